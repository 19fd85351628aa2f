"""MODELS ALLOWED: which models are served, by whatever name they are allowed or switched off."""
from __future__ import annotations

import pytest
from harness import CHAT, ccproxy, make_config

BUILTIN = ccproxy.builtin_models()


def off(*names, **options):
    return make_config(models=[{"id": name, "enabled": False} for name in names], **options)


@pytest.mark.parametrize("asked, config", [
    ("moonshotai/Kimi-K3", off("moonshotai/Kimi-K3")), ("MOONSHOTAI/kimi-k3", off("moonshotai/Kimi-K3")),
    ("moonshotai/Kimi-K3", off("MOONSHOTAI/KIMI-K3")), ("kimi-k3", off("moonshotai/Kimi-K3")),
    ("kimi", off("moonshotai/Kimi-K3")), ("moonshotai/Kimi-K3", off("kimi")),
    ("claude-opus-5[1m]", off("claude-opus-5")), ("claude-haiku-4-5", off("claude-haiku-4-5-20251001")),
    ("mine", off("glm", modelAliases={"mine": "glm"})),
    ("claude-x", off("glm", modelAliases={"claude-*": "zai-org/glm-5.3"})),
    ("", off(ccproxy.DEFAULT_MODEL)), ("default", off(ccproxy.DEFAULT_MODEL)),
    ("New/Model", off("new/model")),
    ("claude-sonnet-4-6", off("anthropic/claude-sonnet-4.6")), ("gpt-5.5", off("openai/gpt-5.5")),
    ("kimi", off("mine", modelAliases={"mine": "kimi-k3"})),
    ("glm", off("default", defaultModel="glm")),
])
def test_a_model_switched_off_is_refused_by_every_name(asked, config):
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.resolve_model(asked, BUILTIN, config, [])
    error = caught.value
    assert (error.kind, error.status, error.param) == ("model", 404, "model")
    assert "is switched off here" in error.message


def test_the_nearest_that_are_on_are_named():
    config = off("claude-opus-5", "claude-opus-5-5", allowedModels=["claude-opus-5", "claude-opus-4-8",
                                                                    "claude-opus-5-5"])
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.resolve_model("claude-opus-5", BUILTIN, config, [])
    assert caught.value.message.endswith(" Nearest: claude-opus-4-8.")


# Names in allowedModels, the options beside it, and the one model that they stand for.
NAMES = [
    ("moonshotai/Kimi-K3", {}, "moonshotai/Kimi-K3"),
    ("MOONSHOTAI/KIMI-k3", {}, "moonshotai/Kimi-K3"),
    ("kimi-k3", {}, "moonshotai/Kimi-K3"), ("Kimi", {}, "moonshotai/Kimi-K3"),
    ("mine", {"modelAliases": {"mine": "kimi"}}, "moonshotai/Kimi-K3"),
    ("MINE", {"modelAliases": {"mine": "moonshotai/Kimi-K3"}}, "moonshotai/Kimi-K3"),
    ("fast-3", {"modelAliases": {"fast-*": "gpt-5.5"}}, "gpt-5.5"),
    ("default", {"defaultModel": "glm"}, "zai-org/GLM-5.3"),
    ("default", {"defaultModel": "mine", "modelAliases": {"mine": "glm"}}, "zai-org/GLM-5.3"),
    ("claude-opus-5[1m]", {}, "claude-opus-5"),
    ("claude-haiku-4-5", {}, "claude-haiku-4-5-20251001"),
    ("claude-opus-5-20260101", {}, "claude-opus-5"),
    ("anthropic/claude-sonnet-4.6", {}, "claude-sonnet-4-6"),
    ("openai/gpt-5.5:nitro", {}, "gpt-5.5"),
    ("x-ai/grok-4.5", {}, "xai/grok-4.5"), ("tencent/hy3", {}, "tencent/Hy3"),     # a hidden one
    ("New/Model", {}, "new/model"),                                         # nothing known
    # An id means its own model, also where an alias hides it: allowed is what is written.
    ("claude-opus-5", {"modelAliases": {"claude-opus-5": "kimi"}}, "claude-opus-5"),
    ("claude-opus-5", {"modelAliases": {"claude-*": "kimi", "direct": "claude-opus-5"}},
     "claude-opus-5"),
]


@pytest.mark.parametrize("name, options, model", NAMES)
def test_a_model_is_allowed_by_whatever_stands_for_it(name, options, model):
    config = make_config(allowedModels=[name], **options)
    assert ccproxy.names_of(model, [name, "gpt-6-luna"], BUILTIN, config) == {name}
    ccproxy.check_allowed(model, ccproxy.find_model(model, BUILTIN), BUILTIN, config)
    assert ccproxy.served_ids(BUILTIN, config) == tuple(
        one for one in BUILTIN.listed if one.lower() == model.lower())
    for other in ("gpt-6-luna", "claude-sonnet-5", "moonshotai/Kimi-K2.6", "new/other"):
        with pytest.raises(ccproxy.ProxyError) as caught:
            ccproxy.check_allowed(other, ccproxy.find_model(other, BUILTIN), BUILTIN, config)
        assert caught.value.status == 404 and "not allowed here" in caught.value.message


@pytest.mark.parametrize("asked", [
    "kimi", "moonshotai/Kimi-K3", "kimi-k3[1m]", "mine", "OpenRouter/Moonshotai/kimi-k3", "",
    "default"])
def test_any_name_of_an_allowed_model_may_be_asked_for(asked):
    config = make_config(allowedModels=["mine"], modelAliases={"mine": "kimi"}, defaultModel="kimi")
    assert ccproxy.resolve_model(asked, BUILTIN, config, []).id == "moonshotai/Kimi-K3"
    assert [model.id for model in ccproxy.listed_models(BUILTIN, config)] == [
        "mine", "moonshotai/Kimi-K3"]


def test_an_alias_of_a_model_that_is_not_allowed_is_none_either():
    config = make_config(allowedModels=["claude-opus-5"],
                         modelAliases={"claude-*": "kimi", "a": "glm"})
    for asked in ("claude-opus-5", "kimi", "a", "glm"):
        with pytest.raises(ccproxy.ProxyError):
            ccproxy.resolve_model(asked, BUILTIN, config, [])
    assert [model.id for model in ccproxy.listed_models(BUILTIN, config)] == ["claude-opus-5"]


def test_allowed_names_are_read_by_the_live_list():
    models = ccproxy.merge_live_models({"data": [{"id": "vendor/New.Model"}]}, BUILTIN)
    config = make_config(allowedModels=["openrouter/new-model", "kimi"])
    assert ccproxy.served_ids(models, config) == ("vendor/New.Model",)
    assert ccproxy.resolve_model("new-model", models, config, []).id == "vendor/New.Model"
    assert ccproxy.resolve_model("kimi", models, config, []).id == "moonshotai/Kimi-K3"


@pytest.mark.parametrize("config", [
    make_config(models=[{"id": "kimi", "enabled": True}]), off("kimi-k2.6"), off("gpt-6-sol"), off()])
def test_all_others_are_served(config):
    assert ccproxy.resolve_model("kimi", BUILTIN, config, []).id == "moonshotai/Kimi-K3"


def test_an_unknown_model_is_not_sent_to_one_that_is_off():
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.resolve_model("gpt-6-lunar", BUILTIN, off("gpt-6-luna", allowUnknownModels=False), [])
    assert "gpt-6-luna." not in caught.value.message and "gpt-6-luna," not in caught.value.message


def test_what_is_listed_without_them():
    config = off("kimi", "GPT-6-SOL", modelAliases={"mine": "kimi", "other": "glm"})
    shown = [model.id for model in ccproxy.listed_models(BUILTIN, config)]
    assert shown == ["other"] + [one for one in BUILTIN.listed
                                 if one not in ("moonshotai/Kimi-K3", "gpt-6-sol")]


@pytest.mark.parametrize("allowed", ["kimi", "mine", "openrouter/moonshotai/kimi-k3"])
def test_allowed_over_http(make_proxy, allowed):
    proxy = make_proxy(allowedModels=[allowed], modelAliases={"mine": "kimi-k3", "my-*": "kimi"},
                       useProviderModels=False)
    listed = [model["id"] for model in proxy.request("GET", "/v1/models").json["data"]]
    assert listed == ["mine", "moonshotai/Kimi-K3"]
    for name in ("kimi", "mine", "my-own", "moonshotai/Kimi-K3", "x/kimi-k3"):
        assert proxy.request("GET", "/v1/models/" + name.replace("/", "%2F")).status == 200
        assert proxy.post(CHAT, model=name).status == 200
    for name in ("glm", "unknown", "default"):
        assert proxy.request("GET", "/v1/models/" + name).status == 404
        assert proxy.post(CHAT, model=name).status == 404


def test_over_http(make_proxy):
    proxy = make_proxy(models="kimi=off", useProviderModels=False)
    listed = [model["id"] for model in proxy.request("GET", "/v1/models").json["data"]]
    assert "moonshotai/Kimi-K3" not in listed and "moonshotai/Kimi-K2.6" in listed
    one = proxy.request("GET", "/v1/models/moonshotai%2FKimi-K3")
    answers = [one, proxy.post(CHAT, model="kimi")]
    assert [answer.status for answer in answers] == [404, 404]
    assert all("switched off" in answer.json["error"]["message"]
               and answer.json["error"]["code"] == "model_not_found" for answer in answers)
    assert proxy.post(CHAT, model="glm").status == 200

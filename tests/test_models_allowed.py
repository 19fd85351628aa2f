"""MODELS ALLOWED: what is switched off is not listed, and refused by whatever name it is asked."""
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

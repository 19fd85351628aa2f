"""METRICS: records are counted, and the counts are shown as Prometheus wants them."""
from __future__ import annotations

import ast
import math
import os
import random
import re
import shutil
import subprocess

import pytest
from harness import ccproxy

MODELS = ccproxy.builtin_models()
SECRET = "5ecr3tPartOfAKey0123456789"
GOOD = ccproxy.Record(1000.0, "chat", "codex", "kimi", "moonshotai/Kimi-K3", "key:123456", 200, True,
                      100, 7, 60, 3, 0.25, 0.5, 2.5, 0, "", "", "")


def counted(*records):
    metrics = ccproxy.Metrics()
    for record in records:
        ccproxy.measure_record(metrics, record, MODELS)
    return metrics.counts


def render(*records):
    return ccproxy.render_metrics(counted(*records))


# A strict reader of the text format 0.0.4.

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
SAMPLE = re.compile(r'(%s)(?:\{(.*)\})? (\S+)' % NAME)
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"(?:,(?!$)|$)')
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}


def read_labels(text):
    """{name: value} of what stands between the braces."""
    labels, at = {}, 0
    while at < len(text):
        found = LABEL.match(text, at)
        assert found, "bad labels: " + text
        assert found[1] not in labels and not found[1].startswith("__")
        labels[found[1]] = re.sub(r"\\(.)", lambda one: {"n": "\n"}.get(one[1], one[1]), found[2])
        at = found.end()
    return labels


def parse(text):
    """{family: (kind, {(sample name, labels): value})}; anything out of order is an assertion."""
    assert text.endswith("\n") and not text.endswith("\n\n") and "\r" not in text
    families, name, kind, helped = {}, None, None, None
    for line in text[:-1].split("\n"):
        assert line, "an empty line"
        if line.startswith("# HELP "):
            helped = re.fullmatch(r"# HELP (%s) (([^\\\n]|\\\\|\\n)+)" % NAME, line)[1]
            assert helped not in families, "a family in two places"
            name = None
        elif line.startswith("# TYPE "):
            name, kind = re.fullmatch(r"# TYPE (%s) (counter|gauge|histogram)" % NAME, line).groups()
            assert name == helped, "HELP and TYPE go together"
            families[name] = (kind, {})
        else:
            found = SAMPLE.fullmatch(line)
            assert found and name, line
            assert found[1] in [name + suffix for suffix in SUFFIXES[kind]], line
            labels = read_labels(found[2] or "")
            key = (found[1], tuple(sorted(labels.items())))
            assert key not in families[name][1], "a series twice: " + line
            families[name][1][key] = float(found[3])
    for name, (kind, samples) in families.items():
        check_family(name, kind, samples)
    return families


def check_family(name, kind, samples):
    """What a family's kind asks of its name and its samples."""
    assert samples, name + " has no sample"
    assert name.startswith("ccproxy_") and re.fullmatch("[a-z_]+", name)
    assert (kind == "counter") == name.endswith("_total")
    assert not re.search(r"_(ms|milliseconds|kb|mb|minutes|counter|gauge|histogram)(_|$)", name)
    for one in {sample for sample, _ in samples}:
        assert len({tuple(dict(labels)) for sample, labels in samples if sample == one}) == 1
    if kind == "counter":
        assert all(value >= 0 and math.isfinite(value) for value in samples.values())
    if kind == "histogram":
        check_histogram(name, samples)


def check_histogram(name, samples):
    """Buckets rise with their bounds and end with +Inf, which is the count."""
    series = {}
    for (sample, labels), value in samples.items():
        rest = tuple(pair for pair in labels if pair[0] != "le")
        if sample == name + "_bucket":
            bound = dict(labels)["le"]
            series.setdefault(rest, []).append((float(bound), bound, value))
    assert {labels for sample, labels in samples if sample == name + "_sum"} == set(series)
    for rest, buckets in series.items():
        assert buckets == sorted(buckets), "bounds must stand in order"
        values = [value for _, _, value in buckets]
        assert values == sorted(values), "buckets are cumulative"
        assert buckets[-1][1] == "+Inf"
        assert samples[name + "_count", rest] == values[-1]
        assert samples[name + "_sum", rest] >= 0


@pytest.mark.parametrize("text, words", [
    ("# HELP ccproxy_a_total x\n# TYPE ccproxy_a_total counter\nccproxy_a_total 1", "endswith"),
    ("ccproxy_a 1\n", "ccproxy_a"),
    ("# HELP ccproxy_a x\n# TYPE ccproxy_b gauge\nccproxy_b 1\n", "together"),
    ("# HELP ccproxy_a x\n# TYPE ccproxy_a gauge\nccproxy_b 1\n", "ccproxy_b"),
    ("# HELP ccproxy_a x\n# TYPE ccproxy_a gauge\nccproxy_a 1\nccproxy_a 2\n", "twice"),
    ("# HELP ccproxy_a x\n# TYPE ccproxy_a counter\nccproxy_a 1\n", "_total"),
    ('# HELP ccproxy_a x\n# TYPE ccproxy_a gauge\nccproxy_a{b="\\x"} 1\n', "bad labels"),
    ('# HELP ccproxy_a x\n# TYPE ccproxy_a gauge\nccproxy_a{b="1",} 1\n', "bad labels"),
    ('# HELP ccproxy_a x\n# TYPE ccproxy_a histogram\nccproxy_a_bucket{le="1"} 2\n'
     'ccproxy_a_bucket{le="+Inf"} 1\nccproxy_a_sum 1\nccproxy_a_count 1\n', "cumulative"),
    ('# HELP ccproxy_a x\n# TYPE ccproxy_a histogram\nccproxy_a_bucket{le="1"} 1\n'
     'ccproxy_a_bucket{le="+Inf"} 2\nccproxy_a_sum 1\nccproxy_a_count 1\n', "1.0 == 2.0"),
    ("# HELP ccproxy_a x\n# TYPE ccproxy_a gauge\n", "no sample")])
def test_the_reader_is_strict(text, words):
    with pytest.raises(AssertionError, match=words):
        parse(text)


# What is counted.

CASES = [
    (GOOD, {'requests_total{api="chat",client="codex",status="2xx",stream="true"}': 1,
            'model_requests_total{model="moonshotai/Kimi-K3",status="2xx"}': 1,
            'tokens_total{model="moonshotai/Kimi-K3",kind="input"}': 100,
            'tokens_total{model="moonshotai/Kimi-K3",kind="output"}': 7,
            'tokens_total{model="moonshotai/Kimi-K3",kind="cached"}': 60,
            'tokens_total{model="moonshotai/Kimi-K3",kind="reasoning"}': 3,
            "cost_usd_total": 0.25, "retries_total": 0,
            'first_event_seconds_bucket{stream="true",le="0.25"}': 0,
            'first_event_seconds_bucket{stream="true",le="0.5"}': 1,
            'first_event_seconds_sum{stream="true"}': 0.5,
            'request_seconds_bucket{stream="true",le="1"}': 0,
            'request_seconds_bucket{stream="true",le="+Inf"}': 1,
            'request_seconds_count{stream="true"}': 1}),
    (GOOD._replace(status=402, error="billing: no credits", stream=False, first=None),
     {'errors_total{kind="billing"}': 1, 'request_seconds_count{stream="false"}': 1,
      'model_requests_total{model="moonshotai/Kimi-K3",status="4xx"}': 1}),
    (GOOD._replace(error="upstream: cut"), {
        'errors_total{kind="upstream"}': 1,
        'model_requests_total{model="moonshotai/Kimi-K3",status="2xx"}': 1}),
    (GOOD._replace(status=499, error="the client left"), {
        'errors_total{kind="client_left"}': 1,
        'model_requests_total{model="moonshotai/Kimi-K3",status="left"}': 1}),
    (GOOD._replace(status=503, error="<b>: x"), {'errors_total{kind="other"}': 1}),
    (GOOD._replace(status=1000), {
        'model_requests_total{model="moonshotai/Kimi-K3",status="other"}': 1}),
    (GOOD._replace(retries=2, notes="model=kimi -> moonshotai/Kimi-K3; failover=key:123456 billing;"
                                    " failover=key:654321 rate_limit; +3 more"),
     {"retries_total": 2, "failovers_total": 2, 'notes_total{code="failover"}': 2,
      'notes_total{code="model"}': 1, 'notes_total{code="other"}': 1}),
    (GOOD._replace(model="MOONSHOTAI/kimi-k3"), {
        'model_requests_total{model="moonshotai/Kimi-K3",status="2xx"}': 1}),
    (GOOD._replace(model="nobody/knows", api="x", client="y", input=10 ** 400, total=10 ** 9), {
        'requests_total{api="other",client="other",status="2xx",stream="true"}': 1,
        'model_requests_total{model="other",status="2xx"}': 1,
        'tokens_total{model="other",kind="input"}': 10 ** 12,
        'request_seconds_bucket{stream="true",le="1800"}': 0}),
    (GOOD._replace(model="", input=None, output=0, cost=None), {
        'model_requests_total{model="other",status="2xx"}': 1, "cost_usd_total": 0})]


@pytest.mark.parametrize("record, expected", CASES)
def test_a_record_is_counted(record, expected):
    text = render(record)
    parse(text)
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert {name: float(lines.get("ccproxy_" + name, "nan")) for name in expected} == expected


@pytest.mark.parametrize("records, share", [
    ([], None), ([GOOD], 0.6), ([GOOD, GOOD._replace(cached=0, input=20)], 0.5),
    ([GOOD._replace(input=None, cached=None)], None)])
def test_the_share_of_the_cache(records, share):
    assert ccproxy.cache_share(counted(*records)) == share


def test_labels_are_escaped():
    text = ccproxy.label_text(("a", "b"), ('x"\\\ny', "n"))
    assert "\n" not in text and read_labels(text[1:-1]) == {"a": 'x"\\\ny', "b": "n"}


def test_the_lists_model_names_are_redacted_and_cut_and_never_a_series_twice():
    names = ["user_" + SECRET, "a" * 150 + "1", "a" * 150 + "2", 'quote"\\']
    models = ccproxy.index_models([ccproxy.Model(name, name) for name in names], [])
    metrics = ccproxy.Metrics()
    for name in names:
        ccproxy.measure_record(metrics, GOOD._replace(model=name), models)
    series = parse(ccproxy.render_metrics(metrics.counts))["ccproxy_model_requests_total"][1]
    assert {dict(labels)["model"]: value for (_, labels), value in series.items()} == {
        ccproxy.key_name("user_" + SECRET): 1, "a" * 97 + "...": 2, 'quote"\\': 1}


def note_codes():
    """Every code that the program itself gives to add_note."""
    with open(ccproxy.__file__, encoding="utf-8") as file:
        text = file.read()
    for node in ast.walk(ast.parse(text)):
        name = getattr(getattr(node, "func", None), "id", "")
        if name in ("add_note", "begin_anew"):
            where = 1 if name == "add_note" else 3
            if isinstance(node.args[where], ast.Constant):
                yield node.args[where].value
    yield from re.findall(r'code = "(\w+)" if left is None else "(\w+)"', text)[0]


def test_every_code_of_a_note_has_its_label():
    assert set(note_codes()) == ccproxy.NOTE_CODES


def test_each_metric_is_told_once():
    names = [metric.name for metric in ccproxy.METRICS]
    assert len(names) == len(set(names))
    assert {key[0] for case, _ in CASES for key in counted(case)} <= set(names)


# Bounds.


def random_record(chance):
    """A record of anything, also of what cannot be, with a key wherever one could stand."""
    junk = "%s-%d" % (chance.choice(["user_" + SECRET, "sk-" + SECRET, "<b>", "\u20ac\n", ""]),
                      chance.randrange(10 ** 9))
    known = chance.choice(MODELS.listed)
    return ccproxy.Record(
        chance.random() * 1e9, chance.choice(["chat", "messages", "responses", junk]),
        chance.choice([*ccproxy.CLIENT_NAMES, junk]), junk, chance.choice([known, known.upper(), junk]),
        junk, chance.choice([200, 400, 401, 404, 429, 499, 500, 503, chance.randrange(10 ** 6)]),
        chance.random() < 0.5, chance.choice([None, 0, 10 ** 3, 10 ** 30]), chance.randrange(10 ** 4),
        None, 5, chance.choice([None, 0.1]), chance.choice([None, chance.random() * 100]),
        chance.random() * 1000, chance.randrange(3), chance.choice(["", junk, "%s=%s; model=%s" % (
            junk, junk, junk)]), chance.choice(["", junk, "billing: " + junk, junk + ": " + junk]), junk)


def test_no_label_grows_without_bound_or_carries_a_key():
    """100,000 requests of anything; the list of models grows as well."""
    chance = random.Random(7)
    metrics = ccproxy.Metrics()
    models = ccproxy.index_models([ccproxy.Model(name, name) for name in MODELS.listed] + [
        ccproxy.Model("live/user_%s%d" % (SECRET, number), "") for number in range(500)], [])
    sizes = []
    for number in range(100_000):
        record = random_record(chance)
        if number % 5 == 0:
            record = record._replace(model="live/user_%s%d" % (SECRET, number // 5 % 500))
        ccproxy.measure_record(metrics, record, models)
        if number % 10_000 == 9_999:
            sizes.append(len(ccproxy.render_metrics(metrics.counts)))
    text = ccproxy.render_metrics(metrics.counts)
    parse(text)
    assert SECRET[:12] not in text and "\u20ac" not in text
    assert len(metrics.models) == ccproxy.MAX_MODEL_LABELS
    assert sizes[-1] - sizes[4] < 0.02 * sizes[-1] < 8000, sizes


# Other people's readers, where they are.


def sample_text():
    return render(*[case for case, _ in CASES])


def test_the_parser_of_prometheus_client_agrees():
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not here")
    ours = parse(sample_text())
    theirs = {}
    for family in parser.text_string_to_metric_families(sample_text()):
        name = family.name + ("_total" if family.type == "counter" else "")
        theirs[name] = (family.type, {(one.name, tuple(sorted(one.labels.items()))): one.value
                                      for one in family.samples})
    assert theirs == ours


def test_promtool_has_nothing_to_say():
    promtool = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not installed (PROMTOOL names it)")
    done = subprocess.run([promtool, "check", "metrics"], input=sample_text(), encoding="utf-8",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (done.returncode, done.stdout) == (0, "")

"""Alerts fire when they should, and the queries name only what the server exports."""

import json
import re
import shutil
import subprocess

import httpx
import pytest
import yaml

from course_lib.fleet.manifest_spec import DeploymentSpec
from course_lib.fleet.manifests import LOAD
from course_lib.fleet.monitoring import dashboard, pod_monitor, prometheus_rule
from course_lib.fleet.prometheus import promql
from course_lib.serving.admission import AdmissionPolicy
from course_lib.serving.admission_base import TenantLimits
from course_lib.serving.scrape import scrape
from tests.serving.servers import load, serving

SPEC = DeploymentSpec(name="llm", image="llm:1", ready_s=180)
RULES = yaml.safe_load(prometheus_rule(SPEC).text())["spec"]
PANELS = json.loads(dashboard(SPEC).body["data"]["llm.json"])["panels"]
QUERIES = {
    **{f"panel {p['title']}: {t['legendFormat']}": t["expr"] for p in PANELS for t in p["targets"]},
    **{f"alert {rule['alert']}": rule["expr"] for rule in RULES["groups"][0]["rules"]},
    "scaled object": promql(LOAD, SPEC.series_labels),
}

ONE, TWO = (
    'namespace="default",job="llm",instance="1"',
    'namespace="default",job="llm",instance="2"',
)
OTHER, OTHERS_TWO = ONE.replace("llm", "other"), TWO.replace("llm", "other")
TTFT = "vllm:time_to_first_token_seconds"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not here; it is in Debian's prometheus"
)


def series(labels, *, up="1+0x90", fast="0+10x90", age="0+0x90", cache="0.5+0x90"):
    """What a replica reports each 10 s for 15 minutes: 10 first tokens within 0.5 s, or within 5 s.

    A value such as `1+0x90` starts at 1 and has 90 more with 0 added each time.
    """
    return {
        f"up{{{labels}}}": up,
        f'{TTFT}_bucket{{{labels},le="0.5"}}': fast,
        f'{TTFT}_bucket{{{labels},le="5.0"}}': "0+10x90",
        f'{TTFT}_bucket{{{labels},le="+Inf"}}': "0+10x90",
        f"{TTFT}_count{{{labels}}}": "0+10x90",
        f"course:oldest_waiting_request_age_seconds{{{labels}}}": age,
        f"vllm:kv_cache_usage_perc{{{labels}}}": cache,
    }


def silent(labels):
    """A target that does not answer."""
    return {f"up{{{labels}}}": "0+0x90"}


QUIET = {name: "5+0x90" if TTFT in name else values for name, values in series(ONE).items()}
BAD = {"fast": "0+0x90", "age": "100+0x90", "cache": "1+0x90"}

CASES = {
    "all is well": (series(ONE), []),
    "nobody asks": (QUIET, []),
    "first tokens take 2.75 s": (series(ONE, fast="0+5x90"), ["TimeToFirstTokenHigh"]),
    "one in thirty is slow": ({**series(ONE), **series(TWO, fast="0+9.4x90")}, []),
    "a request waits": (series(ONE, age="11+0x90"), ["QueueTooOld"]),
    "it waits on one replica": ({**series(ONE), **series(TWO, age="11+0x90")}, ["QueueTooOld"]),
    "it has waited for a minute only": (series(ONE, age="0+0x83 20+0x6"), []),
    "the cache is full": (series(ONE, cache="0.91+0x90"), ["KVCacheFull"]),
    "the mean is not": ({**series(ONE, cache="0.99+0x90"), **series(TWO)}, []),
    "one replica is not scraped": ({**series(ONE), **silent(TWO)}, ["ReplicaNotScraped"]),
    "one replica loads": ({**series(ONE), f"up{{{TWO}}}": "_x60 0+0x29"}, []),
    "none is scraped": (
        {**silent(ONE), **silent(TWO)},
        ["MetricsLost", "ReplicaNotScraped", "ReplicaNotScraped"],
    ),
    "Prometheus knows none": ({}, ["MetricsLost"]),
    "another fleet is ill": ({**series(ONE), **series(OTHER, **BAD), **silent(OTHERS_TWO)}, []),
    "another fleet is well": (series(OTHER), ["MetricsLost"]),
}  # fmt: skip


def promtool(tmp_path, command, files):
    for name, content in files.items():
        (tmp_path / name).write_text(yaml.safe_dump(content))
    paths = [str(tmp_path / name) for name in files]
    return subprocess.run(["promtool", *command, paths[-1]], capture_output=True, text=True)


def check(tmp_path, rules, given, expectations):
    """Whether Prometheus' own evaluation meets the expectations after 15 minutes."""
    tests = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "10s",
        "tests": [
            {
                "interval": "10s",
                "input_series": [{"series": n, "values": v} for n, v in given.items()],
                **expectations,
            }
        ],
    }
    done = promtool(tmp_path, ["test", "rules"], {"rules.yaml": rules, "tests.yaml": tests})
    assert done.returncode == 0, done.stdout + done.stderr


def check_firing(tmp_path, rules, given, expected):
    samples = [
        {"labels": f'{{alertname="{name}"}}', "value": expected.count(name)}
        for name in sorted(set(expected))
    ]
    query = 'count by (alertname) (ALERTS{alertstate="firing"})'
    test = {"expr": query, "eval_time": "15m", "exp_samples": samples}
    check(tmp_path, rules, given, {"promql_expr_test": [test]})


@needs_promtool
def test_the_rules_are_good_rules(tmp_path):
    done = promtool(tmp_path, ["check", "rules"], {"rules.yaml": RULES})
    assert done.returncode == 0, done.stderr
    assert "5 rules found" in done.stdout


@needs_promtool
@pytest.mark.parametrize(("given", "firing"), CASES.values(), ids=CASES.keys())
def test_exactly_these_alerts_fire(tmp_path, given, firing):
    check_firing(tmp_path, RULES, given, firing)


@needs_promtool
@pytest.mark.parametrize(
    ("alert", "field", "old", "new", "case"),
    [
        ("TimeToFirstTokenHigh", "expr", "> 2000", "> 2", "all is well"),
        ("TimeToFirstTokenHigh", "expr", ' > 2000', " > 20000", "first tokens take 2.75 s"),
        ("QueueTooOld", "expr", "> 10", "> 100", "a request waits"),
        ("QueueTooOld", "expr", "max", "avg", "it waits on one replica"),
        ("QueueTooOld", "for", "2m", "30s", "it has waited for a minute only"),
        ("KVCacheFull", "expr", "avg", "max", "the mean is not"),
        ("QueueTooOld", "expr", 'job="llm"', 'job=~".*"', "another fleet is ill"),
        ("ReplicaNotScraped", "for", "420s", "60s", "one replica loads"),
        ("MetricsLost", "expr", " == 1", "", "none is scraped"),
        ("MetricsLost", "expr", ',job="llm"', "", "another fleet is well"),
    ],
)  # fmt: skip
def test_an_alert_with_a_mistake_is_noticed(tmp_path, alert, field, old, new, case):
    rules = yaml.safe_load(yaml.safe_dump(RULES))
    (rule,) = [rule for rule in rules["groups"][0]["rules"] if rule["alert"] == alert]
    assert old in rule[field]
    rule[field] = rule[field].replace(old, new)
    with pytest.raises(AssertionError, match="FAILED"):
        check_firing(tmp_path, rules, *CASES[case])


@needs_promtool
def test_an_alert_says_what_is_wrong(tmp_path):
    def fires(name, summary, **labels):
        labels = {"severity": "warning", **SPEC.series_labels, **labels}
        alert = {"exp_labels": labels, "exp_annotations": {"summary": summary}}
        return {"alertname": name, "eval_time": "15m", "exp_alerts": [alert]}

    expected = [
        fires("TimeToFirstTokenHigh", "llm: TTFT p95 is 4750 ms, above 2000 ms"),
        fires("QueueTooOld", "llm: a request has waited 100 s, above 10 s"),
        fires("KVCacheFull", "llm: the KV cache is 100% full on average; preemptions are near"),
        fires(
            "ReplicaNotScraped",
            "llm: 2 does not answer; the autoscaler does not see its requests",
            instance="2",
        ),
    ]
    given = {**series(ONE, **{**BAD, "fast": "0+1x90"}), **silent(TWO)}
    check(tmp_path, RULES, given, {"alert_rule_test": expected})


# What the server exports.


@pytest.fixture(scope="module")
def exported():
    """Name and labels of all that a server exports that has answered once and refused once."""
    once = AdmissionPolicy(tenant=TenantLimits(requests_per_s=1e-6))
    body = {"prompt": "Where is my order A-1842?", "max_tokens": 4, "temperature": 0}
    with serving(load(), admission=once) as server:
        answers = [httpx.post(f"{server.url}/v1/completions", json=body) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 429]
        return [(name, labels) for name, labels, _ in scrape(server.url).samples]


def test_queries_name_only_what_the_server_exports(exported):
    names = {name for name, _ in exported} | {"up"}
    for what, query in QUERIES.items():
        asked = set(re.findall(r"([\w:]+)\{", query))
        assert asked and asked <= names, f"{what}: {query}"
        assert query.count("{") == query.count('{namespace="default",job="llm"}'), query


def check_all_answer(tmp_path, exported, queries):
    """Prometheus has an answer for each query when it knows only the server's series."""
    target = {**SPEC.series_labels, "instance": "10.0.0.1:8000", "pod": "llm-1"}
    given = {"up" + _labels(target): "1+0x90"}
    for name, labels in exported:
        given[name + _labels({**labels, **target})] = "0+1x90"
    tests = [
        {
            "expr": f"(count({query}) or vector(0)) > bool 0",
            "eval_time": "15m",
            "exp_samples": [{"labels": "{}", "value": 1}],
        }
        for query in queries
    ]
    check(tmp_path, RULES, given, {"promql_expr_test": tests})


def _labels(labels):
    return "{" + ",".join(f"{name}={json.dumps(value)}" for name, value in labels.items()) + "}"


@needs_promtool
def test_every_query_has_an_answer(tmp_path, exported):
    # An alert's answer is empty as long as all is well.
    steady = [query for what, query in QUERIES.items() if not what.startswith("alert")]
    check_all_answer(tmp_path, exported, steady)


@needs_promtool
@pytest.mark.parametrize(
    "query",
    [
        'sum(vllm:gpu_cache_usage_perc{job="llm"})',  # an older name
        'vllm:num_preemptions{job="llm"}',  # without _total
        'rate(vllm:generation_tokens_total{job="llm"}[1m]',
        'sum by (le) (rate(vllm:time_to_first_token_seconds{job="llm"}[1m]))',
    ],
)
def test_a_query_with_a_mistake_has_none(tmp_path, exported, query):
    with pytest.raises(AssertionError, match=r"FAILED|parse error"):
        check_all_answer(tmp_path, exported, [query])


# The dashboard and the scraping.


def test_panels_lie_side_by_side_and_each_has_its_own_place():
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in PANELS]
    covered = [(x + i, y + j) for x, y, w, h in places for i in range(w) for j in range(h)]
    assert len(set(covered)) == len(covered)
    assert max(x for x, _ in covered) < 24  # Grafana's columns
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0
        for label in re.findall(r"\{\{(\w+)\}\}", str(panel["targets"])):
            (query,) = {
                t["expr"] for t in panel["targets"] if f"{{{{{label}}}}}" in t["legendFormat"]
            }
            # A label in a legend must be one that the query keeps.
            assert f"by ({label})" in query or "sum" not in query


def test_prometheus_scrapes_often_enough_for_the_rates_of_a_minute():
    (endpoint,) = pod_monitor(SPEC).body["spec"]["podMetricsEndpoints"]
    assert int(endpoint["interval"].removesuffix("s")) <= 15

"""`/metrics` has vLLM's names, types and buckets, and its values are those of what was sent."""

import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from course_lib import LLM
from course_lib.engine.outputs import CompletionOutput, RequestOutput
from course_lib.engine.request import RequestMetrics
from course_lib.serving.admission import AdmissionPolicy
from course_lib.serving.metrics import Metrics
from course_lib.serving.scrape import Scrape, scrape
from tests.serving.servers import MODEL, ORDER, change, idle, load, serving, wait_until

GAUGES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "lora_requests_info",
    "cache_config_info",
]
COUNTERS = [
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "admission_rejections",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
]
TTFT = """.001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160 640 2560"""
TOKEN = """.01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10 20 40 80"""
REQUEST = """.3 .5 .8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"""
ITERATION = "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384"
LENGTHS = "1 2 5 10 20 50 100 200 500 1000 2000"  # up to the model's 4096
HISTOGRAMS = {
    "time_to_first_token_seconds": TTFT,
    "inter_token_latency_seconds": TOKEN,
    "request_time_per_output_token_seconds": TOKEN,
    "e2e_request_latency_seconds": REQUEST,
    "request_queue_time_seconds": REQUEST,
    "request_inference_time_seconds": REQUEST,
    "request_prefill_time_seconds": REQUEST,
    "request_decode_time_seconds": REQUEST,
    "iteration_tokens_total": ITERATION,
    "request_prompt_tokens": LENGTHS,
    "request_generation_tokens": LENGTHS,
    "request_params_max_tokens": LENGTHS,
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load(max_num_seqs=4)


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    with serving(llm, admission=AdmissionPolicy(max_num_queued_reqs=2)) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def test_names_types_and_buckets_are_vllms(url: str) -> None:
    families = {
        family.name: family
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
        if not family.name.endswith("_created")
    }
    kinds = {name: family.type for name, family in families.items()}
    assert kinds == {
        **{f"vllm:{name}": "gauge" for name in GAUGES},
        **{f"vllm:{name}": "counter" for name in COUNTERS},
        **{f"vllm:{name}": "histogram" for name in HISTOGRAMS},
        "course:oldest_waiting_request_age_seconds": "gauge",
    }
    for name, edges in HISTOGRAMS.items():
        family = families[f"vllm:{name}"]
        found = [s.labels["le"] for s in family.samples if s.name.endswith("_bucket")]
        assert [float(edge) for edge in found] == [*map(float, edges.split()), float("inf")], name
    special = {"vllm:lora_requests_info", "vllm:cache_config_info", "vllm:admission_rejections"}
    for name, family in families.items():
        for sample in family.samples:
            assert name in special or sample.labels["model_name"] == MODEL, name
            assert name in special or sample.labels["engine"] == "0", name
    labels = families["vllm:lora_requests_info"].samples[0].labels
    assert {"max_lora", "waiting_lora_adapters", "running_lora_adapters"} <= labels.keys()
    reasons = {s.labels["finished_reason"] for s in families["vllm:request_success"].samples}
    assert reasons == {"stop", "length", "abort", "error"}


def counts(before: Scrape, after: Scrape, name: str) -> tuple[float, float]:
    """Observations of a histogram, and their sum."""
    return change(before, after, f"{name}_count"), change(before, after, f"{name}_sum")


def test_values_are_those_of_the_requests_sent(client: OpenAI, url: str, llm: LLM) -> None:
    before = scrape(url)
    computed_before = llm.llm_engine.scheduler.stats.num_scheduled_tokens
    usages = []
    for index in range(6):
        answer = client.chat.completions.create(
            model=MODEL, messages=ORDER, max_tokens=5 if index % 2 else 100, temperature=0
        )
        usages.append(answer.usage)
    stream = client.completions.create(
        model=MODEL, prompt="Hello", max_tokens=7, stream=True, extra_body={"ignore_eos": True}
    )
    assert len(list(stream)) == 7
    prompts = [usage.prompt_tokens for usage in usages] + [1]
    generated = [usage.completion_tokens for usage in usages] + [7]
    after = scrape(url)

    assert change(before, after, "vllm:prompt_tokens_total") == sum(prompts)
    assert change(before, after, "vllm:generation_tokens_total") == sum(generated)
    assert counts(before, after, "vllm:request_prompt_tokens") == (7, sum(prompts))
    assert counts(before, after, "vllm:request_generation_tokens") == (7, sum(generated))
    assert counts(before, after, "vllm:request_params_max_tokens") == (7, 3 * 105 + 7)
    success = {
        reason: value - before.by_label("vllm:request_success_total", "finished_reason")[reason]
        for reason, value in after.by_label("vllm:request_success_total", "finished_reason").items()
    }
    assert success == {"stop": 3, "length": 4, "abort": 0, "error": 0}
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert counts(before, after, f"vllm:{name}_seconds")[0] == 7
    assert counts(before, after, "vllm:inter_token_latency_seconds")[0] == sum(generated) - 7
    assert counts(before, after, "vllm:request_time_per_output_token_seconds")[0] == 7
    seconds = {
        part: counts(before, after, f"vllm:{part}_seconds")[1]
        for part in (
            "e2e_request_latency", "request_queue_time", "request_prefill_time",
            "request_decode_time", "request_inference_time",
        )
    }  # fmt: skip
    e2e, queue, prefill, decode, inference = seconds.values()
    assert e2e == pytest.approx(queue + prefill + decode)
    assert inference == pytest.approx(prefill + decode)

    cached = sum(usage.prompt_tokens_details.cached_tokens for usage in usages)
    assert cached > 0
    assert change(before, after, "vllm:prefix_cache_hits_total") == cached
    assert change(before, after, "vllm:prefix_cache_queries_total") == sum(prompts)
    computed = llm.llm_engine.scheduler.stats.num_scheduled_tokens - computed_before
    assert counts(before, after, "vllm:iteration_tokens_total")[1] == computed
    assert computed == sum(prompts) - cached + sum(generated) - 7  # the last is not fed back
    assert idle(url)


def test_gauges_rejections_and_aborts(client: OpenAI, url: str) -> None:
    before = scrape(url)
    streams = [
        client.completions.create(
            model=MODEL, prompt="Hello", max_tokens=3000, stream=True,
            extra_body={"ignore_eos": True},
        )
        for _ in range(4)
    ]  # fmt: skip
    for stream in streams:
        next(iter(stream))
    with httpx.Client(timeout=0.5) as impatient:
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 9}
        for _ in range(2):  # the queue takes two
            with pytest.raises(httpx.ReadTimeout):
                impatient.post(f"{url}/v1/completions", json={**body, "max_tokens": 3})
    # Those two have gone; two that stay fill the queue.
    with httpx.Client() as patient:
        waiting = [
            threading.Thread(target=patient.post, args=(f"{url}/v1/completions",),
                             kwargs={"json": body, "timeout": 60})
            for _ in range(2)
        ]  # fmt: skip
        for thread in waiting:
            thread.start()
        wait_until(lambda: scrape(url).value("vllm:num_requests_waiting") == 2)
        busy = scrape(url)
        assert busy.value("vllm:num_requests_running") == 4
        assert 0 < busy.value("vllm:kv_cache_usage_perc") <= 1
        assert busy.value("course:oldest_waiting_request_age_seconds") > 0
        answers = [httpx.post(f"{url}/v1/completions", json=body) for _ in range(3)]
        for stream in streams:
            stream.close()
        for thread in waiting:
            thread.join()
    for answer in answers:
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "max_num_queued_reqs"
        assert int(answer.headers["retry-after"]) >= 1
    wait_until(lambda: idle(url))
    after = scrape(url)
    rejections = after.by_label("vllm:admission_rejections_total", "reason")
    assert rejections == {"max_num_queued_reqs": 3}
    aborts = [
        found.by_label("vllm:request_success_total", "finished_reason")["abort"]
        for found in (before, after)
    ]
    assert aborts[1] - aborts[0] == 6
    assert after.value("course:oldest_waiting_request_age_seconds") == 0


def test_several_completions_end_once_each(client: OpenAI, url: str) -> None:
    before = scrape(url)
    client.completions.create(
        model=MODEL, prompt=["Hello", "The parcel"], n=3, max_tokens=4, seed=1,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    after = scrape(url)
    assert change(before, after, "vllm:generation_tokens_total") == 2 * 3 * 4
    assert change(before, after, "vllm:request_success_total") == 2


def test_preemptions_are_counted(tmp_path: object) -> None:
    small = load(max_num_seqs=4, max_model_len=480, num_gpu_blocks_override=41)
    with serving(small) as server:
        answer = httpx.post(
            f"{server.url}/v1/completions",
            json={"prompt": ["a", "b", "c", "d"], "max_tokens": 300, "ignore_eos": True},
            timeout=60,
        )
        assert answer.json()["usage"]["completion_tokens"] == 1200
        found = scrape(server.url)
        preemptions = found.value("vllm:num_preemptions_total")
        assert preemptions == small.llm_engine.scheduler.stats.num_preemptions > 0
        assert found.value("vllm:prompt_tokens_total") == answer.json()["usage"]["prompt_tokens"]
        assert found.value("vllm:time_to_first_token_seconds_count") == 4
        assert found.value("vllm:inter_token_latency_seconds_count") == 1200 - 4


def test_what_metrics_cost(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(MODEL, 4096)
    outputs = [
        RequestOutput(
            str(index), None, [1] * 10, [CompletionOutput(0, "a", [1])], False,
            RequestMetrics(0.0, 0.0, [token * 0.01 for token in range(50)]),
        )
        for index in range(64)
    ]  # fmt: skip
    start = time.perf_counter()
    for _ in range(100):
        metrics.observe_step(64, outputs)
    step_us = (time.perf_counter() - start) / 100 * 1e6
    with capsys.disabled():
        print(f"\nmetrics of a step with 64 requests: {step_us:.0f} us")
    assert step_us < 5000  # some 50 on an idle core; a step takes tens of thousands

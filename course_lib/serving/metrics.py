"""What `/metrics` says, under vLLM's names, so that its dashboards and KEDA queries work here.

Counters and gauges that the engine keeps anyway are read when somebody asks; only latencies and
lengths are observed as they happen, once a request and token.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from course_lib.engine.outputs import RequestOutput
from course_lib.engine.sampling_params import SamplingParams
from course_lib.serving.async_llm import AsyncLLM

# Bucket edges as in vLLM 0.32.
TTFT_EDGES = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_LATENCY = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def one_two_five(max_value: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 and so on, up to `max_value`."""
    edges = [m * 10**e for e in range(len(str(max_value))) for m in (1, 2, 5)]
    return [edge for edge in edges if edge <= max_value]


class Metrics:
    """The metrics of one engine.

    Args:
        model_name: label of every sample.
        max_model_len: tokens; the largest edge of the length histograms.
    """

    def __init__(self, model_name: str, max_model_len: int) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        lengths = one_two_five(max_model_len)

        self._ttft = self._histogram("time_to_first_token_seconds", TTFT_EDGES)
        self._itl = self._histogram("inter_token_latency_seconds", _TOKEN_LATENCY)
        self._tpot = self._histogram("request_time_per_output_token_seconds", _TOKEN_LATENCY)
        self._e2e = self._histogram("e2e_request_latency_seconds", _REQUEST_LATENCY)
        self._queue = self._histogram("request_queue_time_seconds", _REQUEST_LATENCY)
        self._inference = self._histogram("request_inference_time_seconds", _REQUEST_LATENCY)
        self._prefill = self._histogram("request_prefill_time_seconds", _REQUEST_LATENCY)
        self._decode = self._histogram("request_decode_time_seconds", _REQUEST_LATENCY)
        self._iteration = self._histogram("iteration_tokens_total", _ITERATION_TOKENS)
        self._prompt_lens = self._histogram("request_prompt_tokens", lengths)
        self._generation_lens = self._histogram("request_generation_tokens", lengths)
        self._max_tokens = self._histogram("request_params_max_tokens", lengths)
        names = list(self._labels)
        self._success = Counter(
            "vllm:request_success", "Requests that ended.", [*names, "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(**self._labels, finished_reason=reason)
        self._rejections = Counter(
            "vllm:admission_rejections", "Requests that were refused.", ["model_name", "reason"],
            registry=self.registry,
        )  # fmt: skip
        self._prompt_tokens = Counter(
            "vllm:prompt_tokens", "Prompt tokens of requests that got a token.", names,
            registry=self.registry,
        ).labels(**self._labels)  # fmt: skip

    def _histogram(self, name: str, buckets: tuple[float, ...] | list[int]) -> Histogram:
        return Histogram(
            f"vllm:{name}", name.replace("_", " ").capitalize() + ".", list(self._labels),
            buckets=buckets, registry=self.registry,
        ).labels(**self._labels)  # fmt: skip

    def watch(self, llm: AsyncLLM) -> None:
        """Report the state of this engine with every scrape."""
        self.registry.register(_EngineCollector(llm, self._labels))

    def observe_step(self, num_tokens: int, outputs: list[RequestOutput]) -> None:
        """A step of the engine: how many tokens it computed, and what came out.

        A prompt with several completions is timed by its first one.
        """
        self._iteration.observe(num_tokens)
        for output in outputs:
            times = output.metrics.token_times
            num_new = len(output.outputs[0].token_ids)
            if num_new and num_new == len(times):
                self._ttft.observe(times[0] - output.metrics.arrival_time)
                self._prompt_tokens.inc(len(output.prompt_token_ids))
            elif num_new:
                self._itl.observe(times[-1] - times[-1 - num_new])
            if output.finished:
                self._observe_end(output)

    def _observe_end(self, output: RequestOutput) -> None:
        timeline = output.metrics
        first, scheduled = timeline.first_token_time, timeline.first_scheduled_time
        end = timeline.token_times[-1]
        assert first is not None and scheduled is not None
        self._e2e.observe(end - timeline.arrival_time)
        self._queue.observe(scheduled - timeline.arrival_time)
        self._prefill.observe(first - scheduled)
        self._decode.observe(end - first)
        self._inference.observe(end - scheduled)
        self._prompt_lens.observe(len(output.prompt_token_ids))
        self._generation_lens.observe(len(timeline.token_times))
        if timeline.tpot_s is not None:
            self._tpot.observe(timeline.tpot_s)
        reason = output.outputs[0].finish_reason or "stop"
        self._success.labels(**self._labels, finished_reason=reason).inc()

    def observe_params(self, params: SamplingParams) -> None:
        """A request was admitted."""
        if params.max_tokens is not None:
            self._max_tokens.observe(params.max_tokens)

    def observe_loss(self, reason: str) -> None:
        """A request ended before its last token: "abort" or "error"."""
        self._success.labels(**self._labels, finished_reason=reason).inc()

    def observe_rejection(self, reason: str) -> None:
        """A request was refused at the door."""
        self._rejections.labels(model_name=self._labels["model_name"], reason=reason).inc()

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector:
    """Reads the engine's own counters and gauges when Prometheus asks."""

    def __init__(self, llm: AsyncLLM, labels: dict[str, str]) -> None:
        self.llm = llm
        self.labels = labels

    def collect(self) -> Iterator[Metric]:
        """One family a name."""
        engine, load = self.llm.engine, self.llm.load()
        stats = engine.scheduler.stats
        for name, value, text in (
            ("vllm:num_requests_running", load.num_running, "Requests in the batch."),
            ("vllm:num_requests_waiting", load.num_waiting, "Requests that wait."),
            ("vllm:kv_cache_usage_perc", load.kv_cache_usage, "KV cache in use, 0 to 1."),
            (
                "course:oldest_waiting_request_age_seconds",
                load.oldest_waiting_age_s,
                "How long the oldest waiting request has waited.",
            ),
        ):
            yield self._gauge(name, value, text, self.labels)
        lora = dict.fromkeys(("running_lora_adapters", "waiting_lora_adapters"), "")
        yield self._gauge(
            "vllm:lora_requests_info", 0, "Adapters in use.", {"max_lora": "0", **lora}
        )
        config = {
            "block_size": str(engine.block_pool.block_size),
            "num_gpu_blocks": str(engine.block_pool.num_blocks),
            "enable_prefix_caching": str(engine.config.enable_prefix_caching),
            "gpu_memory_utilization": str(engine.config.gpu_memory_utilization),
            "engine": "0",
        }
        yield self._gauge("vllm:cache_config_info", 1, "The KV cache.", config)
        for name, value, text in (
            ("vllm:prefix_cache_queries", stats.prefix_cache_queries, "Tokens looked up."),
            ("vllm:prefix_cache_hits", stats.prefix_cache_hits, "Tokens found."),
            (
                "vllm:num_preemptions",
                stats.num_preemptions,
                "Requests put back for lack of blocks.",
            ),
            ("vllm:generation_tokens", stats.num_generation_tokens, "Tokens generated."),
            ("vllm:spec_decode_num_drafts", 0, "Drafts verified."),
            ("vllm:spec_decode_num_draft_tokens", 0, "Draft tokens proposed."),
            ("vllm:spec_decode_num_accepted_tokens", 0, "Draft tokens accepted."),
        ):
            family = CounterMetricFamily(name, text, labels=list(self.labels))
            family.add_metric(list(self.labels.values()), value)
            yield family
        yield CounterMetricFamily(  # without drafts there are no positions
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by their position in the draft.",
            labels=[*self.labels, "position"],
        )

    def _gauge(self, name: str, value: float, text: str, labels: dict[str, str]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family

"""The offline API: what it takes and refuses, what comes back, and that it stays usable whatever
happens on the way.
"""

import inspect
import itertools
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from course_lib import LLM, LLMEngine, RequestOutput, SamplingParams
from course_lib.engine.batch import ScheduledBatch
from course_lib.engine.block_pool import BlockPool
from course_lib.engine.config import EngineConfig
from course_lib.engine.request import Request
from course_lib.engine.sampling_params import RequestOutputKind
from course_lib.engine.scheduler import Scheduler
from course_lib.model.config import CheckpointError
from tests.byte_tokenizer import byte_tokenizer, save_tokenizer
from tests.checkpoints import random_model, save

TEXT = "Where is my order? 🚚"
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 96, "block_size": 8}


def greedy(max_tokens: int = 8, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer and a chat template."""
    tokenizer = byte_tokenizer()
    eos = tokenizer.token_to_id("</s>")
    size = tokenizer.get_vocab_size()
    model = random_model("llama", num_hidden_layers=2, vocab_size=size, eos_token_id=eos)
    return save_tokenizer(save(model, tmp_path_factory.mktemp("llm")), tokenizer)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    """Shared: a test must leave nothing in it."""
    return LLM(checkpoint, **OPTIONS)


@pytest.fixture(scope="module")
def without_tokenizer(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory = tmp_path_factory.mktemp("no-tokenizer")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, directory)
    return LLM(directory, **OPTIONS)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "copy")


def assert_idle(llm: LLM) -> None:
    engine = llm.llm_engine
    assert not engine.has_unfinished_requests()
    assert not engine.scheduler.has_unfinished_requests()
    assert engine.get_num_unfinished_requests() == 0
    assert engine.block_pool.usage == 0
    assert not engine._completions and not engine._groups


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def stream(llm: LLM, params: SamplingParams, prompt: Any = TEXT) -> list[RequestOutput]:
    llm.llm_engine.add_request("streamed", prompt, params)
    outputs = []
    while llm.llm_engine.has_unfinished_requests():
        outputs += llm.llm_engine.step()
    return outputs


# Prompts.


def test_a_prompt_may_be_text_tokens_or_a_dict(llm: LLM) -> None:
    tokens = llm.get_tokenizer().encode(TEXT)
    of_text: list[Any] = [TEXT, [TEXT], (TEXT,), {"prompt": TEXT}, [{"prompt": TEXT}]]
    of_tokens: list[Any] = [
        tokens,
        [tokens],
        np.array(tokens),
        np.array([tokens]),
        {"prompt_token_ids": tokens},
        [{"prompt_token_ids": tuple(tokens)}],
        {"prompt_token_ids": np.array(tokens)},
    ]
    of_both = {"prompt": TEXT, "prompt_token_ids": tokens, "cache_salt": "mine"}
    [expected] = tokens_of(llm.generate(TEXT, greedy(), use_tqdm=False))
    for form in [*of_text, *of_tokens, of_both]:
        [output] = llm.generate(form, greedy(), use_tqdm=False)
        assert output.prompt_token_ids == tokens
        assert all(type(token) is int for token in output.prompt_token_ids)
        assert tokens_of([output]) == [expected]
        assert output.prompt == (None if any(form is f for f in of_tokens) else TEXT)
    assert llm.generate([], greedy(), use_tqdm=False) == []
    assert_idle(llm)


def test_outputs_come_in_the_order_of_the_prompts_whichever_ends_first(llm: LLM) -> None:
    prompts = [[n] * length for n, length in ((1, 30), (2, 1), (3, 9), (4, 20))]
    params = [greedy(20), greedy(1), greedy(7), greedy(12)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(tokens) for tokens in tokens_of(outputs)] == [20, 1, 7, 12]
    assert all(output.finished for output in outputs)
    alone = [
        tokens_of(llm.generate([prompt], p, use_tqdm=False))[0]
        for prompt, p in zip(prompts, params, strict=True)
    ]
    assert tokens_of(outputs) == alone


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty prompt"),
        ([[]], "empty prompt"),
        ({"prompt_token_ids": []}, "empty prompt"),
        ([[1] * 96], r"prompt of 96 tokens, but at most 95 fit \(max_model_len 96"),
        ([[5, 10**6]], r"the prompt has the token 1000000; expected integers from 0 to"),
        ([[-1]], "the prompt has the token -1"),
        ([[1.5]], r"the prompt has the token 1\.5"),
        ([["a", 1]], "the prompt has the token 'a'"),
        ([[True, 2]], "the prompt has the token True"),
        ({"text": "x"}, r"must have 'prompt' or 'prompt_token_ids'.*got \['text'\]"),
        ({"prompt": "x", "multi_modal_data": 1}, "multi_modal_data"),
        ({}, r"got \[\]"),
        ({"prompt": None}, "text must be a string"),
        ({"prompt": 5}, "text must be a string"),
        ("half \ud800 pair", "valid Unicode"),
        ({"prompt_token_ids": None}, "a prompt must be a text, a list of token ids"),
        ({"prompt_token_ids": "12"}, "a prompt must be a text, a list of token ids"),
        ([None], "a prompt must be a text, a list of token ids"),
        ([1, "a"], "a prompt must be a text, a list of token ids"),
        (None, "prompts must be a text, token ids, a dict or a list"),
        (5, "prompts must be a text, token ids, a dict or a list"),
        (b"bytes", "prompts must be a text, token ids, a dict or a list"),
    ],
    ids=repr,
)
def test_a_prompt_that_cannot_be_served_is_refused_with_a_sentence(
    llm: LLM, prompt: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, greedy(), use_tqdm=False)
    assert_idle(llm)


def test_the_last_token_of_the_vocabulary_is_served_and_the_one_after_it_is_not(llm: LLM) -> None:
    vocab_size = llm.llm_engine.model_config.vocab_size
    llm.generate([vocab_size - 1], greedy(1), use_tqdm=False)
    with pytest.raises(ValueError, match=f"token {vocab_size}; expected integers from 0"):
        llm.generate([vocab_size], greedy(1), use_tqdm=False)
    assert_idle(llm)


def test_one_bad_prompt_in_a_list_leaves_nothing_queued(llm: LLM) -> None:
    steps = llm.llm_engine.scheduler.stats.num_steps
    with pytest.raises(ValueError, match="the token 1000000"):
        llm.generate([[1, 2], [3] * 40, [10**6]], greedy(), use_tqdm=False)
    assert_idle(llm)
    assert llm.llm_engine.scheduler.stats.num_steps == steps


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop_token_ids": [10**6]}, "stop_token_ids has the token 1000000"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias has the token 1000000"),
    ],
)
def test_tokens_beyond_the_vocabulary_in_options_are_refused(
    llm: LLM, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(TEXT, SamplingParams(**params), use_tqdm=False)
    assert_idle(llm)


def test_lists_of_another_length_are_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="sampling_params has 1 entries for 2 prompts"):
        llm.generate(["a", "b"], [greedy()], use_tqdm=False)
    with pytest.raises(ValueError, match="priority has 3 entries for 2 prompts"):
        llm.generate(["a", "b"], greedy(), priority=[1, 2, 3], use_tqdm=False)
    assert_idle(llm)


@pytest.mark.parametrize("params", [{"temperature": 0}, [None], ["x"]], ids=str)
def test_options_of_another_type_are_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(ValueError, match="sampling_params must be SamplingParams"):
        llm.generate("a", params, use_tqdm=False)
    with pytest.raises(ValueError, match="sampling_params must be SamplingParams"):
        llm.llm_engine.add_request("x", "a", {"temperature": 0})  # type: ignore[arg-type]
    assert_idle(llm)


@pytest.mark.parametrize("priority", ["high", None, 1.5, True])
def test_a_priority_is_a_whole_number(llm: LLM, priority: Any) -> None:
    """Anything else could not be ordered among the priorities of other requests."""
    with pytest.raises(ValueError, match="priority must be"):
        llm.generate("a", greedy(), priority=[priority], use_tqdm=False)
    assert_idle(llm)


def test_a_smaller_priority_is_served_first(checkpoint: Path) -> None:
    llm = LLM(checkpoint, max_num_seqs=1, **OPTIONS)
    outputs = llm.generate(["a", "b", "c"], greedy(), priority=[5, -1, 2], use_tqdm=False)
    finished = [output.metrics.finished_time for output in outputs]
    assert sorted(range(3), key=lambda i: finished[i] or 0) == [1, 2, 0]


def test_text_needs_a_tokenizer_and_says_so(without_tokenizer: LLM) -> None:
    llm = without_tokenizer
    [output] = llm.generate([1, 2, 3], greedy(), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 8 and output.outputs[0].text == ""
    with pytest.raises(ValueError, match=r"no tokenizer\.json.*prompt_token_ids"):
        llm.generate(TEXT, greedy(), use_tqdm=False)
    with pytest.raises(ValueError, match=r"stop strings need a tokenizer.*stop_token_ids"):
        llm.generate([1], greedy(stop="x"), use_tqdm=False)
    with pytest.raises(ValueError, match=r"no tokenizer\.json.*prompt_token_ids"):
        llm.chat([{"role": "user", "content": "x"}], greedy(), use_tqdm=False)
    assert_idle(llm)


# Chat.


def test_chat_is_generate_on_the_templates_text(llm: LLM) -> None:
    first = [{"role": "user", "content": TEXT}]
    second = [*first, {"role": "assistant", "content": "On its way."}, *first]
    prompts = [
        "<s>" + "".join(f"<|{m['role']}|>{m['content']}</s>" for m in c) for c in (first, second)
    ]
    outputs = llm.chat([first, second], greedy(), use_tqdm=False)
    assert [output.prompt for output in outputs] == [p + "<|assistant|>" for p in prompts]
    for output in outputs:
        assert output.prompt_token_ids == llm.get_tokenizer().encode(output.prompt or "")
        again = llm.generate(output.prompt or "", greedy(), use_tqdm=False)
        assert tokens_of(again) == tokens_of([output])
    [single] = llm.chat(first, greedy(), use_tqdm=False)
    assert tokens_of([single]) == tokens_of(outputs[:1])
    [open_end] = llm.chat(first, greedy(), use_tqdm=False, add_generation_prompt=False)
    assert open_end.prompt == prompts[0]
    assert_idle(llm)


def test_chat_adds_no_special_tokens_to_those_of_the_template(copy: Path) -> None:
    tokenizer = byte_tokenizer()
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    save_tokenizer(copy, tokenizer)
    llm = LLM(copy, **OPTIONS)
    [chat] = llm.chat([{"role": "user", "content": TEXT}], greedy(1), use_tqdm=False)
    [text] = llm.generate(TEXT, greedy(1), use_tqdm=False)
    assert chat.prompt_token_ids.count(bos) == text.prompt_token_ids.count(bos) == 1


# Ends, stop strings, streaming.


def test_a_reply_ends_as_in_vllm_with_finish_and_stop_reason(copy: Path) -> None:
    """length; stop and None at the model's end token; stop and the token or text that did it."""
    llm = LLM(copy, **OPTIONS)
    [tokens] = tokens_of(llm.generate(TEXT, greedy(12), use_tqdm=False))
    third = tokens[2]
    first_at = tokens.index(third) + 1

    def end(**options: Any) -> tuple[int, str | None, int | str | None]:
        params = SamplingParams(**{"temperature": 0, "max_tokens": 12, **options})
        [completion] = llm.generate(TEXT, params, use_tqdm=False)[0].outputs
        assert completion.finished()
        return len(completion.token_ids), completion.finish_reason, completion.stop_reason

    assert end(ignore_eos=True) == (12, "length", None)
    assert end(ignore_eos=True, stop_token_ids=[third]) == (first_at, "stop", third)
    room = OPTIONS["max_model_len"] - len(llm.get_tokenizer().encode(TEXT))
    assert end(ignore_eos=True, max_tokens=None) == (room, "length", None)
    assert end(ignore_eos=True, max_tokens=999) == (room, "length", None)

    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, third]}))
    llm = LLM(copy, **OPTIONS)
    assert end() == (first_at, "stop", None)
    assert end(ignore_eos=True) == (12, "length", None)
    assert end(min_tokens=9)[0] >= 9
    assert_idle(llm)


def stoppable(llm: LLM) -> tuple[str, list[str], SamplingParams]:
    """A reply's text, cut into its tokens' pieces, and the options that lead to it."""
    letters = [llm.get_tokenizer().token_id(letter) for letter in "abcdefgh"]
    bias = {token: 100.0 for token in letters if token is not None}
    params = SamplingParams(logit_bias=bias, seed=3, max_tokens=30, ignore_eos=True)
    [completion] = llm.generate(TEXT, params, use_tqdm=False)[0].outputs
    assert set(completion.text) <= set("abcdefgh") and len(completion.text) == 30
    return completion.text, list(completion.text), params


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("min_tokens", [0, 15])
@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_a_stop_string_across_tokens_ends_the_reply_and_frees_its_blocks(
    llm: LLM, include: bool, min_tokens: int, kind: RequestOutputKind
) -> None:
    text, _, params = stoppable(llm)
    stop = text[min_tokens + 4 : min_tokens + 7]
    end = next(e for e in range(min_tokens + 1, 31) if text[:e].endswith(stop))
    options = {
        **{name: getattr(params, name) for name in ("logit_bias", "seed", "max_tokens")},
        "ignore_eos": True,
        "stop": ["zzzzz", stop],
        "min_tokens": min_tokens,
        "include_stop_str_in_output": include,
    }
    want = text[:end] if include else text[: end - 3]
    [final] = llm.generate(TEXT, SamplingParams(**options), use_tqdm=False)[0].outputs
    assert (final.text, final.finish_reason, final.stop_reason) == (want, "stop", stop)
    assert len(final.token_ids) == end

    outputs = stream(llm, SamplingParams(**options, output_kind=kind))
    texts = [output.outputs[0].text for output in outputs]
    if kind is RequestOutputKind.DELTA:
        texts = list(itertools.accumulate(texts))
        assert sum(len(output.outputs[0].token_ids) for output in outputs) == end
    assert texts[-1] == want
    assert all(want.startswith(shown) for shown in texts)
    assert [output.finished for output in outputs] == [False] * (end - 1) + [True]
    assert_idle(llm)


def test_kinds_of_output_agree(llm: LLM) -> None:
    def run(kind: RequestOutputKind) -> list[RequestOutput]:
        return stream(llm, SamplingParams(seed=1, n=2, max_tokens=6, output_kind=kind))

    [final] = run(RequestOutputKind.FINAL_ONLY)
    cumulative, delta = run(RequestOutputKind.CUMULATIVE), run(RequestOutputKind.DELTA)
    for index, completion in enumerate(final.outputs):
        assert cumulative[-1].outputs[index] == completion
        joined = [token for output in delta for token in output.outputs[index].token_ids]
        assert joined == completion.token_ids
        assert "".join(output.outputs[index].text for output in delta) == completion.text
        growing = [output.outputs[index] for output in cumulative]
        for before, after in pairwise(growing):
            assert after.text.startswith(before.text)
            assert after.token_ids[: len(before.token_ids)] == before.token_ids


# Requests come and go.


def test_request_ids_are_unique_also_among_the_completions_of_others(llm: LLM) -> None:
    engine = llm.llm_engine
    engine.add_request("a", "x", SamplingParams(n=2))
    engine.add_request("1_b", "x", greedy())
    with pytest.raises(ValueError, match="request id 'a' is in use"):
        engine.add_request("a", "x", greedy())
    with pytest.raises(ValueError, match="request id '0_a' is in use"):
        engine.add_request("0_a", "x", greedy())
    with pytest.raises(ValueError, match="request id 'b' is in use"):
        engine.add_request("b", "x", SamplingParams(n=2))
    assert engine.get_num_unfinished_requests() == 2
    engine.abort_request(["a", "1_b"])
    engine.add_request("a", "x", greedy())
    engine.abort_request("a")
    assert_idle(llm)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_an_aborted_request_leaves_at_once_and_the_others_go_on(llm: LLM, steps: int) -> None:
    engine = llm.llm_engine
    [alone] = tokens_of(llm.generate("other", greedy(), use_tqdm=False))
    engine.add_request("gone", [7] * 50, SamplingParams(n=3, max_tokens=40))
    engine.add_request("other", "other", greedy())
    outputs = [output for _ in range(steps) for output in engine.step()]
    engine.abort_request(["gone", "unknown"])
    engine.abort_request("gone")
    assert engine.get_num_unfinished_requests() == 1
    while engine.has_unfinished_requests():
        new = engine.step()
        assert [output.request_id for output in new] == ["other"]
        outputs += new
    assert outputs[-1].outputs[0].token_ids == alone
    assert_idle(llm)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at_step", [1, 2, 3, 7])
def test_after_an_interrupt_the_cache_is_empty_and_replies_are_as_before(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException], at_step: int
) -> None:
    prompts = [[3] * 30, [4] * 17, list(range(40))]
    want = tokens_of(LLM(checkpoint, **OPTIONS).generate(prompts, greedy(), use_tqdm=False))
    llm = LLM(checkpoint, max_num_batched_tokens=16, **OPTIONS)
    execute, steps = llm.llm_engine.executor.execute, itertools.count(1)

    def failing(batch: ScheduledBatch) -> Any:
        if next(steps) == at_step:
            raise failure
        return execute(batch)

    monkeypatch.setattr(llm.llm_engine.executor, "execute", failing)
    with pytest.raises(failure):
        llm.generate(prompts, greedy(), use_tqdm=False)
    assert_idle(llm)
    assert tokens_of(llm.generate(prompts, greedy(), use_tqdm=False)) == want
    assert_idle(llm)


def test_the_timeline_goes_forward(llm: LLM) -> None:
    prompts = [[n] * 20 for n in range(6)]
    for output in llm.generate(prompts, greedy(5), use_tqdm=False):
        metrics = output.metrics
        assert metrics.first_scheduled_time is not None and metrics.finished_time is not None
        times = [
            metrics.arrival_time,
            metrics.first_scheduled_time,
            *metrics.token_times,
            metrics.finished_time,
        ]
        assert times == sorted(times)
        assert len(metrics.token_times) == 5 and metrics.first_token_time == times[2]
        assert metrics.ttft_s == times[2] - times[0] and metrics.queue_time_s == times[1] - times[0]
        assert metrics.e2e_latency_s == times[-1] - times[0]
        assert metrics.tpot_s == pytest.approx((times[-2] - times[2]) / 4)


def test_times_come_from_the_clock_of_the_engine(checkpoint: Path) -> None:
    ticks = itertools.count(100.0)
    engine = LLMEngine(EngineConfig(checkpoint, **OPTIONS), clock=lambda: next(ticks))
    engine.add_request("a", [1, 2], greedy(3))
    engine.add_request("b", [1, 2], greedy(3), arrival_time=42.0)
    outputs = [output for _ in range(3) for output in engine.step()]
    metrics = {output.request_id: output.metrics for output in outputs}
    assert metrics["a"].arrival_time == 100.0 and metrics["b"].arrival_time == 42.0
    assert all(100 < time < next(ticks) for time in metrics["a"].token_times)


def test_cached_tokens_are_counted_in_whole_blocks_and_salts_keep_apart(checkpoint: Path) -> None:
    llm = LLM(checkpoint, **OPTIONS)
    prompt = list(range(30))

    def cached(prompt: Any) -> int:
        return llm.generate(prompt, greedy(1), use_tqdm=False)[0].num_cached_tokens

    assert [cached(prompt), cached(prompt), cached(prompt[:24])] == [0, 24, 16]
    assert cached([*prompt[:16], 99, 98, 97]) == 16
    salted = {"prompt_token_ids": prompt, "cache_salt": "tenant"}
    assert [cached(salted), cached(salted), cached(prompt)] == [0, 24, 24]
    llm = LLM(checkpoint, enable_prefix_caching=False, **OPTIONS)
    assert [cached(prompt), cached(prompt)] == [0, 0]


# Construction.


@pytest.mark.parametrize(
    "name", ["tensor_parallel_size", "quantization", "trust_remote_code", "swap"]
)
def test_an_argument_that_we_do_not_have_is_refused_by_name(checkpoint: Path, name: str) -> None:
    with pytest.raises(TypeError, match=f"LLM has no argument '{name}'; it has model, dtype"):
        LLM(checkpoint, **{name: 1})


def test_names_and_order_of_arguments_are_those_of_vllm() -> None:
    """`generate(prompts, sampling_params, *, use_tqdm)` and `chat(..., use_tqdm)` positional."""
    generate = inspect.signature(LLM.generate).parameters
    assert list(generate)[1:3] == ["prompts", "sampling_params"]
    assert {"use_tqdm", "priority"} <= set(generate)
    chat = inspect.signature(LLM.chat).parameters
    assert list(chat)[1:4] == ["messages", "sampling_params", "use_tqdm"]
    assert chat["use_tqdm"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert "add_generation_prompt" in chat
    assert list(inspect.signature(LLM.__init__).parameters)[1] == "model"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_model_len": 513}, "max_model_len must be between 2 and 512.*got 513"),
        ({"max_model_len": 0}, "max_model_len must be.*got 0"),
        ({"max_model_len": 1}, "max_model_len must be.*got 1"),
        ({"max_model_len": -1}, "max_model_len must be.*got -1"),
        ({"max_model_len": "64"}, "max_model_len must be.*got '64'"),
        ({"max_model_len": 64.0}, r"max_model_len must be.*got 64\.0"),
        (
            {"max_model_len": 96, "num_gpu_blocks_override": 12},
            r"max_model_len 96 needs 12 KV blocks of 8.*there are 11 \(88 tokens\).*at most 88",
        ),
        ({"num_gpu_blocks_override": 1}, "num_gpu_blocks_override must be.*got 1"),
        ({"num_gpu_blocks_override": -5}, "num_gpu_blocks_override must be.*got -5"),
        ({"block_size": 0}, "block_size must be.*got 0"),
        ({"block_size": -8}, "block_size must be.*got -8"),
        ({"block_size": 8.0}, r"block_size must be.*got 8\.0"),
        ({"max_num_seqs": 0}, "max_num_seqs must be.*got 0"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be.*got 0"),
        ({"max_num_batched_tokens": True}, "max_num_batched_tokens must be.*got True"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization must be.*got 0"),
        ({"gpu_memory_utilization": 1.1}, r"gpu_memory_utilization must be.*got 1\.1"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization must be.*got nan"),
        ({"gpu_memory_utilization": "0.5"}, "gpu_memory_utilization must be.*got '0.5'"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching must be True or False, got 1"),
        ({"seed": "x"}, "seed must be.*got 'x'"),
        ({"seed": None}, "seed must be.*got None"),
        ({"dtype": "int8"}, "dtype must be 'auto' or one of.*got 'int8'"),
        ({"dtype": ["float32"]}, r"dtype must be 'auto' or one of.*got \['float32'\]"),
        ({"model": "meta-llama/Llama-3.2-1B"}, "'meta-llama/Llama-3.2-1B' is not a directory"),
        ({"model": 5}, "model must be the path of a directory, got 5"),
    ],
    ids=str,
)
def test_a_value_that_cannot_work_is_refused_with_a_sentence(
    checkpoint: Path, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(**{"model": checkpoint, **OPTIONS, **option})


def test_a_lone_request_of_the_longest_length_finishes_in_the_smallest_cache(
    checkpoint: Path,
) -> None:
    llm = LLM(checkpoint, num_gpu_blocks_override=13, **OPTIONS)
    assert llm.llm_engine.kv_cache_tokens == 96
    [output] = llm.generate([[5] * 95], greedy(None), use_tqdm=False)
    assert output.outputs[0].finish_reason == "length"
    [output] = llm.generate([[5]], greedy(None), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 95
    assert_idle(llm)


def test_parts_passed_in_are_the_ones_that_run(checkpoint: Path) -> None:
    used = set()

    class MyScheduler(Scheduler):
        def schedule(self) -> ScheduledBatch:
            used.add("schedule")
            return super().schedule()

    class MyPool(BlockPool):
        def free(self, request: Request) -> None:
            used.add("free")
            super().free(request)

    mine = LLM(checkpoint, scheduler=MyScheduler, block_pool=MyPool, max_num_seqs=3, **OPTIONS)
    engine = mine.llm_engine
    assert type(engine.scheduler) is MyScheduler and type(engine.block_pool) is MyPool
    assert engine.scheduler.block_pool is engine.block_pool
    assert engine.scheduler.max_num_seqs == 3 and engine.scheduler.max_model_len == 96
    assert engine.block_pool.block_size == 8 and engine.block_pool.enable_prefix_caching
    prompts = [[n, n + 1] for n in range(5)]
    outputs = mine.generate(prompts, greedy(), use_tqdm=False)
    assert used == {"schedule", "free"}
    plain = LLM(checkpoint, **OPTIONS).generate(prompts, greedy(), use_tqdm=False)
    assert tokens_of(outputs) == tokens_of(plain)


# Defaults and progress.


def test_without_options_those_of_the_generation_config_hold(copy: Path) -> None:
    llm = LLM(copy, **OPTIONS)
    stored = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "do_sample": True, "min_p": None}
    path = copy / "generation_config.json"
    path.write_text(json.dumps({**stored, "repetition_penalty": 1.2, "max_new_tokens": 3}))
    assert llm.get_default_sampling_params() == SamplingParams(
        temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.2, max_tokens=3
    )
    [output] = llm.generate("a", use_tqdm=False)
    assert 1 <= len(output.outputs[0].token_ids) <= 3
    path.write_text(json.dumps({"temperature": "hot"}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: temperature must be"):
        llm.generate("a", use_tqdm=False)
    path.unlink()
    assert llm.get_default_sampling_params() == SamplingParams()


def test_progress_is_shown_unless_turned_off(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], greedy())
    shown = capsys.readouterr().err
    assert "Processed prompts" in shown and "2/2" in shown
    llm.generate(["a", "b"], greedy(), use_tqdm=False)
    llm.chat([{"role": "user", "content": "a"}], greedy(), False)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""

"""The official client, over a socket: every answer is valid by the client library's own models,
a stream adds up to the whole answer, and both are what the offline API gives."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion, Model
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel

from course_lib import LLM, SamplingParams
from course_lib.data import DEFAULT_MODEL
from course_lib.serving.admission import AdmissionPolicy
from course_lib.serving.admission_base import TenantLimits
from tests.serving.servers import MODEL, ORDER, events, idle, load, serving, wait_until

PROMPT = "The parcel with order A-1842"


@pytest.fixture(scope="module")
def llm() -> LLM:
    """The offline API, for comparison."""
    return load()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(load()) as server:
        yield server.url
        wait_until(lambda: idle(server.url))


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def valid(answer: BaseModel) -> None:
    """The JSON that came has the fields and types of the client's model, and no others."""
    data = answer.to_dict()  # type: ignore[attr-defined]
    if isinstance(answer, Completion):
        for choice in data["choices"]:  # two nulls of OpenAI's that the library's models lack
            if choice["finish_reason"] is None:  # a stream that goes on
                choice["finish_reason"] = "stop"
            if choice["logprobs"] and choice["logprobs"]["token_logprobs"][0] is None:  # echoed
                choice["logprobs"]["token_logprobs"][0] = 0.0
                choice["logprobs"]["top_logprobs"][0] = {}
    _no_extras(type(answer).model_validate(data, strict=True))


def _no_extras(value: Any) -> None:
    if isinstance(value, BaseModel):
        assert not value.model_extra, f"{type(value).__name__} has no {value.model_extra}"
        for name in value.model_fields_set:
            _no_extras(getattr(value, name))
    elif isinstance(value, list):
        for entry in value:
            _no_extras(entry)


VLLM_ONLY = {
    "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids",
    "include_stop_str_in_output", "skip_special_tokens",
}  # fmt: skip

#: Options of requests, as the engine's; what differs by name in the API is translated.
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "max_tokens": 40},
    "cut": {"temperature": 0, "max_tokens": 3},
    "seed": {"seed": 7, "max_tokens": 24},
    "three": {"seed": -3, "n": 3, "temperature": 1.2, "max_tokens": 24},
    "largest seed": {"seed": 2**63 - 1, "n": 2, "max_tokens": 8},
    "nucleus": {"seed": 1, "top_p": 0.8, "temperature": 1.5, "max_tokens": 24},
    "penalties": {
        "temperature": 0, "max_tokens": 30, "presence_penalty": 1.5, "frequency_penalty": -0.5,
    },
    "biases": {"temperature": 0, "max_tokens": 8, "logit_bias": {300: 100, 301: -100}},
    "vllm": {
        "seed": 2, "max_tokens": 20, "top_k": 5, "min_p": 0.05, "repetition_penalty": 1.2,
        "min_tokens": 10, "ignore_eos": True, "skip_special_tokens": False,
    },
    "logprobs": {"temperature": 0, "max_tokens": 12, "logprobs": 3},
    "own logprobs": {"seed": 4, "n": 2, "max_tokens": 12, "logprobs": 0},
}  # fmt: skip


def to_api(options: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    """The same options as arguments of the client."""
    result: dict[str, Any] = {"model": MODEL, "extra_body": {}}
    for name, value in options.items():
        if name in VLLM_ONLY:
            result["extra_body"][name] = value
        elif name == "logprobs" and chat:
            result |= {"logprobs": True, "top_logprobs": value}
        elif name == "logit_bias":
            result[name] = {str(token): bias for token, bias in value.items()}
        else:
            result[name] = value
    return result


def chat_stream(client: OpenAI, **request: Any) -> tuple[dict[int, Any], Any]:
    """A streamed chat put together: for each choice text, finish reason and logprobs; usage."""
    choices: dict[int, Any] = {}
    usage = None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(**request, stream=True, stream_options=options):
        valid(chunk)
        assert isinstance(chunk, ChatCompletionChunk)
        if not chunk.choices:
            assert usage is None
            usage = chunk.usage
        for choice in chunk.choices:
            assert usage is None, "the usage comes last"
            if choice.index not in choices:
                assert choice.delta.role == "assistant" and choice.delta.content == ""
                choices[choice.index] = {"text": "", "finish": None, "logprobs": []}
                continue
            found = choices[choice.index]
            assert found["finish"] is None, "a choice ends once"
            found["text"] += choice.delta.content or ""
            found["finish"] = choice.finish_reason
            if choice.logprobs is not None:
                found["logprobs"] += choice.logprobs.content or []
    assert usage is not None
    return choices, usage


@pytest.mark.parametrize("name", OPTIONS)
def test_chat_whole_streamed_and_offline_agree(name: str, client: OpenAI, llm: LLM) -> None:
    options = OPTIONS[name]
    request = {**to_api(options, chat=True), "messages": ORDER}
    whole = client.chat.completions.create(**request)
    valid(whole)
    (offline,) = llm.chat(ORDER, SamplingParams(**options), use_tqdm=False)
    streamed, usage = chat_stream(client, **request)
    assert len(whole.choices) == len(streamed) == options.get("n", 1)
    for choice, completion in zip(whole.choices, offline.outputs, strict=True):
        part = streamed[choice.index]
        assert choice.message.role == "assistant"
        assert choice.message.content == part["text"] == completion.text
        assert choice.finish_reason == part["finish"] == completion.finish_reason
        if "logprobs" not in options:
            assert choice.logprobs is None and not part["logprobs"]
            continue
        assert choice.logprobs is not None and choice.logprobs.content == part["logprobs"]
        for entry, token, expected in zip(
            part["logprobs"], completion.token_ids, completion.logprobs or (), strict=True
        ):
            # The cache may have been warm in one run and cold in another.
            assert entry.logprob == pytest.approx(expected[token].logprob, abs=1e-3)
            assert entry.token == expected[token].decoded_token
            assert bytes(entry.bytes) == entry.token.encode()
            assert len(entry.top_logprobs) == options["logprobs"]
            likeliest = [top.logprob for top in entry.top_logprobs]
            assert likeliest == sorted(likeliest, reverse=True)
    num_tokens = sum(len(completion.token_ids) for completion in offline.outputs)
    for counted in (whole.usage, usage):
        assert counted.prompt_tokens == len(offline.prompt_token_ids)
        assert counted.completion_tokens == num_tokens
        assert counted.total_tokens == counted.prompt_tokens + num_tokens
    assert usage.prompt_tokens_details.cached_tokens > 0  # the whole request came before


def completion_stream(client: OpenAI, **request: Any) -> tuple[dict[int, Any], Any]:
    """A streamed completion put together."""
    choices: dict[int, Any] = {}
    usage = None
    options = {"include_usage": True}
    for chunk in client.completions.create(**request, stream=True, stream_options=options):
        valid(chunk)
        if not chunk.choices:
            usage = chunk.usage
        for choice in chunk.choices:
            found = choices.setdefault(choice.index, {"text": "", "finish": None, "logprobs": {}})
            assert found["finish"] is None
            found["text"] += choice.text
            found["finish"] = choice.finish_reason
            if choice.logprobs is not None:
                for name, values in choice.logprobs.to_dict().items():
                    found["logprobs"].setdefault(name, []).extend(values)
    return choices, usage


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_completions_whole_streamed_and_offline_agree(
    name: str, echo: bool, client: OpenAI, llm: LLM
) -> None:
    options = OPTIONS[name]
    request = {**to_api(options, chat=False), "prompt": PROMPT, "echo": echo}
    whole = client.completions.create(**request)
    valid(whole)
    (offline,) = llm.generate(PROMPT, SamplingParams(**options), use_tqdm=False)
    streamed, usage = completion_stream(client, **request)
    assert len(whole.choices) == len(streamed) == options.get("n", 1)
    for choice, completion in zip(whole.choices, offline.outputs, strict=True):
        part = streamed[choice.index]
        assert choice.text == part["text"] == PROMPT * echo + completion.text
        assert choice.finish_reason == part["finish"] == completion.finish_reason
        if "logprobs" not in options:
            assert choice.logprobs is None
            continue
        assert choice.logprobs is not None
        found = choice.logprobs.to_dict()
        assert found == part["logprobs"]
        prompt_length = len(offline.prompt_token_ids) if echo else 0
        assert len({len(values) for values in found.values()}) == 1
        assert found["token_logprobs"][prompt_length:] == pytest.approx(
            [
                entry[token].logprob
                for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
            ],
            abs=1e-3,
        )
        if echo:
            assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
            assert None not in found["token_logprobs"][1:]
        text = "".join(found["tokens"])
        assert text.removesuffix("<|im_end|>") == choice.text
        for offset, token in zip(found["text_offset"], found["tokens"], strict=True):
            assert text[offset : offset + len(token)] == token
    assert whole.usage == usage.model_copy(
        update={"prompt_tokens_details": whole.usage.prompt_tokens_details}
    )


def test_several_prompts_are_numbered_through(client: OpenAI, llm: LLM) -> None:
    prompts = ["The parcel", "A refund for order", "Hello"]
    options = {"seed": 1, "n": 2, "max_tokens": 9}
    request = {**to_api(options, chat=False), "prompt": prompts}
    whole = client.completions.create(**request)
    valid(whole)
    streamed, _ = completion_stream(client, **request)
    offline = llm.generate(prompts, SamplingParams(**options), use_tqdm=False)
    expected = [completion.text for output in offline for completion in output.outputs]
    assert [choice.text for choice in whole.choices] == expected
    assert [streamed[index]["text"] for index in range(6)] == expected
    tokens = [llm.get_tokenizer().encode(prompt) for prompt in prompts]
    again = client.completions.create(**{**request, "prompt": tokens})
    assert [choice.text for choice in again.choices] == expected
    single = client.completions.create(**{**request, "prompt": tokens[1]})
    assert [choice.text for choice in single.choices] == expected[2:4]


def stop_across_tokens(llm: LLM) -> tuple[str, str]:
    """A stop string that begins in one token and ends in another, and the text before it."""
    (output,) = llm.chat(ORDER, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    decode = llm.get_tokenizer().decode
    tokens = output.outputs[0].token_ids
    before = len(decode(tokens[:10]))
    text = output.outputs[0].text
    stop = text[before - 2 : before + 2]
    return stop, text[: text.index(stop)]


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_tokens_never_show_a_part(
    include: bool, client: OpenAI, llm: LLM
) -> None:
    stop, before = stop_across_tokens(llm)
    options = {
        "temperature": 0, "max_tokens": 40, "stop": ["never", stop],
        "include_stop_str_in_output": include, "logprobs": 1,
    }  # fmt: skip
    request = {**to_api(options, chat=True), "messages": ORDER}
    client.chat.completions.create(**request)  # the next two find the prompt in the prefix cache
    whole = client.chat.completions.create(**request)
    streamed, _ = chat_stream(client, **request)
    assert whole.choices[0].message.content == streamed[0]["text"] == before + stop * include
    assert whole.choices[0].finish_reason == streamed[0]["finish"] == "stop"
    assert whole.choices[0].logprobs.content == streamed[0]["logprobs"]


def test_offsets_hold_although_text_is_held_back(client: OpenAI) -> None:
    request = {
        "model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 20, "logprobs": 1,
        "stop": "something that never comes",
    }  # fmt: skip
    whole = client.completions.create(**request)
    streamed, _ = completion_stream(client, **request)
    assert streamed[0]["logprobs"] == whole.choices[0].logprobs.to_dict()
    assert streamed[0]["text"] == whole.choices[0].text


def test_the_lengths_of_chat(client: OpenAI, url: str) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(
            model=MODEL, messages=ORDER, **{name: 4}, extra_body={"ignore_eos": True}
        )
        assert answer.usage.completion_tokens == 4
    # Without a limit the reply may fill the context.
    answer = client.chat.completions.create(model=MODEL, messages=ORDER, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    whole = client.completions.create(model=MODEL, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert whole.usage.completion_tokens == 16  # OpenAI's default


def test_what_other_clients_send(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("Hel", "lo")]},
            {"role": "assistant", "content": "Hello!", "name": "shop"},
            {"role": "user", "content": "Where is my order A-1842?"},
        ],
        max_tokens=4,
        user="someone",
        metadata={"a": "b"},
        service_tier="flex",
        extra_body={"cache_salt": "mine", "priority": 3},
    )  # fmt: skip
    valid(answer)


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    data = model.to_dict()
    assert data.pop("max_model_len") == 4096  # an addition of vLLM
    _no_extras(Model.model_validate(data, strict=True))


def test_a_hundred_at_once_through_the_asynchronous_client(url: str, llm: LLM) -> None:
    texts = [f"Where is my order A-{1800 + i}?" for i in range(100)]

    async def ask(client: AsyncOpenAI, index: int) -> str:
        request: dict[str, Any] = {
            "model": MODEL, "messages": [{"role": "user", "content": texts[index]}],
            "max_tokens": 12, "seed": index,
        }  # fmt: skip
        if index % 2:
            answer = await client.chat.completions.create(**request)
            return answer.choices[0].message.content or ""
        stream = await client.chat.completions.create(**request, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, index) for index in range(100)))

    found = asyncio.run(ask_all())
    offline = llm.chat(
        [[{"role": "user", "content": text}] for text in texts],
        [SamplingParams(max_tokens=12, seed=index) for index in range(100)],
        use_tqdm=False,
    )
    assert found == [output.outputs[0].text for output in offline]


def test_leaving_a_stream_ends_it(client: OpenAI, url: str) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=ORDER, stream=True, max_tokens=3000, extra_body={"ignore_eos": True}
    )
    for _ in zip(range(5), stream, strict=False):
        pass
    stream.close()
    wait_until(lambda: idle(url), 20, "the engine is idle")


# What goes wrong.


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"n": 2, "temperature": 0}, "n must be 1 when temperature is 0"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"temperature": "hot"}, "temperature: Input should be a valid number"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens is 1000000; prompt and reply together may have 4096"),
        ({"stop": ""}, "stop must be non-empty strings"),
        ({"logit_bias": {"99999": 1}}, "logit_bias has the token 99999"),
        ({"logit_bias": {"x": 1}}, "logit_bias has the key 'x'"),
        ({"logit_bias": {"1": 101}}, "at most 100, got 101"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: Input should be less"),
        ({"stream_options": {"include_usage": True}}, "stream_options are for streams"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role: Input should be"),
        ({"tools": []}, "tools: Extra inputs are not permitted"),
        ({"extra_body": {"min_tokens": 9, "max_tokens": 8}}, "min_tokens must not exceed"),
        ({"extra_body": {"unheard_of": 1}}, "unheard_of: Extra inputs are not permitted"),
        ({"extra_body": {"stop_token_ids": [5000]}}, "stop_token_ids has the token 5000"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_named(
    change: dict[str, Any], says: str, stream: bool, client: OpenAI
) -> None:
    if "stream_options" in change and stream:
        return
    request = {"model": MODEL, "messages": ORDER, "stream": stream, **change}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**request)
    assert says in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_prompts_that_do_not_fit(client: OpenAI) -> None:
    for prompt in ([5] * 4096, [5] * 9000):
        with pytest.raises(openai.BadRequestError, match="model's context") as caught:
            client.completions.create(model=MODEL, prompt=prompt)
        assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="model's context"):
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "order " * 9000}]
        )
    for prompt in ("", [], [[]], [""], ["a", ""]):
        with pytest.raises(openai.BadRequestError, match="prompt"):
            client.completions.create(model=MODEL, prompt=prompt)
    with pytest.raises(openai.BadRequestError, match="the prompt has the token 4000"):
        client.completions.create(model=MODEL, prompt=[4000])
    # One that just fits ends where the context does.
    answer = client.completions.create(
        model=MODEL, prompt=[5] * 4094, max_tokens=2, extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == 4096


@pytest.mark.parametrize("name", ["gpt-4", "", str(DEFAULT_MODEL), "/etc/passwd", "../" + MODEL])
def test_only_the_served_model_can_be_asked_for(
    name: str, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr("builtins.open", lambda *a, **k: opened.append(a))
    with pytest.raises(openai.NotFoundError, match="there is no model") as caught:
        client.chat.completions.create(model=name, messages=ORDER)
    monkeypatch.undo()
    assert caught.value.code == "model_not_found" and not opened


def test_unknown_paths_and_methods_are_errors_of_the_same_shape(url: str) -> None:
    for method, path, status in (
        ("GET", "/v1/engines", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/metrics", 405),
        ("HEAD", "/nothing", 404),
    ):
        answer = httpx.request(method, url + path)
        assert answer.status_code == status, (method, path)
        assert method == "HEAD" or answer.json()["error"]["message"]


def test_keys_limits_and_overload_are_the_clients_exceptions() -> None:
    policy = AdmissionPolicy(tenant=TenantLimits(requests_per_s=0.001, burst_s=2000))
    with serving(load(), api_key="secret", admission=policy) as server:
        request: dict[str, Any] = {"model": MODEL, "messages": ORDER, "max_tokens": 1}
        bad = OpenAI(base_url=f"{server.url}/v1", api_key="guess", max_retries=0)
        with pytest.raises(openai.AuthenticationError) as refused:
            bad.chat.completions.create(**request)
        assert refused.value.code == "invalid_api_key"
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert httpx.get(server.url + path).status_code == 200

        client = OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        for _ in range(2):
            client.chat.completions.create(**request)
        with pytest.raises(openai.RateLimitError, match="has used up its tenant") as limited:
            client.chat.completions.create(**request)
        assert limited.value.code == "tenant_requests"
        assert 900 < int(limited.value.response.headers["retry-after"]) <= 1000
        # Another tenant has its own.
        client.chat.completions.create(**request, extra_headers={"X-Tenant": "other"})


def test_tokenize_and_detokenize(url: str, llm: LLM) -> None:
    tokens = llm.get_tokenizer().encode(PROMPT)
    answer = httpx.post(f"{url}/tokenize", json={"prompt": PROMPT}).json()
    assert answer == {"tokens": tokens, "count": len(tokens), "max_model_len": 4096}
    back = httpx.post(f"{url}/detokenize", json={"tokens": tokens}).json()
    assert back == {"prompt": PROMPT}
    answer = httpx.post(f"{url}/tokenize", json={"messages": ORDER}).json()
    assert answer["tokens"] == llm.chat_prompt(ORDER)["prompt_token_ids"]
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": ORDER}),
        ("/detokenize", {"tokens": [99999]}),
        ("/detokenize", {"tokens": [-1]}),
    ):
        assert httpx.post(url + path, json=body).status_code == 400


def test_the_bytes_of_a_stream(url: str) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 5, "stream": True, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    *chunks, done = events(answer)
    assert done == "[DONE]" and len(chunks) == 5
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert answer.text.endswith("data: [DONE]\n\n")

"""The engine: requests go in by `add_request`, each `step` moves all of them, outputs come back.

A step is three calls: the scheduler picks the batch, the executor computes it, the scheduler books
the result. Around them this module turns prompts into tokens, joins the `n` completions of a
prompt, and hands each completion's tokens to the detokenizer.
"""

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from course_lib.engine.batch import Executor, ScheduledBatch, StepResult
from course_lib.engine.block_pool import BlockPool
from course_lib.engine.block_pool_base import BlockPoolBase
from course_lib.engine.config import EngineConfig, check_num_blocks, resolve
from course_lib.engine.detokenizer import CompletionBuilder, with_decoded_tokens
from course_lib.engine.kv_cache import (
    cpu_kv_cache_bytes,
    gpu_kv_cache_bytes,
    make_kv_cache,
    num_blocks_for,
)
from course_lib.engine.outputs import LogprobsAtPosition, RequestOutput
from course_lib.engine.request import Request, RequestStatus
from course_lib.engine.runner import ModelRunner
from course_lib.engine.sampling_params import RequestOutputKind, SamplingParams
from course_lib.engine.scheduler import Scheduler
from course_lib.engine.scheduler_base import SchedulerBase
from course_lib.engine.startup import phase
from course_lib.model.attention import AttentionBackend, FunctionAttention, choose_backend
from course_lib.model.config import CheckpointError, ModelConfig, read_json
from course_lib.model.decoder import Decoder
from course_lib.model.ops import CPU_OPS
from course_lib.model.packing import pack_weights
from course_lib.model.tokenizer import Tokenizer
from course_lib.model.weights import check_weights, fill_with_random_weights, load_weights
from course_lib.validation import whole_number

#: A prompt as a caller may give it: text, token ids, or a dict with `prompt` or
#: `prompt_token_ids`, and optionally `cache_salt`.
Prompt = str | Sequence[int] | dict[str, Any]


@dataclass
class _Group:
    """A prompt and its `n` completions, which the scheduler sees as requests of their own."""

    request_id: str
    prompt: str | None
    params: SamplingParams
    requests: list[Request]
    completions: list[CompletionBuilder]
    prompt_logprobs: list[LogprobsAtPosition | None] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.completions)


class LLMEngine:
    """A serving engine on one device.

    Args:
        config: vLLM's engine arguments.
        scheduler: class of the scheduler, see `course_lib.engine.scheduler`.
        block_pool: class of the block pool, see `course_lib.engine.block_pool`.
        paged_attention: a function with the contract of `kernels.paged_attention`; by default the
            backend that suits the device.
        clock: returns seconds.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        scheduler: Callable[..., SchedulerBase] = Scheduler,
        block_pool: Callable[..., BlockPoolBase] = BlockPool,
        paged_attention: Callable[..., torch.Tensor] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.clock = clock
        with phase("checkpoint"):
            self.model_config = ModelConfig.from_pretrained(config.model)
            dummy = config.load_format == "dummy"
            files = None if dummy else check_weights(self.model_config, config.model)
        resolved = resolve(config, self.model_config)
        self.device, self.dtype = resolved.device, resolved.dtype
        self.max_model_len = resolved.max_model_len
        self.attention: AttentionBackend = (
            choose_backend(config.attention_backend, self.device, self.dtype)
            if paged_attention is None
            else FunctionAttention(paged_attention, self.device)
        )
        has_tokenizer = (Path(config.model) / "tokenizer.json").exists()
        with phase("tokenizer"):
            self.tokenizer = Tokenizer(config.model) if has_tokenizer else None
        self.eos_token_ids = _eos_token_ids(
            Path(config.model), self.tokenizer, self.model_config.vocab_size
        )
        runner = self._load(files)
        self.executor: Executor = runner
        self.block_pool = block_pool(
            runner.num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.scheduler = scheduler(
            self.block_pool,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            clock=clock,
        )
        self._groups: dict[str, _Group] = {}
        self._completions: dict[str, tuple[_Group, CompletionBuilder]] = {}
        self._seeds = random.Random(config.seed)

    def _load(self, files: dict[str, Path] | None) -> ModelRunner:
        """Weights, random without files; the KV cache in what they leave; recorded steps."""
        config, model = self.config, self.model_config
        replayable = self.attention.graph_safe and not config.enforce_eager
        num_blocks = config.num_gpu_blocks_override
        if num_blocks is None and self.device.type == "cpu":
            num_blocks = self._num_blocks(cpu_kv_cache_bytes(config, model, self.dtype))
        if num_blocks is not None:  # refused before time is spent on loading
            check_num_blocks(num_blocks, self.max_model_len, config.block_size)
        with phase("weights"):
            decoder = Decoder(
                model, self.max_model_len, self.dtype, self.device, self.attention.ops
            )
            if files is None:
                fill_with_random_weights(decoder)
            else:
                load_weights(decoder, files)
            if self.attention.ops is CPU_OPS and not pack_weights(decoder):
                replayable = False  # PyTorch's products are not recorded
        with phase("kv_cache"):
            if num_blocks is None:
                num_blocks = self._num_blocks(
                    gpu_kv_cache_bytes(decoder, self.attention, config, self.max_model_len)
                )
                check_num_blocks(num_blocks, self.max_model_len, config.block_size)
            kv_cache = make_kv_cache(decoder, num_blocks, config.block_size)
            runner = ModelRunner(decoder, self.attention, kv_cache)
        if replayable:
            runner.record_decode_steps(config.max_num_seqs)
        return runner

    def _num_blocks(self, budget_bytes: int) -> int:
        block_size = self.config.block_size
        return num_blocks_for(
            budget_bytes,
            self.model_config.kv_bytes_per_token(self.dtype.itemsize) * block_size,
            self.config.max_num_seqs,
            -(-self.max_model_len // block_size),
        )

    def __str__(self) -> str:
        """What runs where, in one line."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{Path(self.config.model).name} in {dtype} on {self.device}, attention by "
            f"{self.attention.name}, KV cache of {self.kv_cache_tokens:,} tokens in "
            f"{self.block_pool.num_blocks - 1:,} blocks of {self.block_pool.block_size}"
        )

    @property
    def kv_cache_tokens(self) -> int:
        """Capacity of the KV cache."""
        return (self.block_pool.num_blocks - 1) * self.block_pool.block_size

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        arrival_time: float | None = None,
        priority: int = 0,
    ) -> None:
        """Queue a prompt.

        Args:
            request_id: unique among unfinished requests.
            prompt: text, token ids, or `{"prompt": ...}` / `{"prompt_token_ids": ...}`.
            params: options; vLLM's defaults if absent.
            arrival_time: on the engine's clock; now if absent.
            priority: smaller is served first.

        Raises:
            ValueError: the prompt or an option can never be served; nothing was queued.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {params!r}")
        whole_number("priority", priority, at_least=-(2**63))
        names = [request_id] if params.n == 1 else [f"{i}_{request_id}" for i in range(params.n)]
        if request_id in self._groups or any(name in self._completions for name in names):
            raise ValueError(f"request id {request_id!r} is in use; give each request its own")
        text, token_ids, cache_salt = self._parse_prompt(prompt)
        self._check_tokens(token_ids, params)
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        requests = [
            Request(
                name,
                token_ids,
                params,
                arrival_time=self.clock() if arrival_time is None else arrival_time,
                priority=priority,
                eos_token_ids=self.eos_token_ids,
                seed=seed + index,
                cache_salt=cache_salt,
            )
            for index, name in enumerate(names)
        ]
        for request in requests:  # the first one raises if any does: they are of one length
            self.scheduler.add_request(request)
        completions = [CompletionBuilder(params, self.tokenizer, i) for i in range(params.n)]
        group = _Group(request_id, text, params, requests, completions)
        if params.prompt_logprobs is not None:
            group.prompt_logprobs = [None] * len(token_ids)
        self._groups[request_id] = group
        for request, completion in zip(requests, completions, strict=True):
            self._completions[request.request_id] = (group, completion)

    def step(self) -> list[RequestOutput]:
        """Compute one batch. Returns the outputs of requests that got tokens."""
        batch = self.scheduler.schedule()
        try:
            result = self.executor.execute(batch)
        except BaseException:  # also an interrupt from the keyboard: pages were left unwritten
            self.scheduler.reset_prefix_cache()
            raise
        outputs = self.scheduler.update(batch, result)
        index_of = {entry.request.request_id: i for i, entry in enumerate(batch.scheduled)}
        self._collect_prompt_logprobs(batch, result)
        touched: dict[str, _Group] = {}
        for output in outputs:
            group, completion = self._completions[output.request_id]
            new = output.outputs[0]
            logprobs = result.logprobs[index_of[output.request_id]] if result.logprobs else []
            stopped = completion.push(new.token_ids, logprobs, new.finish_reason, new.stop_reason)
            if stopped:
                request = group.requests[completion.index]
                self.scheduler.finish(request, RequestStatus.STOPPED, str(completion.stop_reason))
            if completion.finish_reason is not None:
                del self._completions[output.request_id]
            touched[group.request_id] = group
        return self._outputs(touched.values())

    def _outputs(self, groups: Iterable[_Group]) -> list[RequestOutput]:
        outputs = []
        for group in groups:
            if group.finished:
                del self._groups[group.request_id]
            elif group.params.output_kind is RequestOutputKind.FINAL_ONLY:
                continue
            outputs.append(self._output(group))
        return outputs

    def _output(self, group: _Group) -> RequestOutput:
        first = group.requests[0]
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=[c.output(group.params.output_kind) for c in group.completions],
            finished=group.finished,
            metrics=first.metrics,
            num_cached_tokens=first.num_cached_tokens,
            prompt_logprobs=group.prompt_logprobs or None,
        )

    def _collect_prompt_logprobs(self, batch: ScheduledBatch, result: StepResult) -> None:
        for entry, logprobs in zip(batch.scheduled, result.prompt_logprobs, strict=False):
            if logprobs and entry.request.request_id in self._completions:
                group, _ = self._completions[entry.request.request_id]
                for position, entries in enumerate(logprobs, start=entry.start + 1):
                    group.prompt_logprobs[position] = with_decoded_tokens(entries, self.tokenizer)

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """End requests now and free their blocks; unknown or finished ids are ignored."""
        for request_id in [request_ids] if isinstance(request_ids, str) else list(request_ids):
            group = self._groups.pop(request_id, None)
            if group is None:
                continue
            for request in group.requests:
                self.scheduler.finish(request, RequestStatus.ABORTED)
                self._completions.pop(request.request_id, None)

    def has_unfinished_requests(self) -> bool:
        """Whether another step has something to do."""
        return bool(self._groups)

    def unfinished_request_ids(self) -> list[str]:
        """The prompts that are waiting or running."""
        return list(self._groups)

    def get_num_unfinished_requests(self) -> int:
        """How many prompts are waiting or running."""
        return len(self._groups)

    def _parse_prompt(self, prompt: Prompt) -> tuple[str | None, list[int], str | None]:
        """Text if there is any, token ids, cache salt."""
        cache_salt = None
        if isinstance(prompt, dict):
            unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
            if unknown or not ("prompt" in prompt or "prompt_token_ids" in prompt):
                raise ValueError(
                    "a prompt given as a dict must have 'prompt' or 'prompt_token_ids', and may "
                    f"have 'cache_salt'; got {sorted(map(str, prompt))}"
                )
            cache_salt = prompt.get("cache_salt")
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), _as_tokens(prompt["prompt_token_ids"]), cache_salt
            text = prompt["prompt"]
        elif isinstance(prompt, str):
            text = prompt
        else:
            return None, _as_tokens(prompt), cache_salt
        if self.tokenizer is None:
            raise ValueError(
                f"{self.config.model} has no tokenizer.json, so text cannot be read; "
                "give {'prompt_token_ids': [...]}"
            )
        return text, self.tokenizer.encode(text), cache_salt

    def _check_tokens(self, token_ids: list[int], params: SamplingParams) -> None:
        vocab_size = self.model_config.vocab_size
        for name, tokens in (
            ("the prompt", token_ids),
            ("stop_token_ids", params.stop_token_ids or ()),
            ("logit_bias", params.logit_bias or ()),
        ):
            for token in tokens:
                if type(token) is not int or not 0 <= token < vocab_size:
                    raise ValueError(
                        f"{name} has the token {token!r}; expected integers from 0 to "
                        f"{vocab_size - 1}, the vocabulary of the model"
                    )
        if params.stop_strings and self.tokenizer is None:
            raise ValueError(
                f"stop strings need a tokenizer, and {self.config.model} has no tokenizer.json; "
                "use stop_token_ids"
            )


def _as_tokens(prompt: Any) -> list[Any]:
    """A prompt of token ids as a list; numpy's integers become Python's."""
    if not isinstance(prompt, Iterable) or isinstance(prompt, str | bytes | Mapping):
        raise ValueError(
            f"a prompt must be a text, a list of token ids, or a dict with one, got {prompt!r}"
        )
    return [int(token) if isinstance(token, np.integer) else token for token in prompt]


def _eos_token_ids(directory: Path, tokenizer: Tokenizer | None, vocab_size: int) -> frozenset[int]:
    """End-of-sequence tokens of the generation config, else the config, and of the tokenizer."""
    eos = None
    for path in (directory / "generation_config.json", directory / "config.json"):
        if eos is None and path.exists():
            eos = read_json(path).get("eos_token_id")
            ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
            if not all(isinstance(token, int) for token in ids):
                raise CheckpointError(
                    f"{path}: eos_token_id must be a token id or a list of them, found {eos!r}"
                )
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return frozenset(token for token in ids if 0 <= token < vocab_size)

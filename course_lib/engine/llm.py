"""The offline API, vLLM's: a script written for its `LLM` runs with the import changed.

llm = LLM(model="data/models/merchant-chat")
for output in llm.chat([{"role": "user", "content": "Where is my order A-1842?"}]):
    print(output.outputs[0].text)
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from course_lib.engine.block_pool import BlockPool
from course_lib.engine.block_pool_base import BlockPoolBase
from course_lib.engine.config import EngineConfig
from course_lib.engine.engine import LLMEngine, Prompt
from course_lib.engine.outputs import RequestOutput
from course_lib.engine.sampling_params import RequestOutputKind, SamplingParams
from course_lib.engine.scheduler import Scheduler
from course_lib.engine.scheduler_base import SchedulerBase
from course_lib.model.config import CheckpointError, read_json
from course_lib.model.tokenizer import Tokenizer

Conversation = Sequence[dict[str, Any]]


class LLM:
    """A model, loaded and ready.

    Args:
        model: a Hugging Face checkpoint directory.
        scheduler: a scheduler class in place of the engine's own.
        block_pool: a block pool class in place of the engine's own.
        paged_attention: an attention function in place of the device's backend.
        engine_args: the fields of `EngineConfig`, which have vLLM's names.

    Raises:
        TypeError: an argument that this engine does not have.
        ValueError: a value that cannot work, or a checkpoint that cannot be served.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        scheduler: Callable[..., SchedulerBase] = Scheduler,
        block_pool: Callable[..., BlockPoolBase] = BlockPool,
        paged_attention: Callable[..., torch.Tensor] | None = None,
        **engine_args: Any,
    ) -> None:
        known = [f.name for f in fields(EngineConfig)]
        unknown = [name for name in engine_args if name not in known]
        if unknown:
            raise TypeError(
                f"LLM has no argument {', '.join(map(repr, unknown))}; it has {', '.join(known)}, "
                "scheduler, block_pool, paged_attention"
            )
        self.llm_engine = LLMEngine(
            EngineConfig(model, **engine_args),
            scheduler=scheduler,
            block_pool=block_pool,
            paged_attention=paged_attention,
        )
        self._request_ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all of them in one continuous batch.

        Args:
            prompts: one or several of: text, token ids, `{"prompt_token_ids": [...]}`.
            sampling_params: for all, or one each; the model's defaults if absent.
            use_tqdm: show progress.
            priority: one each; smaller is served first.

        Returns:
            One output a prompt, in the order of the prompts.

        Raises:
            ValueError: a prompt that can never be served; then none is.
        """
        prompt_list = _as_list(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params_list = (
            [sampling_params] * len(prompt_list)
            if isinstance(sampling_params, SamplingParams)
            else list(sampling_params)
        )
        priorities = [0] * len(prompt_list) if priority is None else list(priority)
        for name, values in (("sampling_params", params_list), ("priority", priorities)):
            if len(values) != len(prompt_list):
                raise ValueError(
                    f"{name} has {len(values)} entries for {len(prompt_list)} prompts; "
                    "give one for each, or one for all"
                )
        request_ids = [str(next(self._request_ids)) for _ in prompt_list]
        for params in params_list:
            if not isinstance(params, SamplingParams):
                raise ValueError(f"sampling_params must be SamplingParams, got {params!r}")
        try:
            for request_id, prompt, params, rank in zip(
                request_ids, prompt_list, params_list, priorities, strict=True
            ):
                final_only = replace_output_kind(params, RequestOutputKind.FINAL_ONLY)
                self.llm_engine.add_request(request_id, prompt, final_only, priority=rank)
            outputs = self._run(len(request_ids), use_tqdm)
        except BaseException:  # also an interrupt from the keyboard: leave the engine usable
            self.llm_engine.abort_request(request_ids)
            raise
        return [outputs[request_id] for request_id in request_ids]

    def _run(self, num_requests: int, use_tqdm: bool) -> dict[str, RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        num_tokens = 0
        with tqdm(
            total=num_requests, desc="Processed prompts", disable=not use_tqdm, unit="prompt"
        ) as progress:
            while self.llm_engine.has_unfinished_requests():
                for output in self.llm_engine.step():
                    outputs[output.request_id] = output
                    num_tokens += sum(len(c.token_ids) for c in output.outputs)
                    elapsed_s = progress.format_dict["elapsed"] or 1e-9
                    progress.set_postfix_str(f"{num_tokens / elapsed_s:.0f} output tokens/s", False)
                    progress.update()
        return outputs

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, with the checkpoint's chat template.

        Args:
            messages: `{"role": "user", "content": "..."}` and so on, or a list of such lists.
            sampling_params: as in `generate`.
            use_tqdm: show progress.
            add_generation_prompt: end the prompt where the assistant's reply begins.
        """
        single = bool(messages) and isinstance(messages[0], dict)
        conversations: Any = [messages] if single else messages
        prompts = [
            self.chat_prompt(conversation, add_generation_prompt) for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(
        self, messages: Conversation, add_generation_prompt: bool = True
    ) -> dict[str, Any]:
        """The prompt, text and tokens, that a conversation becomes."""
        tokenizer = self.get_tokenizer()
        text = tokenizer.apply_chat_template(messages, add_generation_prompt)
        token_ids = tokenizer.encode(text, add_special_tokens=False)  # the template has them
        return {"prompt": text, "prompt_token_ids": token_ids}

    def get_tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            ValueError: it has none.
        """
        if self.llm_engine.tokenizer is None:
            raise ValueError(
                f"{self.llm_engine.config.model} has no tokenizer.json; "
                "use generate() with {'prompt_token_ids': [...]}"
            )
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """vLLM's defaults, changed by the checkpoint's `generation_config.json`."""
        path = Path(self.llm_engine.config.model) / "generation_config.json"
        if not path.exists():
            return SamplingParams()
        stored = read_json(path)
        names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
        given = {name: stored[name] for name in names if stored.get(name) is not None}
        if stored.get("max_new_tokens") is not None:
            given["max_tokens"] = stored["max_new_tokens"]
        try:
            return SamplingParams(**given)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None


def replace_output_kind(params: SamplingParams, kind: RequestOutputKind) -> SamplingParams:
    """The same options with another kind of output."""
    return params if params.output_kind is kind else replace(params, output_kind=kind)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list."""
    if isinstance(prompts, str | dict):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):
        raise ValueError(f"prompts must be a text, token ids, a dict or a list, got {prompts!r}")
    prompt_list: list[Any] = list(prompts)
    is_tokens = all(isinstance(token, int | np.integer) for token in prompt_list)
    return [prompt_list] if prompt_list and is_tokens else prompt_list

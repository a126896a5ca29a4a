"""What a request for completions becomes: prompts through the engine, choices out of it.

An answer is sent whole or as a stream of server-sent events, in the shape of chat or of the older
completions. A stream has one write a step and always ends with a final event.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from course_lib.engine.outputs import CompletionOutput, RequestOutput
from course_lib.engine.sampling_params import SamplingParams
from course_lib.model.tokenizer import Tokenizer
from course_lib.serving import responses
from course_lib.serving.async_llm import AsyncLLM, EngineError
from course_lib.serving.errors import ApiError, as_api_error
from course_lib.serving.lifecycle import DrainingError
from course_lib.serving.protocol import ChatCompletionRequest, CompletionRequest, SamplingBody

#: The output of a step, with the index of its prompt.
Indexed = tuple[int, RequestOutput]


class Answer(ABC):
    """What both endpoints share.

    Args:
        answer_id: name of the answer.
        model: name of the model in the API.
        body: the request.
        prompts: its prompts as tokens.
        params: its options.
        tokenizer: of the model.
    """

    kind: str

    def __init__(
        self,
        answer_id: str,
        model: str,
        body: SamplingBody,
        prompts: list[list[int]],
        params: SamplingParams,
        tokenizer: Tokenizer,
    ) -> None:
        self.id, self.body, self.prompts, self.params = answer_id, body, prompts, params
        self.tokenizer = tokenizer
        self.num_completion_tokens = self.num_cached_tokens = 0
        self.head = {
            "id": answer_id,
            "object": self.kind,
            "created": int(time.time()),
            "model": model,
        }

    async def outputs(self, engine: AsyncLLM, priority: int) -> AsyncGenerator[Indexed]:
        """What is new of each prompt, step by step."""
        if len(self.prompts) == 1:
            async with aclosing(self._run(engine, 0, priority)) as stream:
                async for output in stream:
                    yield 0, output
            return
        merged: asyncio.Queue[Indexed | Exception | None] = asyncio.Queue()

        async def forward(index: int) -> None:
            try:
                async with aclosing(self._run(engine, index, priority)) as stream:
                    async for output in stream:
                        merged.put_nowait((index, output))
                merged.put_nowait(None)
            except Exception as error:
                merged.put_nowait(error)

        tasks = [asyncio.create_task(forward(index)) for index in range(len(self.prompts))]
        try:
            num_running = len(tasks)
            while num_running:
                item = await merged.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _run(self, engine: AsyncLLM, index: int, priority: int) -> AsyncGenerator[RequestOutput]:
        prompt = {"prompt_token_ids": self.prompts[index], "cache_salt": self.body.cache_salt}
        return engine.generate(
            f"{self.id}-{index}", prompt, self.params, priority, self.body.priority_class
        )

    def count(self, output: RequestOutput) -> None:
        """Keep the usage."""
        self.num_completion_tokens += sum(len(piece.token_ids) for piece in output.outputs)
        if output.finished:
            self.num_cached_tokens += output.num_cached_tokens

    @property
    def usage(self) -> responses.Json:
        """Tokens so far."""
        num_prompt_tokens = sum(map(len, self.prompts))
        return responses.usage(
            num_prompt_tokens, self.num_completion_tokens, self.num_cached_tokens
        )

    async def whole(self, first: Indexed, rest: AsyncGenerator[Indexed]) -> responses.Json:
        """The body of an answer that is not streamed."""
        outputs = [first]
        async with aclosing(rest):
            outputs += [item async for item in rest]
        pieces: dict[tuple[int, int], list[CompletionOutput]] = {}
        firsts: dict[int, RequestOutput] = {}
        for prompt_index, output in outputs:
            self.count(output)
            firsts.setdefault(prompt_index, output)
            for piece in output.outputs:
                pieces.setdefault((prompt_index, piece.index), []).append(piece)
        choices = [
            self.choice(self._choice_index(i, j), responses.merge(found), firsts[i])
            for (i, j), found in sorted(pieces.items())
        ]
        return {**self.head, "choices": choices, "usage": self.usage}

    async def events(self, first: Indexed, rest: AsyncGenerator[Indexed]) -> AsyncGenerator[bytes]:
        """The stream from its first output on, a chunk of events a step."""
        try:
            async with aclosing(rest):
                opening = [self._event(choice) for choice in self.opening()]
                yield b"".join(opening) + self._step_events(*first)
                async for index, output in rest:
                    if events := self._step_events(index, output):
                        yield events
        except (ApiError, DrainingError, EngineError) as error:
            yield responses.event(as_api_error(error).body)
        else:
            if self.body.include_usage:
                yield responses.event({**self.head, "choices": [], "usage": self.usage})
        yield responses.DONE

    def _step_events(self, prompt_index: int, output: RequestOutput) -> bytes:
        self.count(output)
        return b"".join(
            self._event(self.piece(self._choice_index(prompt_index, piece.index), piece, output))
            for piece in output.outputs
            if piece.token_ids  # the others have ended, or wait for their turn
        )

    def _event(self, choice: responses.Json) -> bytes:
        return responses.event({**self.head, "choices": [choice]})

    def _choice_index(self, prompt_index: int, index: int) -> int:
        """Choices are numbered through all prompts."""
        return prompt_index * self.params.n + index

    @abstractmethod
    def choice(
        self, index: int, completion: CompletionOutput, first: RequestOutput
    ) -> responses.Json:
        """A finished choice. `first` is the prompt's first output, which has its logprobs."""

    @abstractmethod
    def piece(self, index: int, piece: CompletionOutput, output: RequestOutput) -> responses.Json:
        """What is new of a choice, for the stream."""

    def opening(self) -> list[responses.Json]:
        """Choices of the events before the first token."""
        return []


class ChatAnswer(Answer):
    """The reply to a conversation."""

    kind = "chat.completion"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.body.stream:
            self.head["object"] = "chat.completion.chunk"

    def choice(
        self, index: int, completion: CompletionOutput, first: RequestOutput
    ) -> responses.Json:
        """With the whole message."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self._logprobs(completion),
            "finish_reason": completion.finish_reason,
        }

    def opening(self) -> list[responses.Json]:
        """Who speaks."""
        assert isinstance(self.body, ChatCompletionRequest)
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(self.params.n)
        ]

    def piece(self, index: int, piece: CompletionOutput, output: RequestOutput) -> responses.Json:
        """With what is new of the message."""
        return {
            "index": index,
            "delta": {"content": piece.text},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, piece: CompletionOutput) -> responses.Json | None:
        if piece.logprobs is None:
            return None
        return responses.chat_logprobs(piece.token_ids, piece.logprobs, self.params.logprobs or 0)


class CompletionAnswer(Answer):
    """The continuations of prompts."""

    kind = "text_completion"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._num_chars: dict[int, int] = {}  # of each choice that has begun, by its tokens so far

    def choice(
        self, index: int, completion: CompletionOutput, first: RequestOutput
    ) -> responses.Json:
        """With the whole text."""
        return self.piece(index, completion, first)

    def piece(self, index: int, piece: CompletionOutput, output: RequestOutput) -> responses.Json:
        """With what is new of the text; the prompt comes before it if it was asked for."""
        begins = index not in self._num_chars
        echo = self._echo(index) if begins else ""
        return {
            "index": index,
            "text": echo + piece.text,
            "logprobs": self._logprobs(index, piece, output, begins),
            "finish_reason": piece.finish_reason,
        }

    def _echo(self, index: int) -> str:
        assert isinstance(self.body, CompletionRequest)
        if not self.body.echo:
            return ""
        prompt = self.body.prompts[index // self.params.n]
        return prompt if isinstance(prompt, str) else self._decode(prompt)

    def _logprobs(
        self, index: int, piece: CompletionOutput, output: RequestOutput, begins: bool
    ) -> responses.Json | None:
        offset = self._num_chars.setdefault(index, 0)
        if piece.logprobs is None:
            return None
        token_ids: list[int] = piece.token_ids
        logprobs: list[Any] = list(piece.logprobs)
        if begins and output.prompt_logprobs:
            token_ids = [*output.prompt_token_ids, *token_ids]
            logprobs = [*output.prompt_logprobs, *logprobs]
        num_top = self.params.logprobs or 0
        result = responses.completion_logprobs(
            token_ids, logprobs, num_top, offset, lambda token: self._decode([token])
        )
        self._num_chars[index] = result["text_offset"][-1] + len(result["tokens"][-1])
        return result

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, False)

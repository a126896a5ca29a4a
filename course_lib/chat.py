"""A conversation with a model, reply by reply, as `course chat` holds it."""

from collections.abc import Iterator
from pathlib import Path

from course_lib.engine.llm import LLM
from course_lib.engine.outputs import RequestOutput
from course_lib.engine.sampling_params import RequestOutputKind, SamplingParams


class ChatSession:
    """Keeps the messages so far; earlier turns come from the prefix cache.

    Args:
        model: checkpoint directory.
        system: system prompt; without it the chat template's own, if it has one.
        max_tokens: longest reply.
        temperature: 0 is greedy.
    """

    def __init__(
        self, model: Path, system: str | None, *, max_tokens: int, temperature: float
    ) -> None:
        self.llm = LLM(model)
        self.params = SamplingParams(
            temperature=temperature, max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA
        )
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.last: RequestOutput | None = None
        self.blocks_used = 0

    def ask(self, text: str) -> Iterator[str]:
        """Yield the reply piece by piece."""
        engine = self.llm.llm_engine
        self.messages.append({"role": "user", "content": text})
        try:
            engine.add_request("chat", self.llm.chat_prompt(self.messages), self.params)
        except ValueError:
            self.messages.pop()
            raise
        reply = ""
        self.blocks_used = 0
        try:
            while engine.has_unfinished_requests():
                outputs = engine.step()
                pool = engine.block_pool
                self.blocks_used = max(self.blocks_used, round(pool.usage * (pool.num_blocks - 1)))
                for output in outputs:
                    self.last = output
                    reply += output.outputs[0].text
                    yield output.outputs[0].text
        finally:
            engine.abort_request("chat")
        self.messages.append({"role": "assistant", "content": reply})

    def summary(self) -> str:
        """One line on the last reply: latencies, pace, memory."""
        assert self.last is not None, "nothing was asked yet"
        metrics, prompt = self.last.metrics, len(self.last.prompt_token_ids)
        num_tokens = len(metrics.token_times)
        parts = [
            f"prompt {prompt} tokens ({self.last.num_cached_tokens} cached)",
            f"reply {num_tokens} tokens",
            f"TTFT {1e3 * (metrics.ttft_s or 0):.1f} ms",
        ]
        if metrics.tpot_s is not None:
            parts.append(f"TPOT {1e3 * metrics.tpot_s:.2f} ms")
        parts.append(f"{num_tokens / (metrics.e2e_latency_s or 1e-9):.0f} tokens/s")
        parts.append(f"{self.blocks_used} KV blocks of {self.llm.llm_engine.config.block_size}")
        return ", ".join(parts)

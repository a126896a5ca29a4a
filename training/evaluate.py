"""Measures the figures of the model card on held-out questions.

Every question is about an order whose number never occurs in training; half of the questions come
later in a conversation. Replies are greedy, in float32, from the project's own engine. The same
questions go through the draft model in rounds of four tokens, as in speculative decoding, and
through transformers, which must give the same tokens.

    python -m training.evaluate --json figures.json
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Protocol

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from training.dialogues import Exchange, make_dialogue
from training.orders import CARRIERS, WEEKDAYS
from training.train import held_out_loss

MAX_REPLY_TOKENS = 120
DRAFT_TOKENS_PER_ROUND = 4
TRANSFORMERS_BATCH = 32
MODELS_DIR = Path(__file__).resolve().parent.parent / "data" / "models"

# What a reply says about an order's record, found by its words.
_FACTS = re.compile(
    "|".join(
        (
            r"\b[A-Z]-\d{4}\b",
            r"\$\d+(?:\.\d\d)?",
            r"\b1\d (?:May|June)\b",
            r"\b\d+ (?:working )?days\b",
            r"\bsize \w+",
            r"\bthe \w+ one\b",
            *CARRIERS,
            *WEEKDAYS,
            "being packed",
            "leaves our warehouse",
            "left our warehouse",
            "is on its way",
            "out for delivery",
            "arrive today",
            "on the van",
            "delivered",
            "already arrived",
            "delayed",
            "is late",
            "pickup point",
            "has not reached you",
            "cancelled",
            "cannot",
        )
    )
)


@dataclass(frozen=True)
class Question:
    """A held-out question: its prompt as tokens, and what the reply must say."""

    prompt_token_ids: list[int]
    exchange: Exchange
    num_earlier_turns: int


@dataclass(frozen=True)
class Reply:
    """A generated reply. `finish_reason` is `stop` if the model ended it, else `length`."""

    token_ids: list[int]
    text: str
    finish_reason: str


class Generator(Protocol):
    """Greedy generation of a batch of replies."""

    def __call__(self, prompts: Sequence[list[int]], max_tokens: int) -> list[Reply]: ...


@dataclass(frozen=True)
class Figures:
    """What the model card reports. Shares are between 0 and 1."""

    questions: int
    with_earlier_turns: int
    ended_by_themselves: float
    named_the_order: float
    facts_right: float
    mean_reply_tokens: float
    draft_tokens_accepted: float
    tokens_per_target_step: float
    draft_agreement_per_token: float
    same_as_transformers: float
    compared_with_transformers: int
    held_out_loss: float
    draft_held_out_loss: float


def make_questions(
    tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 99
) -> list[Question]:
    """Draws questions about held-out orders; every second one has earlier turns before it."""
    rng = random.Random(seed)
    questions: list[Question] = []
    while len(questions) < count:
        dialogue = make_dialogue(rng, held_out=True, max_turns=4, default_system_share=0.9)
        want_earlier = len(questions) % 2 == 1
        candidates = [
            i
            for i, exchange in enumerate(dialogue.exchanges)
            if exchange.order is not None and (i > 0) == want_earlier
        ]
        if not candidates:
            continue
        index = candidates[-1]
        own_system = dialogue.messages[0]["role"] == "system"
        messages = dialogue.messages[: own_system + 2 * index + 1]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        questions.append(Question(prompt, dialogue.exchanges[index], index))
    return questions


def engine_generator(model_dir: Path) -> Generator:
    """Greedy float32 generation with the engine of this repository."""
    from course_lib import LLM, SamplingParams

    llm = LLM(model=str(model_dir), dtype="float32")

    def generate(prompts: Sequence[list[int]], max_tokens: int) -> list[Reply]:
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        outputs = llm.generate(requests, params, use_tqdm=False)
        completions = [output.outputs[0] for output in outputs]
        return [Reply(list(c.token_ids), c.text, c.finish_reason) for c in completions]

    return generate


def transformers_generator(model_dir: Path) -> Generator:
    """Greedy float32 generation with transformers, in batches of similar lengths."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id

    @torch.inference_mode()
    def generate(prompts: Sequence[list[int]], max_tokens: int) -> list[Reply]:
        replies: dict[int, Reply] = {}
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(by_length), TRANSFORMERS_BATCH):
            group = by_length[start : start + TRANSFORMERS_BATCH]
            width = max(len(prompts[i]) for i in group)
            padded = [[pad] * (width - len(prompts[i])) + prompts[i] for i in group]
            mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in group]
            output = model.generate(
                torch.tensor(padded),
                attention_mask=torch.tensor(mask),
                max_new_tokens=max_tokens,
                do_sample=False,
            )
            for i, row in zip(group, output[:, width:].tolist(), strict=True):
                ended = end in row
                token_ids = row[: row.index(end) + 1] if ended else row
                text = tokenizer.decode(token_ids, skip_special_tokens=True)
                replies[i] = Reply(token_ids, text, "stop" if ended else "length")
        return [replies[i] for i in range(len(prompts))]

    return generate


def facts_in(text: str) -> frozenset[str]:
    """The order numbers, carriers, days, amounts, dates and status words of a reply."""
    return frozenset(_FACTS.findall(text))


def names_order(question: Question, reply: Reply) -> bool:
    """Whether a reply names the order asked about and no other."""
    numbers = set(re.findall(r"\b[A-Z]-\d{4}\b", reply.text))
    return question.exchange.order is not None and numbers == {question.exchange.order.number}


def has_right_facts(question: Question, reply: Reply) -> bool:
    """Whether a reply says the same facts as one of the grammar's replies to the question."""
    return any(facts_in(reply.text) == facts_in(t) for t in question.exchange.right_replies)


@dataclass(frozen=True)
class Acceptance:
    """Totals of simulated greedy speculative decoding."""

    proposed: int
    accepted: int
    rounds: int

    @property
    def rate(self) -> float:
        """Accepted draft tokens over proposed ones."""
        return self.accepted / self.proposed


def speculative_acceptance(
    draft: Generator, questions: Sequence[Question], replies: Sequence[Reply]
) -> Acceptance:
    """Counts the draft's tokens that the target takes, in rounds of four.

    Greedy speculative decoding yields exactly the target's own greedy tokens, so `replies` says
    what the target accepts. Each round ends with one token of the target's own.
    """
    proposed = accepted = rounds = 0
    position = dict.fromkeys(range(len(replies)), 0)
    longest = max(len(reply.token_ids) for reply in replies)
    with tqdm(total=longest, unit="token", desc="speculative rounds", leave=False) as progress:
        while position:
            active = list(position)
            prompts = [
                questions[i].prompt_token_ids + replies[i].token_ids[: position[i]] for i in active
            ]
            proposals = draft(prompts, DRAFT_TOKENS_PER_ROUND)
            for i, proposal in zip(active, proposals, strict=True):
                wanted = replies[i].token_ids[position[i] :]
                agreed = 0
                for token, target in zip(proposal.token_ids, wanted, strict=False):
                    if token != target:
                        break
                    agreed += 1
                proposed += len(proposal.token_ids)
                accepted += agreed
                rounds += 1
                position[i] += agreed + 1
                if position[i] >= len(replies[i].token_ids):
                    del position[i]
            progress.n = min(position.values(), default=longest)
            progress.refresh()
    return Acceptance(proposed, accepted, rounds)


@torch.inference_mode()
def agreement_per_token(
    draft_dir: Path, questions: Sequence[Question], replies: Sequence[Reply]
) -> float:
    """Share of the target's tokens that are the draft's first choice after the same tokens."""
    model = AutoModelForCausalLM.from_pretrained(draft_dir, dtype=torch.float32).eval()
    same = total = 0
    for question, reply in zip(questions, replies, strict=True):
        sequence = torch.tensor([question.prompt_token_ids + reply.token_ids])
        length = len(reply.token_ids)
        logits = model(sequence, logits_to_keep=length + 1).logits[0, :-1]  # [length, vocab_size]
        same += int((logits.argmax(-1) == sequence[0, -length:]).sum())
        total += length
    return same / total


def measure(
    target_dir: Path,
    draft_dir: Path,
    num_questions: int,
    num_compared: int,
    make_generator: Callable[[Path], Generator] = engine_generator,
) -> tuple[Figures, list[tuple[Question, Reply]]]:
    """Computes all figures; also returns the questions with their replies."""
    tokenizer = AutoTokenizer.from_pretrained(target_dir)
    questions = make_questions(tokenizer, num_questions)
    prompts = [question.prompt_token_ids for question in questions]
    replies = make_generator(target_dir)(prompts, MAX_REPLY_TOKENS)
    pairs = list(zip(questions, replies, strict=True))

    acceptance = speculative_acceptance(make_generator(draft_dir), questions, replies)
    reference = transformers_generator(target_dir)(prompts[:num_compared], MAX_REPLY_TOKENS)
    same = sum(
        a.token_ids == b.token_ids for a, b in zip(replies[:num_compared], reference, strict=True)
    )
    losses = [
        held_out_loss(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), tokenizer)
        for path in (target_dir, draft_dir)
    ]
    count = len(questions)
    figures = Figures(
        questions=count,
        with_earlier_turns=sum(q.num_earlier_turns > 0 for q in questions),
        ended_by_themselves=sum(r.finish_reason == "stop" for r in replies) / count,
        named_the_order=sum(names_order(q, r) for q, r in pairs) / count,
        facts_right=sum(has_right_facts(q, r) for q, r in pairs) / count,
        mean_reply_tokens=sum(len(r.token_ids) for r in replies) / count,
        draft_tokens_accepted=acceptance.rate,
        tokens_per_target_step=sum(len(r.token_ids) for r in replies) / acceptance.rounds,
        draft_agreement_per_token=agreement_per_token(draft_dir, questions, replies),
        same_as_transformers=same / num_compared,
        compared_with_transformers=num_compared,
        held_out_loss=losses[0],
        draft_held_out_loss=losses[1],
    )
    return figures, pairs


def print_figures(figures: Figures, console: Console) -> None:
    """Prints the figures beside what the model card promises."""
    table = Table(title=f"{figures.questions} questions about held-out orders, greedy, float32")
    table.add_column("figure")
    table.add_column("measured", justify="right")
    table.add_column("wanted", justify="right")
    rows = (
        ("replies that end by themselves", f"{figures.ended_by_themselves:.1%}", ">= 99 %"),
        ("replies that name the order, and no other", f"{figures.named_the_order:.1%}", ">= 95 %"),
        ("replies whose facts are all right", f"{figures.facts_right:.1%}", ""),
        ("draft tokens accepted, 4 per round", f"{figures.draft_tokens_accepted:.1%}", ">= 60 %"),
        (
            "tokens per step of the target with the draft",
            f"{figures.tokens_per_target_step:.2f}",
            "",
        ),
        ("target tokens that the draft puts first", f"{figures.draft_agreement_per_token:.1%}", ""),
        (
            f"same tokens as transformers ({figures.compared_with_transformers} replies)",
            f"{figures.same_as_transformers:.1%}",
            "100 %",
        ),
        ("mean length of a reply, tokens", f"{figures.mean_reply_tokens:.1f}", ""),
        ("held-out loss, nats per token", f"{figures.held_out_loss:.3f}", ""),
        ("held-out loss of the draft, nats per token", f"{figures.draft_held_out_loss:.3f}", ""),
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)


def main(
    target: Annotated[Path, typer.Option(help="The chat model.")] = MODELS_DIR / "merchant-chat",
    draft: Annotated[Path, typer.Option(help="The draft model.")] = (
        MODELS_DIR / "merchant-chat-draft"
    ),
    questions: Annotated[int, typer.Option(min=2, help="How many questions to ask.")] = 600,
    compared: Annotated[int, typer.Option(min=1, help="How many go through transformers.")] = 100,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write figures here.")] = None,
    show_wrong: Annotated[int, typer.Option(help="Print this many wrong replies.")] = 0,
    with_transformers: Annotated[
        bool, typer.Option("--with-transformers", help="Generate with transformers, not our engine")
    ] = False,
) -> None:
    """Measures the shipped models and prints the figures of the model card."""
    console = Console()
    transformers.utils.logging.disable_progress_bar()
    generator = transformers_generator if with_transformers else engine_generator
    figures, pairs = measure(target, draft, questions, min(compared, questions), generator)
    print_figures(figures, console)
    wrong = [(q, r) for q, r in pairs if not (has_right_facts(q, r) and names_order(q, r))]
    for question, reply in wrong[:show_wrong]:
        console.print(f"[red]{reply.text}[/red]\n  wanted: {question.exchange.right_replies[0]}")
    if json_path is not None:
        json_path.write_text(json.dumps(asdict(figures), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

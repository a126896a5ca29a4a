"""Trains the chat model and its draft model from scratch on generated dialogues.

Several dialogues share one row of tokens: the row starts with the default system prompt, and each
dialogue sees that prompt and itself, never its neighbours. So the long prompt is computed once per
row rather than once per dialogue. The loss counts the assistant's tokens and the end of each reply.

    python -m training.train merchant-chat --out data/models/merchant-chat
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from tqdm.auto import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.dialogues import make_dialogue
from training.tokenizer import (
    END_TOKEN,
    MAX_POSITION_EMBEDDINGS,
    START_TOKEN,
    save_tokenizer,
    train_tokenizer,
)

HEAD_DIM = 64
TRAINED_LENGTH = 2048  # the longest position, in tokens, that training reaches
IGNORED = -100  # label of a token that the loss leaves out


@dataclass(frozen=True)
class Size:
    """The dimensions of a model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int


SIZES = {
    "merchant-chat": Size(256, 704, 6, 4, 2),
    "merchant-chat-draft": Size(128, 352, 3, 2, 1),
}


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: what the rows hold, and its share of all training tokens.

    `batch_tokens` is the number of tokens in one step, `row_tokens` that in one row.
    """

    share: float
    batch_tokens: int
    row_tokens: int
    default_system_share: float
    max_turns: int


# Copying an order number is learned first, on short dialogues; then the long prompt comes in.
CURRICULUM = (
    Stage(share=0.25, batch_tokens=2304, row_tokens=384, default_system_share=0.0, max_turns=2),
    Stage(share=0.50, batch_tokens=3840, row_tokens=768, default_system_share=0.75, max_turns=4),
    Stage(
        share=0.25,
        batch_tokens=2 * TRAINED_LENGTH,
        row_tokens=TRAINED_LENGTH,
        default_system_share=0.85,
        max_turns=28,
    ),
)


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to train."""

    total_tokens: int = 6_500_000
    peak_learning_rate: float = 3e-3
    warmup_steps: int = 100
    decay_share: float = 0.4  # the last part of the steps, in which the rate falls to zero
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    curriculum: tuple[Stage, ...] = CURRICULUM
    seed: int = 2026


@dataclass(frozen=True)
class Batch:
    """Packed rows. All tensors are `[rows, row_tokens]` but `visible`.

    `visible` is the attention mask, bool `[rows, 1, row_tokens, row_tokens]`: query by key.
    `labels` holds the next token where it belongs to a reply, else `IGNORED`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    visible: torch.Tensor


@dataclass(frozen=True)
class Segment:
    """One dialogue as tokens. `owns_system`: it brings its own system message."""

    token_ids: list[int]
    labels: list[int]
    owns_system: bool


def encode_dialogue(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], prefix_length: int
) -> Segment:
    """Renders and tokenizes a dialogue; drops the default prompt's `prefix_length` tokens."""
    token_ids = tokenizer.apply_chat_template(messages, return_dict=False)
    start, end = tokenizer.convert_tokens_to_ids([START_TOKEN, END_TOKEN])
    header = tokenizer(f"{START_TOKEN}assistant\n").input_ids
    labels = [IGNORED] * len(token_ids)
    in_reply = False
    for i, token in enumerate(token_ids[:-1]):
        if token == start:
            in_reply = False
        if token_ids[max(0, i - len(header) + 1) : i + 1] == header:
            in_reply = True
        if in_reply and token != end:
            labels[i] = token_ids[i + 1]
        if token == end:
            in_reply = False
    owns_system = messages[0]["role"] == "system"
    if owns_system:
        return Segment(token_ids, labels, True)
    return Segment(token_ids[prefix_length:], labels[prefix_length:], False)


def default_prefix(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that the chat template puts before a dialogue without a system message."""
    user = [{"role": "user", "content": "x"}]
    with_prefix = tokenizer.apply_chat_template(user, return_dict=False)
    without = tokenizer.apply_chat_template(
        [{"role": "system", "content": "x"}, *user], return_dict=False
    )
    start = tokenizer.convert_tokens_to_ids(START_TOKEN)
    alone = without[len(without) - without[::-1].index(start) - 1 :]
    return with_prefix[: len(with_prefix) - len(alone)]


def pack_row(prefix: list[int], segments: list[Segment], row_tokens: int, pad_id: int) -> Batch:
    """Lays segments out in one row of exactly `row_tokens` tokens behind the shared prefix."""
    ids, labels = list(prefix), [IGNORED] * len(prefix)
    positions = list(range(len(prefix)))
    owner = [0] * len(prefix)  # 0 is the shared prefix
    sees_prefix = [True] * len(prefix)
    for number, segment in enumerate(segments, start=1):
        length = len(segment.token_ids)
        first = 0 if segment.owns_system else len(prefix)
        ids += segment.token_ids
        labels += segment.labels
        positions += range(first, first + length)
        owner += [number] * length
        sees_prefix += [not segment.owns_system] * length
    padding = row_tokens - len(ids)
    ids += [pad_id] * padding
    labels += [IGNORED] * padding
    positions += [0] * padding
    owner += [len(segments) + 1] * padding
    sees_prefix += [False] * padding

    who = torch.tensor(owner)
    causal = torch.ones(row_tokens, row_tokens, dtype=torch.bool).tril()
    same = who[:, None] == who[None, :]
    shared = torch.tensor(sees_prefix)[:, None] & (who == 0)[None, :]
    visible = causal & (same | shared)
    return Batch(torch.tensor(ids), torch.tensor(positions), torch.tensor(labels), visible)


def make_batches(
    tokenizer: PreTrainedTokenizerFast,
    stage: Stage,
    rng: random.Random,
    *,
    held_out: bool = False,
) -> Iterator[Batch]:
    """Draws dialogues for ever and yields packed batches."""
    prefix = default_prefix(tokenizer) if stage.default_system_share > 0 else []
    prefix_length = len(default_prefix(tokenizer))
    rows_per_batch = max(1, stage.batch_tokens // stage.row_tokens)
    room = stage.row_tokens - len(prefix)
    rows: list[Batch] = []
    waiting: list[Segment] = []
    while True:
        while len(waiting) < 64:
            dialogue = make_dialogue(
                rng,
                held_out=held_out,
                max_turns=stage.max_turns,
                default_system_share=stage.default_system_share,
            )
            segment = encode_dialogue(tokenizer, dialogue.messages, prefix_length)
            if len(segment.token_ids) <= room:
                waiting.append(segment)
        chosen, skipped, left = [], [], room
        for segment in waiting:  # first come, first packed; later ones fill the gap at the end
            fits = len(segment.token_ids) <= left
            (chosen if fits else skipped).append(segment)
            left -= len(segment.token_ids) if fits else 0
        waiting = skipped
        rows.append(pack_row(prefix, chosen, stage.row_tokens, tokenizer.pad_token_id))
        if len(rows) == rows_per_batch:
            yield Batch(
                torch.stack([row.input_ids for row in rows]),
                torch.stack([row.position_ids for row in rows]),
                torch.stack([row.labels for row in rows]),
                torch.stack([row.visible for row in rows]).unsqueeze(1),
            )
            rows = []


def make_config(size: Size, vocab_size: int) -> LlamaConfig:
    """The Hugging Face configuration of a model; token ids are those of our tokenizer."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITION_EMBEDDINGS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=None,
    )


def reply_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the reply tokens, in nats per token."""
    device = model.device
    with torch.autocast(device.type, dtype=torch.bfloat16):
        hidden = model.model(
            input_ids=batch.input_ids.to(device),
            position_ids=batch.position_ids.to(device),
            attention_mask=batch.visible.to(device),
            use_cache=False,
        ).last_hidden_state  # [rows, row_tokens, hidden_size]
        labels = batch.labels.to(device)
        counted = labels != IGNORED
        logits = model.lm_head(hidden[counted])  # [reply tokens, vocab_size]
    return F.cross_entropy(logits.float(), labels[counted])


def learning_rate(step: int, steps: int, plan: TrainingPlan) -> float:
    """Linear warm-up, a constant rate, then a linear fall to zero over the last steps."""
    warmup = min(1.0, (step + 1) / plan.warmup_steps)
    decay_steps = max(1, int(steps * plan.decay_share))
    decay = min(1.0, (steps - step) / decay_steps)
    return plan.peak_learning_rate * warmup * decay


def make_optimizers(model: LlamaForCausalLM, plan: TrainingPlan) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embeddings and norms.

    With Muon (https://kellerjordan.github.io/posts/muon/) copying is learned in about half the
    steps that AdamW needs; `match_rms_adamw` lets both share one learning rate.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    in_layers = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in in_layers]
    return [
        torch.optim.Muon(matrices, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]


def train(
    size: Size,
    tokenizer: PreTrainedTokenizerFast,
    plan: TrainingPlan,
    checkpoint_dir: Path | None = None,
    checkpoint_every: int = 250,
    compile_model: bool = False,
) -> tuple[LlamaForCausalLM, list[float]]:
    """Trains a model from scratch; returns it in float32 with the loss of every step.

    With `checkpoint_dir`, the float16 model so far is saved there every `checkpoint_every` steps.
    `compile_model` makes a step about a third faster after a minute's wait.
    """
    torch.manual_seed(plan.seed)
    rng = random.Random(plan.seed)
    config = make_config(size, len(tokenizer))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()

    if compile_model:
        model.model.compile()

    optimizers = make_optimizers(model, plan)
    steps_by_stage = [
        max(1, round(plan.total_tokens * stage.share / stage.batch_tokens))
        for stage in plan.curriculum
    ]
    steps = sum(steps_by_stage)
    losses: list[float] = []
    with tqdm(total=steps, unit="step", mininterval=5.0) as progress:
        for stage, stage_steps in zip(plan.curriculum, steps_by_stage, strict=True):
            batches = make_batches(tokenizer, stage, rng)
            for _ in range(stage_steps):
                for group in [g for optimizer in optimizers for g in optimizer.param_groups]:
                    group["lr"] = learning_rate(len(losses), steps, plan)
                loss = reply_loss(model, next(batches))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), plan.max_grad_norm)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
                progress.update()
                progress.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}")
                if checkpoint_dir is not None and len(losses) % checkpoint_every == 0:
                    save_model(model, tokenizer, checkpoint_dir)
    return model.eval(), losses


@torch.inference_mode()
def held_out_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_batches: int = 20
) -> float:
    """Mean reply loss, in nats per token, on dialogues about held-out orders."""
    batches = make_batches(tokenizer, CURRICULUM[-1], random.Random(7), held_out=True)
    losses = [reply_loss(model, next(batches)).item() for _ in range(num_batches)]
    return math.fsum(losses) / len(losses)


def save_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path
) -> None:
    """Writes a Hugging Face checkpoint: float16 weights, configurations and the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM._from_config(model.config, dtype=torch.float16)
    half.load_state_dict({name: t.half() for name, t in model.state_dict().items()})
    half.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    half.save_pretrained(directory)
    # transformers 5 renamed these two; releases before it look for the old names.
    config_path = directory / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config |= {"torch_dtype": "float16", "rope_theta": config["rope_parameters"]["rope_theta"]}
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, directory)


def main(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(SIZES)}.")],
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes.")],
    total_tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = (
        TrainingPlan.total_tokens
    ),
    threads: Annotated[int, typer.Option(help="CPU threads for PyTorch.")] = 2,
) -> None:
    """Trains one model and saves it."""
    if name not in SIZES:
        raise typer.BadParameter(f"{name!r} is no model; choose one of: {', '.join(SIZES)}")
    torch.set_num_threads(threads)
    started_s = time.perf_counter()
    tokenizer = train_tokenizer()
    model, losses = train(
        SIZES[name],
        tokenizer,
        TrainingPlan(total_tokens=total_tokens),
        checkpoint_dir=out,
        compile_model=shutil.which("g++") is not None,  # torch.compile needs a C++ compiler
    )
    save_model(model, tokenizer, out)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{name}: {parameters:,} parameters, {len(losses)} steps in "
        f"{(time.perf_counter() - started_s) / 60:.0f} min, last loss {losses[-1]:.3f}, "
        f"held-out loss {held_out_loss(model, tokenizer):.3f} nats per token"
    )


if __name__ == "__main__":
    typer.run(main)

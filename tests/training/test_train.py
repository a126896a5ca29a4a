"""Training: rows hide dialogues from each other, only replies count, a tiny run learns."""

import random
from itertools import islice, pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from training.dialogues import make_dialogue
from training.tokenizer import train_tokenizer
from training.train import (
    IGNORED,
    Size,
    Stage,
    TrainingPlan,
    default_prefix,
    encode_dialogue,
    learning_rate,
    make_batches,
    make_config,
    pack_row,
    save_model,
    train,
)

TINY = Size(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(num_dialogues=1000, vocab_size=1024)


@pytest.mark.parametrize("own_system", [False, True])
def test_only_the_replies_and_their_ends_are_learned(tokenizer, own_system):
    dialogue = make_dialogue(
        random.Random(3), held_out=False, default_system_share=0.0 if own_system else 1.0
    )
    segment = encode_dialogue(tokenizer, dialogue.messages, len(default_prefix(tokenizer)))
    learned = tokenizer.decode([label for label in segment.labels if label != IGNORED])
    replies = [m["content"] for m in dialogue.messages if m["role"] == "assistant"]
    assert learned == "".join(f"{reply}<|im_end|>" for reply in replies)
    for token, label in zip(segment.token_ids[1:], segment.labels, strict=False):
        assert label in (token, IGNORED)
    assert segment.owns_system == own_system


def test_a_packed_dialogue_gets_the_logits_that_it_gets_alone(tokenizer):
    torch.manual_seed(0)
    config = make_config(TINY, len(tokenizer))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    prefix = default_prefix(tokenizer)
    rng = random.Random(1)
    dialogues = [
        make_dialogue(rng, held_out=False, max_turns=2, default_system_share=share)
        for share in (1.0, 0.0, 1.0)
    ]
    segments = [encode_dialogue(tokenizer, d.messages, len(prefix)) for d in dialogues]
    length = len(prefix) + sum(len(s.token_ids) for s in segments)
    row = pack_row(prefix, segments, length + 5, tokenizer.pad_token_id)
    with torch.inference_mode():
        packed = model(
            input_ids=row.input_ids[None],
            position_ids=row.position_ids[None],
            attention_mask=row.visible[None, None],
        ).logits[0]
        start = len(prefix)
        for dialogue, segment in zip(dialogues, segments, strict=True):
            token_ids = tokenizer.apply_chat_template(dialogue.messages, return_dict=False)
            alone = model(input_ids=torch.tensor([token_ids])).logits[0, -len(segment.token_ids) :]
            torch.testing.assert_close(
                packed[start : start + len(segment.token_ids)], alone, rtol=1e-4, atol=1e-4
            )
            start += len(segment.token_ids)


def test_batches_are_well_filled_and_repeat_with_the_seed(tokenizer):
    stage = Stage(1.0, batch_tokens=3072, row_tokens=768, default_system_share=0.7, max_turns=4)
    first = list(islice(make_batches(tokenizer, stage, random.Random(2)), 3))
    again = list(islice(make_batches(tokenizer, stage, random.Random(2)), 3))
    for a, b in zip(first, again, strict=True):
        assert a.input_ids.shape == (4, 768)
        assert torch.equal(a.input_ids, b.input_ids)
    padding = torch.cat([b.input_ids == tokenizer.pad_token_id for b in first]).float().mean()
    assert padding < 0.05


def test_the_learning_rate_warms_up_stays_and_falls():
    plan = TrainingPlan(warmup_steps=10, decay_share=0.5, peak_learning_rate=1.0)
    rates = [learning_rate(step, 100, plan) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert all(a > b for a, b in pairwise(rates[50:]))
    assert rates[-1] == pytest.approx(1 / 50)


def test_a_tiny_run_lowers_the_loss_and_its_checkpoint_loads(tokenizer, tmp_path):
    plan = TrainingPlan(
        total_tokens=30 * 512,
        warmup_steps=5,
        curriculum=(Stage(1.0, 512, row_tokens=256, default_system_share=0.0, max_turns=1),),
    )
    model, losses = train(TINY, tokenizer, plan)
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

    save_model(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float16
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half())

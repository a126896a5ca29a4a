"""The models that ship: sizes, formats, and replies to questions about held-out orders."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.evaluate import (
    MAX_REPLY_TOKENS,
    engine_generator,
    has_right_facts,
    make_questions,
    names_order,
    speculative_acceptance,
    transformers_generator,
)
from training.tokenizer import CHAT_TEMPLATE

DATA = Path(__file__).resolve().parents[2] / "data"
TARGET = DATA / "models" / "merchant-chat"
DRAFT = DATA / "models" / "merchant-chat-draft"
NUM_QUESTIONS = 24


def count_parameters(directory: Path) -> int:
    return AutoModelForCausalLM.from_pretrained(directory).num_parameters()


@pytest.fixture(scope="module")
def questions():
    return make_questions(AutoTokenizer.from_pretrained(TARGET), NUM_QUESTIONS, seed=5)


@pytest.fixture(scope="module")
def prompts(questions):
    return [question.prompt_token_ids for question in questions]


@pytest.fixture(scope="module")
def replies(prompts):
    return transformers_generator(TARGET)(prompts, MAX_REPLY_TOKENS)


def test_the_sizes_are_within_the_bounds():
    target, draft = count_parameters(TARGET), count_parameters(DRAFT)
    assert 4e6 <= target <= 8e6
    assert draft < target / 5
    assert sum(f.stat().st_size for f in DATA.rglob("*") if f.is_file()) < 40e6


@pytest.mark.parametrize("directory", [TARGET, DRAFT], ids=lambda path: path.name)
def test_the_checkpoints_are_16_bit_llamas_with_grouped_queries(directory):
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 64
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["dtype"] == config["torch_dtype"] == "float16"
    with safe_open(directory / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118
    assert (directory / "generation_config.json").exists()


def test_both_models_share_one_tokenizer_and_its_template():
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (TARGET / name).read_bytes() == (DRAFT / name).read_bytes()
    config = json.loads((TARGET / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT_TEMPLATE


def test_replies_end_by_themselves_and_name_the_order(questions, replies):
    assert all(reply.finish_reason == "stop" for reply in replies)
    named = [names_order(q, r) for q, r in zip(questions, replies, strict=True)]
    assert sum(named) >= 0.95 * NUM_QUESTIONS
    right = [has_right_facts(q, r) for q, r in zip(questions, replies, strict=True)]
    assert sum(right) >= 0.9 * NUM_QUESTIONS


def test_the_target_accepts_most_draft_tokens(questions, replies):
    acceptance = speculative_acceptance(transformers_generator(DRAFT), questions, replies)
    assert acceptance.rate >= 0.6


def test_the_engine_gives_the_same_tokens_as_transformers(prompts, replies):
    ours = engine_generator(TARGET)(prompts, MAX_REPLY_TOKENS)
    assert [r.token_ids for r in ours] == [r.token_ids for r in replies]
    assert [r.text for r in ours] == [r.text for r in replies]
    assert [r.finish_reason for r in ours] == [r.finish_reason for r in replies]

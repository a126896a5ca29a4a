"""The tokenizer: text comes back, digits stay single, the chat template says what it should."""

import pytest
from transformers import AutoTokenizer

from training.dialogues import DEFAULT_SYSTEM_PROMPT, make_dialogues
from training.tokenizer import END_TOKEN, VOCAB_SIZE, save_tokenizer, train_tokenizer

QUESTION = [{"role": "user", "content": "Where is my order A-1842?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(num_dialogues=2000)


def test_training_twice_gives_the_same_vocabulary(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert train_tokenizer(num_dialogues=2000).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("text", ["Where is A-1842?", "¿Dónde está? 日本 🚚", "a  b\n\n c\t", ""])
def test_any_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_digit_is_a_token_of_its_own(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("order A-1842, $18.40, 30 days").input_ids)
    assert all(len(t.lstrip("Ġ")) == 1 for t in tokens if any(c.isdigit() for c in t))


def test_the_template_writes_chatml(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhere is my order A-1842?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_template_inserts_the_default_prompt_before_a_first_user_message(tokenizer):
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False)
    assert text.startswith(f"<|im_start|>system\n{DEFAULT_SYSTEM_PROMPT}{END_TOKEN}\n")
    given = [{"role": "system", "content": DEFAULT_SYSTEM_PROMPT}, *QUESTION]
    assert text == tokenizer.apply_chat_template(given, tokenize=False)
    num_tokens = len(tokenizer(DEFAULT_SYSTEM_PROMPT).input_ids)
    assert 200 <= num_tokens <= 280


def test_a_dialogue_survives_rendering_and_tokenizing(tokenizer):
    for dialogue in make_dialogues(4, 50, held_out=False, default_system_share=0.5):
        text = tokenizer.apply_chat_template(dialogue.messages, tokenize=False)
        token_ids = tokenizer.apply_chat_template(dialogue.messages, return_dict=False)
        assert tokenizer.decode(token_ids) == text
        for message in dialogue.messages:
            assert f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" in text


def test_a_saved_tokenizer_loads_in_transformers(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert loaded.apply_chat_template(QUESTION) == tokenizer.apply_chat_template(QUESTION)

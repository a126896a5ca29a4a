"""Trains the byte-level BPE tokenizer that both models share.

Digits and the letter of an order number are tokens of their own, without the space before them,
so that a model copies a number sign by sign and numbers it never saw work like any other. The chat
template is ChatML; where a conversation brings no system message, it inserts the default prompt.

    tokenizer = train_tokenizer(seed=1)
    save_tokenizer(tokenizer, Path("data/models/merchant-chat"))
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from training.dialogues import DEFAULT_SYSTEM_PROMPT, make_dialogues, make_system_prompt

VOCAB_SIZE = 2048
PAD_TOKEN = "<|endoftext|>"
START_TOKEN = "<|im_start|>"
END_TOKEN = "<|im_end|>"
MAX_POSITION_EMBEDDINGS = 4096

PRE_TOKENIZER_PATTERN = "|".join(
    (
        r" (?=\p{L}[- ]?\p{N}{4})",  # the space before an order number
        r"(?<!\p{L})\p{L}(?=[- ]?\p{N}{4})",  # the letter of an order number
        r" ?\p{L}+",  # a word with the space before it
        r"\p{N}",  # one digit
        r" ?[^\s\p{L}\p{N}]+",  # a run of other signs
        r"\s+(?!\S)",  # white space up to the next word's own space
        r"\s+",
    )
)

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\n' + \"" + DEFAULT_SYSTEM_PROMPT + "\" + '<|im_end|>\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)  # fmt: skip


def _corpus(seed: int, num_dialogues: int) -> Iterator[str]:
    """Texts to learn merges from: roles, system prompts and messages of training dialogues."""
    rng = random.Random(seed)
    for _ in range(num_dialogues // 20):
        yield from ("system", "user", "assistant")
        yield DEFAULT_SYSTEM_PROMPT
        yield make_system_prompt(rng)[0]
    for dialogue in make_dialogues(seed, num_dialogues, held_out=False):
        yield from (message["content"] for message in dialogue.messages)


def train_tokenizer(
    seed: int = 1, num_dialogues: int = 20_000, vocab_size: int = VOCAB_SIZE
) -> PreTrainedTokenizerFast:
    """Learns the merges from generated dialogues and returns a Hugging Face tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, START_TOKEN, END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed, num_dialogues), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITION_EMBEDDINGS,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, the chat template inside the latter.

    The configuration is written here rather than by transformers so that releases 4 and 5, and
    programs that only read the template from tokenizer_config.json, all understand it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITION_EMBEDDINGS,
        "bos_token": None,
        "eos_token": END_TOKEN,
        "pad_token": PAD_TOKEN,
        "additional_special_tokens": [START_TOKEN],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

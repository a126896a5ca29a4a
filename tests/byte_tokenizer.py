"""A small byte-level BPE tokenizer with a chat template, written as a Hugging Face directory."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = ["the order is on its way", "naïve café 🚚📦", "Where is my order? It is là-bas.", "日本語"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(num_merges: int = 60) -> Tokenizer:
    """Ids 0 to 255 are bytes, then special tokens, then merges; characters may take four tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 4 + num_merges,
        min_frequency=1,
        initial_alphabet=alphabet,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def save_tokenizer(
    directory: Path,
    tokenizer: Tokenizer | None = None,
    *,
    template_file: str | None = None,
    **config: Any,
) -> Path:
    """Write `tokenizer.json`, `tokenizer_config.json` and, if given, `chat_template.jinja`."""
    (tokenizer or byte_tokenizer()).save(str(directory / "tokenizer.json"))
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        **config,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")
    if template_file is not None:
        (directory / "chat_template.jinja").write_text(template_file, encoding="utf-8")
    return directory

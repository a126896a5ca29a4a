"""Text and tokens: the tokenizer and chat template of a Hugging Face checkpoint.

Built on the `tokenizers` library and Jinja, so transformers is not needed at run time.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from course_lib.model.config import CheckpointError, read_json


class Tokenizer:
    """The tokenizer of a checkpoint directory.

    Raises:
        CheckpointError: `tokenizer.json` is missing or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; text needs it, token ids do not")
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise CheckpointError(f"{path} is not a readable tokenizer: {error}") from None
        self._tokenizer.no_truncation()  # some files bring the settings of their training
        self._tokenizer.no_padding()
        config_path = directory / "tokenizer_config.json"
        config = read_json(config_path) if config_path.exists() else {}
        self.chat_template = _chat_template(directory, config)
        self.special_tokens = {
            name: _special_token(config_path, name, config[name])
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if config.get(name) is not None
        }
        self.eos_token = self.special_tokens.get("eos_token")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size()

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token of the tokenizer's own configuration."""
        return None if self.eos_token is None else self.token_id(self.eos_token)

    def token_id(self, token: str) -> int | None:
        """Id of a token given as text, None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to tokens; special tokens that the tokenizer puts around it are added.

        Raises:
            ValueError: `text` is no string, or holds half of a surrogate pair.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise ValueError(f"text must be a string of valid Unicode, got {text!r:.200}") from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Tokens to text."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """A decoder that takes tokens one by one."""
        return TextStream(self._tokenizer, skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the prompt text that the model was trained on.

        Args:
            messages: `{"role": ..., "content": ...}` each.
            add_generation_prompt: end where the assistant's reply begins.

        Raises:
            ValueError: there is no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(
                "the checkpoint has no chat template; use generate() with a prompt instead of "
                "chat(), or add a chat_template.jinja to its directory"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template).render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as error:  # a template is a program and may fail in any way
            raise ValueError(f"the chat template refuses these messages: {error}") from None


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only shows them."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """The template's own file, else the one in `tokenizer_config.json`; None if there is none."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several with names
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{directory / 'tokenizer_config.json'}: chat_template must be a string, "
            f"found {template!r}"
        )
    return template


def _special_token(path: Path, name: str, token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise CheckpointError(f"{path}: {name} must be a string, found {token!r}")
    return text


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own `tojson` escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_template_error(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class TextStream:
    """Text of tokens that arrive one by one; characters of several tokens come when complete."""

    def __init__(self, tokenizer: FastTokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token, often empty."""
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception as error:
            # The library cannot go on after some invalid byte sequences; a new stream can.
            if "Invalid prefix" not in str(error):
                raise
            self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            return self._stream.step(self._tokenizer, token_id) or ""

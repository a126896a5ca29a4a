"""Text and tokens as transformers has them: chat templates on the same directory, special tokens,
and text that grows token by token.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from course_lib.model.config import CheckpointError
from course_lib.model.tokenizer import Tokenizer
from tests.byte_tokenizer import byte_tokenizer, save_tokenizer

SHIPPED = Path(__file__).parents[2] / "data" / "models" / "merchant-chat"

TURN = {"role": "user", "content": 'Where is my order? <it\'s> & "là-bas" 🚚'}
CONVERSATIONS = [
    [TURN],
    [{"role": "system", "content": "Be brief."}, TURN],
    [TURN, {"role": "assistant", "content": "On its way."}, {"role": "user", "content": ""}],
]

TEMPLATES = {
    "plain": "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    "white space": "{% for m in messages %}\n    {% if m.role == 'user' %}\n    U {{ m.content }}\n"
    "    {% endif %}\n{% endfor %}\n",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "no tools": "{% if tools is not none %}tools{% endif %}"
    "{% if documents is not none %}documents{% endif %}{{ messages[0].content }}",
    "absent special token": "{% if unk_token is defined %}unk{% endif %}{{ pad_token }}|",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ strftime_now('%Y') }}",
}


def template_of_transformers(directory: Path, messages: Any, add_generation_prompt: bool) -> str:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )


@pytest.mark.parametrize("in_a_file", [True, False], ids=["jinja file", "tokenizer config"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_chat_templates_render_as_in_transformers(
    tmp_path: Path, template: str, in_a_file: bool
) -> None:
    if in_a_file:  # and it goes before the one in the config
        save_tokenizer(tmp_path, template_file=template, chat_template="another")
    else:
        save_tokenizer(tmp_path, chat_template=template)
    tokenizer = Tokenizer(tmp_path)
    for messages in CONVERSATIONS:
        for add_generation_prompt in (True, False):
            assert tokenizer.apply_chat_template(
                messages, add_generation_prompt
            ) == template_of_transformers(tmp_path, messages, add_generation_prompt)


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    save_tokenizer(tmp_path, chat_template=named)
    assert Tokenizer(tmp_path).apply_chat_template([TURN]) == "D"
    assert template_of_transformers(tmp_path, [TURN], True) == "D"


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        ("{{ raise_exception('roles must alternate') }}", [TURN]),
        ("{{ messages[0].content.upper() }}", [{"role": "user"}]),
        ("{{ messages[0].content + 1 }}", [TURN]),
        ("{{ 1 // (messages | length - 1) }}", [TURN]),
        ("{% if %}", [TURN]),
        ("{{ ''.__class__.__mro__ }}{{ messages[9].x.y }}", [TURN]),
        ("{{ messages[0].content }}", 5),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_template_that_fails_is_a_value_error(
    tmp_path: Path, template: str, messages: Any
) -> None:
    save_tokenizer(tmp_path, chat_template=template)
    with pytest.raises(ValueError, match="the chat template refuses these messages"):
        Tokenizer(tmp_path).apply_chat_template(messages)


def test_without_a_template_chat_says_what_to_do(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(ValueError, match=r"no chat template.*chat_template\.jinja"):
        Tokenizer(tmp_path).apply_chat_template([TURN])


@given(st.text(max_size=30), st.booleans())
def test_encode_and_decode_are_those_of_transformers(text: str, skip: bool) -> None:
    tokens = OURS.encode(text)
    assert tokens == THEIRS.encode(text)
    assert OURS.decode(tokens, skip) == THEIRS.decode(tokens, skip_special_tokens=skip)
    assert OURS.decode(tokens) == text


OURS: Tokenizer
THEIRS: PreTrainedTokenizerFast


@pytest.fixture(scope="module", autouse=True)
def _tokenizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    global OURS, THEIRS
    directory = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    OURS, THEIRS = Tokenizer(directory), PreTrainedTokenizerFast.from_pretrained(directory)


def test_special_tokens_are_skipped_or_shown() -> None:
    tokens = OURS.encode("<s>the order<tool></s>")
    assert tokens[0] == OURS.token_id("<s>") and tokens[-1] == OURS.eos_token_id
    assert OURS.decode(tokens) == "the order<tool>"
    assert OURS.decode(tokens, skip_special_tokens=False) == "<s>the order<tool></s>"
    assert streamed(OURS, tokens) == "the order<tool>"
    assert streamed(OURS, tokens, skip_special_tokens=False) == "<s>the order<tool></s>"


def streamed(tokenizer: Tokenizer, tokens: list[int], **options: bool) -> str:
    stream = tokenizer.stream(**options)
    return "".join(stream.push(token) for token in tokens)


@given(st.text(max_size=30).filter(lambda text: "\ufffd" not in text))
def test_text_that_grows_token_by_token_becomes_the_text(text: str) -> None:
    assert streamed(OURS, OURS.encode(text)) == text


@given(st.data(), st.booleans())
def test_growing_text_of_any_tokens_is_decode_without_an_incomplete_tail(
    data: st.DataObject, skip: bool
) -> None:
    """Also where the bytes are no valid UTF-8 and where ids are beyond the vocabulary."""
    tokens = data.draw(st.lists(st.integers(0, OURS.vocab_size + 3), max_size=20))
    stream = OURS.stream(skip)
    text = ""
    for count, token in enumerate(tokens, start=1):
        text += stream.push(token)
        whole = OURS.decode(tokens[:count], skip)
        assert whole.startswith(text)
        assert whole == text or whole.endswith("\ufffd")


def test_a_character_of_several_tokens_comes_when_complete() -> None:
    tokens = [OURS.token_id(c) for c in "ðŁĺĢ"]  # the four bytes of one emoji
    stream = OURS.stream()
    assert [stream.push(token) for token in tokens] == ["", "", "", "😀"]
    assert streamed(OURS, tokens[:3]) == ""


@pytest.mark.parametrize("directory", ["merchant-chat", "merchant-chat-draft"])
def test_the_shipped_tokenizer_and_template_are_read_as_by_transformers(directory: str) -> None:
    path = SHIPPED.with_name(directory)
    if not (path / "tokenizer.json").exists():
        pytest.skip(f"data/models/{directory} is not there")
    ours, theirs = Tokenizer(path), PreTrainedTokenizerFast.from_pretrained(path)
    assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)
    for messages in CONVERSATIONS:
        text = ours.apply_chat_template(messages)
        assert text == template_of_transformers(path, messages, True)
        tokens = ours.encode(text, add_special_tokens=False)
        assert tokens == theirs.encode(text, add_special_tokens=False)
        assert streamed(ours, tokens) == ours.decode(tokens)
        assert streamed(ours, tokens, skip_special_tokens=False) == text


def test_truncation_and_padding_stored_in_the_file_are_not_applied(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=50)
    save_tokenizer(tmp_path, tokenizer)
    text = "the order is on its way"
    assert Tokenizer(tmp_path).encode(text) == OURS.encode(text)


def test_tokens_that_the_tokenizer_puts_around_a_text_can_be_left_out(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    ours = Tokenizer(save_tokenizer(tmp_path, tokenizer))
    assert ours.encode("way") == [bos, *ours.encode("way", add_special_tokens=False)]


@pytest.mark.parametrize("text", [None, 5, b"bytes", "half \ud800 pair"], ids=repr)
def test_text_that_is_none_is_a_value_error(text: Any) -> None:
    with pytest.raises(ValueError, match="text must be a string of valid Unicode"):
        OURS.encode(text)


@pytest.mark.parametrize("contents", [b"", b"{", b"{}", b"\xff\xfe", b'{"version": 1}'])
def test_a_damaged_tokenizer_file_is_named(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(contents)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "tokenizer.json"))):
        Tokenizer(tmp_path)


def test_a_missing_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token", 5),
        ("eos_token", {"text": "</s>"}),
        ("bos_token", ["<s>"]),
        ("chat_template", 5),
        ("chat_template", {"default": "x"}),
        ("chat_template", [{"name": "default", "template": 3}]),
    ],
)
def test_a_bad_tokenizer_config_is_a_checkpoint_error(
    tmp_path: Path, field: str, value: Any
) -> None:
    save_tokenizer(tmp_path, **{field: value})
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {field} must be a string"):
        Tokenizer(tmp_path)


def test_special_tokens_may_be_written_out_as_objects_or_be_absent(tmp_path: Path) -> None:
    written_out = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "special": True}
    save_tokenizer(tmp_path, eos_token=written_out, bos_token=None)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_token_id == OURS.eos_token_id
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer(tmp_path).eos_token_id is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json must hold a JSON object"):
        Tokenizer(tmp_path)


def test_the_text_of_a_metaspace_tokenizer_grows_to_what_decode_gives(tmp_path: Path) -> None:
    """The scheme of Llama 2 and Mistral: words carry the space before them."""
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(["▁", "▁the", "▁way", "s", "▁on", "<unk>"])}
    fast = FastTokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(save_tokenizer(tmp_path, fast, bos_token=None, eos_token=None))
    tokens = [1, 2, 3, 4, 1]
    assert streamed(tokenizer, tokens) == tokenizer.decode(tokens) == "the ways on the"

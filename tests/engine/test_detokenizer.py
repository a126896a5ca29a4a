"""A completion as it grows: its text, its stop strings wherever tokens are cut, and what a
streaming caller sees of it.
"""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from course_lib import CompletionOutput, SamplingParams
from course_lib.engine.detokenizer import CompletionBuilder
from course_lib.engine.outputs import Logprob
from course_lib.engine.sampling_params import RequestOutputKind
from course_lib.model.tokenizer import Tokenizer
from tests.byte_tokenizer import save_tokenizer

CUMULATIVE, DELTA = RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA
#: Tokens of one to three letters, so that a stop string begins and ends anywhere in them.
PIECES = ["a", "b", "ab", "ba", "bb", "aab", "bab"]

PLAIN: Tokenizer
BYTES: Tokenizer


@pytest.fixture(scope="module", autouse=True)
def _tokenizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    global PLAIN, BYTES
    pieces = FastTokenizer(models.WordLevel({p: i for i, p in enumerate(PIECES)}, "a"))
    pieces.decoder = decoders.ByteLevel()
    PLAIN = Tokenizer(save_tokenizer(tmp_path_factory.mktemp("pieces"), pieces, eos_token=None))
    BYTES = Tokenizer(save_tokenizer(tmp_path_factory.mktemp("bytes")))


def byte_tokens(text: str) -> list[int]:
    """The text with a token for each byte."""
    [(letters, _)] = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)
    return [BYTES.token_id(letter) for letter in letters]


def run(
    tokenizer: Tokenizer | None,
    tokens: Sequence[int],
    params: SamplingParams,
    *,
    kind: RequestOutputKind = CUMULATIVE,
    pushes: Sequence[int] = (),
    finish_reason: str = "length",
    stop_reason: int | None = None,
) -> list[CompletionOutput]:
    """Outputs after each push, of one token or of the numbers in `pushes`, up to the end."""
    builder = CompletionBuilder(params, tokenizer, 0)
    outputs, position, sizes = [], 0, list(pushes)
    while position < len(tokens):
        new = list(tokens[position : position + (sizes.pop() if sizes else 1)])
        position += len(new)
        last = position == len(tokens)
        logprobs = [{token: Logprob(-0.5, 1)} for token in new]
        end = (finish_reason, stop_reason) if last else (None, None)
        builder.push(new, logprobs, *end)
        outputs.append(builder.output(kind))
        if builder.finish_reason is not None:
            break
    return outputs


def expected(
    tokens: list[int], stops: list[str], min_tokens: int, include: bool
) -> tuple[str, int, str | None]:
    """Text, number of tokens and stop string, by brute force over all places of all stops."""
    for count in range(min_tokens + 1, len(tokens) + 1):
        text = "".join(PIECES[t] for t in tokens[:count])
        before = len("".join(PIECES[t] for t in tokens[: count - 1]))
        found = [
            (at, stop)
            for stop in stops
            for at in range(len(text))
            if text.startswith(stop, at) and at + len(stop) > before
        ]
        if found:
            at, stop = min(found)
            return text[: at + len(stop) * include], count, stop
    return "".join(PIECES[t] for t in tokens), len(tokens), None


_tokens = st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=12)
_stops = st.lists(st.text("ab", min_size=1, max_size=5), max_size=3)


@given(_tokens, _stops, st.integers(0, 4), st.booleans(), st.lists(st.integers(1, 4)))
def test_text_ends_at_the_first_stop_string_wherever_tokens_are_cut(
    tokens: list[int], stops: list[str], min_tokens: int, include: bool, pushes: list[int]
) -> None:
    """One token a step or several, as speculative decoding brings them; none before min_tokens."""
    params = SamplingParams(
        stop=stops, min_tokens=min_tokens, include_stop_str_in_output=include, max_tokens=None
    )
    text, count, stop = expected(tokens, stops, min_tokens, include)
    final = run(PLAIN, tokens, params, pushes=pushes)[-1]
    assert (final.text, final.token_ids, final.stop_reason) == (text, tokens[:count], stop)
    assert final.finish_reason == ("length" if stop is None else "stop")


@given(_tokens, _stops, st.integers(0, 4), st.booleans(), st.lists(st.integers(1, 4)))
def test_deltas_join_to_the_final_text_and_no_shown_text_is_taken_back(
    tokens: list[int], stops: list[str], min_tokens: int, include: bool, pushes: list[int]
) -> None:
    params = SamplingParams(
        stop=stops,
        min_tokens=min_tokens,
        include_stop_str_in_output=include,
        max_tokens=None,
        logprobs=0,
    )
    shown = run(PLAIN, tokens, params, pushes=pushes)
    deltas = run(PLAIN, tokens, params, pushes=pushes, kind=DELTA)
    final = shown[-1]
    assert all(final.text.startswith(output.text) for output in shown)
    assert "".join(output.text for output in deltas) == final.text
    assert [token for output in deltas for token in output.token_ids] == final.token_ids
    assert [entry for output in deltas for entry in output.logprobs or ()] == final.logprobs
    assert [d.finish_reason for d in deltas] == [s.finish_reason for s in shown]
    for before, after in pairwise(shown):
        assert after.text.startswith(before.text)


@given(_tokens)
def test_without_stop_strings_nothing_is_held_back(tokens: list[int]) -> None:
    outputs = run(PLAIN, tokens, SamplingParams())
    for count, output in enumerate(outputs, start=1):
        assert output.text == "".join(PIECES[t] for t in tokens[:count])


def test_text_is_held_back_only_as_far_as_a_stop_string_could_begin() -> None:
    outputs = run(BYTES, byte_tokens("abcde"), SamplingParams(stop=["xyz", "q"]))
    assert [output.text for output in outputs] == ["", "", "a", "ab", "abcde"]


@given(st.data())
def test_stop_strings_of_any_characters_are_found_across_byte_tokens(data: st.DataObject) -> None:
    characters = st.characters(codec="utf-8", exclude_characters="\ufffd")  # no lone surrogates
    text = data.draw(st.text(characters, min_size=1, max_size=12))
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    tokens = byte_tokens(text)
    final = run(BYTES, tokens, SamplingParams(stop=stop, max_tokens=None))[-1]
    assert final.text == text[: text.find(stop)]
    assert (final.finish_reason, final.stop_reason) == ("stop", stop)
    plain = run(BYTES, tokens, SamplingParams(max_tokens=None), kind=DELTA)
    assert "".join(output.text for output in plain) == text
    assert all("\ufffd" not in output.text for output in plain)


def test_a_character_cut_by_the_end_is_dropped() -> None:
    tokens = byte_tokens("way 🚚")
    assert run(BYTES, tokens[:-1], SamplingParams())[-1].text == "way "
    assert run(BYTES, tokens, SamplingParams())[-1].text == "way 🚚"


def test_a_stop_string_that_ends_within_min_tokens_is_part_of_the_reply() -> None:
    params = SamplingParams(stop="ab", min_tokens=3)
    final = run(BYTES, byte_tokens("xabyab."), params)[-1]
    assert (final.text, final.stop_reason) == ("xaby", "ab")


def test_a_stop_string_that_begins_within_min_tokens_and_ends_after_counts() -> None:
    """As in vLLM: what matters is how many tokens there are when it is complete."""
    final = run(BYTES, byte_tokens("xabyz"), SamplingParams(stop="aby", min_tokens=2))[-1]
    assert (final.text, final.stop_reason) == ("x", "aby")


@pytest.mark.parametrize(("include", "text"), [(False, "on "), (True, "on </s>")])
def test_the_token_that_ends_a_reply_is_shown_only_on_request(include: bool, text: str) -> None:
    eos = BYTES.eos_token_id
    assert eos is not None
    params = SamplingParams(include_stop_str_in_output=include, skip_special_tokens=False)
    tokens = [*byte_tokens("on "), eos]
    final = run(BYTES, tokens, params, finish_reason="stop")[-1]
    assert (final.text, final.token_ids, final.finish_reason) == (text, tokens, "stop")
    assert final.stop_reason is None
    stop = byte_tokens("!")[0]
    params = SamplingParams(include_stop_str_in_output=include, stop_token_ids=[stop])
    tokens = [*byte_tokens("on "), stop]
    final = run(BYTES, tokens, params, finish_reason="stop", stop_reason=stop)[-1]
    assert (final.text, final.stop_reason) == ("on !" if include else "on ", stop)


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    tokens = BYTES.encode("<s>the<|user|> way")
    assert run(BYTES, tokens, SamplingParams())[-1].text == "the way"
    shown = run(BYTES, tokens, SamplingParams(skip_special_tokens=False))[-1]
    assert shown.text == "<s>the<|user|> way"


@pytest.mark.parametrize("detokenize", [False, True])
def test_without_detokenizing_or_a_tokenizer_there_are_tokens_and_no_text(
    detokenize: bool,
) -> None:
    tokenizer = None if detokenize else BYTES
    params = SamplingParams(detokenize=detokenize, logprobs=0)
    final = run(tokenizer, [1, 2, 3], params)[-1]
    assert (final.text, final.token_ids) == ("", [1, 2, 3])
    assert final.logprobs is not None
    assert [entry[t].decoded_token for entry, t in zip(final.logprobs, [1, 2, 3], strict=True)] == [
        None
    ] * 3


def test_logprobs_carry_the_text_of_each_token_and_add_up() -> None:
    eos = BYTES.eos_token_id
    assert eos is not None
    final = run(BYTES, [*byte_tokens("é"), eos], SamplingParams(logprobs=0))[-1]
    assert final.logprobs is not None and final.cumulative_logprob == pytest.approx(-1.5)
    texts = [logprob.decoded_token for entry in final.logprobs for logprob in entry.values()]
    assert texts == ["\ufffd", "\ufffd", "</s>"]
    without = run(BYTES, [1], SamplingParams())[-1]
    assert without.logprobs is None and without.cumulative_logprob is None

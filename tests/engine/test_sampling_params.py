"""`SamplingParams` checks every value when it is made, and says which and what it expected."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib import SamplingParams
from course_lib.engine.sampling_params import RequestOutputKind

FINITE = [math.nan, math.inf, -math.inf, 10**400, "1", None, True, [1.0], 1j]
INTEGER = [1.5, math.nan, math.inf, "3", True, [1], object()]

BAD = {
    "n": [*INTEGER, None, 0, -1, 10**6],
    "presence_penalty": [*FINITE, -2.1, 2.1],
    "frequency_penalty": [*FINITE, -2.1, 2.1],
    "repetition_penalty": [*FINITE, 0, -1],
    "temperature": [*FINITE, -0.1],
    "top_p": [*FINITE, 0, -0.1, 1.1],
    "top_k": [*INTEGER, None, -2],
    "min_p": [*FINITE, -0.1, 1.1],
    "seed": [*INTEGER, -(2**63) - 1],
    "stop": [5, 1.5, True, b"x", {"a": 1}, [""], "", [1], [None], object()],
    "stop_token_ids": [5, "5", b"5", {"a": 1}, [-1], [1.5], ["1"], [True], [None], object()],
    "ignore_eos": [1, 0, None, "yes"],
    "max_tokens": [*INTEGER, 0, -1],
    "min_tokens": [*INTEGER, None, -1],
    "logprobs": [*INTEGER, -1],
    "prompt_logprobs": [*INTEGER, -1],
    "detokenize": [1, None, "yes"],
    "skip_special_tokens": [1, None, "yes"],
    "include_stop_str_in_output": [1, None, "yes"],
    "logit_bias": [
        5,
        "5",
        [1, 2],
        {"a": 1.0},
        {"-1": 1.0},
        {"9" * 5000: 1.0},
        {1.5: 1.0},
        {None: 1.0},
        {True: 1.0},
        {-1: 1.0},
        {1: math.nan},
        {1: 100.5},
        {1: "x"},
        {1: None},
    ],
    "output_kind": [0, None, "DELTA"],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD.items() for v in values])
def test_a_bad_value_is_refused_by_field_expectation_and_value(field: str, value: object) -> None:
    with pytest.raises(ValueError) as refused:
        SamplingParams(**{field: value})
    message = str(refused.value)
    assert message.startswith(field)
    assert "must" in message
    parts = [value]
    if isinstance(value, list | dict):
        parts += [*value, *(value.values() if isinstance(value, dict) else ())]
    assert any(repr(part) in message for part in parts)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", [1, 5]),
        ("presence_penalty", [-2, 2, 0.5]),
        ("repetition_penalty", [1e-3, 5]),
        ("temperature", [0.5, 100]),
        ("top_p", [1e-9, 1]),
        ("top_k", [-1, 0, 1, 10**6]),
        ("min_p", [0, 1]),
        ("seed", [None, 0, -5, 2**64]),
        ("stop", [None, "x", ["x", "yz"], ("x",), []]),
        ("stop_token_ids", [None, [], [0, 7], (3,), {3}]),
        ("max_tokens", [None, 1]),
        ("logprobs", [None, 0, 20]),
        ("logit_bias", [None, {}, {3: -100}, {"17": 100.0}]),
        ("output_kind", list(RequestOutputKind)),
    ],
)
def test_values_in_range_are_taken(field: str, values: list[object]) -> None:
    for value in values:
        SamplingParams(**{field: value})


def test_a_refused_combination_says_which() -> None:
    with pytest.raises(ValueError, match=r"min_tokens must not exceed max_tokens, got 5 > 4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(ValueError, match=r"n must be 1 when temperature is 0.*got 2"):
        SamplingParams(n=2, temperature=0)
    with pytest.raises(ValueError, match=r"stop needs detokenize=True.*'x'"):
        SamplingParams(stop="x", detokenize=False)
    SamplingParams(min_tokens=500, max_tokens=None)


def test_an_option_that_we_do_not_have_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="bad_words"):
        SamplingParams(bad_words=["x"])


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.min_p, params.max_tokens, params.min_tokens) == (0.0, 16, 0)
    assert (params.presence_penalty, params.frequency_penalty) == (0.0, 0.0)
    assert params.repetition_penalty == 1.0
    assert params.seed is None and params.logprobs is None and params.prompt_logprobs is None
    assert params.output_kind is RequestOutputKind.CUMULATIVE


def test_numbers_of_numpy_become_those_of_python() -> None:
    params = SamplingParams(
        max_tokens=np.int64(5),
        seed=np.int64(7),
        temperature=np.float32(0.5),
        stop_token_ids=np.array([3, 4]),
        logit_bias={np.int64(2): np.float32(1)},
    )
    assert type(params.max_tokens) is type(params.seed) is int
    assert type(params.temperature) is float
    assert params.stop_token_ids == [3, 4] and params.logit_bias == {2: 1.0}


def test_keys_of_logit_bias_may_be_digits_as_in_json() -> None:
    assert SamplingParams(logit_bias={"17": 1}).logit_bias == {17: 1.0}


def test_a_copy_with_another_output_kind_keeps_everything_else() -> None:
    params = SamplingParams(stop=["a", "b"], stop_token_ids=(1,), logit_bias={1: 2}, seed=3)
    copy = replace(params, output_kind=RequestOutputKind.DELTA)
    assert replace(copy, output_kind=params.output_kind) == params


_ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.complex_numbers()
    | st.sampled_from([10**400, np.float64(math.nan), np.int64(3), object(), RequestOutputKind]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.none() | st.booleans() | st.integers() | st.text(max_size=3), inner)
    ),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(BAD)), _ANYTHING, max_size=3))
def test_random_values_give_an_object_or_a_value_error(values: dict[str, object]) -> None:
    try:
        SamplingParams(**values)
    except ValueError as refused:
        assert any(name in str(refused) for name in values)

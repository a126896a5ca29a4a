"""Lengths: drawn within their limits, and as often as the distribution says."""

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.traces.lengths import (
    AZURE_CHAT_PROMPTS,
    AZURE_CHAT_REPLIES,
    Quantiles,
    draw_lengths,
)

SHARED = Path(__file__).resolve().parents[3] / "shared"
AZURE_FILE = SHARED / "data" / "traces" / "AzureLLMInferenceTrace_conv.csv"


def draw(lengths, count: int = 10_000) -> np.ndarray:
    return draw_lengths(np.random.default_rng(1), "prompt_tokens", lengths, count)


@given(st.integers(1, 1000), st.integers(0, 3))
def test_limits_are_both_reached_and_never_passed(low, spread):
    assert set(draw((low, low + spread), 1000)) == set(range(low, low + spread + 1))
    assert set(draw(low, 10)) == {low}


def test_quantiles_have_the_shares_they_were_given():
    drawn = draw(Quantiles(((0, 1), (0.5, 100), (0.9, 100), (1, 1000))))
    assert drawn.min() >= 1 and drawn.max() <= 1000
    # Four standard errors of a share of 10,000 are below 0.02.
    assert np.mean(drawn <= 99) == pytest.approx(0.5, abs=0.02)
    assert np.mean(drawn == 100) == pytest.approx(0.4, abs=0.02)
    assert np.mean(drawn <= 50) == pytest.approx(0.25, abs=0.02)
    assert np.mean(drawn > 550) == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (0, "prompt_tokens must be a whole number"),
        ((5, 4), r"prompt_tokens\[1\] must be a whole number of at least 5"),
        ((1, 2, 3), "prompt_tokens must be"),
        ("64", "prompt_tokens must be"),
    ],
)
def test_what_is_no_length_is_refused_by_name(lengths, words):
    with pytest.raises(ValueError, match=words):
        draw(lengths)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ((), "must begin at share 0 and end at share 1"),
        (((0, 1), (0.9, 5)), "must begin at share 0 and end at share 1"),
        (((0.1, 1), (1, 5)), "must begin at share 0 and end at share 1"),
        (((0, 1), (0.6, 5), (0.5, 6), (1, 7)), "share of a quantile must be .* at least 0.6"),
        (((0, 1), (0.6, 5), (1, 4)), "tokens at share 1 must be a whole number of at least 5"),
        (((0, 0), (1, 4)), "tokens at share 0 must be"),
        (((0, 1), (2, 4)), "share of a quantile must be .* at most 1"),
    ],
)
def test_quantiles_that_make_no_sense_are_refused(points, words):
    with pytest.raises(ValueError, match=words):
        Quantiles(points)


@pytest.mark.skipif(not AZURE_FILE.exists(), reason="the trace ../shared/data/traces is not there")
@pytest.mark.parametrize(
    ("lengths", "column"),
    [(AZURE_CHAT_PROMPTS, "ContextTokens"), (AZURE_CHAT_REPLIES, "GeneratedTokens")],
)
def test_azures_lengths_are_those_of_the_published_trace(lengths, column):
    with AZURE_FILE.open(newline="") as file:
        real = np.array([int(row[column]) for row in csv.DictReader(file)])
    drawn = draw(lengths, 100_000)
    assert drawn.mean() == pytest.approx(real.mean(), rel=0.03)
    assert (drawn.min(), drawn.max()) == pytest.approx((real.min(), real.max()), rel=0.2)
    # Kolmogorov and Smirnov's distance, of distribution functions at every length there is.
    lengths_seen = np.unique(real)
    shares = [np.searchsorted(np.sort(each), lengths_seen, "right") / len(each)
              for each in (real, drawn)]  # fmt: skip
    assert np.abs(shares[0] - shares[1]).max() < 0.05
    # Between the points of the table, too.
    for share in (0.125, 0.25, 0.55, 0.75, 0.97):
        wanted = np.quantile(real, share)
        assert np.quantile(drawn, share) == pytest.approx(wanted, rel=0.25), share

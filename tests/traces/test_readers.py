"""Traces from files: each format as published, and every broken one refused with its line."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from course_lib.traces.readers import read_trace
from course_lib.traces.trace import Segment, content_ids, prompt_contents, token_ids

SHARED = Path(__file__).resolve().parents[3] / "shared"
AZURE_FILE = SHARED / "data" / "traces" / "AzureLLMInferenceTrace_conv.csv"

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:50.6805900,374,44
2023-11-16 18:15:46.6805900,3960,109
2023-11-16 18:15:51.1805900,20,1000
"""

BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,1087,0,1087,API log
118,GPT-4,417,276,693,Conversation log
"""

OURS = "arrival_s,prompt_tokens,output_tokens\n"

# 1100 tokens are two blocks and a part; the second prompt goes on as the first one began.
MOONCAKE = """{"timestamp": 2000, "input_length": 1100, "output_length": 50, "hash_ids": [0, 1, 2]}
{"timestamp": 500, "input_length": 1500, "output_length": 9, "hash_ids": [0, 1, 7]}

{"timestamp": 2500, "input_length": 600, "output_length": 1, "hash_ids": [4]}
"""


@pytest.fixture
def write(tmp_path):
    def written(text: str | bytes, name: str = "trace.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return written


def rows(trace) -> list[tuple[float, int, int]]:
    return [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in trace.requests]


def test_azures_format_has_dates_and_is_sorted_by_them(write):
    trace = read_trace(write(AZURE))
    assert rows(trace) == [
        (0.0, 3960, 109),
        (pytest.approx(4.0), 374, 44),
        (pytest.approx(4.5), 20, 1000),
    ]
    assert trace.name == "trace.csv" and trace.duration_s == pytest.approx(4.5)


def test_dates_of_different_zones_are_on_one_clock(write):
    text = AZURE.splitlines()[0] + "\n"
    text += "2024-05-10 02:00:03+02:00,2,2\n2024-05-10 00:00:00,1,1\n"
    assert rows(read_trace(write(text))) == [(0.0, 1, 1), (3.0, 2, 2)]


def test_burstgpts_failures_are_left_out(write):
    assert rows(read_trace(write(BURSTGPT))) == [(0.0, 472, 18), (113.0, 417, 276)]


def test_our_own_format_is_three_columns_in_any_place_among_others(write):
    assert rows(read_trace(write(OURS + "7.5,3,4\n9,1,2\n"))) == [(0.0, 3, 4), (1.5, 1, 2)]
    text = "region,output_tokens,prompt_tokens,arrival_s\neu,4,3,7\n\nus,2,1,8\n"
    assert rows(read_trace(write(text))) == [(0.0, 3, 4), (1.0, 1, 2)]


def test_a_byte_order_mark_windows_lines_and_gzip_are_taken_as_they_are(write):
    plain = rows(read_trace(write(AZURE)))
    windows = b"\xef\xbb\xbf" + AZURE.replace("\n", "\r\n").encode()
    assert rows(read_trace(write(windows))) == plain
    assert rows(read_trace(write(gzip.compress(windows), "trace.csv.gz"))) == plain


def test_a_trace_can_be_sped_up_and_cut(write):
    path = write(AZURE)
    trace = read_trace(path, speed=2.0, max_prompt_tokens=100, max_output_tokens=50)
    assert rows(trace) == [
        (0.0, 100, 50),
        (pytest.approx(2.0), 100, 44),
        (pytest.approx(2.25), 20, 50),
    ]
    assert (trace.speed, trace.max_prompt_tokens, trace.max_output_tokens) == (2.0, 100, 50)
    for option in ("speed", "max_prompt_tokens", "max_output_tokens"):
        with pytest.raises(ValueError, match=f"{option} must be"):
            read_trace(path, **{option: 0})


def test_mooncakes_blocks_become_segments_and_the_last_one_may_be_partial(write):
    trace = read_trace(write(MOONCAKE, "mooncake.jsonl"))
    assert rows(trace) == [(0.0, 1500, 9), (1.5, 1100, 50), (2.0, 600, 1)]
    assert [r.segments for r in trace.requests] == [
        (Segment(0, 512), Segment(1, 512), Segment(7, 476)),
        (Segment(0, 512), Segment(1, 512), Segment(2, 76)),
        (Segment(4, 512),),
    ]
    assert trace.has_shared_prefixes


def _common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def test_mooncakes_prompts_share_just_the_tokens_of_their_common_blocks(write):
    trace = read_trace(write(MOONCAKE, "mooncake.jsonl"))
    owns = [(request, -1 - index) for index, request in enumerate(trace.requests)]
    for first, second, third in (
        [content_ids(prompt_contents(*each)) for each in owns],
        [token_ids(*each) for each in owns],
    ):
        assert [len(first), len(second), len(third)] == [1500, 1100, 600]
        # In tokens below 512, the first one after the common part may be equal by chance.
        assert 1024 <= _common(first, second) <= 1030
        assert _common(first, third) <= 6


def test_cutting_a_prompt_cuts_what_it_shares(write):
    path = write(MOONCAKE, "mooncake.jsonl")
    for limit, segments in (
        (600, (Segment(0, 512), Segment(1, 88))),
        (512, (Segment(0, 512),)),
        (3, (Segment(0, 3),)),
    ):
        request = read_trace(path, max_prompt_tokens=limit).requests[0]
        assert request.prompt_tokens == limit and request.segments == segments


MOMENTS = st.floats(0, 1e6)
TOKENS = st.integers(1, 100_000)


@given(st.lists(st.tuples(MOMENTS, TOKENS, TOKENS), min_size=1, max_size=20))
def test_what_is_written_is_read(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("traces") / "trace.csv"
    lines = [",".join(map(repr, row)) + "\n" for row in written]
    path.write_text(OURS + "".join(lines))
    start_s = min(arrival_s for arrival_s, _, _ in written)
    expected = [(a - start_s, p, o) for a, p, o in sorted(written, key=lambda row: row[0])]
    assert rows(read_trace(path)) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: the columns of a trace are TIMESTAMP,.* or arrival_s,"),
        ("a,b\n1,2\n", "line 1: the columns of a trace are .* got 'a,b'"),
        ("0,1,1\n", "line 1: the columns"),
        (OURS, "holds no requests"),
        (BURSTGPT[: BURSTGPT.index("5,")] + "1,GPT-4,9,0,9,API log\n", "holds no requests"),
        (OURS + "1,2\n", "line 2: 3 columns are expected, got 2"),
        (OURS + "1,2,3,4\n", "line 2: 3 columns are expected, got 4"),
        (OURS + "1,1,1\n\n1,0,1\n", "line 4: prompt_tokens must be .* from 1 .*, got 0"),
        (OURS + "1,1,1\n1,1,-5\n", "line 3: output_tokens must be .* from 1 .*, got -5"),
        (OURS + "1,1.5,1\n", "line 2: prompt_tokens must be a whole number .*, got '1.5'"),
        (OURS + "1,1,1000000001\n", "line 2: output_tokens must be .* to 1000000000"),
        (OURS + f"1,{'9' * 5000},1\n", "line 2: prompt_tokens must be"),
        (OURS + "soon,1,1\n", "line 2: arrival_s must be a number at least 0, got 'soon'"),
        (OURS + "nan,1,1\n", "line 2: arrival_s must be .*, got nan"),
        (OURS + "1e999,1,1\n", "line 2: arrival_s must be .*, got inf"),
        (OURS + "-1,1,1\n", "line 2: arrival_s must be a number at least 0, got -1"),
        (OURS + "1,1,\0\n", "line 2: output_tokens must be"),
        (OURS + '1,1,1\n1,"1,1\n1,1,1\n', "line 3: unexpected end of data"),
        (OURS + f"1,{'9' * 200_000},1\n", "line 2: field larger than field limit"),
        (AZURE + "yesterday,1,1\n", "line 5: TIMESTAMP must be a date like .* got 'yesterday'"),
        (AZURE + "2023-11-16 18:15:46,1,0\n", "line 5: GeneratedTokens must be"),
        (BURSTGPT + "9,ChatGPT,0,5,5,API log\n", "line 5: Request tokens must be"),
        (BURSTGPT + "9,ChatGPT,5,-1,4,API log\n", "line 5: Response tokens must be .* from 0"),
        (OURS.encode("utf-16"), "line 1: a trace must be text in UTF-8"),
        (OURS.encode() + b"1,1,1\n1,\xff,1\n", "line 3: a trace must be text in UTF-8"),
    ],
)
def test_a_table_that_is_no_trace_is_refused_with_the_line(write, text, words):
    with pytest.raises(ValueError, match=f"trace.csv.*{words}"):
        read_trace(write(text))


def mooncake(**changes) -> str:
    fields = {"timestamp": 1, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
    return json.dumps({**fields, **changes})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (mooncake()[:-5], "a JSON object with timestamp, input_length, .* is expected, got '{"),
        ("[" * 100_000, "a JSON object with"),
        ("7", "a JSON object with"),
        ('{"timestamp": 1}', "a JSON object with"),
        (mooncake(timestamp=-1), "timestamp must be a number at least 0"),
        (mooncake(timestamp=float("nan")), "timestamp must be"),
        (mooncake(timestamp="1"), "timestamp must be"),
        (mooncake(input_length=0), "input_length must be"),
        (mooncake(input_length=600.0), "input_length must be"),
        (mooncake(output_length=True), "output_length must be"),
        (mooncake(output_length=10**12), "output_length must be"),
        (mooncake(hash_ids=None), "hash_ids must be a list of at most 2 ids"),
        (mooncake(hash_ids=[1, 2, 3]), "hash_ids .* one for each 512 of 600 tokens, got .1, 2, 3"),
        (mooncake(hash_ids=[-1]), "each of hash_ids must be a whole number of at least 0"),
        (mooncake(hash_ids=["a"]), "each of hash_ids must be"),
    ],
)
def test_a_json_line_that_is_no_request_is_refused_with_the_line(write, row, words):
    with pytest.raises(ValueError, match=f"trace.jsonl, line 3: {words}"):
        read_trace(write(f"{mooncake()}\n\n{row}\n", "trace.jsonl"))


@pytest.mark.parametrize("data", [b"", b"not gzip", gzip.compress(b"a" * 1000, mtime=0)[:20]])
def test_a_broken_archive_is_refused(write, data):
    with pytest.raises(ValueError, match=r"trace.csv.gz"):
        read_trace(write(data, "trace.csv.gz"))


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the trace .*nothing.csv: No such file"):
        read_trace(tmp_path / "nothing.csv")
    with pytest.raises(ValueError, match=r"cannot read the trace .*: Is a directory"):
        read_trace(tmp_path)


BROKEN = st.one_of(
    st.binary(max_size=60),
    st.builds(bytes.__add__, st.just(OURS.encode()), st.binary(max_size=40)),
    st.builds(lambda text: (AZURE + text).encode(), st.text('0123456789-:T+Z, ."\n', max_size=40)),
    st.builds(lambda text: (MOONCAKE + text).encode(), st.text('{}[]",:eE+-.019 \n', max_size=40)),
    st.builds(
        lambda at, byte: MOONCAKE.encode()[:at] + bytes([byte]) + MOONCAKE.encode()[at + 1 :],
        st.integers(0, len(MOONCAKE) - 1),
        st.integers(0, 255),
    ),
)


@given(BROKEN)
@example((AZURE + "0001-01-01T00:00+23:59,1,1").encode())
@example((AZURE + "9999-12-31T23:59-23:59,1,1").encode())
def test_whatever_a_file_holds_it_is_a_trace_or_a_sentence(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("traces") / "trace.csv"
    path.write_bytes(data)
    try:
        trace = read_trace(path)
    except ValueError as error:
        assert f"{path}, line " in str(error) or "holds no requests" in str(error)
    else:
        arrivals = [request.arrival_s for request in trace.requests]
        assert arrivals[0] == 0.0 and arrivals == sorted(arrivals)
        assert all(r.prompt_tokens >= 1 and r.output_tokens >= 1 for r in trace.requests)
        for request in trace.requests:
            assert sum(tokens for _, tokens in request.segments) <= request.prompt_tokens


@pytest.mark.skipif(not AZURE_FILE.exists(), reason="the trace ../shared/data/traces is not there")
def test_the_production_trace_is_read_as_it_was_recorded():
    trace = read_trace(AZURE_FILE)
    assert len(trace.requests) == 19366
    first, second, last = trace.requests[0], trace.requests[1], trace.requests[-1]
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert (second.prompt_tokens, second.output_tokens) == (396, 109)
    assert last.arrival_s == pytest.approx(58 * 60 + 21.72195, abs=1e-3)
    assert not trace.has_shared_prefixes

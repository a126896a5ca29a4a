"""An oracle and an answer at the two ends of a line: what comes over it, and what does not."""

import importlib
import math
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from course_lib.classroom.checks import NoAnswer, Verdict, assess, find_exercise
from course_lib.classroom.grading.answering import LINE_VARIABLE, encode, send, serve
from course_lib.classroom.grading.asking import Line, Record, Unknown, decode, remote_answer
from course_lib.classroom.grading.course_copy import REFUSAL
from course_lib.classroom.ownership import NotYourOwn

NOTEBOOKS = sorted(path.stem[-2:] for path in Path(__file__).parents[1].glob("answers_*.py"))
ANSWERS = [importlib.import_module(f"tests.classroom.answers_{name}") for name in NOTEBOOKS]
RIGHT = [(e, found[-1]) for module in ANSWERS for e, found in module.RIGHT.items()]
WRONG = [(e, found[0]) for module in ANSWERS for e, found in module.WRONG.items()]


@contextmanager
def line_to(
    answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time_limit_s: float = 120
) -> Iterator[Line]:
    """A line to an answer that is served in a thread."""
    with listening(tmp_path, monkeypatch) as listener:
        server = threading.Thread(target=serve, args=(answer,), daemon=True)
        server.start()
        line = Line(listener, time_limit_s)
        try:
            yield line
        finally:
            line.socket.close()
    server.join(timeout=30)


@contextmanager
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    path = tmp_path / "line"
    monkeypatch.setenv(LINE_VARIABLE, str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        yield listener


def judged(exercise: str, answer: Any, line: Line) -> Verdict:
    return assess(find_exercise(exercise), remote_answer(line, answer), random.getrandbits(32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exercise", "answer"), RIGHT, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_right_answer_passes_from_outside(exercise, answer, tmp_path, monkeypatch) -> None:
    with line_to(answer, tmp_path, monkeypatch) as line:
        verdict = judged(exercise, answer, line)
    assert (verdict.outcome, verdict.message) == ("passed", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exercise", "answer"), WRONG, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_wrong_answer_fails_from_outside_with_a_hint(
    exercise, answer, tmp_path, monkeypatch
) -> None:
    with line_to(answer, tmp_path, monkeypatch) as line:
        verdict = judged(exercise, answer, line)
    assert verdict.outcome == "wrong"
    assert "First difference: " in verdict.message and "Hint: " in verdict.message
    assert "asking.py" not in verdict.message and "_Remote" not in verdict.message


@dataclass
class Pair:
    left: Any
    right: Any


def over_the_line(value: Any) -> Any:
    import json

    return decode(json.loads(json.dumps(encode(value))))


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -1.5, math.inf, "text", b"bytes", [1, [2.0]], (1, "a"), {1, 2}, {(1, 2): [3]}],
    ids=str,
)
def test_data_comes_over_as_it_is(value) -> None:
    got = over_the_line(value)
    assert got == value and type(got) is type(value)


def test_numbers_arrays_and_tensors_keep_type_and_shape() -> None:
    assert isinstance(over_the_line(np.int32(7)), np.int32)
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(over_the_line(array.T), array.T)
    for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.bool):
        tensor = torch.ones(2, 0 if dtype is torch.int64 else 3).to(dtype)
        got = over_the_line(tensor)
        assert got.dtype == dtype and torch.equal(got, tensor)


def test_an_object_comes_over_as_its_fields_and_without_its_code() -> None:
    got = over_the_line(Pair(1, Pair("a", None)))
    assert isinstance(got, Record) and got.left == 1 and got.right.left == "a"
    assert repr(got) == "Pair(left=1, right=Pair(left='a', right=None))"
    assert isinstance(over_the_line(lambda: 1), Unknown)

    class Lies:
        def __eq__(self, other):
            return True

        __hash__ = None

    assert over_the_line(Lies()) != 5


def test_fields_that_numpy_would_believe_stay_out() -> None:
    class Array:
        def __init__(self):
            self.__dict__["__array_interface__"] = {
                "data": (8, False), "shape": (1,), "typestr": "<f8", "version": 3,
            }  # fmt: skip
            self.left = 1

    got = over_the_line(Array())
    assert got.left == 1 and not hasattr(got, "__array_interface__")
    assert np.asarray(got).dtype == object


@pytest.mark.parametrize(
    "reply",
    [
        {"is": "object", "type": "X", "fields": 3},
        {"is": "numpy", "dtype": "O", "shape": [1], "data": ""},
        {"is": "numpy", "dtype": "f8", "shape": [10**12], "data": ""},
        {"is": "tensor", "dtype": "load", "shape": [1], "data": ""},
        {"is": "tuple", "items": None},
        {"is": "dict", "items": [[[1], 2]]},
        {"what": "is this"},
    ],
    ids=str,
)
def test_what_is_no_value_is_refused(reply) -> None:
    with pytest.raises(NoAnswer, match="no value"):
        decode(reply)


def test_functions_of_the_oracle_are_called_back(tmp_path, monkeypatch) -> None:
    class Stopwatch:
        def __init__(self, clock):
            self.clock = clock

        def twice(self):
            return self.clock() + self.clock()

    times = iter((1.0, 2.5))
    with line_to(Stopwatch, tmp_path, monkeypatch) as line:
        answer = remote_answer(line, Stopwatch)
        assert isinstance(answer, type)
        assert answer(lambda: next(times)).twice() == 3.5


def test_what_is_written_into_an_argument_arrives(tmp_path, monkeypatch) -> None:
    def fill(out):
        return out.fill_(7)

    with line_to(fill, tmp_path, monkeypatch) as line:
        out = torch.zeros(3)
        assert remote_answer(line, fill)(out=out) is out
        assert out.tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (ValueError("bad cost"), ValueError),
        (KeyError("name"), KeyError),
        (NotImplementedError(), NotImplementedError),
        (RuntimeError(REFUSAL), NotYourOwn),
        (SystemExit(0), RuntimeError),
    ],
    ids=repr,
)
def test_an_error_comes_over_as_what_it_is(raised, seen, tmp_path, monkeypatch) -> None:
    def answer():
        raise raised

    with line_to(answer, tmp_path, monkeypatch) as line, pytest.raises(seen):
        remote_answer(line, answer)()


def test_an_error_is_shown_with_the_line_of_the_answer(tmp_path, monkeypatch) -> None:
    def answer(reply_lengths, slots, continuous):
        return reply_lengths[99]

    with line_to(answer, tmp_path, monkeypatch) as line:
        verdict = judged("A1.1", answer, line)
    assert "IndexError: list index out of range (at `return reply_lengths[99]`)" in verdict.message


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (b"not json", "no reply"),
        (b"[]", "no reply"),
        (b"[" * 100_000, "no reply"),
        (b'{"value": {"is": "shell"}}', "no value"),
        (b'{"call_back": 99, "arguments": {"is": "tuple", "items": []}}', "no reply"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_forged_reply_is_no_answer(said, heard, tmp_path, monkeypatch) -> None:
    with listening(tmp_path, monkeypatch) as listener:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(str(tmp_path / "line"))
        send(client, b'{"kind": "function"}')
        send(client, said)
        answer = remote_answer(Line(listener, 30), test_a_forged_reply_is_no_answer)
        with pytest.raises(NoAnswer, match=heard):
            answer(1)
        client.close()


def test_a_reply_that_is_too_long_is_not_read(tmp_path, monkeypatch) -> None:
    with listening(tmp_path, monkeypatch) as listener:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(str(tmp_path / "line"))
        client.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(NoAnswer, match="bytes"):
            Line(listener, 30)
        client.close()


def test_a_line_that_is_cut_or_silent_is_no_answer(tmp_path, monkeypatch) -> None:
    with listening(tmp_path, monkeypatch) as listener:
        for silent in (True, False):
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            client.connect(str(tmp_path / "line"))
            send(client, b'{"kind": "function"}')
            line = Line(listener, 0.2 if silent else 30)
            if not silent:
                client.close()
            with pytest.raises(NoAnswer, match="did not end" if silent else "ended in the middle"):
                line.ask("call", 0, None)
        client.close()

"""The oracle's end of the line: an answer that lives in the student's process.

`remote_answer` gives something that an oracle calls as it would call the answer itself. Questions
go out as pickles, which only we make. Replies come in as JSON and become numbers, strings, arrays
and `Record`s, never objects with code of the student's.
"""

import base64
import builtins
import io
import json
import linecache
import math
import pickle
import socket
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from course_lib.classroom.checks import Mismatch, NoAnswer
from course_lib.classroom.grading.answering import receive, send
from course_lib.classroom.grading.course_copy import REFUSAL
from course_lib.classroom.ownership import NotYourOwn

#: A reply may be so long. The largest of an exercise has some ten thousand numbers.
MAX_REPLY_BYTES = 16 << 20


class Record:
    """An object of the student's: its public fields, without its code.

    Other names stay out: NumPy, for one, believes what an object's `__array_interface__` says.
    """

    def __init__(self, type_name: str, fields: dict[str, Any]) -> None:
        self._type_name = type_name
        self.__dict__.update({n: value for n, value in fields.items() if not n.startswith("_")})

    def __repr__(self) -> str:
        fields = [f"{n}={value!r}" for n, value in vars(self).items() if n != "_type_name"]
        return f"{self._type_name}({', '.join(fields)})"


@dataclass(frozen=True)
class Unknown:
    """What is no data, such as a function: only what it looks like."""

    shown: str

    def __repr__(self) -> str:
        return self.shown


class Line:
    """A line to the student's process.

    Args:
        listener: the socket that it will connect to.
        time_limit_s: for the whole conversation.
    """

    def __init__(self, listener: socket.socket, time_limit_s: float) -> None:
        self.time_limit_s = time_limit_s
        self.deadline = time.monotonic() + time_limit_s
        self.callbacks: list[Callable[..., Any]] = []
        listener.settimeout(time_limit_s)
        try:
            self.socket, _ = listener.accept()
        except OSError:
            raise NoAnswer("it was never reached: a cell before it did not end") from None
        self.hello = self._reply()

    def ask(self, verb: str, number: int, name: Any, /, *arguments: Any, **options: Any) -> Any:
        """Ask for a call ("call"), an attribute ("get") or a new object ("make").

        Raises:
            NoAnswer: the process is gone, out of time, or sent what is no reply.
        """
        file = io.BytesIO()
        _Pickler(file, self.callbacks).dump((verb, number, name, arguments, options))
        self._send(file.getvalue())
        reply = self._reply()
        while "call_back" in reply:
            self._send(pickle.dumps(self._called_back(reply)))
            reply = self._reply()
        if "error" in reply:
            _raise_as(reply["error"])
        if verb == "make":
            return _whole(reply.get("made"))
        if reply.get("method") is True:
            return _METHOD
        value = decode(reply.get("value"))
        key = reply.get("is_argument")
        if key is None:
            return value
        given: dict[Any, Any] = dict(enumerate(arguments)) | options
        return _written_into(given.get(_key(key)), value)

    def _called_back(self, reply: dict[str, Any]) -> Any:
        number = _whole(reply["call_back"])
        arguments = decode(reply.get("arguments"))
        if not 0 <= number < len(self.callbacks) or not isinstance(arguments, tuple):
            raise NoAnswer("it sent what is no reply")
        try:
            return self.callbacks[number](*arguments)
        except TypeError:
            raise Mismatch(f"it called a function with the arguments {arguments}") from None

    def _send(self, data: bytes) -> None:
        try:
            self.socket.settimeout(max(0.01, self.deadline - time.monotonic()))
            send(self.socket, data)
        except OSError:
            raise NoAnswer(_GONE) from None

    def _reply(self) -> dict[str, Any]:
        try:
            self.socket.settimeout(max(0.01, self.deadline - time.monotonic()))
            reply = json.loads(receive(self.socket, MAX_REPLY_BYTES))
        except TimeoutError:
            raise NoAnswer(
                f"it did not end within {self.time_limit_s:g} s; is there a loop that never stops?"
            ) from None
        except (EOFError, OSError):
            raise NoAnswer(_GONE) from None
        except (ValueError, RecursionError) as error:
            raise NoAnswer(f"it sent what is no reply: {error}") from None
        if not isinstance(reply, dict):
            raise NoAnswer("it sent what is no reply")
        return reply


_GONE = "its process ended in the middle of a call; does it exit, or fill the memory?"
_METHOD = object()


class _Pickler(pickle.Pickler):
    """Leaves functions of the oracle's here and sends their number."""

    def __init__(self, file: io.BytesIO, callbacks: list[Callable[..., Any]]) -> None:
        super().__init__(file)
        self.callbacks = callbacks

    def persistent_id(self, obj: Any) -> int | None:
        """The number of a function that stays here."""
        if not _stays_here(obj):
            return None
        if obj not in self.callbacks:
            self.callbacks.append(obj)
        return self.callbacks.index(obj)


def _stays_here(obj: Any) -> bool:
    if isinstance(obj, types.FunctionType):
        return "<" in obj.__qualname__
    is_instance = not isinstance(obj, type | types.BuiltinFunctionType | types.ModuleType)
    in_course = type(obj).__module__.startswith("course_lib.")
    return isinstance(obj, types.MethodType) or (is_instance and in_course and callable(obj))


def _whole(number: Any) -> int:
    if not isinstance(number, int):
        raise NoAnswer("it sent what is no reply")
    return number


def _key(key: Any) -> Any:
    return key if isinstance(key, str | int) else None


def _written_into(argument: Any, value: Any) -> Any:
    """The argument, with what the student's process has in its copy."""
    import torch

    tensors = isinstance(argument, torch.Tensor) and isinstance(value, torch.Tensor)
    if not tensors or argument.shape != value.shape or argument.dtype != value.dtype:
        return value
    return argument.copy_(value)


def _raise_as(error: Any) -> None:
    """Raise what the answer raised, as if from the student's own line."""
    error = error if isinstance(error, dict) else {}
    name, message, line = (str(error.get(key, "")) for key in ("type", "message", "line"))
    if REFUSAL in message:
        raise NotYourOwn("it calls the course's own version; write it without.")
    known = getattr(builtins, name, None) if error.get("builtin") is True else None
    is_error = isinstance(known, type) and issubclass(known, Exception)
    try:
        exception = known(message) if is_error and known is not None else RuntimeError(message)
    except TypeError:  # such as UnicodeDecodeError, which wants more than a message
        exception = RuntimeError(message)
    if not is_error:
        exception = RuntimeError(f"{name}: {message}")
    # Whoever describes the error shows the line of its innermost frame.
    where = f"<the answer, {line!r}>"
    linecache.cache[where] = (len(line), None, [line + "\n"], where)
    exec(compile("raise error", where, "exec"), {"error": exception})


def decode(value: Any) -> Any:
    """The value that `answering.encode` made JSON of.

    Raises:
        NoAnswer: it is nothing that `encode` makes.
    """
    try:
        return _decoded(value)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise NoAnswer(f"it sent what is no value: {error!r}") from None


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value["is"]
    if kind == "bytes":
        return base64.b64decode(value["data"])
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](_decoded(item) for item in value["items"])
    if kind == "dict":
        return {_decoded(key): _decoded(item) for key, item in value["items"]}
    if kind == "object":
        fields = {str(name): _decoded(item) for name, item in value["fields"].items()}
        return Record(str(value["type"]), fields)
    if kind in ("numpy", "number"):
        array = _array(value)
        return array[()] if kind == "number" else array
    if kind == "tensor":
        return _tensor(value)
    return Unknown(str(value["shown"]))


_CONTAINERS: dict[Any, Callable[..., Any]] = {
    kind.__name__: kind for kind in (list, tuple, set, frozenset)
}


def _array(value: dict[str, Any]) -> np.ndarray[Any, Any]:
    dtype = np.dtype(str(value["dtype"]))
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of {dtype}")
    shape = [_whole(length) for length in value["shape"]]
    return np.frombuffer(base64.b64decode(value["data"]), dtype).reshape(shape).copy()


def _tensor(value: dict[str, Any]) -> Any:
    import torch

    dtype = getattr(torch, str(value["dtype"]))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor of {value['dtype']}")
    shape = [_whole(length) for length in value["shape"]]
    data = base64.b64decode(value["data"])
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


class _RemoteObject:
    """An object in the student's process. Its methods are called there."""

    def __init__(self, line: Line, number: int) -> None:
        self._line, self._number = line, number
        self._methods: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name not in self._methods:
            value = self._line.ask("get", self._number, name)
            if value is not _METHOD:
                return value
            self._methods.add(name)

        def method(*arguments: Any, **options: Any) -> Any:
            return self._line.ask("call", self._number, name, *arguments, **options)

        return method


def remote_answer(line: Line, portrait: Any) -> Any:
    """What an oracle may take for the answer.

    Args:
        line: to the student's process.
        portrait: the same function or class as it stands in the notebook, for those who look at
            its code. A class has the bases of its portrait.
    """

    def ask(verb: str, name: Any, /, *arguments: Any, **options: Any) -> Any:
        return line.ask(verb, 0, name, *arguments, **options)

    def make(*arguments: Any, **options: Any) -> _RemoteObject:
        return _RemoteObject(line, ask("make", None, *arguments, **options))

    def make_stand(stand: type, /, *arguments: Any, **options: Any) -> _RemoteObject:
        return _RemoteObject(line, ask("make", stand, *arguments, **options))

    if line.hello.get("kind") == "class" and isinstance(portrait, type):
        members = {"__new__": lambda cls, *a, **o: make(*a, **o), "__wrapped__": portrait}
        answer = type(portrait.__name__, portrait.__bases__, members)
        answer.make_stand = staticmethod(make_stand)  # type: ignore[attr-defined]
        return answer
    if line.hello.get("kind") == "function" and isinstance(portrait, types.FunctionType):

        def function(*arguments: Any, **options: Any) -> Any:
            return ask("call", None, *arguments, **options)

        function.__wrapped__ = portrait  # type: ignore[attr-defined]
        return function
    return Unknown(str(line.hello.get("shown", "nothing")))

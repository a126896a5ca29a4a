"""The student's end of the line: serves an answer to the questions of an oracle elsewhere.

The last cell of a graded notebook calls `serve`. It runs in the student's process, where everything
can be tampered with, so it decides nothing: it calls the answer with what comes over the line, and
sends back what the answer did, as plain data. Nothing here knows what is right.
"""

import base64
import dataclasses
import io
import json
import os
import pickle
import socket
import struct
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

#: Names the socket in the environment of the student's process.
LINE_VARIABLE = "COURSE_GRADING_LINE"

#: Nesting beyond this is not sent; no exercise needs as much.
MAX_DEPTH = 12

_LENGTH = struct.Struct(">I")


def send(line: socket.socket, data: bytes) -> None:
    """Send one message."""
    line.sendall(_LENGTH.pack(len(data)) + data)


def receive(line: socket.socket, at_most: int = 1 << 31) -> bytes:
    """The next message.

    Raises:
        EOFError: the other end has closed the line.
        ValueError: the message is longer than `at_most` bytes.
    """
    (length,) = _LENGTH.unpack(_exactly(line, _LENGTH.size))
    if length > at_most:
        raise ValueError(f"a message of {length} bytes, at most {at_most} are taken")
    return _exactly(line, length)


def _exactly(line: socket.socket, count: int) -> bytes:
    pieces = []
    while count:
        piece = line.recv(min(count, 1 << 20))
        if not piece:
            raise EOFError("the line was closed")
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def serve(answer: Any) -> None:
    """Answer questions until the oracle has no more.

    Args:
        answer: the function or class; None if the student's cell did not define it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.connect(os.environ[LINE_VARIABLE])
        server = _Server(answer, line)
        server.tell({"kind": _kind(answer), "shown": _shown(answer)})
        while True:
            try:
                question = receive(line)
            except (EOFError, ConnectionError):
                return
            server.tell(server.answer_to(question))


def _kind(answer: Any) -> str:
    if answer is None:
        return "missing"
    if isinstance(answer, type):
        return "class"
    return "function" if callable(answer) else "other"


class _Server:
    """The objects that the oracle has asked for, by number; 0 is the answer itself."""

    def __init__(self, answer: Any, line: socket.socket) -> None:
        self.objects: list[Any] = [answer]
        self.line = line

    def tell(self, reply: dict[str, Any]) -> None:
        send(self.line, json.dumps(reply).encode())

    def answer_to(self, question: bytes) -> dict[str, Any]:
        try:
            unpickler = _Unpickler(io.BytesIO(question), self)
            verb, number, name, arguments, options = unpickler.load()
            target = self.objects[number]
            if verb == "make":  # an instance, or a stand with the answer in it
                made = (
                    name(target, *arguments, **options) if name else target(*arguments, **options)
                )
                self.objects.append(made)
                return {"made": len(self.objects) - 1}
            if verb == "get":
                value = getattr(target, name)
                return {"method": True} if callable(value) else {"value": encode(value)}
            function = target if name is None else getattr(target, name)
            value = function(*arguments, **options)
            given = {**dict(enumerate(arguments)), **options}
            same = next((key for key, given_value in given.items() if given_value is value), None)
            is_tensor = hasattr(value, "dtype")  # its identity matters: `out` was written into
            return {"value": encode(value), "is_argument": same if is_tensor else None}
        except KeyboardInterrupt:  # the time is up
            raise
        except BaseException as error:
            return {"error": _error(error)}

    def call_back(self, number: int, arguments: tuple[Any, ...]) -> Any:
        """Call a function that the oracle has handed over, such as a clock."""
        self.tell({"call_back": number, "arguments": encode(arguments)})
        return pickle.loads(receive(self.line))


class _Unpickler(pickle.Unpickler):
    """Finds a function of the oracle's in its place."""

    def __init__(self, file: io.BytesIO, server: _Server) -> None:
        super().__init__(file)
        self.server = server

    def persistent_load(self, pid: Any) -> Any:
        """A function that calls the oracle's."""
        return lambda *arguments: self.server.call_back(pid, arguments)


def _error(error: BaseException) -> dict[str, Any]:
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__  # of a Triton kernel that was interpreted
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    line = own[-1].line if own else None
    builtin = isinstance(error, Exception) and type(error).__module__ == "builtins"
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return {
        "type": type(error).__name__,
        "builtin": builtin,
        "message": _shown(message, str),
        "line": line or "",
    }


def _shown(value: Any, how: Any = repr) -> str:
    try:
        return str(how(value))[:2000]
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"


def encode(value: Any, depth: int = 0) -> Any:
    """A value as JSON: data as it is, objects as the names and values of their fields."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float) and not isinstance(value, np.generic):
        return int(value) if isinstance(value, int) else float(value)
    if depth > MAX_DEPTH:
        return {"is": "other", "shown": "nested too deeply"}

    def inner(item: Any) -> Any:
        return encode(item, depth + 1)

    if type(value) is list:
        return [inner(item) for item in value]
    if isinstance(value, bytes | bytearray):
        return {"is": "bytes", "data": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray | np.generic):
        return _encode_array(np.asarray(value), "numpy" if value.ndim else "number")
    if "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor):
        return _encode_tensor(value)
    if isinstance(value, Mapping):
        return {"is": "dict", "items": [[inner(k), inner(v)] for k, v in value.items()]}
    if isinstance(value, list | tuple | set | frozenset) and not hasattr(value, "_fields"):
        kind = next(k for k in (list, tuple, set, frozenset) if isinstance(value, k))
        return {"is": kind.__name__, "items": [inner(item) for item in value]}
    names = _field_names(value)
    if names is None:
        return {"is": "other", "shown": _shown(value)}
    fields = {name: inner(getattr(value, name)) for name in names if hasattr(value, name)}
    return {"is": "object", "type": type(value).__name__, "fields": fields}


def _field_names(value: Any) -> list[str] | None:
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    names = getattr(value, "_fields", None) or getattr(value, "__dict__", None)
    return None if names is None or callable(value) else [n for n in names if isinstance(n, str)]


def _encode_array(array: np.ndarray[Any, Any], kind: str) -> Any:
    if array.dtype.kind not in "biuf":
        return {"is": "other", "shown": _shown(array)}
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"is": kind, "dtype": array.dtype.str, "shape": array.shape, "data": data}


def _encode_tensor(tensor: Any) -> Any:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.numel() == 0:
        return {"is": "tensor", "dtype": dtype, "shape": list(tensor.shape), "data": ""}
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "is": "tensor",
        "dtype": dtype,
        "shape": list(tensor.shape),
        "data": base64.b64encode(data).decode(),
    }

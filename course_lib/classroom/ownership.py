"""Whether an answer is the student's own, and its source code.

An answer that is, derives from, calls or repeats the reference shows nothing. Derived and called
are seen by looking at what its code refers to, and by blocking the reference while the answer is
checked; repeated by comparing the programs with names, comments and annotations taken out.
"""

import ast
import builtins
import importlib
import textwrap
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from course_lib.classroom.parts import load_object
from course_lib.classroom.source import names_in, own_functions, source_of


class NotYourOwn(Exception):
    """The answer is the course's own version in one way or another."""


def check_is_own(answer: Any, reference: str) -> None:
    """Raise `NotYourOwn` if the answer is, derives from, refers to or repeats the reference.

    Args:
        answer: a function or class.
        reference: "module:name".
    """
    target = load_object(reference)
    module, name = reference.split(":")
    if not isinstance(answer, types.FunctionType | type):
        raise NotYourOwn(f"expected the function or class that you wrote, got {answer!r}")
    if answer is target or (isinstance(answer, type) and target in answer.__mro__):
        raise NotYourOwn(f"this is the course's own {name}, or derives from it; write your own.")
    for used in _objects_used(answer):
        helper = isinstance(used, types.FunctionType) and used.__module__ == module
        if used is target or helper:
            raise NotYourOwn(f"it uses the course's own {used.__name__}; write it without.")
    try:
        own = source_of(answer)
    except OSError:
        raise NotYourOwn("its source code was not found; define it in a notebook cell.") from None
    if _refers_to_module(own, module):
        raise NotYourOwn(f"it imports the module of the course's own {name}; write it without.")
    if _fingerprint(own) == _fingerprint(source_of(target)):
        raise NotYourOwn(f"it is the course's own {name} word by word; write it in your own way.")


@contextmanager
def reference_blocked(reference: str) -> Iterator[None]:
    """While inside, the reference and the functions beside it raise `NotYourOwn` when called."""
    module = importlib.import_module(reference.split(":")[0])
    beside = [f for f in own_functions(module) if f.__module__ == module.__name__]
    functions = own_functions(load_object(reference)) + beside
    blocked = [f for f in dict.fromkeys(functions) if not f.__code__.co_freevars]
    saved = [f.__code__ for f in blocked]

    def refuse(*_: Any, **__: Any) -> None:
        from course_lib.classroom.ownership import NotYourOwn

        raise NotYourOwn("it calls the course's own version; write it without.")

    for function in blocked:
        function.__code__ = refuse.__code__
    try:
        yield
    finally:
        for function, code in zip(blocked, saved, strict=True):
            function.__code__ = code


def _objects_used(answer: Any) -> Iterator[Any]:
    """Global objects that the code of the answer names, those of its helpers included."""
    seen: set[int] = set()
    queue = own_functions(answer)
    while queue:
        function = queue.pop()
        for name in names_in(function.__code__):
            used = function.__globals__.get(name)
            if used is None or id(used) in seen:
                continue
            seen.add(id(used))
            yield used
            if getattr(used, "__module__", None) == function.__module__ and isinstance(
                used, types.FunctionType | type
            ):
                queue.extend(own_functions(used))


def _refers_to_module(source: str, module: str) -> bool:
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(node, ast.Import) and any(alias.name == module for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == module:
            return True
    return False


def _fingerprint(source: str) -> str:
    """The program's structure with docstrings, annotations and names of its own taken out."""
    tree = ast.parse(textwrap.dedent(source))
    names: dict[str, str] = {}

    def neutral(name: str) -> str:
        return name if hasattr(builtins, name) else names.setdefault(name, f"n{len(names)}")

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            node.name = neutral(node.name)
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.arg, node.annotation = neutral(node.arg), None
        if isinstance(node, ast.Name):
            node.id = neutral(node.id)
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)

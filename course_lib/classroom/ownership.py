"""Whether an answer is the student's own, and its source code.

An answer that is, derives from, calls or repeats the reference shows nothing. Derived and called
are seen by looking at what its code refers to, and by blocking the reference while the answer is
checked; repeated by comparing the programs with names, comments and annotations taken out. The
Triton kernels that an answer launches are part of it.
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
from course_lib.classroom.source import names_in, own_functions, plain, program_of


class NotYourOwn(Exception):
    """The answer is the course's own version in one way or another."""


def check_is_own(answer: Any, reference: str) -> None:
    """Raise `NotYourOwn` if the answer is, derives from, refers to or repeats the reference.

    Args:
        answer: a function or class.
        reference: "module:name".
    """
    target = plain(load_object(reference))
    module, name = reference.split(":")
    answer = plain(answer)
    if not isinstance(answer, types.FunctionType | type):
        raise NotYourOwn(f"expected the function or class that you wrote, got {answer!r}")
    if answer is target or (isinstance(answer, type) and target in answer.__mro__):
        raise NotYourOwn(f"this is the course's own {name}, or derives from it; write your own.")
    for used in _objects_used(answer):
        home = used.__name__ if isinstance(used, types.ModuleType) else used.__module__
        helper = isinstance(used, types.FunctionType) and home == module
        if used is target or helper or home.startswith("course_lib.classroom"):
            raise NotYourOwn(f"it uses the course's own {used.__name__}; write it without.")
    try:
        own = program_of(answer)
    except OSError:
        raise NotYourOwn("its source code was not found; define it in a notebook cell.") from None
    if any(name.startswith("course_lib.classroom") for name in _modules_imported(own)):
        raise NotYourOwn("it imports the course's checks; write it without.")
    if _fingerprint(own) == _fingerprint(program_of(target)):
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
            used = plain(function.__globals__.get(name))
            if id(used) in seen or not isinstance(used, _NAMED):
                continue
            seen.add(id(used))
            yield used
            is_code = isinstance(used, types.FunctionType | type)
            if is_code and used.__module__ == function.__module__:
                queue.extend(own_functions(used))


_NAMED = types.FunctionType | type | types.ModuleType


def _modules_imported(source: str) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    return modules


def _fingerprint(source: str) -> str:
    """The program's structure with docstrings, annotations and names of its own taken out."""
    tree = _Plain().visit(ast.parse(textwrap.dedent(source)))
    names: dict[str, str] = {}
    defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}

    def neutral(name: str) -> str:
        return name if hasattr(builtins, name) else names.setdefault(name, f"n{len(names)}")

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.name = neutral(node.name)
        elif isinstance(node, ast.arg):
            node.arg = neutral(node.arg)
        elif isinstance(node, ast.Name):
            node.id = neutral(node.id)
        elif isinstance(node, ast.Attribute) and node.attr in defined:
            node.attr = neutral(node.attr)
    return ast.dump(tree)


class _Plain(ast.NodeTransformer):
    """Takes out docstrings and annotations."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self._without_docstring(node)
        node.returns = None
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self._without_docstring(node)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        return self.generic_visit(ast.Assign([node.target], node.value, lineno=node.lineno))

    def _without_docstring(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]

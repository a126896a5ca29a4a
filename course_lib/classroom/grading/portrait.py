"""An answer as it stands in the notebook: its code, without running any of it.

The ownership rules and some oracles look at the code of an answer: what it refers to, which kernels
it launches, its source. `portrait` gives them functions and classes to look at, made from the
compiled cells. Nothing of the student's is executed: the functions are never called.
"""

import ast
import importlib
import linecache
import types
from collections.abc import Sequence
from typing import Any

from IPython.core.inputtransformer2 import TransformerManager

from kernels.runtime import triton

#: What the code of an answer is looked up in. Other modules are not imported for it.
_LOOKED_UP = ("course_lib", "kernels", "numpy", "torch", "triton")


#: What parsing a student's source may raise: it is no Python, or nested too deeply.
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)


def python_of(source: str) -> str:
    """A cell as Python, with its magic commands made calls."""
    return TransformerManager().transform_cell(source)


def portrait(cells: Sequence[str], name: str) -> Any:
    """The function or class `name` that the cells define; None if they do not.

    Args:
        cells: sources in the order in which they run; those that are not valid Python define
            nothing.
        name: of the answer.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(cells):
        try:
            text = python_of(source)
            file = f"<answer {number}>"
            code = compile(text, file, "exec")
            statements = ast.parse(text).body
        except NOT_PYTHON:
            continue
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        for statement in statements:
            _define(statement, code, namespace)
    return namespace.get(name)


def _define(statement: ast.stmt, code: types.CodeType, namespace: dict[str, Any]) -> None:
    """Put what a statement defines into the namespace, as far as that takes no execution."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        _import(statement, namespace)
    elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        namespace[statement.name] = _function(statement, code, namespace)
    elif isinstance(statement, ast.ClassDef):
        namespace[statement.name] = _class(statement, code, namespace)
    elif isinstance(statement, ast.Assign) and isinstance(
        statement.value, ast.Name | ast.Attribute
    ):
        value = _looked_up(statement.value, namespace)
        for target in statement.targets:
            if isinstance(target, ast.Name):
                namespace[target.id] = value
    elif isinstance(statement, ast.If | ast.Try | ast.With):
        for inner in [*statement.body, *getattr(statement, "orelse", [])]:
            _define(inner, code, namespace)


def _import(statement: ast.Import | ast.ImportFrom, namespace: dict[str, Any]) -> None:
    module = statement.module if isinstance(statement, ast.ImportFrom) else None
    for alias in statement.names:
        home = module or alias.name
        if home.split(".")[0] not in _LOOKED_UP:
            continue
        try:
            found = importlib.import_module(home)
            if module:
                value = getattr(found, alias.name, None) or importlib.import_module(
                    f"{home}.{alias.name}"
                )
            else:
                value = found if alias.asname else importlib.import_module(home.split(".")[0])
        except ImportError:
            continue
        namespace[alias.asname or alias.name.split(".")[0]] = value


def _looked_up(expression: ast.expr, namespace: dict[str, Any]) -> Any:
    """The object that a name, or attributes of one, stand for; None if that is not known."""
    if isinstance(expression, ast.Name):
        return namespace.get(expression.id)
    if isinstance(expression, ast.Attribute):
        owner = _looked_up(expression.value, namespace)
        return (
            getattr(owner, expression.attr, None) if isinstance(owner, types.ModuleType) else None
        )
    return None


def _code_of(
    statement: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, code: types.CodeType
) -> types.CodeType | None:
    first = min([statement.lineno, *(d.lineno for d in statement.decorator_list)])
    for constant in code.co_consts:
        if (
            isinstance(constant, types.CodeType)
            and constant.co_name == statement.name
            and constant.co_firstlineno in (first, statement.lineno)
        ):
            return constant
    return None


def _function(
    statement: ast.FunctionDef | ast.AsyncFunctionDef,
    code: types.CodeType,
    namespace: dict[str, Any],
) -> Any:
    own = _code_of(statement, code)
    if own is None:
        return None
    closure = tuple(types.CellType() for _ in own.co_freevars)
    function = types.FunctionType(own, namespace, statement.name, closure=closure)
    function.__module__ = "__main__"
    is_kernel = any(_looked_up(d, namespace) is triton.jit for d in statement.decorator_list)
    return triton.jit(function) if is_kernel and isinstance(triton.__version__, str) else function


def _class(statement: ast.ClassDef, code: types.CodeType, namespace: dict[str, Any]) -> Any:
    body = _code_of(statement, code)
    if body is None:
        return None
    bases = [_looked_up(base, namespace) for base in statement.bases]
    members: dict[str, Any] = {"__module__": "__main__"}
    for inner in statement.body:
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
            members[inner.name] = _function(inner, body, namespace)
    known = tuple(dict.fromkeys(base for base in bases if isinstance(base, type)))
    try:
        return type(statement.name, known, members)
    except TypeError:  # bases that do not go together
        return type(statement.name, (), members)

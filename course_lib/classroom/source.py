"""The source code of functions and classes, those of notebook cells included.

`inspect.getsource` finds no class that was defined in a notebook; the lines of every cell are kept
by `linecache`, so looking there does.
"""

import ast
import inspect
import linecache
import textwrap
import types
from typing import Any


def own_functions(obj: Any) -> list[types.FunctionType]:
    """The function itself, or those that a class or module defines in its own body."""
    if isinstance(obj, types.FunctionType):
        return [obj]
    members = (
        member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        for member in vars(obj).values()
    )
    functions = [member for member in members if isinstance(member, types.FunctionType)]
    if isinstance(obj, type):  # from Python 3.13 on, a dataclass has a method of `dataclasses`
        functions = [function for function in functions if function.__module__ == obj.__module__]
    return functions


def names_in(code: types.CodeType) -> set[str]:
    """Names that a code object and those nested in it refer to."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= names_in(constant)
    return names


def source_of(obj: Any) -> str:
    """Source of a function or class, also of one that was defined in a notebook cell.

    Raises:
        OSError: it is nowhere to be found.
    """
    files = [f.__code__.co_filename for f in own_functions(obj)]
    for file in dict.fromkeys(files + [f for f in reversed(linecache.cache) if "ipykernel" in f]):
        lines = linecache.getlines(file)
        for node in ast.walk(ast.parse("".join(lines))):
            if isinstance(node, _DEFINITIONS) and node.name == obj.__name__:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                return textwrap.dedent("".join(lines[first - 1 : node.end_lineno]))
    return inspect.getsource(obj)


_DEFINITIONS = (ast.FunctionDef, ast.ClassDef)

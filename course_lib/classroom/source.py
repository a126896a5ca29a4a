"""The source code of functions and classes, those of notebook cells included.

`inspect.getsource` finds no class that was defined in a notebook; the lines of every cell are kept
by `linecache`, so looking there does.
"""

import ast
import inspect
import linecache
import symtable
import textwrap
import types
from typing import Any


def plain(obj: Any) -> Any:
    """The Python function that was decorated or made a Triton kernel; any other object as it is."""
    while type(obj).__module__.startswith("triton.") and hasattr(obj, "fn"):
        obj = obj.fn
    return inspect.unwrap(obj) if callable(obj) else obj


def kernels_of(function: types.FunctionType) -> list[types.FunctionType]:
    """Triton kernels that a function and its helpers launch, and what these call, line by line."""
    seen = [function]
    kernels: list[types.FunctionType] = []
    for outer in seen:  # grows
        for name in names_in(outer.__code__):
            used = outer.__globals__.get(name)
            inner = plain(used)
            if isinstance(inner, types.FunctionType) and inner not in seen:
                is_kernel = type(used).__module__.startswith("triton.")
                if is_kernel:
                    kernels.append(inner)
                if is_kernel or inner.__module__ == function.__module__:
                    seen.append(inner)
    return sorted(kernels, key=lambda kernel: kernel.__code__.co_firstlineno)


def own_functions(obj: Any) -> list[types.FunctionType]:
    """The function itself, or those that a class or module defines in its own body."""
    obj = plain(obj)
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
    obj = plain(obj)
    files = [f.__code__.co_filename for f in own_functions(obj)]
    for file in dict.fromkeys(files + [f for f in reversed(linecache.cache) if "ipykernel" in f]):
        lines = linecache.getlines(file)
        found = [node for node in _definitions("".join(lines)) if node.name == obj.__name__]
        if found:  # the last one, if a name is defined twice
            node = found[-1]
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            return textwrap.dedent("".join(lines[first - 1 : node.end_lineno]))
    return inspect.getsource(obj)


def program_of(obj: Any) -> str:
    """Source of a function or class, and before it that of the Triton kernels that it launches."""
    kernels = dict.fromkeys(k for function in own_functions(obj) for k in kernels_of(function))
    return "\n\n".join([*map(source_of, kernels), source_of(obj)])


def _definitions(source: str) -> list[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a file or cell; none if it is not valid Python, as a cell may be."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def global_names(source: str) -> set[str]:
    """Names that the source takes from, or puts into, the module it stands in."""
    names: set[str] = set()
    queue = [symtable.symtable(source, "<source>", "exec")]
    while queue:
        table = queue.pop()
        is_module = table.get_type() == "module"
        names |= {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_global() or (is_module and symbol.is_referenced())
        }
        queue += table.get_children()
    return names

"""What an answer reaches for that no exercise needs. A sign to look, not a verdict.

Marks do not depend on it: the walls and the oracle outside hold whatever the code says.
"""

import ast

from course_lib.classroom.grading.portrait import NOT_PYTHON, python_of

_MODULES = {
    "builtins", "ctypes", "gc", "glob", "importlib", "inspect", "io", "IPython", "linecache",
    "marshal", "multiprocessing", "nbval", "os", "pathlib", "pickle", "pkgutil", "psutil",
    "pytest", "requests", "resource", "runpy", "shutil", "signal", "socket", "subprocess", "sys",
    "tempfile", "threading", "urllib",
}  # fmt: skip
_NAMES = {"__import__", "compile", "eval", "exec", "get_ipython", "globals", "open", "setattr"}


def suspicions(source: str) -> list[str]:
    """What to look at in the source of an answer, a sentence of each kind."""
    try:
        nodes = list(ast.walk(ast.parse(python_of(source))))
    except NOT_PYTHON:
        return ["its cell is not valid Python"] if source.strip() else []
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    homes = {home for node in imports for home in _homes(node)}
    bound = {(a.asname or a.name).split(".")[0] for node in imports for a in node.names}
    changed = {
        ast.unparse(target)
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and _root(target) in bound
    }
    found = {
        "imports": {home for home in homes if _is_odd(home)},
        "uses": {node.id for node in nodes if isinstance(node, ast.Name)} & _NAMES,
        "changes": changed,
    }
    return [f"it {verb} {', '.join(sorted(names))}" for verb, names in found.items() if names]


def _homes(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names]


def _is_odd(home: str) -> bool:
    return home.split(".")[0] in _MODULES or home.startswith("course_lib.classroom.grading")


def _root(target: ast.expr) -> str | None:
    while isinstance(target, ast.Attribute):
        target = target.value
    return target.id if isinstance(target, ast.Name) else None

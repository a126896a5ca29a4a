"""What an answer reaches for that no exercise needs. A sign to look, not a verdict.

Marks do not depend on it: the walls and the oracle outside hold whatever the code says.
"""

import ast

from course_lib.classroom.grading.portrait import python_of

_MODULES = {
    "builtins", "ctypes", "gc", "glob", "importlib", "inspect", "io", "IPython", "linecache",
    "marshal", "multiprocessing", "nbval", "os", "pathlib", "pickle", "pkgutil", "psutil",
    "pytest", "requests", "resource", "runpy", "shutil", "signal", "socket", "subprocess", "sys",
    "tempfile", "threading", "urllib",
}  # fmt: skip
_NAMES = {"__import__", "compile", "eval", "exec", "get_ipython", "globals", "open", "setattr"}


def suspicions(source: str) -> list[str]:
    """A sentence for each thing to look at."""
    try:
        tree = ast.parse(python_of(source))
    except (SyntaxError, ValueError, RecursionError):
        return ["its cell is not valid Python"] if source.strip() else []
    found: dict[str, None] = {}
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            homes = [module] if module else [alias.name for alias in node.names]
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            for home in homes:
                if home.split(".")[0] in _MODULES or home.startswith(
                    "course_lib.classroom.grading"
                ):
                    found[f"it imports {home}"] = None
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in _NAMES:
            found[f"it uses {node.id}"] = None
        targets = node.targets if isinstance(node, ast.Assign) else ()
        for target in targets:
            root = target
            while isinstance(root, ast.Attribute):
                root = root.value
            if root is not target and isinstance(root, ast.Name) and root.id in imported:
                found[f"it changes {ast.unparse(target)}"] = None
    return list(found)

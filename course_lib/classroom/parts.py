"""The parts of the engine that a student can replace, and which of them are the student's own.

A part whose check passes is written to `labs/my_engine/` as a plain Python file. After that
`part("scheduler")` gives the student's version, before it the course's own. `course parts` lists
them.
"""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_lib.classroom.source import global_names, own_functions, plain, source_of
from course_lib.data import DATA_DIR


@dataclass(frozen=True)
class Part:
    """A replaceable part: what it is called, where the course's own is, where it is built."""

    name: str
    home: str  # "module:name"
    built_in: str  # notebook


PARTS = (
    Part("scheduler", "course_lib.engine.scheduler:Scheduler", "A1"),
    Part("admission", "course_lib.serving.admission:AdmissionPolicy", "A2"),
    Part("autoscaler", "course_lib.fleet.proportional:ProportionalAutoscaler", "A3"),
    Part("cold_start", "course_lib.fleet.warm_pool:ColdStartPlan", "A4"),
    Part("sizing", "course_lib.sizing.memory:estimate_gpu_requirements", "B1"),
    Part("block_pool", "course_lib.engine.block_pool:BlockPool", "B2"),
    Part("paged_attention", "kernels.paged_attention:paged_attention", "B3"),
    Part("load_timer", "course_lib.engine.load_timing:time_phases", "B4"),
    Part("diagnose", "course_lib.classroom.diagnosis:diagnose", "C1"),
)


def parts_dir() -> Path:
    """Where the student's parts are kept; the variable COURSE_PARTS_DIR names another place."""
    return Path(os.environ.get("COURSE_PARTS_DIR") or DATA_DIR.parent / "labs" / "my_engine")


def find_part(name: str) -> Part:
    """The part of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    for candidate in PARTS:
        if candidate.name == name:
            return candidate
    known = ", ".join(candidate.name for candidate in PARTS)
    raise ValueError(f"there is no part {name!r}; the parts are {known}")


def load_object(home: str) -> Any:
    """The object that "module:name" names."""
    module, name = home.split(":")
    return getattr(importlib.import_module(module), name)


def part(name: str) -> Any:
    """The student's own version of a part if its check has passed, else the course's."""
    found = find_part(name)
    path = parts_dir() / f"{name}.py"
    return load_file(path) if path.exists() else load_object(found.home)


def is_own(name: str) -> bool:
    """Whether the student has a version of the part."""
    return (parts_dir() / f"{find_part(name).name}.py").exists()


def load_file(path: str | Path) -> Any:
    """The object that a saved part's `PART` names.

    Raises:
        ValueError: the file does not run; the message says what to do.
    """
    spec = importlib.util.spec_from_file_location(f"my_engine_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.PART
    except Exception as error:
        raise ValueError(
            f"{path} does not run ({type(error).__name__}: {error}); mend it, or delete it to go "
            "back to the course's own part"
        ) from error


def save_part(name: str, answer: Any, exercise_id: str) -> Path:
    """Write an answer as a file that runs on its own. Returns its path.

    The file is kept only if it passes the exercise's check in a process of its own.

    Raises:
        ValueError: it depends on something of the notebook that was not written down with it.
    """
    path = parts_dir() / f"{find_part(name).name}.py"
    text = f"# The {name} of your own engine, saved when its check passed.\n"
    text += standalone_source(answer)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft.py")
    draft.write_text(text, encoding="utf-8")
    try:
        code = (
            "import sys; from course_lib.classroom.checks import verify_file as v; v(*sys.argv[1:])"
        )
        command = [sys.executable, "-c", code, str(draft), exercise_id]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(f"on its own, without the notebook, it does not work: {reason}")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


#: Triton as the notebooks name it. `kernels.runtime` switches its interpreter on where needed.
_FROM_RUNTIME = {"triton": "triton", "tl": "triton.language"}


def standalone_source(answer: Any) -> str:
    """A module with the answer as its `PART`: its source, preceded by what that uses.

    Raises:
        ValueError: it uses something that cannot be written down.
    """
    imports: list[str] = []
    definitions: list[str] = []
    done: set[str] = set()

    def add(obj: Any) -> None:
        source = source_of(obj)
        namespace = own_functions(obj)[0].__globals__ if own_functions(obj) else {}
        for used in sorted(global_names(source)):
            if used in namespace and used not in done and used != obj.__name__:
                done.add(used)
                add_name(used, namespace[used], namespace)
        definitions.append(source)

    def add_name(used: str, value: Any, namespace: dict[str, Any]) -> None:
        value = plain(value)
        home = getattr(value, "__module__", None)
        in_notebook = home == namespace.get("__name__")
        if used in _FROM_RUNTIME and getattr(value, "__name__", "") == _FROM_RUNTIME[used]:
            imports.append(f"from kernels.runtime import {used}")
        elif isinstance(value, types.ModuleType):
            imports.append(f"import {value.__name__} as {used}")
        elif isinstance(value, types.FunctionType | type) and in_notebook:
            add(value)
        elif home and hasattr(value, "__name__") and not in_notebook:
            imports.append(f"from {home} import {value.__name__} as {used}")
        elif isinstance(value, int | float | str | tuple | type(None)):
            definitions.append(f"{used} = {value!r}\n")
        elif isinstance(value, re.Pattern):
            imports.append("import re")
            definitions.append(f"{used} = re.compile({value.pattern!r}, {value.flags})\n")
        else:
            raise ValueError(
                f"the part uses the notebook's variable {used!r} ({type(value).__name__}), which "
                "cannot be saved with it; make it inside the part or pass it as an argument"
            )

    add(answer)
    body = "\n\n".join(definitions)
    return f"{chr(10).join(imports)}\n\n\n{body}\n\nPART = {answer.__name__}\n"

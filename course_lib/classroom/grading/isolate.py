"""The walls around a student's process: what it may read, write, reach, and how much it may use.

With bubblewrap it sees Python, a copy of the course and a small empty disk in memory; no network,
no other process, no other user's file. Where that is missing it has no network at least, or limits
only. `isolation_here` says which, and the report says it on.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from course_lib.classroom.grading.course_copy import visible_data

Isolation = Literal["bubblewrap", "network namespace", "limits only"]

#: What each level keeps a student's code from.
MEANING: Mapping[Isolation, str] = {
    "bubblewrap": "No network, no file of this machine but Python and the course without what is "
    "asked, no other process; limits on time, memory, processes and files",
    "network namespace": "No network; limits on time, memory, processes and the size of a file. "
    "Files of this machine can be read: install bubblewrap before you trust marks of unknown "
    "people",
    "limits only": "Limits on time, memory, processes and the size of a file. The network and the "
    "files of this machine can be reached: install bubblewrap before you trust marks of unknown "
    "people",
}


@dataclass(frozen=True)
class Limits:
    """What the process of one answer may use.

    Args:
        cell_s: seconds, for each cell.
        memory_mb: of all its processes together.
        processes: and threads.
        file_mb: of one file.
        disk_mb: of all files.
    """

    cell_s: float = 120.0
    memory_mb: int = 4096
    processes: int = 100
    file_mb: int = 64
    disk_mb: int = 256


# Sets the limits inside the walls, where counting begins anew, and becomes the program. A kernel
# that knows who started it ends when its parent is process 1, as it is there.
_SET_LIMITS = """
import os, resource, sys
for name, value in zip(("AS", "NPROC", "FSIZE", "CORE"), map(int, sys.argv[1:5])):
    limit = getattr(resource, "RLIMIT_" + name, None)
    if limit is not None:
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
os.environ.pop("JPY_PARENT_PID", None)
os.execv(sys.argv[5], sys.argv[5:])
"""


def sandboxed(
    program: Sequence[str], isolation: Isolation, limits: Limits, *, course: Path, writable: Path
) -> list[str]:
    """The command that runs a program within walls and limits.

    Args:
        program: begins with the path of an executable.
        isolation: the walls.
        limits: what it may use.
        course: the copy of the course that it sees.
        writable: the one folder of the machine that it may write to, for its sockets.
    """
    mib = 1 << 20
    numbers = (limits.memory_mb * mib, limits.processes, limits.file_mb * mib, 0)
    command = [sys.executable, "-I", "-S", "-c", _SET_LIMITS, *map(str, numbers), *program]
    if isolation == "bubblewrap":
        return [*_bubblewrap(limits, course, writable), *_as_nobody(), *command]
    if isolation == "network namespace":
        return [*_WITHOUT_NETWORK, *command]
    return command


def user_of_this_process() -> int | None:
    """Where we are root, the user that the sandboxed process is: one that owns nothing here.

    Root is exempt from the limit on processes, so it must be somebody else; and the limit counts
    all processes of a user, so those that run side by side differ.
    """
    return 200_000 + os.getpid() % 100_000 if os.getuid() == 0 else None


_WITHOUT_NETWORK = ["unshare", "--map-root-user", "--net", "--"]


def _as_nobody() -> list[str]:
    user = user_of_this_process()
    if user is None:
        return []
    return [
        "setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs",
        "--inh-caps=-all", "--bounding-set=-all", "--",
    ]  # fmt: skip


def _bubblewrap(limits: Limits, course: Path, writable: Path) -> list[str]:
    """The walls: an empty root into which what is needed is mounted, read-only."""
    system = [Path(p) for p in ("/usr", "/bin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache")]
    environment = [Path(sys.prefix, name) for name in ("bin", "lib", "lib64", "pyvenv.cfg")]
    python = environment if sys.prefix != sys.base_prefix else []
    readable = [*system, Path(sys.base_prefix), *python, course, *visible_data()]
    readable = [path for path in readable if path.exists()]
    arguments = ["bwrap", "--die-with-parent", "--unshare-net", "--unshare-pid", "--unshare-ipc"]
    arguments += ["--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox"]
    if os.getuid() == 0:
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):  # all given up at once
            arguments += ["--cap-add", capability]
    else:
        arguments += ["--unshare-user"]
    arguments += ["--proc", "/proc", "--dev", "/dev"]
    arguments += ["--perms", "1777", "--size", str(limits.disk_mb << 20), "--tmpfs", "/tmp"]
    parents = {parent for path in [*readable, writable] for parent in path.parents}
    for parent in sorted(parents - {Path("/"), Path("/tmp")}):
        arguments += ["--perms", "0755", "--dir", str(parent)]
    for path in readable:
        arguments += ["--ro-bind", str(path), str(path)]
    for package in ("course_lib", "kernels"):  # an installed copy of the course, references and all
        for site in Path(sys.prefix).glob(f"lib*/python*/site-packages/{package}"):
            arguments += ["--tmpfs", str(site)]
    return [*arguments, "--bind", str(writable), str(writable), "--chdir", "/tmp", "--"]


@lru_cache(maxsize=1)
def isolation_here() -> Isolation:
    """The best walls that work on this machine: each kind is tried."""
    here = Path(sys.prefix)
    tries: list[tuple[Isolation, list[str]]] = [
        ("bubblewrap", [*_bubblewrap(Limits(), here, Path("/tmp")), *_as_nobody()]),
        ("network namespace", _WITHOUT_NETWORK),
    ]
    for name, command in tries:
        if shutil.which(command[0]) is None:
            continue
        done = subprocess.run([*command, "/usr/bin/env", "true"], capture_output=True, check=False)
        if done.returncode == 0:
            return name
    return "limits only"

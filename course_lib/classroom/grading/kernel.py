"""nbval's kernel, started within walls and watched.

It talks over sockets in a folder, which reach through the walls where ports do not. While nbval
waits for it, it is looked at: a process that has died, or that takes too much with all that it has
started, is ended at once.
"""

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from queue import Empty
from typing import Any

import psutil
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager
from nbval.kernel import RunningKernel

from course_lib.classroom.grading.answering import LINE_VARIABLE
from course_lib.classroom.grading.isolate import (
    Isolation,
    Limits,
    sandboxed,
    user_of_this_process,
)

#: Output beyond this is no answer.
MAX_OUTPUT_BYTES = 4 << 20

#: How often a kernel is looked at while it is waited for.
LOOK_EVERY_S = 0.2

#: What a cell has after its time, for the traceback of the interrupt.
GRACE_S = 3.0


class Stopped(Exception):
    """The process was ended, or has ended itself; the message says why."""


class _Manager(KernelManager):
    """Starts a given command as the kernel, with its connection file where the command may read."""

    def __init__(self, command: list[str], sockets: Path, user: int | None) -> None:
        super().__init__(
            transport="ipc",
            ip=str(sockets / "kernel"),
            connection_file=str(sockets / "connection.json"),
        )
        self.command, self.sockets, self.user = command, sockets, user

    @property
    def kernel_spec(self) -> KernelSpec:
        """An interrupt goes as a message, since a signal would end the walls."""
        return KernelSpec(argv=self.command, language="python", interrupt_mode="message")

    def write_connection_file(self, **options: Any) -> None:
        """Write it, and give the folder to the user of the kernel."""
        super().write_connection_file(**options)
        if self.user is not None:
            for path in (self.sockets, *self.sockets.iterdir()):
                os.chown(path, self.user, self.user)


class Kernel(RunningKernel):
    """A kernel for one exercise.

    Args:
        folder: of the notebook; the sockets go below it.
        course: the copy of the course that it sees.
        isolation: its walls.
        limits: what it may use.
        startup_timeout_s: seconds to start in.
    """

    def __init__(
        self,
        folder: Path,
        course: Path,
        isolation: Isolation,
        limits: Limits,
        startup_timeout_s: float,
    ) -> None:
        self.limits = limits
        self.sockets = folder / "s"  # short: the path of a socket has about a hundred characters
        self.sockets.mkdir()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.sockets / "line"))
        self.listener.listen(1)
        self.flags: list[str] = []  # for the instructor
        self.troubles: list[str] = []  # why the answer cannot be asked
        self.output_bytes = 0
        self.looked_at_s = 0.0
        self.deadline_s = time.monotonic() + startup_timeout_s
        program = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        program.append("--HistoryManager.enabled=False")
        command = sandboxed(program, isolation, limits, course=course, writable=self.sockets)
        user = user_of_this_process() if isolation == "bubblewrap" else None
        self.km = _Manager(command, self.sockets, user)
        nowhere = subprocess.DEVNULL
        self.km.start_kernel(env=self._environment(course), stdout=nowhere, stderr=nowhere)
        self.kc = self.km.client()
        self.kc.start_channels()
        self.kc.wait_for_ready(timeout=startup_timeout_s)
        self._ensure_iopub_up()

    def _environment(self, course: Path) -> dict[str, str]:
        return {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "PYTHONPATH": str(course),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": "/tmp",
            "USER": "student",
            "IPYTHONDIR": "/tmp/ipython",
            "COURSE_PARTS_DIR": "/tmp/my_engine",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            LINE_VARIABLE: str(self.sockets / "line"),
        }

    def execute_cell_input(self, cell_input: str, allow_stdin: bool | None = None) -> Any:
        """Start a cell, and its time."""
        self.deadline_s = time.monotonic() + self.limits.cell_s
        return super().execute_cell_input(cell_input, allow_stdin)

    def get_message(self, stream: str, timeout: float | None = None) -> Any:
        """The next message, as long as there is time left and the process keeps its limits."""
        grace_s = 0.0 if stream == "shell" else GRACE_S
        ends_at_s = min(time.monotonic() + (timeout or 0), self.deadline_s + grace_s)
        while True:
            self._look()
            left_s = ends_at_s - time.monotonic()
            if left_s <= 0:
                raise Empty
            try:
                message = super().get_message(stream, min(left_s, LOOK_EVERY_S))
            except Empty:
                if not self.is_alive():
                    self._stop_for("its process ended itself")
                continue
            self.output_bytes += len(json.dumps(message["content"], default=str))
            if self.output_bytes > MAX_OUTPUT_BYTES:
                self._stop_for(f"it printed more than {MAX_OUTPUT_BYTES >> 20} MB")
            return message

    def _look(self) -> None:
        """Stop what takes too much together; a limit on one process holds by itself."""
        now_s = time.monotonic()
        if now_s - self.looked_at_s < LOOK_EVERY_S:
            return
        self.looked_at_s = now_s
        memory = threads = 0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                threads += process.num_threads()
                used = process.memory_full_info()
                memory += getattr(used, "pss", used.rss)  # what is shared counts once
        written = sum(path.stat().st_size for path in self.sockets.rglob("*") if path.is_file())
        if memory > self.limits.memory_mb << 20:
            self._stop_for(f"it took more than {self.limits.memory_mb} MB of memory")
        if threads > 2 * self.limits.processes:
            self._stop_for(f"it started more than {self.limits.processes} processes and threads")
        if written > self.limits.disk_mb << 20:
            self._stop_for(f"it wrote more than {self.limits.disk_mb} MB")

    def _stop_for(self, why: str) -> None:
        self.flags.append(why)
        self.stop()
        raise Stopped(why)

    def close_line(self) -> None:
        """Wake whoever waits at either end of it."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def stop(self) -> None:
        """End the process and all that it has started."""
        self.close_line()
        if hasattr(self, "km"):
            super().stop()
        end_children()


def adopt_orphans() -> None:
    """Become the parent of what a child of ours leaves behind, so that it can be ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def end_children() -> None:
    """Kill all that runs below this process."""
    for _ in range(20):  # what forks while it is killed takes a few rounds
        children = psutil.Process().children(recursive=True)
        if not children:
            return
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(children, timeout=2)

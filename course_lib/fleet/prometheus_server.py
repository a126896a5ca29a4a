"""The real `prometheus` as a process of ours, for tests, notebooks and a fleet on one machine.

    with PrometheusServer({"merchant-chat": [server.url]}) as prometheus:
        Prometheus(prometheus.url).query("up")

It keeps its samples in a temporary folder, which goes with it. A process that was killed can be
started again: it comes back on the same port with what it had, as a pod with a volume does.
"""

import atexit
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from course_lib.validation import number

#: It has no work to do at its start, but the machine may have.
START_TIMEOUT_S = 60.0


class PrometheusServer:
    """A Prometheus that scrapes servers of this machine.

    Args:
        targets: URLs of servers by job; those of a job can be changed while it runs.
        scrape_interval_s: between two scrapes of a target.
        labels: that all series get, such as the namespace that a cluster would give them.

    Raises:
        FileNotFoundError: the program is not installed.
        ValueError: the interval is below a millisecond, the least that Prometheus knows.
    """

    def __init__(
        self,
        targets: Mapping[str, Sequence[str]],
        scrape_interval_s: float = 1.0,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        program = shutil.which("prometheus")
        if program is None:
            raise FileNotFoundError(
                "the program prometheus is not installed; on Debian or Ubuntu: "
                "sudo apt-get install prometheus"
            )
        number("scrape_interval_s", scrape_interval_s, at_least=0.001)
        self.program = program
        self.labels = dict(labels or {})
        self.port = 0  # a free one, which it then keeps
        self.process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="course-prometheus-")
        self._path = Path(self._folder.name)
        interval = f"{round(scrape_interval_s * 1000)}ms"
        jobs = [
            {"job_name": job, "file_sd_configs": [{"files": [str(self._targets_of(job))]}]}
            for job in targets
        ]
        config = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval},
            "scrape_configs": jobs,
        }
        self._path.joinpath("prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        for job, urls in targets.items():
            self.set_targets(job, urls)

    @property
    def url(self) -> str:
        """Where it listens, once it does."""
        return f"http://127.0.0.1:{self.port}"

    def set_targets(self, job: str, urls: Sequence[str]) -> None:
        """Scrape these servers for a job from now on; it notices within a second or two."""
        new = self._path / "targets.new"
        group = {"targets": [urlsplit(url).netloc for url in urls], "labels": self.labels}
        new.write_text(json.dumps([group]))
        new.replace(self._targets_of(job))  # at once, so that it never reads half a file

    def _targets_of(self, job: str) -> Path:
        return self._path / f"targets-{job}.json"

    def start(self) -> "PrometheusServer":
        """Return when it answers.

        Raises:
            OSError: it ended, or did not answer in time; the message has the end of its log.
        """
        log = self._path / "log"
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    self.program,
                    f"--config.file={self._path / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self._path / 'samples'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdout=subprocess.DEVNULL,
                stderr=output,
            )
        atexit.register(self.process.kill)  # where nobody leaves the block, as in a notebook
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready(log.read_text()):
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                self._end(self.process)
                raise OSError(f"prometheus did not start: {log.read_text()[-500:]}")
            time.sleep(0.02)
        return self

    def _is_ready(self, log: str) -> bool:
        listening = re.search(r'msg="Listening on" address=\S+:(\d+)', log)
        if listening is None:
            return False
        self.port = int(listening[1])
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
                return True
        except (urllib.error.URLError, TimeoutError):
            return False

    def kill(self) -> None:
        """End the process as a machine that fails does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """End the process and forget its samples."""
        if self.process is not None:
            self._end(self.process)
        self._folder.cleanup()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> "PrometheusServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

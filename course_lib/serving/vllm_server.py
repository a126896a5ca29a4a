"""vLLM's own server in a process of its own, so that a notebook can drive it as it drives ours.

if is_installed():
    with VllmServer(DEFAULT_MODEL, max_num_seqs=4) as server:
        print(server.url)
"""

import importlib.util
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path


def is_installed() -> bool:
    """Whether there is a vLLM to start."""
    return importlib.util.find_spec("vllm") is not None


class VllmServer:
    """vLLM's OpenAI server, up while inside a `with` block.

    Args:
        model: checkpoint directory; its last part is the model's name in the API.
        max_num_seqs: requests that run at once.
        options: further ones of its command line.
        start_s: how long it may take to start.
    """

    def __init__(
        self, model: Path, *, max_num_seqs: int, options: tuple[str, ...] = (), start_s: float = 600
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.start_s = start_s
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--served-model-name", model.name, "--host", "127.0.0.1", "--port", str(port),
            "--max-num-seqs", str(max_num_seqs), *options,
        ]  # fmt: skip

    def __enter__(self) -> "VllmServer":
        """Return when it answers.

        Raises:
            RuntimeError: it did not start; the message has the end of its log.
        """
        self._log = tempfile.TemporaryFile(mode="w+")
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log)
        deadline_s = time.monotonic() + self.start_s
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self._end()
                self._log.seek(0)
                raise RuntimeError(f"vLLM did not start:\n{self._log.read()[-2000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._log.close()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

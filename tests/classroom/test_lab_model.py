"""COURSE_MODEL: the labs on another checkpoint, of a folder or a hub, and what is said if not.

The hub is a server of this test, which answers as Hugging Face's does.
"""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from course_lib.classroom.lab_model import LabModelError, lab_model
from course_lib.data import DEFAULT_MODEL
from course_lib.model.config import CheckpointError
from tests.checkpoints import random_model, save

ROOT = Path(__file__).parents[2]
NAME = "someone/qwen3-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 with random weights, as long a context as the real one, and our tokenizer."""
    model = random_model("qwen3", vocab_size=2048, max_position_embeddings=40960)
    folder = save(model, tmp_path_factory.mktemp("checkpoint"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEFAULT_MODEL / name, folder)
    return folder


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[str]:
    """The address of a hub that has one checkpoint."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            found = re.fullmatch(rf"/{NAME}/resolve/{COMMIT}/(.+)", path)
            if path.startswith(f"/api/models/{NAME}/tree/"):
                files = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"}
                    for file in checkpoint.iterdir()
                ]
                self.answer(json.dumps(files).encode())
            elif path.startswith(f"/api/models/{NAME}"):
                files = [{"rfilename": file.name} for file in checkpoint.iterdir()]
                self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": files}).encode())
            elif found and (checkpoint / found.group(1)).is_file():
                self.answer((checkpoint / found.group(1)).read_bytes())
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(name: str, hub: str, home: Path) -> subprocess.CompletedProcess:
    """`lab_model()` in a process of its own, since the hub's address is read once."""
    code = "from course_lib.classroom.lab_model import lab_model; print(lab_model())"
    environment = {
        **os.environ, "COURSE_MODEL": name, "HF_ENDPOINT": hub, "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def test_without_the_variable_it_is_the_model_that_ships(monkeypatch):
    monkeypatch.delenv("COURSE_MODEL", raising=False)
    assert lab_model() == DEFAULT_MODEL
    monkeypatch.setenv("COURSE_MODEL", "")
    assert lab_model() == DEFAULT_MODEL


def test_a_folder_is_taken_as_it_is(monkeypatch, checkpoint):
    monkeypatch.setenv("COURSE_MODEL", str(checkpoint))
    assert lab_model() == checkpoint


def test_a_family_that_the_engine_does_not_serve_is_named(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    monkeypatch.setenv("COURSE_MODEL", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"MambaForCausalLM is not supported.*Qwen3"):
        lab_model()


def test_a_name_is_downloaded_once_and_found_again_when_the_hub_is_gone(checkpoint, hub, tmp_path):
    asked = ask(NAME, hub, tmp_path)
    assert asked.returncode == 0, asked.stderr
    folder = Path(asked.stdout.strip())
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (checkpoint / name).read_bytes()
    again = ask(NAME, "http://127.0.0.1:9", tmp_path)
    assert again.returncode == 0 and Path(again.stdout.strip()) == folder, again.stderr


@pytest.mark.parametrize("reachable", [True, False], ids=["unknown name", "no hub"])
def test_what_cannot_be_had_is_told_in_a_sentence_that_says_how(hub, tmp_path, reachable):
    asked = ask("nobody/nothing", hub if reachable else "http://127.0.0.1:9", tmp_path)
    assert asked.returncode == 1
    sentence = asked.stderr.strip().splitlines()[-1]
    assert "LabModelError: COURSE_MODEL=nobody/nothing is not a folder here" in sentence
    assert "`hf download nobody/nothing --local-dir model`" in sentence


def test_a_notebook_shows_the_sentence_without_a_traceback():
    assert LabModelError("no such model")._render_traceback_() == ["LabModelError: no such model"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "lab",
    [
        "00_start_here",
        "lab_a_architect/a1_continuous_batching",
        "lab_b_optimizer/b1_sizing",
        "lab_b_optimizer/b2_paged_kv_cache",
    ],
)
def test_a_lab_runs_through_on_another_model(lab, checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_MODEL", str(checkpoint))
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))
    path = ROOT / "labs" / f"{lab}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    loads = [cell.source for cell in notebook.cells if "LLM(" in cell.source]
    assert any("lab_model()" in source or "MODEL" in source for source in loads)
    assert not any("DEFAULT_MODEL" in source for source in loads)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()

"""The Dockerfile as far as it can be tested without Docker: its linter, its files, its commands."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from course_lib.cli import app
from course_lib.fleet.manifest_spec import DeploymentSpec
from tests.serving.servers import wait_until

ROOT = Path(__file__).resolve().parents[2]
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1] != "#"]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.partition(" ") for line in text.splitlines() if line]
    return [(name, arguments.strip()) for name, _, arguments in found]


def last(name: str) -> str:
    return [arguments for found, arguments in instructions() if found == name][-1]


def copied() -> list[str]:
    """What is copied from the repository, not from another stage."""
    copies = [a.split() for name, a in instructions() if name == "COPY" and "--from" not in a]
    return [source for *sources, _ in copies for source in sources]


def test_the_linter_has_nothing_to_say():
    if HADOLINT is None:
        pytest.skip("hadolint is not here; it has no build for this machine")
    done = subprocess.run(
        [HADOLINT, "--failure-threshold", "style", str(ROOT / "Dockerfile")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_copied_is_there_and_goes_to_the_builder():
    rules = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and line[0] != "#"
    ]
    assert copied()
    for source in copied():
        assert (ROOT / source).exists(), source
        ignored = False
        for rule in rules:  # the last that fits decides
            if fnmatch.fnmatch(source, rule.removeprefix("!")):
                ignored = not rule.startswith("!")
        assert not ignored, source


def test_it_runs_as_a_user_without_rights_whom_kubernetes_recognizes():
    user = last("USER")
    assert user.isdigit() and int(user) >= 1000
    assert any(f"useradd --uid {user} " in arguments for name, arguments in instructions())


def test_the_versions_are_those_of_the_tests():
    installs = [a for name, a in instructions() if name == "RUN" and "pip install" in a]
    assert all("constraints.txt" in arguments for arguments in installs)
    assert ("ARG", "PYTHON=3.11") in instructions()
    assert 'requires-python = ">=3.11,<3.14"' in (ROOT / "pyproject.toml").read_text()


def test_the_command_is_one_that_course_takes():
    assert json.loads(last("ENTRYPOINT")) == ["course"]
    command, *arguments = json.loads(last("CMD"))
    options = typer.main.get_command(app).commands[command].make_context(command, arguments).params
    assert options["host"] == "0.0.0.0"
    assert str(options["port"]) == last("EXPOSE")
    # The manifests replace the command and keep the image's model.
    assert str(options["model"]) == DeploymentSpec("llm", "llm:1").model


@pytest.mark.slow
def test_what_is_copied_is_enough_to_serve_and_the_health_check_agrees(tmp_path):
    for source in copied():
        into = tmp_path / source
        into.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, into, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, into)
    arguments = [
        part.replace("/app", str(tmp_path)).replace("=8000", "=0")
        for part in json.loads(last("CMD"))
    ]
    course = "import kernels, course_lib.cli as c; print(kernels.__file__, c.__file__); c.app()"
    server = subprocess.Popen(
        [sys.executable, "-c", course, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=(tmp_path / "log").open("w"),
        stderr=subprocess.STDOUT,
    )

    def log() -> str:
        return (tmp_path / "log").read_text()

    try:
        wait_until(
            lambda: " on http" in log() or server.poll() is not None, 180, "the server's address"
        )
        assert log().split()[:2] == [  # and not those of the repository
            str(tmp_path / "kernels" / "__init__.py"),
            str(tmp_path / "course_lib" / "cli.py"),
        ]
        port = re.search(r" on http://[^:]+:(\d+)", log())
        assert port, log()
        _, _, check = last("HEALTHCHECK").partition("CMD ")
        python, *rest = (p.replace(":8000", f":{port[1]}") for p in json.loads(check))
        assert python == "python"
        healthy = subprocess.run([sys.executable, *rest], capture_output=True, text=True)
        assert healthy.returncode == 0, healthy.stderr
    finally:
        server.terminate()
        assert server.wait(60) == 0
    ill = subprocess.run([sys.executable, *rest], capture_output=True, text=True)
    assert ill.returncode == 1

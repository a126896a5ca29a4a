"""The `course` command: what it prints, and how it says what is wrong."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from course_lib import doctor
from course_lib.cli import app
from course_lib.data import DEFAULT_MODEL
from tests.checkpoints import random_model, save

runner = CliRunner()


def test_doctor_names_device_versions_and_models() -> None:
    result = runner.invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for part in ("Python", "device", "triton", "CPU kernels", "torch", "merchant-chat"):
        assert part in result.output


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(doctor, "model_directories", lambda: [])
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["numpy"].ok is False
    assert "make setup" in findings["numpy"].hint
    assert findings["jupyterlab"].ok is None  # only needed for the notebooks
    assert "[labs]" in findings["jupyterlab"].hint
    assert findings["models"].ok is False
    assert runner.invoke(app, ["doctor"]).exit_code == 1


def test_chat_streams_a_reply_that_names_the_order_and_ends_with_one_line_of_figures() -> None:
    result = runner.invoke(app, ["chat", "Where is my order A-1842?"])
    assert result.exit_code == 0, result.output
    *reply, figures = result.output.strip().splitlines()
    assert "A-1842" in " ".join(reply)
    for figure in (r"TTFT [\d.]+ ms", r"TPOT [\d.]+ ms", r"\d+ tokens/s", r"\d+ KV blocks of 16"):
        assert re.search(figure, figures), figures


def test_chat_without_a_message_is_a_conversation_that_reuses_its_prefix() -> None:
    result = runner.invoke(app, ["chat"], input="Where is my order A-1842?\nThank you!\n")
    assert result.exit_code == 0, result.output
    cached = [int(n) for n in re.findall(r"\((\d+) cached\)", result.output)]
    assert len(cached) == 2 and cached[0] == 0
    assert cached[1] > 100  # the system prompt and the first turn


def test_chat_says_in_a_sentence_what_is_wrong(tmp_path: Path) -> None:
    result = runner.invoke(app, ["chat", "hello", "--model", str(tmp_path / "nothing")])
    assert result.exit_code == 1
    assert "is not a directory" in result.output
    checkpoint = save(random_model("llama"), tmp_path)
    result = runner.invoke(app, ["chat", "hello", "--model", str(checkpoint)])
    assert result.exit_code == 1
    assert "no tokenizer.json" in result.output
    too_long = "Where is my order A-1842? " * 1000
    result = runner.invoke(app, ["chat", too_long, "--model", str(DEFAULT_MODEL)])
    assert result.exit_code == 1
    assert "shorten the prompt" in result.output
    assert "Traceback" not in result.output


def test_parts_shows_which_are_the_students_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))
    assert "your own" not in runner.invoke(app, ["parts"]).output
    (tmp_path / "scheduler.py").write_text("PART = None\n")
    lines = runner.invoke(app, ["parts"], env={"COLUMNS": "120"}).output.splitlines()
    assert [line.split()[0] for line in lines if "your own" in line] == ["scheduler"]

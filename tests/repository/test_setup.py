"""What `make` says on a machine that lacks something, and what it does not do twice.

A fake `python3` on the path stands for the machine's; nothing is installed.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ["sh", "make", "grep", "uname", "cat", "basename", "id", "mkdir", "cp"]


@pytest.fixture
def machine(tmp_path):
    """A repository with what set-up reads, and an otherwise empty machine."""
    repository = tmp_path / "repository"
    (repository / "scripts").mkdir(parents=True)
    for name in ["Makefile", "pyproject.toml", "constraints.txt", "scripts/setup.sh"]:
        shutil.copy(ROOT / name, repository / name)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def install_python(machine: Path, name: str, version: tuple[int, int], *, venv: bool) -> None:
    """Put a fake interpreter on the path, which answers the questions that set-up asks."""
    supported = (3, 11) <= version <= (3, 13)
    script = machine / "bin" / name
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f"  *version_info*) exit {0 if supported else 1} ;;\n"
        f"  *ensurepip*) exit {0 if venv else 1} ;;\n"
        f"  --version) echo Python {version[0]}.{version[1]}.0 ;;\n"
        # "-m venv --clear .venv" makes an environment whose pip only notes what it was asked.
        '  "-m venv --clear .venv")\n'
        "    mkdir -p .venv/bin\n"
        '    cp "$0" .venv/bin/python\n'
        '    echo "$PWD/.venv" > .venv/pyvenv.cfg ;;\n'
        '  "-m pip"*) echo "$@" >> pip.log ;;\n'
        "  *) exit 1 ;;\n"
        "esac\n"
    )
    script.chmod(0o755)


def make(machine: Path, goal: str, folder: str = "repository") -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", goal],
        cwd=machine / folder,
        env={"PATH": str(machine / "bin"), "HOME": str(machine)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("command", ["lab", "test"])
def test_a_missing_venv_module_is_named_with_the_command_that_brings_it(machine, command):
    install_python(machine, "python3", (3, 12), venv=False)
    done = make(machine, command)
    assert done.returncode != 0
    assert "python3 has no venv module" in done.stderr
    assert "sudo apt install python3-venv" in done.stderr
    assert not (machine / "repository/.venv").exists()


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_an_unsupported_python_is_named(machine, version):
    install_python(machine, "python3", version, venv=True)
    done = make(machine, "lab")
    assert done.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert f"found Python {version[0]}.{version[1]}.0" in done.stderr


def test_no_python_at_all_is_named(machine):
    done = make(machine, "lab")
    assert done.returncode != 0
    assert "found no python3" in done.stderr
    assert "sudo apt install python3 python3-venv" in done.stderr


def test_another_python_is_taken_where_python3_is_too_old(machine):
    install_python(machine, "python3", (3, 10), venv=True)
    install_python(machine, "python3.12", (3, 12), venv=True)
    done = make(machine, "setup")
    assert done.returncode == 0, done.stderr
    assert "Making .venv with Python 3.12.0" in done.stderr


def test_a_second_run_installs_nothing_and_a_changed_pin_installs_again(machine):
    install_python(machine, "python3", (3, 13), venv=True)
    log = machine / "repository/pip.log"

    assert make(machine, "setup").returncode == 0
    first = log.read_text()
    assert "-c constraints.txt -e .[dev]" in first
    assert make(machine, "setup").returncode == 0
    assert log.read_text() == first

    later = (machine / "repository/.venv/.installed").stat().st_mtime + 10
    os.utime(machine / "repository/constraints.txt", (later, later))
    assert make(machine, "setup").returncode == 0
    assert len(log.read_text()) > len(first)


def test_a_moved_repository_is_set_up_again(machine):
    install_python(machine, "python3", (3, 13), venv=True)
    assert make(machine, "setup").returncode == 0
    (machine / "repository").rename(machine / "moved")
    done = make(machine, "setup", folder="moved")
    assert done.returncode == 0, done.stderr
    assert "Making .venv" in done.stderr

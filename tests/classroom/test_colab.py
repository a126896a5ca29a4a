"""The set-up cell, the badges, and the labs with the package versions that Colab has.

An environment with Colab's versions is made in a folder of its own: those that decide how widgets
and pictures look come from the package index, the rest is what this one has. torch is not among
them, since the index has no CPU build of Colab's.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

from course_lib.classroom import colab
from tests.colab import VERSIONS

ROOT = Path(__file__).parents[2]
NOTEBOOKS = [
    path
    for folder in ("solutions", "labs")
    for path in sorted((ROOT / folder).rglob("*.ipynb"))
    if ".ipynb_checkpoints" not in path.parts
]
LABS = [path.relative_to(ROOT / "labs") for path in NOTEBOOKS if ROOT / "labs" in path.parents]

# Of those, what there is for any machine, and what two of them need besides.
HERE = ("numpy", "pandas", "matplotlib", "ipywidgets")
COLAB = [f"{name}=={VERSIONS[name]}" for name in HERE]
COLAB += ["ipython_genutils==0.2.0", "pytz==2025.2"]

# Run with Colab's versions each time; the others with `--all-labs`.
OFTEN = {"00_start_here", "a2_serving_edge", "b1_sizing"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_every_notebook_opens_with_the_same_set_up_cell(path):
    cells = nbformat.read(path, as_version=4).cells
    first = next(cell for cell in cells if cell.cell_type == "code")
    assert first.source == colab.setup_cell(), "run `course release`"
    assert first.outputs == []


def test_the_set_up_cell_hides_nothing_and_pins_what_it_installs():
    cell = colab.setup_cell()
    assert "%%capture" not in cell and "quiet" not in cell
    (install,) = re.findall(r"%pip install (.+)", cell)
    assert install.split()[:2] == ["-e", "./gpu-serving-labs"]
    assert all(re.fullmatch(r"\w+==[\d.]+", pin) for pin in install.split()[2:])
    assert f"--branch {colab.tag()} {colab.repository()} " in cell


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.stem)
def test_the_badge_of_a_lab_opens_that_lab(lab):
    title = nbformat.read(ROOT / "labs" / lab, as_version=4).cells[0].source
    ((picture, address),) = re.findall(r"\[!\[Open in Colab\]\((.+?)\)\]\((.+?)\)", title)
    assert (ROOT / "labs" / lab.parent / picture).resolve() == ROOT / "labs" / colab.BADGE_FILE
    assert address.startswith("https://colab.research.google.com/github/")
    assert address.endswith(f"/{colab.tag()}/labs/{lab.as_posix()}")


def test_nothing_is_said_where_it_is_not_colab(monkeypatch, capsys):
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    colab.report()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("capability", "said"), [(None, "no GPU here"), ((7, 5), "older than"), ((9, 0), None)]
)
def test_colab_is_told_what_will_differ(monkeypatch, capsys, capability, said):
    import torch

    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    if capability:
        properties = type("Properties", (), {"name": "T", "major": 7, "minor": 5})
        properties.total_memory = 2**34
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    colab.report()
    device, versions, *rest = capsys.readouterr().out.splitlines()
    assert device.startswith("T, 16 GiB" if capability else "CPU")
    assert f"torch {torch.__version__}" in versions and "ipywidgets" in versions
    assert said in " ".join(rest) if said else rest == []


def test_a_version_that_is_too_old_is_named(monkeypatch):
    assert colab.unsuitable_versions() == []
    found = colab.version
    monkeypatch.setattr(colab, "version", lambda n: "1.26.4" if n == "numpy" else found(n))
    (problem,) = colab.unsuitable_versions()
    assert problem.startswith("numpy>=2") and problem.endswith("found 1.26.4")


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of an environment with Colab's versions and without the course."""
    folder = tmp_path_factory.mktemp("colab") / "venv"
    uv = [sys.executable, "-m", "uv", "--quiet"]
    subprocess.run([*uv, "venv", f"--python={sys.executable}", str(folder)], check=True)
    python = folder / "bin" / "python"
    # This environment's packages come after Colab's. The course is not among them: the .pth file
    # of its editable install is not read in a folder that is itself named by one.
    here = sysconfig.get_paths()["purelib"]
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "rest.pth").write_text(f"{here}\n")
    install = [*uv, "pip", "install", f"--python={python}", "--no-deps", *COLAB]
    done = subprocess.run(
        install, capture_output=True, text=True, env=os.environ | {"UV_HTTP_TIMEOUT": "20"}
    )
    if done.returncode:
        pytest.skip(f"Colab's versions cannot be had: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.mark.slow
@pytest.mark.network
def test_explorers_and_steps_work_with_colabs_versions(python):
    code = f"import {', '.join(HERE)}; print(*(p.__version__ for p in ({', '.join(HERE)})))"
    versions = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert versions.stdout.split() == [VERSIONS[name] for name in HERE]
    done = subprocess.run(
        [python, "-m", "pytest", "-p", "no:cacheprovider", "tests/classroom/test_explorers.py"]
        + ["tests/engine/test_runner.py"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def content(python, tmp_path_factory) -> Path:
    """A folder as Colab's /content, a repository to clone from, and a kernel of that Python."""
    home = tmp_path_factory.mktemp("home")
    bare = home / "repository.git"
    clone = subprocess.run(["git", "clone", "-q", "--bare", ROOT, bare], capture_output=True)
    if clone.returncode:
        pytest.skip("this is no git repository, so there is nothing to clone")
    subprocess.run(["git", "-C", bare, "tag", "--force", colab.tag()], check=True)
    kernel = home / "jupyter" / "kernels" / "colab" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    environment = {
        "COLAB_RELEASE_TAG": "release-colab",
        "COURSE_PARTS_DIR": str(home / "parts"),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{bare}.insteadOf",
        "GIT_CONFIG_VALUE_0": colab.repository(),
    }
    spec = {"argv": argv, "display_name": "Colab", "language": "python", "env": environment}
    kernel.write_text(json.dumps(spec))
    (home / "content").mkdir()
    return home / "content"


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.stem)
def test_a_lab_runs_on_colab_from_its_set_up_cell_on(lab, content, pytestconfig):
    if lab.stem not in OFTEN and not pytestconfig.getoption("--all-labs"):
        pytest.skip("with --all-labs only")
    shutil.rmtree(content / "gpu-serving-labs", ignore_errors=True)
    notebook = nbformat.read(ROOT / "labs" / lab, as_version=4)
    where = nbformat.v4.new_code_cell("import course_lib\ncourse_lib.__file__")
    notebook.cells.append(where)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="colab", resources={"metadata": {"path": content}}
    )
    specs = KernelSpecManager(kernel_dirs=[str(content.parent / "jupyter" / "kernels")])
    client.create_kernel_manager().kernel_spec_manager = specs
    client.execute()
    setup = next(cell for cell in notebook.cells if cell.cell_type == "code")
    said = "".join(output.get("text", "") for output in setup.outputs)
    assert all(f"{name} {VERSIONS[name]}" in said for name in HERE) and "Expected" not in said
    assert str(content / "gpu-serving-labs" / "course_lib") in where.outputs[0].data["text/plain"]

"""The set-up cell with which every notebook opens, the badge of a lab, and what is said on Colab.

`course release` writes the cell into the notebooks, so that there is one text for all of them. The
repository's address is the one in `[project.urls]` of pyproject.toml; the tag of a release is the
package's version. Where the course is installed, the cell does nothing.
"""

import os
import re
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import course_lib
from course_lib.data import DATA_DIR
from course_lib.doctor import examine

ROOT = DATA_DIR.parent

#: A picture of our own beside the labs: the notebooks are read where there is no network.
BADGE_FILE = "open_in_colab.svg"

_SETUP = """\
# Set-up. Where the course is installed, as after `make lab`, this does nothing.
import importlib.util
import os
import sys

if importlib.util.find_spec("course_lib") is None:
    assert "COLAB_RELEASE_TAG" in os.environ, "The course is not installed here: run `make lab`."
    !git clone --depth 1 --branch {tag} {repository} gpu-serving-labs
    %pip install -e ./gpu-serving-labs {pins}
    sys.path.insert(0, os.path.abspath("gpu-serving-labs"))

from course_lib.classroom.colab import report

report()"""

# What Colab may lack, of the `serve` extra. All else it has, in versions that are not to change.
_INSTALLED = ("fastapi", "prometheus_client", "uvicorn")

# What decides whether the notebooks run, in the order in which it is reported.
_NEEDED = ("torch", "triton", "numpy", "ipywidgets", "matplotlib", "pandas")

WITHOUT_GPU = """\
There is no GPU here; Runtime > Change runtime type has one. Every exercise can be solved without.
What differs: all times are those of a CPU. Triton kernels run under its interpreter, so that B3
takes minutes. Speeds of kernels, CUDA graphs and vLLM are not measured."""

OLD_GPU = """\
This GPU is older than compute capability 8.0: models run in float16 instead of bfloat16, and the
Triton kernels compute without tensor cores."""


def setup_cell() -> str:
    """The text of the set-up cell."""
    pinned = dict(re.findall(r"^(\w+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    pins = " ".join(f"{name}=={pinned[name]}" for name in _INSTALLED)
    return _SETUP.format(tag=tag(), repository=repository(), pins=pins)


def repository() -> str:
    """The address that students clone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"]


def tag() -> str:
    """The tag of this release in the repository."""
    return f"v{course_lib.__version__}"


def badge(lab: Path) -> str:
    """A picture that opens a lab on Colab, in Markdown.

    Args:
        lab: its path in `labs/`.
    """
    up = "../" * (len(lab.parts) - 1)
    place = repository().removeprefix("https://github.com/")
    address = f"https://colab.research.google.com/github/{place}/blob/{tag()}/labs/{lab.as_posix()}"
    return f"[![Open in Colab]({up}{BADGE_FILE})]({address})"


def report() -> None:
    """On Colab, print what the machine has and what will differ; elsewhere, nothing."""
    if "COLAB_RELEASE_TAG" not in os.environ:
        return
    device = next(finding for finding in examine() if finding.name == "device")
    versions = ", ".join(f"{name} {version(name)}" for name in _NEEDED)
    print(f"{device.value}\n{versions}")
    for problem in unsuitable_versions():
        print(f"Expected {problem}: some cells may not work.")
    import torch

    if not torch.cuda.is_available():
        print(WITHOUT_GPU)
    elif torch.cuda.get_device_capability() < (8, 0):
        print(OLD_GPU)


def unsuitable_versions() -> list[str]:
    """Requirements of the course and its labs that what is installed does not meet."""
    from packaging.requirements import Requirement

    found = []
    for line in requires("gpu-serving-labs") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if requirement.name in _NEEDED and (marker is None or marker.evaluate({"extra": "labs"})):
            installed = version(requirement.name)
            if not requirement.specifier.contains(installed, prereleases=True):
                found.append(f"{requirement.name}{requirement.specifier}, found {installed}")
    return found

"""pyproject.toml, constraints.txt, environment.yml and the README agree with one another."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests import colab

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
README = (ROOT / "README.md").read_text()
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
CONDA_PIP = next(d["pip"] for d in ENVIRONMENT["dependencies"] if isinstance(d, dict))


def requirements(*extras: str) -> list[Requirement]:
    """The package's dependencies with those of the extras, references to itself resolved."""
    found = [Requirement(line) for line in PROJECT["dependencies"]]
    todo, seen = list(extras), set()
    while todo:
        extra = todo.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in map(Requirement, EXTRAS[extra]):
            if requirement.name == PROJECT["name"]:
                todo += requirement.extras
            else:
                found.append(requirement)
    return found


def pins(lines: list[str]) -> dict[str, str]:
    """Package name to exact version, of the lines `name==version`."""
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


TESTED = pins((ROOT / "constraints.txt").read_text().splitlines())


def test_constraints_pin_every_direct_dependency_within_its_range():
    for requirement in requirements("dev"):
        version = TESTED.get(canonicalize_name(requirement.name))
        assert version, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"
    assert TESTED["torch"] == "2.13.0"


@pytest.mark.parametrize(
    "pinned", [pins(CONDA_PIP), colab.VERSIONS], ids=["environment.yml", "Colab"]
)
def test_ranges_admit_other_environments(pinned):
    assert "torch" in pinned
    for requirement in requirements(*EXTRAS):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is None or requirement.specifier.contains(version), f"{requirement}"


def test_environment_yml_installs_this_package_with_extras_that_exist():
    (editable,) = [line for line in CONDA_PIP if line.startswith("-e .")]
    assert set(extras_of(editable)) <= set(EXTRAS)
    assert ENVIRONMENT["name"] == PROJECT["name"]
    (python,) = [
        d for d in ENVIRONMENT["dependencies"] if isinstance(d, str) and d.startswith("python=")
    ]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))


def extras_of(text: str) -> list[str]:
    return re.search(r"\[([\w,]+)\]", text).group(1).split(",")


def test_readme_names_both_commands_and_extras_that_exist():
    assert "make lab" in README
    assert "make test" in README
    assert "environment.yml" in README
    for extra in EXTRAS:
        assert f"`{extra}`" in README, f"the README does not mention the extra {extra}"


def test_readme_and_ci_name_the_supported_pythons():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    supported = SpecifierSet(PROJECT["requires-python"])
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert matrix == [f"3.{n}" for n in range(30) if supported.contains(f"3.{n}")]
    assert "Python 3.11 to 3.13" in README


def test_paths_named_in_the_readme_exist():
    for path in re.findall(r"`([\w./-]+/[\w./-]*)`", README):
        assert (ROOT / path).exists(), f"the README names {path}, which is not there"


def test_the_wheel_holds_both_packages_and_nothing_else(tmp_path):
    source = tmp_path / "source"  # a copy, so that nothing is left behind in the repository
    source.mkdir()
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    for name in ["course_lib", "kernels", "tests"]:
        shutil.copytree(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        + ["--disable-pip-version-check", "--wheel-dir", str(tmp_path), str(source)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "course_lib",
        "kernels",
    }
    for package in ("course_lib", "kernels"):
        for module in (ROOT / package).rglob("*.py"):
            assert module.relative_to(ROOT).as_posix() in names


@pytest.mark.network
@pytest.mark.slow
def test_environment_yml_resolves_for_python_312():
    """Reads the metadata of wheels only. pip's own dry run would download them whole, 3 GB here,
    and take the markers of the Python that runs it, so uv does what pip would do.
    """
    if resolve(["pip"], "--refresh").returncode:
        pytest.skip("offline: the package index does not answer")
    wanted = [line for line in CONDA_PIP if not line.startswith("-e")]
    (editable,) = [line for line in CONDA_PIP if line.startswith("-e")]
    wanted += [str(requirement) for requirement in requirements(*extras_of(editable))]
    resolved = resolve(wanted)
    assert resolved.returncode == 0, resolved.stderr
    versions = pins(resolved.stdout.splitlines())
    for name, version in pins(CONDA_PIP).items():
        assert versions[name] == version


def resolve(wanted: list[str], *options: str) -> subprocess.CompletedProcess:
    """Let uv choose versions for the conda environment's Python, on a Linux with glibc 2.35."""
    return subprocess.run(
        [sys.executable, "-m", "uv", "pip", "compile", "--no-build", "--no-header", "--no-annotate"]
        + ["--python-version=3.12", "--python-platform=x86_64-manylinux_2_35"]
        + [f"--python={sys.executable}", "--no-python-downloads", *options, "-"],
        input="\n".join(wanted),
        capture_output=True,
        text=True,
        env=os.environ | {"UV_HTTP_TIMEOUT": "10"},
    )

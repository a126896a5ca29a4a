"""Measurements that were recorded on real devices, one JSON file a run in `data/measurements/`.

Benchmarks write them with `save_measurement`; labs read them with `load_measurements`, to show a
student without a GPU what one does. `data/measurements/README.md` documents the fields.
"""

import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from course_lib.data import DATA_DIR

MEASUREMENTS_DIR = DATA_DIR / "measurements"


@dataclass(frozen=True)
class Measurement:
    """One run of one benchmark.

    Args:
        benchmark: such as "kernels" or "engine".
        device: name, compute_capability, memory_gib, multiprocessors; for a CPU name and threads.
        versions: of Python and of the packages that matter.
        date: ISO, when it ran.
        command: that ran it.
        ceilings: what the device was measured to do in the same run, such as copy_gb_s.
        rows: one result each; the fields are the benchmark's own, with units in their names.
    """

    benchmark: str
    device: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str
    command: str
    ceilings: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]

    @property
    def origin(self) -> str:
        """Device, versions and date in one line, for a caption."""
        versions = ", ".join(f"{package} {number}" for package, number in self.versions.items())
        return f"{self.device['name']}, {versions}, {self.date}"


def describe_device() -> dict[str, Any]:
    """The device that the engine would run on."""
    import torch

    if not torch.cuda.is_available():
        return {"name": platform.processor() or "CPU", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def measured_here(
    benchmark: str, rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float] | None = None
) -> Measurement:
    """A run of this process, with device, versions, date and command filled in."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "vllm"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return Measurement(
        benchmark=benchmark,
        device=describe_device(),
        versions=versions,
        date=date.today().isoformat(),
        command=" ".join(["python", *sys.argv]),
        ceilings=dict(ceilings or {}),
        rows=list(rows),
    )


def save_measurement(
    measurement: Measurement, variant: str = "", directory: Path = MEASUREMENTS_DIR
) -> Path:
    """Write it as `benchmark-variant-device-date.json`, over one of the same name.

    Args:
        measurement: what to write.
        variant: tells runs of a benchmark with different options apart.
        directory: where to.
    """
    parts = (measurement.benchmark, variant, measurement.device["name"], measurement.date)
    name = "-".join(re.sub(r"[^a-z0-9.]+", "-", str(p).lower()).strip("-") for p in parts if p)
    path = directory / f"{name}.json"
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(measurement), indent=1) + "\n", encoding="utf-8")
    return path


def load_measurements(benchmark: str, directory: Path = MEASUREMENTS_DIR) -> list[Measurement]:
    """All recorded runs of a benchmark, the latest first; none if nobody has recorded one.

    Raises:
        ValueError: a file lacks a field or is no JSON; the message names it.
    """
    measurements = []
    for path in sorted(directory.glob("*.json")):
        try:
            found = Measurement(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is not a measurement ({error}); see README.md beside it"
            ) from None
        if found.benchmark == benchmark:
            measurements.append(found)
    return sorted(measurements, key=lambda found: found.date, reverse=True)

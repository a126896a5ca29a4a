"""Recorded measurements: what is written is read back, and a damaged file is named."""

from pathlib import Path

import pytest

from course_lib.measurements import (
    MEASUREMENTS_DIR,
    load_measurements,
    measured_here,
    save_measurement,
)

ROWS = [{"kernel": "rms_norm", "gb_s": 12.5}]


def test_a_measurement_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    made = measured_here("kernels", ROWS, {"copy_gb_s": 20.0})
    path = save_measurement(made, "8B shape", tmp_path)
    assert path.name.startswith("kernels-8b-shape-")
    assert load_measurements("kernels", tmp_path) == [made]
    assert load_measurements("engine", tmp_path) == []


def test_it_says_where_it_comes_from() -> None:
    made = measured_here("kernels", ROWS)
    assert made.date in made.origin
    assert f"torch {made.versions['torch']}" in made.origin
    assert str(made.device["name"]) in made.origin


def test_the_latest_comes_first(tmp_path: Path) -> None:
    for day in ("2026-01-02", "2026-03-01", "2026-02-01"):
        made = measured_here("kernels", [{"day": day}])
        save_measurement(type(made)(**{**vars(made), "date": day}), directory=tmp_path)
    assert [found.date for found in load_measurements("kernels", tmp_path)] == [
        "2026-03-01",
        "2026-02-01",
        "2026-01-02",
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmark": "kernels"}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json is not a measurement"):
        load_measurements("kernels", tmp_path)


def test_what_the_course_ships_can_be_read_and_was_measured_on_a_device() -> None:
    for path in MEASUREMENTS_DIR.glob("*.json"):
        kind = path.name.split("-")[0]
        assert all(m.rows and m.device["name"] for m in load_measurements(kind))

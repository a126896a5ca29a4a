"""Keeps what tests save away from the student's own parts in labs/my_engine.

The complete notebooks, the student notebooks and the unit tests get a folder each, so that a part
that passed in `solutions/` is not what `labs/` runs on.
"""

import os
import tempfile
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--soak` and `--all-labs`."""
    parser.addoption("--soak", action="store_true", help="overload the server for 60 s, not 20")
    parser.addoption(
        "--all-labs", action="store_true", help="every lab with Colab's versions, not three"
    )


_folders = tempfile.TemporaryDirectory(prefix="course-parts-")


@pytest.hookimpl(tryfirst=True)  # before nbval starts the notebook's kernel, which inherits it
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Point `COURSE_PARTS_DIR` at the folder of this item's top-level directory."""
    top = item.path.relative_to(item.config.rootpath).parts[0]
    os.environ["COURSE_PARTS_DIR"] = str(Path(_folders.name) / top)

"""The labs in a real JupyterLab, in a real browser without a screen.

Opens a lab, runs all its cells, moves a control of each explorer, and sees its picture change.
Pictures of the pages are kept in `tests/output/`, to look at.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the dev extra")

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "tests" / "output"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE_S = 300  # for anything that a busy machine does slowly

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt install chromium"),
    pytest.mark.timeout(1200),
]

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

# No question about news, and no look for a newer version.
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

NOTEBOOKS = {
    path.relative_to(ROOT / "labs").as_posix(): "_explorer(" in path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "labs").rglob("*.ipynb"))
    if ".ipynb_checkpoints" not in path.parts
}
WITH_CONTROLS = [notebook for notebook, has_controls in NOTEBOOKS.items() if has_controls]
WITHOUT = [notebook for notebook, has_controls in NOTEBOOKS.items() if not has_controls]


@dataclass(frozen=True)
class Server:
    url: str
    token: str

    def page_of(self, notebook: str) -> str:
        workspace = secrets.token_hex(4)  # with nothing open in it
        return f"{self.url}lab/workspaces/{workspace}/tree/labs/{notebook}?token={self.token}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """JupyterLab over a copy of the labs, with nothing of this user's own settings."""
    home = tmp_path_factory.mktemp("jupyter")
    shutil.copytree(ROOT / "labs", home / "root" / "labs", ignore=shutil.ignore_patterns("my_*"))
    for name, values in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    folders = {
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "COURSE_PARTS_DIR": "parts",
        "IPYTHONDIR": "ipython",
    }
    environment = os.environ | {name: str(home / path) for name, path in folders.items()}
    environment.setdefault("OMP_NUM_THREADS", "1")  # as `make test` does
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
        "--port=0", "--expose-app-in-browser", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={home / 'root'}",
    ]  # fmt: skip
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield Server(_url(process, home), token)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def _url(process: subprocess.Popen, home: Path) -> str:
    """Where the server listens, as it writes down itself."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and process.poll() is None:
        for path in (home / "runtime").glob("jpserver-*.json"):
            with contextlib.suppress(json.JSONDecodeError):  # half written
                return json.loads(path.read_text())["url"]
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{(home / 'log').read_text()}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, with a user's folder of its own that playwright makes and removes."""
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=FLAGS, timeout=1000 * PATIENCE_S
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that notes down what goes wrong in it."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE_S)
    page.errors = []
    page.on("console", lambda m: m.type == "error" and page.errors.append(m.text))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    page.evaluate("() => window.jupyterapp?.serviceManager.sessions.shutdownAll()")
    context.close()


@pytest.mark.parametrize("notebook", WITH_CONTROLS)
def test_a_control_of_a_lab_changes_its_picture(server: Server, page: Any, notebook: str) -> None:
    open_notebook(page, server, notebook)
    run_all_cells(page)
    explorers = [n for n, text in enumerate(sources(page)) if "_explorer(" in text]
    for number, cell in enumerate(explorers, 1):
        show(page, cell)
        output = page.locator(".jp-Cell.jp-mod-active .jp-Cell-outputArea")
        picture = output.locator("img.widget-image")
        picture.wait_for()
        before = picture.get_attribute("src")
        take_picture(page, notebook, f"{number}-before")
        move_a_control(output)
        page.wait_for_function(
            "([image, src]) => image.src != src && image.complete && image.naturalWidth > 0",
            arg=[picture.element_handle(), before],
        )
        output.get_by_text("computed in").wait_for()
        take_picture(page, notebook, f"{number}-after")
    assert page.errors == []


@pytest.mark.parametrize("notebook", WITHOUT)
def test_a_lab_opens_without_an_error(server: Server, page: Any, notebook: str) -> None:
    open_notebook(page, server, notebook)
    take_picture(page, notebook, "opened")
    assert page.errors == []


def open_notebook(page: Any, server: Server, notebook: str) -> None:
    """Load the page, and wait until its title is there and its kernel can be asked."""
    page.goto(server.page_of(notebook))
    page.wait_for_function(
        "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status "
        "== 'idle'"
    )
    page.locator(".jp-RenderedMarkdown h1").first.wait_for()


def run_all_cells(page: Any) -> None:
    """As the menu does. No cell of a lab that is not solved yet may end in an error."""
    page.evaluate(
        "() => { window.isDone = false; "
        "jupyterapp.commands.execute('notebook:run-all-cells').then(() => window.isDone = true); }"
    )
    page.wait_for_function("() => window.isDone")
    errors = page.evaluate(
        "() => jupyterapp.shell.currentWidget.content.widgets.flatMap("
        "cell => cell.model.outputs?.toJSON() ?? []).filter(o => o.output_type == 'error')"
    )
    assert errors == []


def move_a_control(output: Any) -> None:
    """The first slider one further; where there is none, the next of the first menu."""
    slider = output.locator(".widget-hslider .noUi-handle")
    if slider.count():
        slider.first.press("ArrowRight")
    else:
        output.locator("select").first.select_option(index=1)


def take_picture(page: Any, notebook: str, when: str) -> None:
    OUTPUT.mkdir(exist_ok=True)
    page.screenshot(path=OUTPUT / f"{Path(notebook).stem}-{when}.png")


def sources(page: Any) -> list[str]:
    return page.evaluate(
        "() => jupyterapp.shell.currentWidget.content.widgets.map("
        "cell => cell.model.sharedModel.getSource())"
    )


def show(page: Any, number: int) -> None:
    """Scroll to a cell; JupyterLab draws only what is near."""
    page.evaluate(
        "async n => { const notebook = jupyterapp.shell.currentWidget.content; "
        "notebook.activeCellIndex = n; await notebook.scrollToItem(n, 'start'); }",
        number,
    )

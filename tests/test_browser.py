"""JupyterLab in a real browser: open, run all, move what can be moved, and look.

Skipped where playwright or Chromium is missing; `.ci/run` installs both where it may.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from engm.lab.batch import RESULT_TYPE, NotebookRun, available
from engm.lab.page import build
from engm.report import run_report
from engm.report.records import collect

pytest.importorskip("playwright")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for found in map(shutil.which, NAMES) if found), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

FOLDER = Path(__file__).parents[1] / "notebooks"
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SECONDS = 120
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # every cell is there at once, so that the page can be searched
    "notebook-extension/tracker": {"windowingMode": "none"},
}
LAB = """from engm import RunConfig, data
from engm.lab.live import TrainingLab

images = data.load("digits", subset=100, validation=50)
small = dict(subset=100, width=4, num_steps=2)
TrainingLab(images, RunConfig(**small, epochs=100_000, optimizer="engm"))"""


def answer(server, path):
    request = urllib.request.Request(
        server["url"] + path, headers={"Authorization": f"token {server['token']}"}
    )
    with urllib.request.urlopen(request, timeout=5) as response:
        return json.load(response)


def wait_until(true, what):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            if true():
                return
        except OSError:
            pass
        time.sleep(0.2)
    pytest.fail(f"{what} took more than {SECONDS} seconds")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A JupyterLab with settings of its own, and two notebooks in its folder."""
    folder = tmp_path_factory.mktemp("lab")
    work = folder / "notebooks"
    work.mkdir()
    attacks = nbformat.read(FOLDER / "01_attacks.ipynb", as_version=4)
    for cell in attacks.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "\nepochs = 5"
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(attacks, work / "attacks.ipynb")
    attacks.cells = [nbformat.v4.new_code_cell(LAB)]
    nbformat.write(attacks, work / "lab.ipynb")
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={work}"]
    places = {
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "runtime",
    }
    env = os.environ | {name: str(folder / place) for name, place in places.items()}
    found = {"url": f"http://127.0.0.1:{port}", "token": token}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: answer(found, "/api/status"), "starting JupyterLab")
            yield found
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield chromium
        chromium.close()


def run_all(browser, server, name):
    """The page of a notebook whose cells have all been run."""
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(1000 * SECONDS)
    page.goto(f"{server['url']}/lab/tree/{name}?token={server['token']}&reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()

    def connected():
        # before that, Run All silently runs nothing
        kernels = {s["path"]: s["kernel"] for s in answer(server, "/api/sessions")}
        kernel = kernels.get(name, {})
        return kernel.get("execution_state") == "idle" and kernel.get("connections", 0) > 0

    wait_until(connected, "connecting to the kernel")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(
        """() => {
            const code = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
            return code.length && code.every(each => /\\[\\d+\\]/.test(each.textContent));
        }"""
    )
    return page


def picture(page):
    """Where the picture of the widget comes from, once it is drawn."""
    image = page.locator("img.widget-image")
    image.wait_for()
    page.wait_for_function("() => document.querySelector('img.widget-image').naturalWidth > 100")
    return image.get_attribute("src")


def wait_for_another_picture(page, before):
    page.wait_for_function(
        "before => document.querySelector('img.widget-image').src !== before", arg=before
    )
    assert picture(page) != before


def assert_no_error(page):
    errors = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
    assert errors.all_inner_texts() == []


def test_a_notebook_runs_and_its_slider_changes_the_picture(browser, server):
    page = run_all(browser, server, "attacks.ipynb")
    assert_no_error(page)
    before = picture(page)
    slider = page.locator(".widget-slider").first
    slider.scroll_into_view_if_needed()
    assert slider.locator(".widget-readout").inner_text() == "0.000"
    handle = slider.locator(".noUi-handle")
    handle.focus()
    for _ in range(5):
        handle.press("ArrowRight")
    wait_for_another_picture(page, before)
    assert float(slider.locator(".widget-readout").inner_text()) > 0
    assert_no_error(page)
    page.close()


def test_the_lab_shows_training_as_it_goes_and_stops(browser, server):
    page = run_all(browser, server, "lab.ipynb")
    start, stop = (page.get_by_role("button", name=name, exact=True) for name in ("Start", "Stop"))
    assert stop.is_disabled()
    start.click()
    first = picture(page)
    wait_for_another_picture(page, first)
    stop.click()
    page.get_by_text("Stopped; whole epochs").wait_for()
    assert start.is_enabled() and stop.is_disabled()
    assert_no_error(page)
    page.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_the_report_of_all_notebooks_fits_the_window(browser, width, tmp_path):
    runs = []
    for path in available():
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if "outputs" in cell]
        data = [output.get("data", {}) for cell in cells for output in cell.outputs]
        results = [each[RESULT_TYPE] for each in data if RESULT_TYPE in each]
        runs.append(NotebookRun(path.stem, path, 1.0, result=results[-1]))
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(build(runs, tmp_path / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    badges = page.locator(".claim .badge")
    assert badges.count() == 5
    if width > 1000:  # all on the first screen
        assert page.locator(".claims").bounding_box()["height"] < 800
    page.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_a_table_of_runs_shows_its_outcomes_at_every_width(browser, width, tmp_path):
    root = FOLDER.parent / "results"
    records = [r for name in ("methods", "digits-precision") for r in collect(root / name)[0]]
    report = run_report.build(records, compare="msgd", choose=["lr"], mixed=True)
    (path,) = report.write(tmp_path / "report.html")
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for head in ("note", "outcome"):
        box = page.locator("th", has_text=re.compile(f"^{head}$")).bounding_box()
        assert 0 <= box["x"] < box["x"] + box["width"] <= width
    page.close()

"""One small run with hostile texts for all tests of pages; a server that shows it, and Chromium to visit it with.

Tests in Chromium are skipped where there is none. Errors in the console, requests to elsewhere, boxes of Streamlit and markup that ran fail
every one of them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60_000  # milliseconds, for machines that do much else


@pytest.fixture(scope="session")
def hostile_run(tiny_lm_directory, tmp_path_factory):
    from page_run import hostile_model, make_run

    lm = hostile_model(tiny_lm_directory, tmp_path_factory.mktemp("model") / "hostile")
    return make_run(tmp_path_factory.mktemp("shown") / "small", lm)


@pytest.fixture
def opened(hostile_run, monkeypatch) -> Callable[..., object]:
    """Opens a page of the app, on the run or on others, as its address says, without a browser."""
    pytest.importorskip("streamlit")
    from page_run import APP, add_app_to_path
    from streamlit.testing.v1 import AppTest
    from streamlit.util import calc_hash

    add_app_to_path()

    def open_page(name: str, *, runs: list | None = None, **params: object) -> AppTest:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, runs or [hostile_run.path])])
        test = AppTest.from_file(str(APP / "main.py"), default_timeout=120)
        test.query_params.update({key: str(value) for key, value in params.items()})
        test._page_hash = calc_hash(name)
        test.run()
        assert not test.exception, [one.value for one in test.exception]
        return test

    return open_page


# --- in Chromium ---


@pytest.fixture(scope="session")
def browser_path() -> str:
    """The program; tests that need it are skipped where there is none."""
    for package in ("playwright.sync_api", "streamlit"):
        pytest.importorskip(package, reason=f"browser tests skipped: {package.partition('.')[0]} is not installed")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("browser tests skipped: no chromium on PATH (apt-get install chromium)")
    return path


@pytest.fixture(scope="session")
def runs(browser_path, hostile_run, tmp_path_factory):
    """The run, and a copy of it whose store b is damaged."""
    damaged = tmp_path_factory.mktemp("runs") / "damaged"
    shutil.copytree(hostile_run.path, damaged)
    next((damaged / "features" / "b").glob("details-*.parquet")).write_bytes(b"")
    return [hostile_run.path, damaged]


@pytest.fixture(scope="session")
def server(runs, tmp_path_factory):
    """Where `saebench browse` shows the runs; Ctrl-C must end it cleanly."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "saebench", "browse", "--no-open", "--port", str(port), *map(str, runs)]
    log = (tmp_path_factory.mktemp("log") / "server.log").open("w+")
    process = subprocess.Popen(
        command, stdout=log, stderr=log, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}, start_new_session=True
    )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health").close()
                break
            except OSError:
                assert process.poll() is None, log.seek(0) or log.read()
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 0
        log.seek(0)
        assert "Traceback" not in log.read()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


@pytest.fixture(scope="module")  # not longer: its event loop would stand in the way of tests without a browser
def chromium(browser_path):
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, server):
    """Opens pages, each in a context of its own unless one is given, and waits until they are done."""
    from page_run import settle

    found, contexts = [], []

    def note(message):
        # asking below the page's own path first is how Streamlit finds its server
        asked = re.search(r"/_stcore/(health|host-config)$", message.location.get("url", ""))
        if message.type == "error" and not asked:
            found.append(message.text)

    def outside(request):
        if not request.url.startswith((server, "data:", "blob:")):
            found.append(request.url)

    def open_page(path: str, *, context=None, **options):
        if context is None:
            context = chromium.new_context(**{"viewport": {"width": 1400, "height": 900}, "accept_downloads": True} | options)
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", note)
        page.on("pageerror", lambda error: found.append(str(error)))
        page.on("request", outside)
        page.on("dialog", lambda dialog: found.append(f"dialog: {dialog.message}"))
        page.goto(f"{server}/{path}")
        settle(page)
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            assert "taken" not in page.title() and page.locator(".sb img, .sb script, .sb-grid img").count() == 0
            assert page.locator("[data-testid=stException], [data-testid=stAlert]").count() == 0
            assert page.locator(".sb-problem").count() == 0, page.locator(".sb-problem").first.inner_text()
        context.close()
    assert not found

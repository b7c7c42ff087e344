"""Prompt, Compare and Corpus in headless Chromium: a person types, points, clicks, shares an address. Errors in the console fail."""

from __future__ import annotations

import csv
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests skipped: playwright is not installed")
pytest.importorskip("streamlit", reason="browser tests skipped: streamlit is not installed")

from page_run import HOSTILE, LABELLED  # noqa: E402

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="browser tests skipped: no chromium on PATH (apt-get install chromium)"),
]
READY = "[data-test-script-state=notRunning]"
TEXT = f"def value_3(x):\n    return {HOSTILE}"
PATIENCE = 60_000  # milliseconds, for machines that do much else


@pytest.fixture(scope="module")
def address(hostile_run, tmp_path_factory):
    """Where a server shows the small run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "saebench", "browse", "--no-open", "--port", str(port), str(hostile_run.path)]
    log = (tmp_path_factory.mktemp("log") / "server.log").open("w+")
    server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health").close()
                break
            except OSError:
                assert server.poll() is None, log.seek(0) or log.read()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.close()


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """Opens pages, waits until they are done, and in the end fails on errors in the console, requests to elsewhere, or markup that ran."""
    found, contexts = [], []

    def note(message):
        # asking below the page's own path first is how Streamlit finds its server
        asked = re.search(r"/_stcore/(health|host-config)$", message.location.get("url", ""))
        if message.type == "error" and not asked:
            found.append(message.text)

    def open_page(path: str, scheme: str = "light"):
        context = chromium.new_context(viewport={"width": 1400, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", note)
        page.on("pageerror", lambda error: found.append(str(error)))
        page.on(
            "request",
            lambda request: found.append(request.url) if not request.url.startswith((address, "data:", "blob:")) else None,
        )
        page.goto(f"{address}/{path}")
        settle(page)
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            assert "taken" not in page.title() and page.locator(".sb img, .sb script").count() == 0
            assert page.locator(".sb-problem").count() == 0, page.locator(".sb-problem").first.inner_text()
            assert page.locator("[data-testid=stException]").count() == 0
        context.close()
    assert not found


def settle(page) -> None:
    """Wait until the script has run to its end."""
    page.wait_for_selector(".sb-title")
    page.wait_for_timeout(250)
    page.wait_for_selector(READY)


def click(page, selector: str) -> None:
    page.locator(selector).first.click()
    settle(page)


def download(page) -> list[list[str]]:
    """The rows of the list as it is saved."""
    with page.expect_download() as saved:
        page.get_by_text("CSV of all").click()
    return list(csv.reader(saved.value.path().read_text(encoding="utf-8").splitlines()))


def test_a_prompt_is_typed_pointed_at_clicked_and_shared(visit):
    page = visit("prompt?run=small&dictionary=a")
    assert "Type a text above" in page.inner_text(".stMain")
    page.fill("textarea", TEXT)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".sb-tokens a")
    settle(page)
    page.locator(".sb-tokens a").nth(3).hover()
    page.wait_for_selector("#sb-tip >> text=with the dictionary")
    click(page, ".sb-tokens a >> nth=3")
    page.wait_for_selector("text=Share of the reconstruction")
    page.wait_for_function("location.search.includes('at=4')")
    chip = page.locator(".sb-table .sb-chip").first
    latent = chip.locator("b").inner_text()
    chip.click()
    page.wait_for_function(f"location.search.includes('shown={latent}')")
    settle(page)
    shaded = page.locator(".sb-tokens .shaded").count()
    assert shaded and page.locator(".sb-tokens .chosen").count() == 1
    click(page, "text=all tokens")
    page.wait_for_function("!location.search.includes('at=')")
    page.wait_for_selector("th:has-text('Strongest features')")
    shared = visit(page.url.split("/", 3)[3], "dark")  # what another person sees who is given the address
    shared.wait_for_selector(".sb-tokens .shaded")
    assert shared.locator(".sb-tokens .shaded").count() == shaded
    assert shared.locator("textarea").input_value() == TEXT
    assert shared.locator(".sb-tokens").inner_text() == page.locator(".sb-tokens").inner_text()


def test_two_dictionaries_are_compared(visit):
    page = visit("compare?run=small&dictionary=a&run2=small&dictionary2=b&least-writing=0.05")
    page.wait_for_selector(".js-plotly-plot")
    click(page, "a:has-text('side by side')")
    dialog = page.locator("[data-testid=stDialog]")
    dialog.locator("text=cosine").first.wait_for()
    assert dialog.locator(".sb-row").count() > 1 and "pair=" in page.url
    dialog.locator("button[aria-label=Close]").click()
    page.wait_for_function("!location.search.includes('pair=')")
    settle(page)
    listed = page.locator("a:has-text('side by side')").count()
    heads, *rows = download(page)
    assert heads == ["small/a", "small/a label", "small/b", "small/b label", "cosine"] and len(rows) >= listed > 1
    assert [float(row[4]) for row in rows] == sorted((float(row[4]) for row in rows), reverse=True)
    page.get_by_text("When they fire").click()
    page.wait_for_selector("th:has-text('phi')")
    page.fill("input[placeholder^='in labels']", str(LABELLED))
    page.keyboard.press("Enter")
    page.wait_for_function(f"location.search.includes('named={LABELLED}')")
    settle(page)
    page.get_by_text("The same text through both").click()
    page.fill("textarea", TEXT)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("th:has-text('With second')")
    settle(page)
    assert page.locator(".sb-tokens").count() == 2


def test_a_corpus_is_explored(visit):
    page = visit("corpus?run=small&dictionary=a")
    click(page, ".sb-chip:has-text('sums')")
    page.wait_for_function("location.search.includes('set=sums')")
    page.wait_for_selector("th:has-text('Ratio')")
    click(page, "a:has-text('examples')")
    dialog = page.locator("[data-testid=stDialog]")
    dialog.locator(".sb-row").first.wait_for()
    dialog.locator("button[aria-label=Close]").click()
    page.wait_for_function("!location.search.includes('look=')")
    settle(page)
    point = page.locator(".js-plotly-plot .scatterlayer .point").first.bounding_box()
    page.mouse.click(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    dialog.locator(".sb-chip").first.wait_for()
    page.wait_for_function("location.search.includes('look=')")
    dialog.locator("button[aria-label=Close]").click()
    page.wait_for_function("!location.search.includes('look=')")
    settle(page)
    assert dialog.count() == 0  # closed for good, though the point is still the one that was clicked
    assert len(download(page)) > 10
    page.get_by_text("Documents", exact=True).first.click()
    page.wait_for_selector("th:has-text('Tokens')")
    settle(page)
    click(page, ".sb-table a >> nth=1")
    click(page, ".sb-reading a:has-text('context')")
    page.wait_for_selector("text=Contexts like this one")
    click(page, ".sb-reading a:has-text('context')")
    page.wait_for_selector("text=Contexts like this one")
    assert re.search(r"context=\d+", page.url)
    click(page, "text=back to the corpus")
    page.wait_for_selector("text=all documents")
    page.wait_for_function("!location.search.includes('context=')")
    click(page, "text=all documents")
    page.wait_for_selector("th:has-text('Tokens')")
    page.wait_for_function("!location.search.includes('document=')")


def test_two_texts_are_contrasted_one_pasted_one_uploaded(visit):
    page = visit("corpus?run=small&dictionary=a&corpus=texts", "dark")
    page.locator("textarea").first.fill("\n\n".join(f"return {i} + {i}" for i in range(8)))
    page.keyboard.press("Control+Enter")
    settle(page)
    files = [
        {"name": f"<b>{i}</b>.txt", "mimeType": "text/plain", "buffer": f"# the number {i}\n\n{HOSTILE}".encode()}
        for i in range(4)
    ]
    page.locator("input[type=file]").nth(1).set_input_files(files)
    page.wait_for_selector("th:has-text('in the second')")
    settle(page)
    assert page.locator(".sb-dim").filter(has_text=re.compile(r"^4 texts, ")).count() == 1
    click(page, "a:has-text('examples')")
    page.locator("[data-testid=stDialog] .sb-row").first.wait_for()

"""Prompt, Compare and Corpus in headless Chromium: a person types, points, clicks, shares an address. Errors in the console fail."""

from __future__ import annotations

import csv
import re

import pytest
from page_run import HOSTILE, LABELLED, settle

pytestmark = pytest.mark.slow
TEXT = f"def value_3(x):\n    return {HOSTILE}"


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
    shared = visit(page.url.split("/", 3)[3], color_scheme="dark")  # what another person sees who is given the address
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
    page = visit("corpus?run=small&dictionary=a&corpus=texts", color_scheme="dark")
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

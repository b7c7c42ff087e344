"""The browser in headless Chromium, as a person uses it: Overview, Features, Feature, links, exports, hostile texts, two visitors.

What fails every test of these is in conftest.py.
"""

from __future__ import annotations

import csv
import io
import re

import numpy as np
import pytest
from page_run import HOSTILE, LABELLED, settle

from saebench.features import FeatureStore, top_examples
from saebench.features.labelling.notes import Notes
from saebench.figures.tokens import alone

pytestmark = pytest.mark.slow
PAGES = ("overview", "features", "feature", "prompt", "compare", "corpus", "steering", "circuit")


@pytest.fixture(scope="module")
def store(hostile_run):
    return FeatureStore(hostile_run.features("a"))


def column(page, number: int) -> list[str]:
    """What stands in a column of the table, as far as it is drawn."""
    return page.locator(".sb-grid-row").evaluate_all("(rows, n) => rows.map((row) => row.children[n].textContent)", number)


def test_every_page_opens_by_its_link(visit):
    page = visit("")
    for name in PAGES:
        page.get_by_role("link", name=name.capitalize(), exact=True).click()
        page.wait_for_url(re.compile(rf"/{'' if name == 'overview' else name}(\?|$)"))
        settle(page)
        assert page.locator(".sb-title h1").inner_text()
        assert page.locator(".sb-problem").count() == 0
        assert "run=small" in page.url and "dictionary=a" in page.url


def test_the_overview_leads_to_the_features(visit, runs):
    page = visit("")
    assert page.locator(".js-plotly-plot").count() == 3
    assert page.locator(".sb-bad").inner_text() == "damaged: index it again"
    page.locator(".sb-table a", has_text="b").first.click()
    page.wait_for_selector(".sb-grid-row")
    page.wait_for_url(re.compile(r"features\?run=small&dictionary=b"))


def test_the_table_sorts_searches_and_opens(visit, store):
    page = visit("features?run=small&dictionary=a")
    page.wait_for_selector(".sb-grid-row")
    largest = store.latents["max"].to_numpy()
    for _ in range(2):
        page.get_by_role("columnheader", name="Max").click()
        settle(page)
    assert "sort=max" in page.url
    alive = np.flatnonzero(store.counts_F)
    expected = sorted(alive.tolist(), key=lambda latent: (largest[latent], latent))
    shown = column(page, 0)
    assert shown == [str(latent) for latent in expected[: len(shown)]]
    page.get_by_label("Search labels").fill("img")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('.sb-grid-row').length == 1")
    assert column(page, 0) == [str(LABELLED)] and HOSTILE in column(page, 2)[0]
    page.locator(".sb-grid-row").click()
    page.wait_for_selector(".sb-figures")
    settle(page)
    assert HOSTILE in page.locator("h1").inner_text() and f"feature={LABELLED}" in page.url and "find" not in page.url
    page.go_back()
    page.wait_for_selector(".sb-grid-row")
    settle(page)
    assert "find=img" in page.url and "sort=max" in page.url and column(page, 0) == [str(LABELLED)]


def test_the_table_by_keyboard(visit, store):
    page = visit("features?run=small&dictionary=a&sort=density-")
    page.wait_for_selector(".sb-grid-row")
    page.get_by_role("columnheader", name="Latent").focus()
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    third = column(page, 0)[2]
    assert third == str(np.argsort(-store.density_F, kind="stable")[2])
    page.keyboard.press("Enter")
    page.wait_for_selector(".sb-figures")
    assert f"feature={third}" in page.url


def test_a_shared_link_shows_the_same(visit, store):
    latent = int(np.argmax(store.counts_F))
    token = store.details(latent).tokens[0][0]
    page = visit(f"feature?run=small&dictionary=a&feature={latent}")
    page.locator(".sb-chip[href*='on=']").first.click()
    page.wait_for_url(re.compile("on="))
    settle(page)
    assert f"on={token}" in page.url
    again = visit(page.url.split("/", 3)[3])
    for part in (".sb-title", ".sb-rows", ".sb-figures"):
        assert again.locator(part).first.inner_text() == page.locator(part).first.inner_text()


def test_pointing_at_a_token_says_its_activation(visit, store):
    latent = int(np.argmax(store.counts_F))
    page = visit(f"feature?run=small&dictionary=a&feature={latent}")
    example = top_examples(store, latent, 1)[0]
    page.locator(".sb-row i.focus").first.hover()
    said = page.locator("#sb-tip").inner_text().splitlines()
    assert said[1] == f"activation {example.values[example.focus]:.4g}"
    assert said[2] == f"position {example.token % store.context_size}"
    assert said[3] == example.document


def test_next_and_previous_by_keyboard(visit, store):
    alive = np.flatnonzero(store.counts_F)
    page = visit(f"feature?run=small&dictionary=a&feature={alive[3]}")
    for key, number in (("n", 4), ("n", 5), ("p", 4)):
        page.keyboard.press(key)
        page.wait_for_url(re.compile(rf"feature={alive[number]}(&|$)"))
        settle(page)
        assert page.locator(".sb-title span").inner_text().startswith(f"{alive[number]} in small / a")


def test_a_feature_is_tried_on_own_text(visit, store):
    latent = int(np.argmax(store.counts_F))
    page = visit(f"feature?run=small&dictionary=a&feature={latent}")
    page.get_by_label("Your text").fill(f"def value_3(x):\n    return {HOSTILE}")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("[data-n=activation] .sb-context")
    page.wait_for_url(re.compile("try="))
    assert HOSTILE in page.locator("[data-n=activation]").inner_text()


def test_bookmarks_of_two_visitors_are_both_kept(visit, store):
    first, second = visit("feature?run=small&dictionary=a&feature=10"), visit("feature?run=small&dictionary=a&feature=11")
    for page in (first, second):
        page.get_by_role("button", name="Bookmark").click()
        page.get_by_role("button", name="Bookmarked").wait_for()
    assert {10, 11} <= set(Notes.open(store).bookmarks())
    starred = visit("features?run=small&dictionary=a&starred=1&dead=1")
    starred.wait_for_selector(".sb-grid-row")
    assert {"10", "11"} <= set(column(starred, 0))
    for page in (first, second):
        page.get_by_role("button", name="Bookmarked").click()
        page.get_by_role("button", name="Bookmark", exact=True).wait_for()
    assert not {10, 11} & set(Notes.open(store).bookmarks())


def test_exports_are_whole_and_work_offline(visit, chromium, store, tmp_path):
    latent = int(np.argmax(store.counts_F))
    page = visit(f"feature?run=small&dictionary=a&feature={latent}")
    page.get_by_role("button", name="Export").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Its examples as CSV").click()
    rows = list(csv.DictReader(io.StringIO(download.value.path().read_text(encoding="utf-8"))))
    strongest = [row for row in rows if row["group"] == "strongest"]
    expected = top_examples(store, latent, 100)
    assert [int(row["token_number"]) for row in strongest] == [example.token for example in expected]
    with page.expect_download() as download:
        page.get_by_role("button", name="This feature as one HTML file").click()
    path = tmp_path / "feature.html"
    download.value.save_as(path)
    assert download.value.suggested_filename == f"small-a-{latent}.html"
    found = []
    with chromium.new_context(offline=True) as context:
        alone_page = context.new_page()
        alone_page.on("console", lambda message: found.append(message.text))
        alone_page.on("request", lambda request: found.append(request.url) if not request.url.startswith("file:") else None)
        alone_page.goto(path.as_uri())
        assert alone_page.locator("svg rect").count() > 50
        assert alone_page.locator(".row").count() >= len(top_examples(store, latent, 20))
        assert alone_page.locator("img, script").count() == 0 and "taken" not in alone_page.title()
    assert not found


def test_a_figure_as_png(visit, store):
    page = visit(f"feature?run=small&dictionary=a&feature={int(np.argmax(store.counts_F))}")
    plot = page.locator(".js-plotly-plot").first
    plot.hover()
    with page.expect_download() as download:
        plot.locator("[data-title*='Download']").click()
    assert download.value.suggested_filename == "activations.png"
    assert download.value.path().read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_typing_is_not_taken_for_a_shortcut(visit, store):
    latent = int(np.flatnonzero(store.counts_F)[3])
    page = visit(f"feature?run=small&dictionary=a&feature={latent}")
    page.get_by_label("Your text").press_sequentially("n p n")
    page.keyboard.press("Control+Enter")
    page.wait_for_url(re.compile("try=n"))
    settle(page)
    assert f"feature={latent}&" in page.url + "&"


def test_the_list_as_csv(visit, store):
    page = visit("features?run=small&dictionary=a")
    with page.expect_download() as download:
        page.get_by_role("button", name="These latents as CSV").click()
    rows = list(csv.DictReader(io.StringIO(download.value.path().read_text(encoding="utf-8"))))
    assert [int(row["latent"]) for row in rows] == np.flatnonzero(store.counts_F).tolist()
    top = store.latents["top_token"].to_pylist()
    for row in rows:
        latent = int(row["latent"])
        assert float(row["density"]) == pytest.approx(store.density_F[latent], rel=1e-5)
        assert row["top token"].strip('"') == alone(store.token_strings[top[latent]]).replace("\\", "\\\\").replace(
            '"', '\\"'
        ).strip('"')


def test_a_damaged_store_is_named_and_the_others_open(visit):
    page = visit("")
    page.goto(page.url.split("?")[0] + "features?run=damaged&dictionary=b")
    page.wait_for_selector(".sb-problem")
    assert "details-00000.parquet" in page.locator(".sb-problem").inner_text()
    page.locator("[data-testid=stSidebar]").get_by_role("combobox", name="Dictionary").click()
    page.get_by_role("option", name="a", exact=True).click()
    page.wait_for_selector(".sb-grid-row")
    page.wait_for_url(re.compile("run=damaged&dictionary=a"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_narrow_window_in_both_colours(visit, scheme):
    page = visit("", viewport={"width": 430, "height": 800}, color_scheme=scheme)
    for name in PAGES:
        page.goto(page.url.split("/", 3)[0] + "//" + page.url.split("/", 3)[2] + f"/{name if name != 'overview' else ''}")
        settle(page)
        wide = page.evaluate("document.querySelector('.stMain').scrollWidth - document.querySelector('.stMain').clientWidth")
        assert wide <= 1, name
    dark = page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) == (scheme == "dark")


def test_the_map_is_computed_and_opens_features(visit, store):
    page = visit("features?run=small&dictionary=a&view=Map")
    page.get_by_role("button", name="Compute the map").click()
    page.wait_for_selector(".js-plotly-plot .gl-canvas, .js-plotly-plot canvas", timeout=240_000)
    settle(page)
    assert store.path.with_name("a.map.parquet").exists()
    page.get_by_role("radio", name="Group").or_(page.get_by_text("Group", exact=True)).first.click()
    settle(page)
    place = page.evaluate("""() => {
        const plot = document.querySelector('.js-plotly-plot'), trace = plot.data.at(-1), layout = plot._fullLayout;
        const box = plot.querySelector('.nsewdrag').getBoundingClientRect();
        const values = (v) => v.bdata ? null : v;
        const cd = plot.calcdata.at(-1)[0].trace;
        return [box.x + layout.xaxis.c2p(cd._length ? cd.x[0] : 0), box.y + layout.yaxis.c2p(cd.y[0]), String(cd.customdata[0])];
    }""")
    page.mouse.move(place[0], place[1])
    page.mouse.click(place[0], place[1])
    page.wait_for_url(re.compile(r"/feature\?"))

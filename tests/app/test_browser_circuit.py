"""Circuit in headless Chromium: built while one watches, clicked, pruned, shared, stopped. What fails all of these is in conftest.py."""

from __future__ import annotations

import re
import shutil
import time

import pytest
from page_run import HOSTILE, settle

from saebench.circuits.graphs.graph_file import load_graph
from saebench.circuits.graphs.tracing import trace
from saebench.dictionaries import load_dictionary
from saebench.lm import load_lm

pytestmark = pytest.mark.slow
PROMPT = f"return 17 + 4{HOSTILE}"
SLUG = "in-chromium"
PLACES = """(name) => {
    const plot = document.querySelector('.st-key-circuit-graph .js-plotly-plot') ?? document.querySelector('.js-plotly-plot');
    const layout = plot._fullLayout, box = plot.querySelector('.nsewdrag').getBoundingClientRect();
    return plot.calcdata.filter((of) => of[0].trace.name === name).flatMap((of) => of.map(
        (point, i) => [box.x + layout.xaxis.c2p(point.x), box.y + layout.yaxis.c2p(point.y), of[0].trace.customdata[i]]));
}"""
"""Where the points of a trace are on the screen, and their ids."""


@pytest.fixture(scope="module")
def graph_file(hostile_run):
    """A graph of a hostile prompt, kept in the run as long as these tests need it."""
    lm = load_lm(hostile_run.record["recipe"]["model"]["name"])
    graph = trace(lm, {"other": load_dictionary(hostile_run.path / "dictionaries" / "other")}, PROMPT)
    path = hostile_run.path / "graphs" / f"{SLUG}.json"
    graph.save(path)
    yield path
    shutil.rmtree(path.parent)


def points(page, name: str) -> list:
    page.locator(".js-plotly-plot").first.scroll_into_view_if_needed()
    page.wait_for_timeout(400)
    return page.evaluate(PLACES, name)


def test_a_graph_is_built_while_one_watches(visit, hostile_run, graph_file):
    page = visit("circuit?run=small")
    page.get_by_label("Prompt").fill(PROMPT)
    page.keyboard.press("Control+Enter")
    page.wait_for_url(re.compile("prompt="))
    settle(page)
    page.get_by_role("button", name="Build the graph").click()
    page.locator(".sb-job").wait_for()
    page.wait_for_url(re.compile("graph=return-17"), timeout=240_000)
    page.locator(".js-plotly-plot").first.wait_for()
    settle(page)
    slug = re.search("graph=([^&]+)", page.url)[1]
    graph = load_graph(hostile_run.path / "graphs" / f"{slug}.json")
    assert graph.prompt == PROMPT and graph.extra["verification"]["edges"]
    assert f"{graph.prune().scores().replacement:.3f}" in page.locator(".stMain").inner_text()
    assert "along all paths" in page.locator(".stMain").inner_text()


def test_pointing_and_clicking(visit, graph_file):
    page = visit(f"circuit?run=small&graph={SLUG}")
    x, y, id = points(page, "features")[0]
    page.mouse.move(x, y)
    page.locator(".hoverlayer .hovertext").wait_for()
    assert "influence" in page.locator(".hoverlayer").text_content()
    began = time.monotonic()
    page.mouse.click(x, y)
    page.wait_for_url(re.compile("node=feature"))
    page.get_by_text("Outputs", exact=False).first.wait_for()
    print(f"a click shows the node after {time.monotonic() - began:.2f} s")
    settle(page)
    latent = id.split("/")[-1]
    assert f"other {latent}" in page.locator(".st-key-circuit-panel").inner_text()
    shown = page.locator(".st-key-circuit-panel").inner_text()
    again = visit(page.url.split("/", 3)[3])
    assert again.locator(".st-key-circuit-panel").inner_text() == shown
    page.locator(".st-key-circuit-panel .sb-table a").first.click()
    page.wait_for_url(lambda url: f"node={id.replace('/', '%2F')}" not in url)
    settle(page)
    assert page.locator(".st-key-circuit-panel").inner_text() != shown
    page.go_back()
    page.wait_for_url(re.compile(f"node={id.replace('/', '(%2F|/)')}"))
    settle(page)
    assert page.locator(".st-key-circuit-panel").inner_text() == shown


def test_the_zoom_stays_when_a_node_is_chosen_and_a_double_click_shows_all(visit, graph_file):
    page = visit(f"circuit?run=small&graph={SLUG}")
    points(page, "features")
    page.locator(".js-plotly-plot").first.hover()
    page.locator(".js-plotly-plot .modebar-btn[data-title='Zoom in']").first.click()
    page.wait_for_url(re.compile("zoom=0.250_0.750"))
    ends = "() => document.querySelector('.js-plotly-plot')._fullLayout.xaxis.range.map((end) => end.toFixed(3))"
    zoomed = page.evaluate(ends)
    visible = [place for name in ("features", "errors", "tokens", "explained") for place in points(page, name)]
    box = page.locator(".js-plotly-plot .nsewdrag").first.bounding_box()
    inside = lambda x, y: box["x"] + 9 < x < box["x"] + box["width"] - 9 and box["y"] + 9 < y < box["y"] + box["height"] - 9  # noqa: E731
    x, y, _ = next(place for place in visible if inside(*place[:2]))
    page.mouse.click(x, y)
    page.wait_for_url(re.compile("node="))
    settle(page)
    page.locator(".js-plotly-plot").first.wait_for()
    assert page.evaluate(ends) == zoomed
    page.wait_for_timeout(500)
    box = page.locator(".js-plotly-plot .nsewdrag").first.bounding_box()
    page.mouse.dblclick(box["x"] + 12, box["y"] + 12)
    page.wait_for_url(lambda url: "zoom=" not in url)


def test_tokens_and_what_is_explained_are_text(visit, graph_file):
    page = visit(f"circuit?run=small&graph={SLUG}")
    text = page.locator(".js-plotly-plot").first.text_content()
    assert "<img" in text  # as text, in a tick or a name on top
    assert page.locator(".js-plotly-plot img, .js-plotly-plot script, .js-plotly-plot image").count() == 0


def test_pruning_and_supernodes_stand_in_the_address(visit, graph_file):
    page = visit(f"circuit?run=small&graph={SLUG}")
    page.get_by_role("slider", name="Influence kept by nodes").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.wait_for_url(re.compile(r"nodes=0\.83"))
    settle(page)
    page.get_by_text("Draw supernodes").click()
    page.wait_for_url(re.compile("grouped=1"))
    settle(page)
    again = visit(page.url.split("/", 3)[3])
    assert len(points(again, "features")) == len(points(page, "features"))


def test_what_is_being_built_can_be_stopped(visit, hostile_run, graph_file):
    before = set((hostile_run.path / "graphs").iterdir())
    page = visit("circuit?run=small&prompt=return%2099")
    page.get_by_role("button", name="Build the graph").click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Build the graph").wait_for()
    settle(page)
    assert page.locator(".sb-job").count() == 0 and set((hostile_run.path / "graphs").iterdir()) == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_window(visit, graph_file, scheme):
    page = visit(f"circuit?run=small&graph={SLUG}&node=token%2F1", viewport={"width": 430, "height": 800}, color_scheme=scheme)
    page.locator(".js-plotly-plot").first.wait_for()
    assert page.evaluate("document.querySelector('.stMain').scrollWidth - document.querySelector('.stMain').clientWidth") <= 1

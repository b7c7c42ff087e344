"""What the benchmark of the browser makes of messages and times, against figures worked out by hand."""

from __future__ import annotations

import math

import pytest

from benchmarks import browse, browse_chromium, browse_tables
from benchmarks.browse_tables import page_cells, quantile, spread, visit_cells
from saebench.runs import Run

pytest.importorskip("streamlit")

from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

from benchmarks import browse_server
from benchmarks.workers import browse_pages


def test_quantiles_are_values_that_were_measured():
    values = [float(v) for v in (5, 1, 4, 2, 3)]
    assert [quantile(values, share) for share in (0.0, 0.2, 0.21, 0.5, 0.95, 1.0)] == [1, 1, 2, 3, 5, 5]
    assert quantile([7.0], 0.95) == 7
    assert quantile([float(v) for v in range(1, 101)], 0.95) == 95
    assert spread([1.0, 2.0, 30.0]) == ["3", "2.0", "30.0", "30.0"]


def page(content: float | None, complete: float) -> dict:
    return {"content": content, "complete": complete, "bytes": 2048, "problem": None}


def test_a_page_meets_its_target_by_the_95th_percentile():
    runs = [page(100, 400)] * 19 + [page(5000, 6000)]
    assert page_cells("Feature, the next one", runs) == ["20", "100", "100", "400", "400", "6000", "2", "first content 300: met"]
    assert page_cells("Feature, the next one", [page(301, 400)])[-1] == "first content 300: **missed**"
    assert page_cells("Prompt, 9 latents", [page(10, 501)])[-1] == "whole 500: **missed**"
    assert page_cells("Feature, first of a process", [page(301, 400)])[-1] == "-"
    assert page_cells("Features, again", [page(301, 400)])[-1] == "-"
    assert page_cells("Features, another filter", [page(None, 40)])[1:4] == ["-", "-", "40"]
    assert page_cells("Feature, the next one", [page(None, 40)])[-1].endswith("**missed**")


def visits(seconds: list[float], **more: object) -> dict:
    made = [{"title": 0.1, "complete": value, "problem": None} for value in seconds]
    plan = {"visitors": 2, "steps": 2, "pause": 3.0}
    return {"visits": made, "plan": plan, "seconds": 8.0, "cpu_seconds": 1.0, "peak_mib": 900.0, "own_mib": 400.0, **more}


def test_visitors_by_their_pages():
    expected = ["3", "4", "0.10", "0.10", "1.00", "2.10", "2.10", "0.5", "0.250", "900", "400", "0", "2 s: **missed**"]
    assert visit_cells(visits([0.5, 1.0, 1.5, 2.1])) == expected
    assert len(expected) == len(browse_tables.VISIT_HEAD) - 1
    assert visit_cells(visits([0.5, 1.0, 1.5, 2.0]))[-1] == "2 s: met"
    assert visit_cells(visits([0.5], problems=["a", "b"]))[-2] == "2"


def test_visitors_who_never_saw_a_page():
    failed = {"problem": "TimeoutError: ", "complete": None, "first": False}
    cells = visit_cells(visits([]) | {"visits": [failed]})
    assert cells[4] == "inf" and cells[-2:] == ["1", "2 s: **missed**"]


def test_opening_has_no_rates():
    cells = browse_tables.opening(visit_cells(visits([0.5, 1.0])))
    shown = dict(zip(browse_tables.VISIT_HEAD[1:], cells, strict=True))
    assert shown["pages/s"] == shown["p95 may be"] == shown["pause s"] == "-"
    assert shown["whole p50 s"] == "0.50"


def test_frames_later_than_two():
    found = browse_chromium.gaps([16.6, 16.7, 34.0, 120.0, 33.0])
    assert found == {"longest_ms": 120.0, "frames": 5, "late": 2}


# --- messages ---


def html(body: str) -> ForwardMsg:
    message = ForwardMsg()
    message.delta.new_element.html.body = body
    return message


def finished(status: int = 0) -> ForwardMsg:
    message = ForwardMsg()
    message.script_finished = status
    return message


def exception(text: str) -> ForwardMsg:
    message = ForwardMsg()
    message.delta.new_element.exception.message = text
    return message


STYLE = "<style>.sb-title { color: red } .sb-problem { color: red }</style>"
TITLE, FIGURES = '<div class="sb"><div class="sb-title"><h1>a</h1></div></div>', '<div class="sb-figures"></div>'
PROBLEM = '<div class="sb-problem" role="alert">no</div>'


def test_first_content_is_the_piece_that_answers():
    grid = ForwardMsg()
    grid.delta.new_element.bidi_component.component_name = "app.saebench_grid"
    sent = [(0.1, html(STYLE)), (0.2, html(TITLE)), (0.3, html(FIGURES)), (0.4, grid), (0.5, html(TITLE))]
    contents = {name: browse_pages.described(name, sent)["content"] for name in ("feature", "prompt", "features")}
    assert contents == {"feature": pytest.approx(200), "prompt": pytest.approx(300), "features": pytest.approx(400)}
    found = browse_pages.described("feature", sent)
    assert found["complete"] == pytest.approx(500) and found["problem"] is None
    assert found["bytes"] == sum(len(message.SerializeToString()) for _, message in sent)


def test_problems_and_exceptions_are_noted():
    assert browse_pages.described("feature", [(0.1, html(PROBLEM))])["problem"] == PROBLEM
    assert browse_pages.described("feature", [(0.1, exception("broken"))])["problem"] == "broken"
    found: dict = {"title": None, "complete": None, "problem": None}
    browse_server.read(html(STYLE), 0.1, found)
    assert found == {"title": None, "complete": None, "problem": None}
    for number, message in enumerate((html(TITLE), html(PROBLEM), html(TITLE), finished())):
        browse_server.read(message, 1.0 + number, found)
    assert found == {"title": 1.0, "complete": 4.0, "problem": PROBLEM}


def test_a_script_that_did_not_succeed_is_a_problem():
    found: dict = {"title": None, "complete": None, "problem": None}
    browse_server.read(finished(1), 2.0, found)
    assert found["complete"] == 2.0 and "status 1" in found["problem"]


# --- what is asked for ---


def test_arguments():
    given = browse.parse(["--pause", "0,2.5", "--parts", "lookups,visitors", "--d-sae", "128", "--steps", "3"])
    assert given.pause == [0.0, 2.5] and given.parts == ["lookups", "visitors"]
    assert browse.settings_of(given)["latents"] == range(124)  # the last of three steps from 123 leads to 126
    with pytest.raises(SystemExit):
        browse.parse(["--parts", "pages,nothing"])


def test_a_few_of_many():
    assert browse.some(list(range(40))) == list(range(0, 40, 3))
    assert browse.some([4, 5]) == [4, 5]


def test_tables_of_what_there_is(tmp_path):
    arguments = browse.parse([])
    result = browse.new_result(arguments) | {"problems": ["Features: no", "Features: no"]}
    result["pages"] = {"Features, again": [page(10, 20)]}
    shown = browse_tables.write(result, tmp_path / "browse")
    assert shown.count("- Features: no") == 1 and "| Features, again |" in shown
    assert "131,072 latents over 10,000,000 tokens" in (tmp_path / "browse.md").read_text()
    assert math.isclose(result["pages"]["Features, again"][0]["content"], 10)


@pytest.mark.slow
def test_the_run_is_one_that_opens(tmp_path):
    from benchmarks import browse_run

    made = browse_run.make(tmp_path / "run", d_sae=64, tokens=2048, prompt_d_sae=64)
    again = Run.open(tmp_path / "run")
    assert again.finished and list(again.dictionaries()) == ["drawn", "prompt"] and again.evaluation("core") == {}
    store = browse_run.FeatureStore(made.features("drawn"))
    assert store.d_sae == 64 and store.num_entries == 32 * store.num_tokens
    pages = browse_pages.Pages()
    pages.init(run=str(made.path), dictionary="drawn", threads=1)
    found = pages.spread(count=8, seed=0)
    assert found["counts"] == store.counts_F[found["latents"]].tolist() and found["entries"] == store.num_entries
    assert found["counts"][0] >= store.counts_F.max() * 0.5 and found["counts"][-1] <= store.counts_F.min() * 2

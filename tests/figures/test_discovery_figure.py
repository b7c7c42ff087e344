"""Curves and tables of circuit discovery: what is drawn is what was measured, and names stay text."""

from saebench.figures.discovery import agreement_table, discovery_rows, faithfulness_figure, write_page

CURVES = [
    {
        "level": "heads",
        "method": method,
        "sizes_K": [0, 2, 6],
        "faithfulness_K": [0.0, 0.9, 1.0],
        "completeness_K": [1.0, 0.2, 0.0],
    }
    for method in ("exact", "eap")
] + [{"level": "edges", "method": "eap", "sizes_K": [0, 9], "faithfulness_K": [0.0, 1.0], "completeness_K": [1.0, 0.0]}]
ROW = {"level": "heads", "method": "eap", "truth": "exact", "seconds": 1.25, "inside": 2, "components": 1500}
RESULTS = {
    "sort/mean": {
        "task": "sort", "patch": "mean", "curves": CURVES,
        "rows": [ROW | {"auc": 0.987, "precision": 0.5, "recall": 1.0}, ROW | {"method": "<b>", "inside": 0}],
    }
}  # fmt: skip


def test_every_curve_is_drawn_with_what_its_circuit_leaves_behind():
    figure = faithfulness_figure(CURVES)
    assert len(figure.data) == 2 * len(CURVES)
    assert [list(trace.customdata) for trace in figure.data[:2]] == [[0, 2, 6]] * 2 and list(figure.data[0].x) == [1, 3, 7]
    assert list(figure.data[0].y) == [0.0, 0.9, 1.0] and list(figure.data[1].y) == [1.0, 0.2, 0.0]
    assert (figure.data[0].line.dash, figure.data[1].line.dash) == ("solid", "dash")
    assert figure.data[2].line.color == figure.data[4].line.color != figure.data[0].line.color  # one colour a method
    assert [trace.name for trace in figure.data if trace.showlegend] == ["exact ablation", "EAP"]
    assert {figure.data[0].xaxis, figure.data[4].xaxis} == {"x", "x2"}
    assert len(faithfulness_figure([]).data) == 0


def test_the_table_has_a_row_for_every_ranking_and_no_figure_where_there_is_none(tmp_path):
    rows = discovery_rows(RESULTS)
    assert rows[0] == {
        "task": "sort", "patch": "mean", "level": "heads", "method": "EAP", "truth": "exact", "in circuit": "2 of 1,500",
        "AUC": "0.99", "precision": "0.50", "recall": "1.00", "seconds": "1.2",
    }  # fmt: skip
    assert rows[1]["AUC"] == ""
    head, _, *lines = agreement_table(RESULTS)
    assert head.startswith("| task | ablation | level | truth | in circuit | exact ablation | EAP |")
    assert lines == ["| sort | mean | heads | exact | 2 of 1,500 |  | 0.99 (0.50) |  |  |  |  |  |"]
    write_page(RESULTS, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<td>&lt;b&gt;</td>" in page and "<td><b></td>" not in page and "sort, mean ablation" in page

"""The report on circuits that are known: perfect on the planted one, resumed and not repeated, and bad options in one line."""

import json
import runpy
from pathlib import Path

import pytest

from saebench.errors import UserError

SCRIPT = Path(__file__).parents[3] / "evals" / "discovery.py"


@pytest.mark.slow
def test_on_the_planted_transformer_every_kind_of_circuit_is_found_and_nothing_is_measured_twice(tmp_path):
    main, out = runpy.run_path(str(SCRIPT))["main"], tmp_path / "discovery.json"
    main(["--only", "planted", "--out", str(out)])
    found = json.loads(out.read_text())
    assert set(found) == {f"planted/{patch}" for patch in ("resample", "mean", "zero")}
    for name, result in found.items():
        auc = {(row["level"], row["method"]): row.get("auc") for row in result["rows"] if row["truth"] == "planted"}
        for method in ("exact", "eap", "eap_ig", "discrete codes"):
            assert auc["heads", method] == 1.0
        for level, method in (("latents", "exact"), ("latents", "integrated"), ("edges of latents", "exact")):
            assert auc[level, method] == 1.0
        if name == "planted/resample":
            assert auc["edges", "exact"] == auc["edges", "eap_ig"] == auc["latents", "first_order"] == 1.0
        levels = {curve["level"]: curve for curve in result["curves"]}
        assert set(levels) == {"heads and MLPs", "edges", "latents", "edges of latents"}
        for curve in levels.values():
            assert (curve["faithfulness_K"][0], curve["faithfulness_K"][-1]) == (0, 1)
            assert (curve["completeness_K"][0], curve["completeness_K"][-1]) == (1, 0)
    marked = {name: result | {"date": "before"} for name, result in found.items()}
    out.write_text(json.dumps(marked))
    main(["--only", "planted", "--out", str(out)])
    assert json.loads(out.read_text()) == marked
    assert "| planted | resample | heads | planted | 2 of 4 |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".svg").exists() and "planted, zero ablation" in (tmp_path / "pages" / "discovery.html").read_text()


def test_bad_options_are_one_line(tmp_path):
    main = runpy.run_path(str(SCRIPT))["main"]
    for arguments, message in (
        (["--only", "docstring"], "task 'docstring' is unknown: use planted, sorting, induction"),
        (["--only", "sorting", "--data", str(tmp_path)], "give the directory that holds gpt-nano-sort by --data"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            main([*arguments, "--out", str(tmp_path / "out.json")])
        assert "\n" not in str(caught.value)

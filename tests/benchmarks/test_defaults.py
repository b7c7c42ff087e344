"""The sweep of defaults: what is still missing, and what its tables say."""

from benchmarks.defaults import best_table, gathered, parse, planned, rates_table, settings_table


def point(fvu: float) -> dict:
    return {"point": {"fvu": fvu, "l0": 8.0, "dead": 0.0, "recovered": 0.5}, "error": None}


POINTS = {
    "mini/topk/ours/default/own/0": point(0.20),
    "mini/topk/ours/default/own/1": point(0.24),
    "mini/topk/ours/default/0.004/0": point(0.30),
    "mini/topk/sae-lens/default/0.004/0": point(0.40),
    "mini/topk/sae-lens/default/own/0": {"point": None, "error": "diverged"},
    "mini/topk/ours/aux_coefficient 1:8/own/0": point(0.11),
    "small/topk/ours/default/own/0": point(0.9),
}


def test_only_missing_and_failed_points_are_measured():
    arguments = parse(["--study", "rates", "--peers", "ours,sae-lens", "--rates", "own,4e-3", "--seeds", "2"])
    ours, sae_lens = planned(arguments, "mini", lambda *_: None)
    assert ours.missing(POINTS) and ours._todo == [(1, 0.004)]
    assert sae_lens.missing(POINTS) and sae_lens._todo == [(0, None), (1, None), (1, 0.004)]


def test_rates_of_both_studies_are_run_once():
    arguments = parse(["--peers", "ours", "--rates", "own,4e-3", "--settings-rates", "own,8e-3", "--variants", "decoder unit"])
    default, unit = planned(arguments, "mini", lambda *_: None)
    assert default.rates == [None, 4e-3, 8e-3] and unit.rates == [None, 8e-3]


def test_tables_star_the_best_rate_and_compare_with_our_default():
    found = gathered(POINTS, "mini", "topk")
    assert "0.2200 ± 0.0283 *" in rates_table(found)
    assert "aux_coefficient" not in rates_table(found)
    sae_lens = next(line for line in best_table(found).splitlines() if "sae-lens" in line)
    assert "0.550" in sae_lens  # 0.22 / 0.40
    assert "aux_coefficient 1/8" in settings_table(found) and "2.000" in settings_table(found)

"""Figures of the tables, against numbers worked out by hand."""

from benchmarks.ratios import Ratio, ratio, ratios
from benchmarks.report import ratio_tables, speed_table

BARE = 200.0


def record(seconds: list[float], peak: float, error: str | None = None, codec: bool = True) -> dict:
    return {
        "seconds": seconds,
        "cpu_seconds": seconds,
        "encode_seconds": [s / 2 for s in seconds],
        "decode_seconds": [s / 4 for s in seconds] if codec else [],
        "peak_rss_mib": peak,
        "l0": 8.0,
        "error": error,
    }


SPEED = {
    "ours": record([1.0, 2.0, 4.0], 300.0),
    "sae-lens": record([10.0, 24.0, 32.0], 700.0),
    "sparsify": record([], 0.0, "ended"),
    "matmul": record([0.5, 2.0, 5.0], 220.0, codec=False),
}


def test_ratios_are_taken_round_by_round():
    # 10/1, 24/2, 32/4: their median is 10, while the ratio of medians would be 12
    assert ratio(SPEED["sae-lens"], SPEED["ours"]) == Ratio(10.0, 8.0, 12.0)


def test_what_failed_or_is_missing_has_no_ratio():
    assert ratio(SPEED["sparsify"], SPEED["ours"]) is None
    assert ratio(SPEED["matmul"], SPEED["ours"], "decode_seconds") is None
    assert ratio(None, SPEED["ours"]) is None


def test_memory_is_beyond_bare_torch_and_yardsticks_are_divided_by():
    found = ratios(SPEED, "ours", BARE)
    assert list(found) == ["sae-lens over ours", "ours over matmul"]
    assert found["sae-lens over ours"]["memory"] == (300 - 200) / (700 - 200)
    assert found["ours over matmul"] == {"step": Ratio(1.0, 0.8, 2.0), "rounds": 7.0 / 7.5}


def test_rounds_of_a_whole_training_are_compared_as_sums():
    assert ratios(SPEED, "ours", BARE)["sae-lens over ours"]["rounds"] == 66.0 / 7.0
    whole, usual = (ratio_tables(SPEED, BARE, whole)["ours"] for whole in (True, False))
    assert "whole training" in whole and "9.43" in whole
    assert "whole training" not in usual and "9.43" not in usual


def test_tables_show_failures_and_leave_out_what_is_not_there():
    table = speed_table(SPEED, {}, 4, BARE)
    assert "sparsify failed: ended" in table
    assert "10.00 (8.00-12.00)" in table
    assert "| 4 " not in table.splitlines()[0]
    against = ratio_tables(SPEED, BARE)["ours"]
    assert "0.20" in against and "ours over matmul" in against

"""Who goes on at the next size of a sweep, and who with whom."""

import pytest

from benchmarks import machine
from benchmarks.sweep import packed


def result(**last: tuple[float, float]) -> dict:
    """After one size, 100: seconds of a step and peak MiB by name."""
    point = {name: {"seconds": [seconds], "peak_rss_mib": peak, "error": None} for name, (seconds, peak) in last.items()}
    return {"points": {"100": point}, "stopped": {}, "bare_torch_mib": 200.0}


@pytest.fixture(autouse=True)
def thousand_mib(monkeypatch):
    monkeypatch.setattr(machine, "free_mib", lambda: 1000 / 0.85)


def test_memory_grows_in_proportion_beyond_torch():
    found = result(a=(1.0, 500.0), b=(1.0, 700.0))
    assert packed(["a", "b"], 200, found, limit=20) == [["a"]]  # 200 + 2 * 300 fits, 200 + 2 * 500 does not
    assert "1200 MiB" in found["stopped"]["b"]


def test_as_many_together_as_fit():
    found = result(a=(1.0, 300.0), b=(1.0, 450.0), c=(1.0, 350.0))
    assert packed(["a", "b", "c"], 200, found, limit=20) == [["a", "c"], ["b"]]  # 400, 700, 500


def test_too_slow_and_stopped_ones_stay_out():
    found = result(a=(21.0, 300.0), b=(1.0, 300.0), c=(1.0, 300.0))
    found["stopped"]["c"] = "failed"
    assert packed(["a", "b", "c"], 200, found, limit=20) == [["b"]]
    assert "21.0 s" in found["stopped"]["a"]


def test_first_size_takes_everybody():
    found = {"points": {}, "stopped": {}, "bare_torch_mib": 200.0}
    assert packed(["a", "b"], 100, found, limit=20) == [["a", "b"]]

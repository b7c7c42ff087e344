"""Memory as the benchmarks measure it: what is allocated, let go and mapped is known here to the MiB."""

import mmap
import time

import numpy as np
import pytest

from benchmarks import machine

SIZE = 192 << 20
linux = pytest.mark.skipif(machine.anonymous_mib() is None, reason="the system does not say what memory is anonymous")


@linux
def test_the_peak_is_seen_though_it_is_over_when_the_block_ends():
    before = machine.anonymous_mib()
    with machine.anonymous_peak() as peak:
        kept = np.ones(SIZE, dtype=np.uint8)
        time.sleep(0.3)
        del kept
    assert peak.mib - before == pytest.approx(SIZE >> 20, abs=16)
    assert machine.anonymous_mib() - before < 16


@linux
def test_pages_of_mapped_files_are_left_out(tmp_path):
    (tmp_path / "file").write_bytes(bytes(SIZE))
    before = machine.anonymous_mib()
    with machine.anonymous_peak() as peak, (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert not np.frombuffer(mapped, dtype=np.uint8)[::4096].any()
        status = dict(line.split(":", 1) for line in machine.STATUS.read_text().splitlines())
        assert int(status["RssFile"].split()[0]) >= SIZE >> 10
        time.sleep(0.2)
    assert peak.mib - before < 16


def test_without_proc_it_is_the_whole_peak(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "STATUS", tmp_path / "none")
    assert machine.anonymous_mib() is None
    with machine.anonymous_peak() as peak:
        pass
    assert peak.mib == pytest.approx(machine.peak_rss_mib())

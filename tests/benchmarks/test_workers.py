"""A live worker, and training runs that are halted between steps."""

import math
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.peers import PEERS
from benchmarks.shapes import SHAPES
from benchmarks.worker_process import WorkerProcess
from benchmarks.workers.streaming import Halting

PROC = Path("/proc")


def state_of(pid: int) -> str:
    return (PROC / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0]


def test_worker_answers_halts_and_ends():
    worker = WorkerProcess(PEERS["matmul"], threads=1, log="test-matmul")
    try:
        job = {"steps": 30, "seed": 0, "lr": None, "threads": 1, "architecture": "topk"}
        assert "torch" in worker.init(shape=asdict(SHAPES["tiny"]), **job)["versions"]
        assert len(worker.ask("step", n=2)["seconds"]) == 2
        assert set(worker.ask("codec")) == {"encode_seconds"}
        if PROC.exists():
            worker.freeze()
            while state_of(worker._process.pid) != "T":
                time.sleep(0.01)
            worker.thaw()
            assert worker.ask("step", n=1) is not None
            worker.freeze()  # and closing must work on a halted one
    finally:
        worker.close()
    assert worker._process is None and worker.error is None


def test_halting_lets_a_loop_run_for_as_many_tokens_as_told():
    halting, seen = Halting(), []

    def loop() -> None:
        halting.passed(0)
        for step in range(6):
            seen.append(step)
            halting.passed(10)

    halting.start(loop)
    assert seen == []
    assert halting.go_on(20) == 20 and seen == [0, 1]
    assert halting.go_on(15) == 20 and seen == [0, 1, 2, 3]
    assert halting.go_on(math.inf) == 20 and seen == [0, 1, 2, 3, 4, 5]
    with pytest.raises(RuntimeError, match="ended before its turns did"):
        halting.go_on(10)

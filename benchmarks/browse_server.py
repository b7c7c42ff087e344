"""`saebench browse` as a process of its own, and visitors that talk to it as a browser does, without one.

A visitor here speaks Streamlit's own messages over a websocket: it asks for a page and reads what comes until the page is whole. What a
browser then does with it takes the visitor's processor, not the server's.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from benchmarks.options import UsageError
from benchmarks.worker_process import LOGS, ROOT

START_S, VISIT_S = 60.0, 120.0
PROBLEM = 'class="sb-problem"'


class Served:
    """A browser's server that runs."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path):
        self.port, self.process, self.log = port, process, log
        (self.pid,) = (int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())

    def address(self, page: str, **query: object) -> str:
        return f"http://127.0.0.1:{self.port}/{page}?{urlencode(query)}"

    def mib(self, line: str) -> float:
        """A resident size: VmHWM, the largest so far; RssAnon, now and without mapped files."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(next(row for row in status.splitlines() if row.startswith(f"{line}:")).split()[1]) / 2**10

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def tracebacks(self) -> int:
        return self.log.read_text(errors="replace").count("Traceback (most recent call last)")


@contextmanager
def served(run: Path, threads: int) -> Iterator[Served]:
    """The browser for a run, started as a person starts it; ends with the block. Raises UsageError where it does not start."""
    LOGS.mkdir(exist_ok=True)
    log, port = LOGS / "browse.log", free_port()
    command = [sys.executable, "-m", "saebench", "browse", str(run), "--no-open", "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        _wait(port, process, log)
        yield Served(port, process, log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    last = time.monotonic() + START_S
    while time.monotonic() < last and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=2):
            return
        time.sleep(0.1)
    words = log.read_text(errors="replace").strip().splitlines() or ["it left no message"]
    raise UsageError(f"the browser did not start: {words[-1][:300]}")


# --- visitors without a browser ---


class Visitor:
    """One session. Times are seconds since the page was asked for, the first time including the connection."""

    def __init__(self, port: int):
        self.port = port

    async def __aenter__(self) -> Visitor:
        from websockets.asyncio.client import connect

        self.asked = time.perf_counter()
        self.socket = await connect(
            f"ws://127.0.0.1:{self.port}/_stcore/stream", subprotocols=["streamlit"], max_size=None, open_timeout=VISIT_S
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.socket.close()

    async def visit(self, page: str, first: bool = False, **query: object) -> dict:
        """What a page took until its title, until it was whole, its bytes, and a problem that it shows."""
        from streamlit.proto.BackMsg_pb2 import BackMsg
        from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

        if not first:
            self.asked = time.perf_counter()
        message = BackMsg()
        message.rerun_script.query_string = urlencode(query)
        message.rerun_script.page_name = page
        await self.socket.send(message.SerializeToString())
        found: dict = {"title": None, "complete": None, "bytes": 0, "problem": None}
        async with asyncio.timeout(VISIT_S):
            while found["complete"] is None:
                payload = await self.socket.recv()
                now = time.perf_counter() - self.asked
                found["bytes"] += len(payload)
                read(ForwardMsg.FromString(payload), now, found)
        return found


def read(message: Any, now: float, found: dict) -> None:
    """Note what a message says of the page."""
    kind = message.WhichOneof("type")
    if kind == "script_finished":
        found["complete"] = now
        if message.script_finished != 0:
            found["problem"] = found["problem"] or f"the script ended with status {message.script_finished}"
    if kind != "delta":
        return
    element = message.delta.new_element
    if element.WhichOneof("type") == "exception":
        found["problem"] = element.exception.message
    elif element.WhichOneof("type") == "html":
        if PROBLEM in element.html.body:
            found["problem"] = element.html.body
        if '"sb-title"' in element.html.body and found["title"] is None:
            found["title"] = now


async def visits(
    port: int, latents: Sequence[int], *, run: str, dictionary: str, visitors: int, steps: int, pause: float, seed: int
) -> list[dict]:
    """So many visitors at once: each opens a feature, then follows links to others, `steps` in all, and looks at each for half to one and a
    half times `pause` seconds. They come one after the other within one pause."""
    rng = random.Random(seed)
    plans = [
        (pause * rng.random(), [rng.choice(latents) for _ in range(steps)], random.Random(rng.random())) for _ in range(visitors)
    ]

    async def one(wait: float, plan: list[int], own: random.Random) -> list[dict]:
        found = []
        await asyncio.sleep(wait)
        async with Visitor(port) as visitor:
            for number, latent in enumerate(plan):
                made = await visitor.visit("feature", number == 0, run=run, dictionary=dictionary, feature=latent)
                found.append(made | {"first": number == 0, "latent": latent})
                await asyncio.sleep(pause * own.uniform(0.5, 1.5))
        return found

    done = await asyncio.gather(*(one(*plan) for plan in plans), return_exceptions=True)
    errors = [one for one in done if isinstance(one, BaseException)]
    made = [visit for one in done if not isinstance(one, BaseException) for visit in one]
    return made + [{"problem": f"{type(one).__name__}: {one}", "complete": None, "first": False} for one in errors]

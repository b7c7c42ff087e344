"""Graphs that are being built: one at a time for a run, in a process of its own, with what it is doing on the page of all visitors, and a
button that stops it."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any

import address
import circuit_state
import layout
import streamlit as st
from background import Job
from circuit_state import Asked
from circuit_worker import Order
from opening import Opened

from saebench.circuits.graphs.graph_file import graph_path

WORKER = Path(__file__).with_name("circuit_worker.py")
MINE = "circuit-built"  # the graph that this visitor waits for
SAID = re.compile(r"(\w[\w ]*): ([\d,]+)/([\d,]+) ")
TAIL = 4000  # bytes of what a process says


@dataclass
class Building(Job):
    """A process, and the name of the graph it writes."""

    slug: str = ""
    stopped: bool = False

    @property
    def stage(self) -> tuple[str, float | None]:
        """What it is doing, and which share of that is done, where it says so."""
        number = self.messages.fileno()
        size = os.fstat(number).st_size
        lines = os.pread(number, TAIL, max(0, size - TAIL)).decode(errors="replace").splitlines()
        last = lines[-1] if lines else "starting"
        if (found := SAID.match(last)) is None:
            return last[:100], None
        done, total = (int(figure.replace(",", "")) for figure in found.groups()[1:])
        return f"{found[1]}: {done:,} of {total:,}", done / max(1, total)

    def stop(self) -> None:
        self.stopped = True
        self.process.terminate()
        self.process.wait(timeout=10)


@st.cache_resource(show_spinner=False)
def _all() -> tuple[dict[str, Building], Lock]:
    return {}, Lock()


def of_run(run: Opened) -> Building | None:
    """The last one of a run, running or ended."""
    return _all()[0].get(str(run.path))


def busy(run: Opened) -> bool:
    """Whether something of a run is being built."""
    job = of_run(run)
    return job is not None and job.running


def begin(run: Opened, slug: str, asked: Asked | None, **more: Any) -> None:
    """Trace a prompt, or check the graph that is there, unless something of this run is being built."""
    known, lock = _all()
    order = Order(str(run.path), str(graph_path(run.path, slug)), asdict(asked) if asked is not None else {}, **more)
    with lock:
        if (job := known.get(str(run.path))) is None or not job.running:
            messages: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the job is known)
            process = subprocess.Popen([sys.executable, str(WORKER), str(order)], stdout=subprocess.DEVNULL, stderr=messages)
            known[str(run.path)] = Building(process, messages, time.monotonic(), slug)
    st.session_state[MINE] = slug


def watch(run: Opened) -> None:
    """Show what is being built, if anything is; the page runs again when it is done. Then the graph that this visitor waited for is looked
    at, or why there is none is told."""
    job = of_run(run)
    if job is None:
        return
    if job.running:
        _watch(run)
        return
    if job.slug == st.session_state.get(MINE) and not job.stopped:
        if job.failure:
            layout.problem(job.failure)
        else:
            del st.session_state[MINE]
            circuit_state.show_graph(job.slug)


@st.fragment(run_every=0.5)
def _watch(run: Opened) -> None:
    with layout.guarded():
        job = of_run(run)
        if job is None or not job.running:
            address.rerun()
        assert job is not None
        stage, share = job.stage
        with st.container(horizontal=True, vertical_alignment="center"):
            layout.show(f'<span class="sb-job">{html.escape(stage)}, {job.seconds} s</span>')
            if st.button("Stop", key="circuit-stop", icon=":material/stop:"):
                job.stop()
                address.rerun()
        if share is not None:
            st.progress(share)

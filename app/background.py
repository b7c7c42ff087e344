"""Work that takes longer than a person waits: a process of its own, one for all visitors, whose result is a file beside the store."""

from __future__ import annotations

import html
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import IO, Any

import address
import layout
import streamlit as st


@dataclass
class Job:
    process: subprocess.Popen[bytes]
    messages: IO[bytes]
    started: float = field(default_factory=time.monotonic)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def seconds(self) -> int:
        return round(time.monotonic() - self.started)

    @property
    def failure(self) -> str:
        """Its last message, if it ended badly."""
        if self.running or self.process.returncode == 0:
            return ""
        self.messages.seek(0)
        lines = self.messages.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with exit code {self.process.returncode}"


@st.cache_resource(show_spinner=False)
def _jobs() -> tuple[dict[str, Job], Lock]:
    return {}, Lock()


def start(name: str, arguments: list[str]) -> None:
    """Run Python with these arguments, unless the job of that name is running."""
    jobs, lock = _jobs()
    with lock:
        if name not in jobs or not jobs[name].running:
            messages = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the job is known)
            jobs[name] = Job(subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=messages), messages)


def offer(name: str, label: str, doing: str, arguments: Callable[[], list[str]], **button: Any) -> None:
    """A button that starts a job, or, while it runs, what it is doing and for how long; the page runs again when it is done."""
    job = _jobs()[0].get(name)
    if job is not None and job.running:
        _watch(name, doing)
        return
    if job is not None and job.failure:
        layout.problem(job.failure)
    if st.button(label, key=f"job-{name}", **button):
        start(name, arguments())
        address.rerun()


@st.fragment(run_every=1.0)
def _watch(name: str, doing: str) -> None:
    with layout.guarded():
        job = _jobs()[0][name]
        if not job.running:
            address.rerun()
        layout.show(f'<span class="sb-job">{html.escape(doing)} {job.seconds} s</span>')

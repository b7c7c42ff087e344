"""A live worker seen from the benchmark: starts it, asks it one thing at a time, ends it."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.environments import python_of
from benchmarks.options import UsageError
from benchmarks.peers import Peer

ROOT = Path(__file__).parent.parent
LOGS = Path(__file__).parent / ".logs"
ANSWER_TIMEOUT_S = 1800.0
EXIT_TIMEOUT_S = 5.0


def output_of(command: list[str], what: str) -> str:
    """What a Python command of this interpreter prints. Ctrl-C ends it without a word of its own; raises UsageError with its last
    words where it fails."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise UsageError(f"{what}: {(done.stderr.strip().splitlines() or ['it left no message'])[-1][:300]}")
    return done.stdout


class WorkerProcess:
    """One peer's process. Once it has failed, `error` says why in one line and every further request answers None."""

    def __init__(self, peer: Peer, *, threads: int, log: str | None = None):
        """`log` names the log file, for several processes of one peer at a time."""
        self.peer, self.name, self.error, self._process = peer, peer.name, None, None
        LOGS.mkdir(exist_ok=True)
        self._log = LOGS / f"{log or peer.name}.log"
        try:
            python = python_of(peer)
        except (RuntimeError, OSError) as error:
            self.error = f"installation failed: {error}"
            return
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin after a step would slow down the next worker's turn,
            "GOMP_SPINCOUNT": "3000",  # and these stop after a fraction of a millisecond
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            "TOKENIZERS_PARALLELISM": "false",
            **peer.variables,
        }
        answers, answers_in_worker = os.pipe()
        self._answers = os.fdopen(answers, "rb", buffering=0)
        with self._log.open("w") as log, os.fdopen(answers_in_worker, "wb"):
            self._process = subprocess.Popen(
                [str(python), "-m", f"benchmarks.workers.{peer.worker}", str(answers_in_worker)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                bufsize=0,
                pass_fds=(answers_in_worker,),
                start_new_session=True,  # Ctrl-C reaches the benchmark alone, which then ends its workers
            )

    def init(self, **job: object) -> dict | None:
        """Ask for a trainer; what the peer fixes for itself replaces what all are asked."""
        return self.ask("init", **(job | dict(self.peer.job)))

    def ask(self, op: str, **arguments: object) -> dict | None:
        """The worker's answer to one request, or None if it has failed, now or before."""
        if self.error is not None:
            return None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            if not select.select([self._answers], [], [], ANSWER_TIMEOUT_S)[0]:
                return self._fail(f"no answer to '{op}' within {ANSWER_TIMEOUT_S:.0f} s")
            line = self._answers.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            return self._fail(f"ended during '{op}': {self._last_words()}")
        answer = json.loads(line)
        return self._fail(answer["error"]) if "error" in answer else answer

    def freeze(self) -> None:
        """Stop all threads of the process until `thaw`: one that reads ahead would work while others are measured."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """Terminate the process at once, from any thread: the request that it is working on fails."""
        self._signal(signal.SIGTERM)
        self.thaw()

    def close(self) -> None:
        """End the process: it leaves by itself when idle, and is terminated when it is not."""
        if self._process is None:
            return
        self.thaw()
        self._process.stdin.close()
        for end in (lambda: None, self._process.terminate, self._process.kill):
            end()
            try:
                self._process.wait(EXIT_TIMEOUT_S)
                break
            except subprocess.TimeoutExpired:
                continue
        self._answers.close()
        self._process = None

    def _signal(self, number: int) -> None:
        process = self._process  # another thread may be closing it
        if process is not None:
            process.send_signal(number)

    def _fail(self, error: str) -> None:
        self.error = error
        self.close()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it left no message"

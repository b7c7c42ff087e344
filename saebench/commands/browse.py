"""`saebench browse RUN...`: look at the features of runs in a browser on this machine."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from saebench.errors import UserError

PORT = 8501
PLACES = (Path(__file__).parent.parent / "_app", Path(__file__).parent.parent.parent / "app")
HOSTS = ("127.0.0.1", "localhost")  # as which it answers: other names that lead here are somebody else's doing
OPTIONS = {
    "server.address": "127.0.0.1",
    "server.enableCORS": "true",
    "server.enableXsrfProtection": "true",
    "server.fileWatcherType": "none",
    "server.showEmailPrompt": "false",
    "runner.postScriptGC": "false",  # a collection after every page stops all visitors for 0.3 s, as large as torch is
    "browser.serverAddress": "127.0.0.1",
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "none",
    "client.showErrorLinks": "false",
    "logger.level": "warning",
    "theme.light.primaryColor": "#0072B2",
    "theme.dark.primaryColor": "#2f8fd0",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--port", type=int, help=f"where to listen on 127.0.0.1 (default: {PORT}, or a free one)")
    parser.add_argument("--no-open", action="store_true", help="do not open a browser window")


def run(args: argparse.Namespace) -> dict[str, Any]:
    return browse(args.runs, port=args.port, window=not args.no_open)


def browse(runs: list[Path], *, port: int | None = None, window: bool = True) -> dict[str, Any]:
    """Serve the browser for some runs on 127.0.0.1 until Ctrl-C. Raises UserError where none of them is a run, streamlit is missing,
    or the port that was asked for is taken."""
    from saebench.progress import say

    check(runs)
    port = free_port(port)
    say(f"browsing {', '.join(map(str, runs))} at http://127.0.0.1:{port} (Ctrl-C ends it)")
    child = subprocess.Popen(command(runs, port, window), stdout=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        code = 0
    if code:
        raise UserError(f"the browser stopped with exit code {code}: its messages are above")
    return {"runs": [str(path) for path in runs], "port": port}


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def check(runs: list[Path]) -> None:
    if importlib.util.find_spec("streamlit") is None:
        raise UserError("the browser needs streamlit, which is not installed: pip install 'saebench[app]'")
    if not any((path / "run.json").is_file() for path in runs):
        raise UserError(
            f"{', '.join(map(str, runs))}: no run there (a run directory has a run.json); name one that `saebench train` made"
        )


def command(runs: list[Path], port: int, window: bool) -> list[str]:
    """What starts the server: only the runs go to it."""
    display = sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    options = OPTIONS | {"server.port": str(port), "server.headless": "false" if window and display else "true"}
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += [f"--server.allowedHosts={name}" for name in HOSTS]
    return [sys.executable, "-m", "streamlit", "run", str(app()), *flags, "--", *(str(path.resolve()) for path in runs)]


def app() -> Path:
    """The script of the browser, in a checkout or in an installed package."""
    for place in PLACES:
        if (place / "main.py").is_file():
            return place / "main.py"
    raise UserError("the pages of the browser are missing from this installation: install saebench again")


def free_port(wanted: int | None) -> int:
    """The port that was asked for, the usual one, or a free one where that is taken. Raises UserError where a wanted one is taken."""
    for port in (wanted,) if wanted is not None else (*range(PORT, PORT + 20), 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                continue
            return int(probe.getsockname()[1])
    raise UserError(f"port {wanted} is taken, or not to be had: leave --port out, or name another one")

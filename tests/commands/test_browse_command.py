"""`saebench browse`: only this machine reaches it, only the runs given go to it, it says what is missing, and it ends when told to."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from saebench.cli import main
from saebench.commands import browse
from saebench.errors import UserError
from saebench.runs import Run


@pytest.fixture
def run(tmp_path):
    run = Run.begin(tmp_path / "run", {})
    run.save()
    return run.path


def test_what_is_missing_is_said_in_one_line(run, tmp_path, monkeypatch, capsys):
    assert main(["browse", str(tmp_path / "nowhere")]) == 2
    assert "no run there" in capsys.readouterr().err
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "streamlit" else found(name))
    assert main(["browse", str(run)]) == 2
    assert capsys.readouterr().err == "error: the browser needs streamlit, which is not installed: pip install 'saebench[app]'\n"


def test_a_taken_port(run, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["browse", str(run), "--port", str(port)]) == 2
        assert f"port {port} is taken" in capsys.readouterr().err
    with pytest.raises(UserError, match="not to be had"):
        browse.free_port(70_000)


def test_another_port_where_the_usual_one_is_taken(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(browse, "PORT", taken.getsockname()[1])
        assert browse.free_port(None) != taken.getsockname()[1]


def test_what_the_server_is_started_with(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    words = browse.command([run.relative_to(run.parent)], 4711, window=False)
    for option in (
        "--server.address=127.0.0.1", "--server.enableXsrfProtection=true", "--server.enableCORS=true", "--server.fileWatcherType=none",
        "--browser.gatherUsageStats=false", "--server.headless=true", "--server.port=4711", "--server.allowedHosts=127.0.0.1",
    ):  # fmt: skip
        assert option in words
    assert words[words.index("--") + 1 :] == [str(run)]
    assert browse.app().name == "main.py"


def test_the_pages_of_an_installed_package_come_first(tmp_path, monkeypatch):
    (tmp_path / "_app").mkdir()
    (tmp_path / "_app" / "main.py").touch()
    monkeypatch.setattr(browse, "PLACES", (tmp_path / "_app", *browse.PLACES))
    assert browse.app() == tmp_path / "_app" / "main.py"
    monkeypatch.setattr(browse, "PLACES", (tmp_path / "elsewhere",))
    with pytest.raises(UserError, match="install saebench again"):
        browse.app()


def handshake(port: int, host: str, origin: str) -> bytes:
    """The answer to a browser that asks for the app's connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(
            f"GET /_stcore/stream HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        return connection.recv(12)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_serves_and_ends(run, tmp_path, end):
    pytest.importorskip("streamlit")
    port = browse.free_port(None)
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "saebench", "browse", str(run), "--port", str(port), "--no-open"],
            stdout=out, stderr=out, env=os.environ, start_new_session=True,
        )  # fmt: skip
    try:
        for _ in range(240):
            try:
                answer = handshake(port, f"127.0.0.1:{port}", f"http://127.0.0.1:{port}")
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.25)
        assert answer == b"HTTP/1.1 101"
        assert handshake(port, f"127.0.0.1:{port}", "http://elsewhere.example") == b"HTTP/1.1 403"
        assert handshake(port, "elsewhere.example", "http://elsewhere.example") == b"HTTP/1.1 403"
        with pytest.raises(OSError):
            socket.create_connection((other_address(), port), timeout=5)
        if end == signal.SIGINT:
            os.killpg(process.pid, end)  # as Ctrl-C in a terminal
        else:
            process.send_signal(end)
        assert process.wait(timeout=30) == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        assert "Traceback" not in log.read_text() and f"http://127.0.0.1:{port}" in log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def other_address() -> str:
    """An address of this machine that is not the loopback the server listens on."""
    return "127.0.0.2" if sys.platform == "linux" else socket.gethostbyname(socket.gethostname())

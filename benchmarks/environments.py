"""One virtual environment per peer, made on first use under `.venvs/NAME`.

    python -m benchmarks.environments [PEER ...]

torch is installed first and named again beside the peer, so that no peer can replace it by another build. A marker file
written last says that an environment is whole: one whose installation was interrupted is made anew.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.peers import PEERS, TORCH, Environment, Peer

VENVS = Path(__file__).parent / ".venvs"
MARKER = "finished.txt"
# Of `benchmarks.index`. Its transformer-lens needs a numpy that newer pyarrow refuses; torchvision as with dictionary-learning.
SAE_DASHBOARD = Peer(
    "sae-dashboard",
    "dashboard",
    Environment("sae-dashboard", ("sae-dashboard==0.8.0", "pyarrow==25.0.1"), uninstall=("torchvision",)),
)
CIRCUIT_TRACER = Peer("circuit-tracer", "circuit_tracer", Environment("circuit-tracer", ("circuit-tracer==0.5.0",)))
INSTALLED = PEERS | {peer.name: peer for peer in (SAE_DASHBOARD, CIRCUIT_TRACER)}


def python_of(peer: Peer) -> Path:
    """The interpreter that runs `peer`'s worker; installs its environment if it is missing or was made for other pins."""
    if peer.environment is None:
        return Path(sys.executable)
    venv = VENVS / peer.environment.name
    recipe = "\n".join((TORCH, *peer.environment.requirements, *(f"without {name}" for name in peer.environment.uninstall)))
    marker = venv / MARKER
    if not (marker.is_file() and marker.read_text() == recipe):
        print(f"installing {' '.join(peer.environment.requirements)} into {venv} (once, some minutes)", flush=True)
        _install(peer.environment, venv)
        marker.write_text(recipe)
    return _python_in(venv)


def _install(environment: Environment, venv: Path) -> None:
    if venv.exists():
        shutil.rmtree(venv)
    _run(sys.executable, "-m", "venv", venv)
    pip = (_python_in(venv), "-m", "pip", "--disable-pip-version-check", "--quiet")
    _run(*pip, "install", TORCH)
    _run(*pip, "install", *environment.requirements, TORCH)
    if environment.uninstall:
        _run(*pip, "uninstall", "--yes", *environment.uninstall)


def _python_in(venv: Path) -> Path:
    return venv / "bin" / "python"


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {(done.stdout.strip().splitlines() or ['no output'])[-1]}")


if __name__ == "__main__":
    for name in sys.argv[1:] or INSTALLED:
        print(name, python_of(INSTALLED[name]))

"""Who is measured: every peer, what to install for it, and the worker that runs its own trainer.

A peer without an environment runs in the interpreter that runs the benchmark; the others each need a virtual environment,
because their dependencies cannot be installed together.
"""

from dataclasses import dataclass

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """What `pip install` is told, and which packages it pulls in must go again before the peer can be imported."""

    name: str
    requirements: tuple[str, ...]
    uninstall: tuple[str, ...] = ()


@dataclass(frozen=True)
class Peer:
    """One contestant: its name on the command line and in tables, its module under `workers/`, where that runs."""

    name: str
    worker: str
    environment: Environment | None = None


SAE_LENS = Environment("sae-lens", ("sae-lens==6.54.12",))
SPARSIFY = Environment("sparsify", ("eai-sparsify==1.3.3",))
# Its torchvision is a CUDA build: beside a CPU torch, `operator torchvision::nms does not exist` on import.
DICTIONARY_LEARNING = Environment("dictionary-learning", ("dictionary-learning==0.1.0",), uninstall=("torchvision",))

PEERS = {
    peer.name: peer
    for peer in (
        Peer("ours", "ours"),
        Peer("sae-lens", "sae_lens", SAE_LENS),
        Peer("sparsify", "sparsify", SPARSIFY),
        Peer("sparsify-adam", "sparsify_adam", SPARSIFY),
        Peer("dictionary-learning", "dictionary_learning", DICTIONARY_LEARNING),
        Peer("dense", "dense"),
    )
}

"""Who is measured: every peer, what to install for it, and the worker that runs its own trainer.

A peer without an environment runs in the interpreter that runs the benchmark; the others each need a virtual environment,
because their dependencies cannot be installed together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TORCH = "torch==2.13.0"
ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "gated", "matryoshka")


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
    architectures: tuple[str, ...] = ("topk",)
    """Where it takes part."""
    job: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the workers' Job that are its own, whatever the others are asked."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of its process."""
    trains: bool = True
    """Whether it has a quality; a yardstick of speed alone has none."""


SAE_LENS = Environment("sae-lens", ("sae-lens==6.54.12",))
SPARSIFY = Environment("sparsify", ("eai-sparsify==1.3.3",))
# Its torchvision is a CUDA build: beside a CPU torch, `operator torchvision::nms does not exist` on import.
DICTIONARY_LEARNING = Environment("dictionary-learning", ("dictionary-learning==0.1.0",), uninstall=("torchvision",))
STOCK = {"SAEBENCH_KERNELS": "stock"}  # no compiled kernels: what a machine without a compiler gets
REFERENCE = {"SAEBENCH_KERNELS": "reference"}  # dense algebra under autograd: what the others must be as good as

PEERS = {
    peer.name: peer
    for peer in (
        Peer("ours", "ours", architectures=ARCHITECTURES),
        Peer("ours-torch", "ours", architectures=ARCHITECTURES, variables=STOCK),
        Peer("ours-reference", "ours", architectures=ARCHITECTURES, variables=REFERENCE),
        Peer("ours-topk", "ours", architectures=ARCHITECTURES[1:], job={"architecture": "topk"}),
        Peer("sae-lens", "sae_lens", SAE_LENS, ARCHITECTURES),
        Peer("sparsify", "sparsify", SPARSIFY),
        Peer("sparsify-adam", "sparsify_adam", SPARSIFY),
        Peer("dictionary-learning", "dictionary_learning", DICTIONARY_LEARNING, ARCHITECTURES),
        Peer("dense", "dense"),
        Peer("matmul", "matmul", architectures=ARCHITECTURES, trains=False),
    )
}
USUAL = tuple(name for name in PEERS if name != "ours-reference")

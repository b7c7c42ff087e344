"""Gradients of matrices of latent rows: handed over in parts where someone collects them, summed where nobody does (methods.md K3, K12).

A matrix whose gradient is never wanted as a matrix, because an optimiser takes its step latent by latent, is given a place to collect parts
in (`collect`). The backward pass of a kernel then adds a part, and autograd sees no gradient. For every other tensor the sum is returned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.implementations import primitives_for
from saebench.kernels.primitives import Term

_PARTS = "_saebench_parts"


@dataclass
class Parts:
    """What backward passes handed over of a matrix' gradient: terms, and own_F[i] times the matrix' own row i."""

    terms: list[Term] = field(default_factory=list)
    own_F: Tensor | None = None

    def clear(self) -> None:
        self.terms.clear()
        self.own_F = None


def collect(W_FD: Tensor) -> Parts:
    """From now on gather the parts of this parameter's gradient; returns where, which belongs to the caller."""
    parts = Parts()
    setattr(W_FD, _PARTS, parts)
    return parts


def collected_in(W_FD: Tensor) -> Parts | None:
    """Where the parts of a matrix' gradient go, if somewhere. To be asked in the forward pass, which sees the parameter itself."""
    return getattr(W_FD, _PARTS, None)


def hand_over(parts: Parts | None, codes: SparseCodes, rows_BD: Tensor) -> Tensor | None:
    """The gradient sum over entries (token b, latent f) of value * rows[b], for every f: added to `parts`, or where there are none, or
    so many latents are active that a dense product is faster, returned [F, D]."""
    primitives = primitives_for(rows_BD)
    if parts is None or codes.crowded(getattr(primitives, "CROWDED", 1)):
        return primitives.sums(codes, rows_BD)
    parts.terms.append(Term(codes, rows_BD))
    return None


def hand_over_own(parts: Parts | None, own_F: Tensor, W_FD: Tensor) -> Tensor | None:
    """The gradient own_F[f] * W[f], for every f: added to `parts`, or where there are none returned [F, D]."""
    if parts is None:
        return (own_F[:, None] * W_FD).to(W_FD.dtype)
    parts.own_F = own_F if parts.own_F is None else parts.own_F + own_F
    return None


def latent_sums(codes: SparseCodes, rows_BD: Tensor) -> Tensor:
    """sum over entries (token b, latent f) of value * rows[b], for every f: [F, D]. Never-active latents get exact zeros.

    Entries are summed latent by latent in token order, without a temporary of N rows and without atomics: deterministic,
    and the same for any number of threads.
    """
    return primitives_for(rows_BD).sums(codes, rows_BD)

"""Gradients of matrices of latent rows: handed over as terms where someone collects them, summed where nobody does (methods.md K3, K12).

A matrix whose gradient is never wanted as a matrix, because an optimiser takes its step latent by latent, is given a list to collect terms
in (`collect`). The backward pass of a kernel then adds a term, and autograd sees no gradient. For every other tensor the sum is returned.
"""

from __future__ import annotations

from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.implementations import primitives_for
from saebench.kernels.primitives import Term

_LIST = "_saebench_terms"


def collect(W_FD: Tensor) -> list[Term]:
    """From now on gather the terms of this parameter's gradient; returns the list, which belongs to the caller."""
    terms: list[Term] = []
    setattr(W_FD, _LIST, terms)
    return terms


def collected_in(W_FD: Tensor) -> list[Term] | None:
    """Where the terms of a matrix go, if somewhere. To be asked in the forward pass, which sees the parameter itself."""
    return getattr(W_FD, _LIST, None)


def hand_over(terms: list[Term] | None, codes: SparseCodes, rows_BD: Tensor) -> Tensor | None:
    """The gradient sum over entries (token b, latent f) of value * rows[b], for every f: added to `terms`, or where there are none, or
    so many latents are active that a dense product is faster, returned [F, D]."""
    primitives = primitives_for(rows_BD)
    if terms is None or codes.crowded(getattr(primitives, "CROWDED", 1)):
        return primitives.sums(codes, rows_BD)
    terms.append(Term(codes, rows_BD))
    return None


def latent_sums(codes: SparseCodes, rows_BD: Tensor) -> Tensor:
    """sum over entries (token b, latent f) of value * rows[b], for every f: [F, D]. Never-active latents get exact zeros.

    Entries are summed latent by latent in token order, without a temporary of N rows and without atomics: deterministic,
    and the same for any number of threads.
    """
    return primitives_for(rows_BD).sums(codes, rows_BD)

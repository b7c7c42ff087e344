"""Entries of a code sorted by latent, once for all kernels that need them so."""

from __future__ import annotations

from saebench.codes import LatentOrder, SparseCodes
from saebench.kernels.implementations import primitives_for


def latent_order(codes: SparseCodes) -> LatentOrder:
    """The order of a code's entries by latent, with `by_latent` filled in."""
    order = codes.order
    if order.by_latent is None:
        order.by_latent = primitives_for(codes.values).by_latent(order.indices_N, order.d_sae)
    return order

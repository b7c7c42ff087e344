"""Entries of a code sorted by latent, once for all kernels that need them so."""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.codes import LatentOrder, SparseCodes
from saebench.kernels.implementations import primitives_for


def latent_order(codes: SparseCodes) -> LatentOrder:
    """The order of a code's entries by latent, with `by_latent` filled in."""
    order = codes.order
    if order.by_latent is None:
        order.by_latent = primitives_for(codes.values).by_latent(order.indices_N, order.d_sae)
    return order


def stable_order(keys_N: Tensor, num: int) -> Tensor:
    """Positions of whole numbers from 0 to num - 1 in ascending order, equal ones in theirs: [N] int64."""
    nothing = torch.empty(
        0, device=keys_N.device
    )  # float32: which implementation sorts does not depend on what the keys belong to
    return primitives_for(nothing).by_latent(keys_N.to(torch.int32), num)[0].long()

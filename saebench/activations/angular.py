"""Which neighbouring layers are alike enough to share one dictionary (Ghilardi et al. 2024; methods.md T16).

Two layers are as far apart as the angle between their activations of the same token, on average, in half turns. Layers are merged
from the bottom up by complete linkage, neighbours only, so that groups are stretches of the model. How many groups: as few as keep AMAD,
the mean over groups of the largest distance within, below a threshold. AMAD grows as groups become fewer, as a rule: two wide groups
side by side whose union is hardly wider count once instead of twice, so it can fall too, and all numbers of groups are tried.
Shape suffixes: `B` tokens, `D` width of a site, `L` sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from saebench.activations.batches import Batches, Source
from saebench.errors import UserError

TOKENS = 16_384
TOKENS_AT_ONCE = 2048


def layer_groups(
    source: Source,
    sites: Sequence[str],
    *,
    groups: int | None = None,
    threshold: float | None = None,
    tokens: int = TOKENS,
    seed: int = 0,
) -> list[tuple[str, ...]]:
    """Cut sites, listed in the order of the model, into stretches of alike ones: `groups` of them, or as few as have an AMAD of at most
    `threshold` (in half turns: 0.1 is 18 degrees). Each is what `site` of a `LayerGroup` takes. Ghilardi et al. leave out the last
    layer, whose activations are unlike all others. Raises UserError unless exactly one of the two is given."""
    if (groups is None) == (threshold is None):
        raise UserError("give either groups, the number of groups, or threshold, the largest AMAD")
    distances_LL = angular_distances(source, sites, tokens, seed=seed)
    if groups is None:
        cuts = (group_layers(distances_LL, count) for count in range(1, len(sites) + 1))
        cut = next((cut for cut in cuts if amad(distances_LL, cut) <= float(threshold or 0)), None)
        if cut is None:
            raise UserError(f"threshold={threshold} must not be negative: single layers have an AMAD of 0")
    else:
        cut = group_layers(distances_LL, groups)
    return [tuple(sites[layer] for layer in group) for group in cut]


@torch.no_grad()
def angular_distances(source: Source, sites: Sequence[str], tokens: int = TOKENS, *, seed: int = 0) -> Tensor:
    """The mean angle between the activations of each two sites at the same token, in half turns: [L, L] float64, symmetric, from 0 to 1,
    0 on the diagonal. Measured on `tokens` tokens drawn by the seed. Raises UserError where sites differ in width."""
    sites = list(sites)
    source.check_sites(sites)
    if len(set(sites)) < len(sites) or not sites:
        raise UserError(f"sites must be named once each, and at least one: {', '.join(sites) or 'none given'}")
    if len({source.widths[site] for site in sites}) > 1:
        widths = ", ".join(f"{site} {source.widths[site]}" for site in sites)
        raise UserError(f"angles are between activations of one width, these sites differ: {widths}")
    tokens = min(tokens, source.num_contexts * (source.context_size - source.skip))
    total_LL = torch.zeros(len(sites), len(sites), dtype=torch.float64)
    batches = Batches(source, sites, tokens, seed=seed)
    try:
        drawn = next(batches)
    finally:
        batches.close()
    for start in range(0, tokens, TOKENS_AT_ONCE):
        unit_LBD = torch.stack([torch.nn.functional.normalize(drawn[site][start : start + TOKENS_AT_ONCE]) for site in sites])
        for layer, unit_BD in enumerate(unit_LBD):
            # the half-angle formula is exact for small angles, where a cosine is not
            apart_LB = (unit_LBD - unit_BD).norm(dim=-1)
            along_LB = (unit_LBD + unit_BD).norm(dim=-1)
            total_LL[layer] += (2 * torch.atan2(apart_LB, along_LB) / torch.pi).sum(1, dtype=torch.float64)
    return (total_LL + total_LL.T) / (2 * tokens)


def group_layers(distances_LL: Tensor, groups: int) -> list[list[int]]:
    """Merge the two neighbouring groups whose farthest members are nearest, until `groups` are left; of equal ones the first. Raises
    UserError where there are not so many layers."""
    if not 1 <= groups <= len(distances_LL):
        raise UserError(f"groups={groups} must be between 1 and the number of layers, {len(distances_LL)}")
    cut = [[layer] for layer in range(len(distances_LL))]
    while len(cut) > groups:
        gaps = [float(distances_LL[a][:, b].max()) for a, b in pairwise(cut)]
        first = gaps.index(min(gaps))
        cut[first : first + 2] = [cut[first] + cut[first + 1]]
    return cut


def amad(distances_LL: Tensor, groups: Sequence[Sequence[int]]) -> float:
    """Average over the groups of the maximum angular distance of two of their layers."""
    return sum(float(distances_LL[list(group)][:, list(group)].max()) for group in groups) / len(groups)

"""Reconstruction alone, on any source of activations: without a model, for joined sources of two models, or for tensors.

`evaluate` measures the same figures and what the model loses besides.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch

from saebench.activations import Source, sequences
from saebench.dictionaries import Dictionary, SparseAutoencoder
from saebench.dictionaries.transcoder import skip_only
from saebench.evaluation.metrics import Reconstruction

TOKENS_AT_ONCE = 8192


@torch.inference_mode()
def reconstruction(dictionary: Dictionary, source: Source, *, start: int = 0, stop: int | None = None) -> dict[str, Any]:
    """Figures of `Reconstruction` on contexts `start` to `stop` of a source, `fvu_by_site`, and for a skip transcoder
    `fvu_skip_only`, with all latents off. Raises UserError for a site that the source lacks."""
    config = dictionary.config.for_sites(source.widths)
    source.check_sites(list(config.sites))
    quality, bypass = (Reconstruction(sum(config.blocks_out), config.d_sae) for _ in range(2))
    device = next(dictionary.parameters()).device
    skip, skips = source.skip, isinstance(dictionary, SparseAutoencoder) and dictionary.config.skip
    at_once = max(1, TOKENS_AT_ONCE // source.context_size)
    for _, read in sequences(source, config.sites, at_once, start=start, stop=stop):
        x_CSD = torch.cat([read[site] for site in config.reads], -1).to(device)
        y_BD = torch.cat([read[site] for site in config.writes], -1)[:, skip:].flatten(0, 1).to(device)
        codes, y_hat_BD = dictionary.reconstruct_contexts(x_CSD, skip)
        quality.update(y_BD, y_hat_BD, codes)
        if skips:
            bypass.update(y_BD, skip_only(dictionary, x_CSD[:, skip:].flatten(0, 1)), codes)
    bounds = pairwise(accumulate(config.blocks_out, initial=0))
    return {
        **quality.figures(),
        "fvu_by_site": {site: quality.fvu_of(slice(*bound)) for site, bound in zip(config.writes, bounds, strict=True)},
        **({"fvu_skip_only": bypass.figures()["fvu"]} if skips else {}),
    }

"""Splice a dictionary into the model and measure: reconstruction of what it writes and what the model loses by it, in one pass.

One function for all: an SAE replaces its site, a transcoder the MLP's output, Lorsa the attention's, a cross-layer transcoder all MLPs'
at once, each from what it reads in the same running pass. Where a site is written before all that it depends on has been computed (a
crosscoder over layers), the readings are those of the untouched model. Position 0 of each context (BOS, of outlying norm) is neither
replaced nor measured.
Shape suffixes: `C` contexts, `S` positions, `D` width of a site, `B` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from saebench.dictionaries import Dictionary, SparseAutoencoder
from saebench.dictionaries.fit import check_model
from saebench.dictionaries.transcoder import skip_only
from saebench.evaluation.metrics import FORMULAS_VERSION, Reconstruction, SplicedLoss, max_decoder_cosine
from saebench.lm import Contexts, LanguageModel
from saebench.progress import progress

SKIP = 1
Edits = dict[str, Callable[[Tensor], Tensor | None]]


@torch.inference_mode()
def evaluate(
    dictionary: Dictionary, lm: LanguageModel, contexts: Contexts, *, batch_size: int = 16, seed: int = 0
) -> dict[str, Any]:
    """Figures of a dictionary on held-out contexts: those of `Reconstruction` and `SplicedLoss`, 95 % intervals over contexts,
    and the density of every latent. Ablation replaces everything that the dictionary writes.

    `batch_size` counts contexts. Raises UserError where the dictionary names no site or its widths are not the sites'.
    """
    config = dictionary.config
    check_model(dictionary, lm)
    dictionary = dictionary.to(lm.device)
    quality, bypass = (Reconstruction(sum(config.blocks_out), config.d_sae) for _ in range(2))
    skips = isinstance(dictionary, SparseAutoencoder) and dictionary.config.skip
    loss = SplicedLoss()
    means = _means(lm, contexts, config.writes, batch_size)

    with progress("evaluate", contexts.num_tokens, "tokens") as report:
        for start in range(0, len(contexts), batch_size):
            ids_CS = contexts.ids_NS[start : start + batch_size].long().to(lm.device)
            with lm.watching(config.sites) as seen:
                logits = {"clean": lm.logits(ids_CS)}
            x_CSD = torch.cat([seen[site].float() for site in config.reads], -1)
            codes, y_hat_BD = dictionary.reconstruct_contexts(x_CSD, SKIP)
            y_BD = torch.cat([seen[site][:, SKIP:].flatten(0, 1).float() for site in config.writes], -1)
            quality.update(y_BD, y_hat_BD, codes)
            if skips:
                bypass.update(y_BD, skip_only(dictionary, x_CSD[:, SKIP:].flatten(0, 1)), codes)
            edits = {
                "spliced": splice(dictionary, seen),
                "zero": {site: _filling(torch.zeros_like(mean_D)) for site, mean_D in means.items()},
                "mean": {site: _filling(mean_D) for site, mean_D in means.items()},
            }
            for name, edit in edits.items():
                with lm.edit(edit):
                    logits[name] = lm.logits(ids_CS)
            loss.update(ids_CS[:, SKIP + 1 :], {name: values[:, SKIP:-1] for name, values in logits.items()})
            report(ids_CS.numel())

    directions_FD = dictionary.directions
    cosine = {} if directions_FD is None else {"mean_max_decoder_cosine": float(max_decoder_cosine(directions_FD).mean())}
    bounds = pairwise(accumulate(config.blocks_out, initial=0))
    return {
        "formulas_version": FORMULAS_VERSION,
        "site": " + ".join(config.reads) if config.rewrites else f"{' + '.join(config.reads)} -> {' + '.join(config.writes)}",
        "reads": list(config.reads),
        "writes": list(config.writes),
        "spliced_positions": "all but the first of each context",
        **quality.figures(),
        "fvu_by_site": {site: quality.fvu_of(slice(*bound)) for site, bound in zip(config.writes, bounds, strict=True)},
        **({"fvu_skip_only": bypass.figures()["fvu"]} if skips else {}),
        **loss.figures(),
        **cosine,
        "gamma": dictionary.trained_on.get("gamma", {}),
        "intervals_95": loss.intervals(seed=seed),
        "seed": seed,
        "density": quality.density_F.tolist(),
    }


def splice(dictionary: Dictionary, clean: Mapping[str, Tensor]) -> Edits:
    """The edits that put a dictionary in place for one forward pass, for `LanguageModel.edit`. `clean` holds what the untouched
    model has at all sites of the dictionary, [C, S, D] each, in the order in which it computes them."""
    config = dictionary.config
    order = list(clean)
    live = all(
        order.index(config.reads[read]) <= order.index(site)
        for write, site in enumerate(config.writes)
        for read in dictionary.depends_on(write)
    )
    running: dict[str, Tensor] = {} if live else dict(clean)

    def edit_of(site: str) -> Callable[[Tensor], Tensor | None]:
        def edit(value: Tensor) -> Tensor | None:
            if live and site in config.reads:
                running[site] = value
            if site not in config.writes:
                return None
            write = config.writes.index(site)
            reads = [running[config.reads[read]].float() for read in dictionary.depends_on(write)]
            return _put(value, dictionary.write_one(reads, write, SKIP))

        return edit

    return {site: edit_of(site) for site in config.sites}


def _put(value_CSD: Tensor, new_BD: Tensor) -> Tensor:
    """New values on all positions but the first."""
    replaced_CSD = value_CSD.clone()
    replaced_CSD[:, SKIP:] = new_BD.reshape(value_CSD[:, SKIP:].shape).to(value_CSD.dtype)
    return replaced_CSD


def _filling(row_D: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value_CSD: _put(value_CSD, row_D.expand(value_CSD[:, SKIP:].shape))


def _means(lm: LanguageModel, contexts: Contexts, sites: Sequence[str], batch_size: int) -> dict[str, Tensor]:
    """The mean at each site over all tokens but the first of each context."""
    totals = {site: torch.zeros(lm.width(site), dtype=torch.float64) for site in sites}
    for start in range(0, len(contexts), batch_size):
        for site, value_CSD in lm.read(contexts.ids_NS[start : start + batch_size], list(sites)).items():
            totals[site] += value_CSD[:, SKIP:].flatten(0, 1).sum(0, dtype=torch.float64).cpu()
    count = len(contexts) * (contexts.context_size - SKIP)
    return {site: (total / count).float().to(lm.device) for site, total in totals.items()}

"""Splice a dictionary into the model and measure: reconstruction at its site and what the model loses by it, in one pass.

Position 0 of each context (BOS, of outlying norm) is neither spliced nor measured.
Shape suffixes: `C` contexts, `S` positions, `D` width of the site, `B` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saebench.dictionaries import Dictionary
from saebench.errors import UserError
from saebench.evaluation.metrics import FORMULAS_VERSION, Reconstruction, SplicedLoss, max_decoder_cosine
from saebench.lm import Contexts, LanguageModel
from saebench.progress import progress


@torch.inference_mode()
def evaluate(
    dictionary: Dictionary, lm: LanguageModel, contexts: Contexts, *, batch_size: int = 16, seed: int = 0
) -> dict[str, Any]:
    """Figures of a dictionary on held-out contexts: those of `Reconstruction` and `SplicedLoss`, 95 % intervals over contexts,
    and the density of every latent.

    `batch_size` counts contexts. Raises UserError where the dictionary names no site or its width is not the site's.
    """
    site = dictionary.config.site
    if site is None:
        raise UserError("the dictionary names no site, so it cannot be spliced in: train it on activations of a site")
    if lm.width(site) != dictionary.config.d_in:
        raise UserError(
            f"the dictionary is {dictionary.config.d_in} wide, site {site!r} of model {lm.name!r} is {lm.width(site)}: wrong model?"
        )
    dictionary = dictionary.to(lm.device)
    quality = Reconstruction(lm.width(site), dictionary.config.d_sae)
    loss = SplicedLoss()
    mean_D = _mean_at(lm, contexts, site, batch_size)

    with progress("evaluate", contexts.num_tokens, "tokens") as report:
        for start in range(0, len(contexts), batch_size):
            ids_CS = contexts.ids_NS[start : start + batch_size].long().to(lm.device)
            seen: dict[str, Tensor] = {}

            def keep(x_CSD: Tensor, seen: dict[str, Tensor] = seen) -> None:
                seen["x"] = x_CSD.clone()

            with lm.edit({site: keep}):
                logits = {"clean": lm.logits(ids_CS)}
            x_CSD = seen["x"]
            x_BD = x_CSD[:, 1:].reshape(-1, dictionary.config.d_in).float()
            codes = dictionary.encode(x_BD)
            x_hat_BD = dictionary.decode(codes)
            quality.update(x_BD, x_hat_BD, codes)
            for name, new_BD in {"spliced": x_hat_BD, "zero": torch.zeros_like(x_BD), "mean": mean_D.expand_as(x_BD)}.items():
                with lm.edit({site: _put(x_CSD, new_BD)}):
                    logits[name] = lm.logits(ids_CS)
            loss.update(ids_CS[:, 2:], {name: values[:, 1:-1] for name, values in logits.items()})
            report(ids_CS.numel())

    W_dec = getattr(dictionary, "W_dec", None)
    return {
        "formulas_version": FORMULAS_VERSION,
        "site": site,
        "spliced_positions": "all but the first of each context",
        **quality.figures(),
        **loss.figures(),
        **({"mean_max_decoder_cosine": float(max_decoder_cosine(W_dec).mean())} if W_dec is not None else {}),
        "intervals_95": loss.intervals(seed=seed),
        "seed": seed,
        "density": quality.density_F.tolist(),
    }


def _put(x_CSD: Tensor, new_BD: Tensor) -> Callable[[Tensor], Tensor]:
    """A replacement of a site by new values on all positions but the first."""
    replaced_CSD = x_CSD.clone()
    replaced_CSD[:, 1:] = new_BD.reshape(x_CSD[:, 1:].shape).to(x_CSD.dtype)
    return lambda _: replaced_CSD


def _mean_at(lm: LanguageModel, contexts: Contexts, site: str, batch_size: int) -> Tensor:
    total = torch.zeros(lm.width(site), dtype=torch.float64)
    for start in range(0, len(contexts), batch_size):
        total += (
            lm.read(contexts.ids_NS[start : start + batch_size], [site])[site][:, 1:]
            .flatten(0, 1)
            .flatten(1)
            .sum(0, dtype=torch.float64)
            .cpu()
        )
    return (total / (len(contexts) * (contexts.context_size - 1))).float().to(lm.device)

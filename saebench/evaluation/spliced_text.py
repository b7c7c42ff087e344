"""A text read by the model as it is, and with a dictionary in place: what each token costs in both, how well it is reconstructed, and which
latents make up the reconstruction.

The first token of the text as the model sees it (BOS) is neither encoded nor replaced, as in `splice.py`.
Shape suffixes: `T` tokens, `C` contexts, `S` positions, `D` width of what is read or written, `N` latents that fire on a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries import Dictionary
from saebench.dictionaries.fit import check_model
from saebench.evaluation.splice import SKIP, Edits, splice
from saebench.features.prompts import MAX_TOKENS, Prompt, PromptCodes, entries
from saebench.lm import LanguageModel


@dataclass(frozen=True)
class SplicedText:
    """What a dictionary makes of a text. Figures of the first token, which has none, are nan."""

    codes: PromptCodes
    loss_T: np.ndarray
    """-log p of each token given those before it, in nats, by the untouched model."""
    spliced_loss_T: np.ndarray
    """The same with the dictionary in place."""
    error_T: np.ndarray
    """Squared error of the reconstruction over the variance of this text: the mean over its tokens is its FVU."""

    @property
    def loss_difference_T(self) -> np.ndarray:
        """What the dictionary adds to the loss of each token."""
        return self.spliced_loss_T - self.loss_T

    @property
    def active_T(self) -> np.ndarray:
        """Latents that fire on each token."""
        return np.diff(self.codes.starts)

    def figures(self) -> dict[str, float]:
        """Means over the tokens but the first: `loss`, `spliced_loss`, `loss_difference`, `fvu`, `l0`."""
        return {
            "loss": _mean(self.loss_T),
            "spliced_loss": _mean(self.spliced_loss_T),
            "loss_difference": _mean(self.loss_difference_T),
            "fvu": _mean(self.error_T),
            "l0": _mean(self.active_T.astype(float)),
        }


def _mean(values_T: np.ndarray) -> float:
    return float(values_T[SKIP:].mean()) if len(values_T) > SKIP else float("nan")


@torch.inference_mode()
def read_spliced(lm: LanguageModel, dictionary: Dictionary, text: str, max_tokens: int = MAX_TOKENS) -> SplicedText:
    """Read a text with and without a dictionary. Raises UserError for a text without tokens, and where the dictionary does not fit the
    model."""
    check_model(dictionary, lm)
    dictionary = dictionary.to(lm.device)
    config = dictionary.config
    prompt = Prompt.of(lm, text, max_tokens)
    ids_CS = torch.tensor([prompt.ids], device=lm.device)
    with lm.watching(config.sites) as seen:  # in the order in which the model computes them, which splice() goes by
        loss_T = _losses(lm.logits(ids_CS), ids_CS)
    codes, y_hat_SD = dictionary.reconstruct_contexts(torch.cat([seen[site].float() for site in config.reads], -1), SKIP)
    with lm.edit(_edits(dictionary, seen, y_hat_SD)):
        spliced_loss_T = _losses(lm.logits(ids_CS), ids_CS)
    error_T = np.full(len(prompt.ids), np.nan)
    if len(prompt.ids) > SKIP:
        y_SD = torch.cat([seen[site][0, SKIP:].float() for site in config.writes], -1).double()
        spread = (y_SD - y_SD.mean(0)).square().sum(1).mean()
        error_T[SKIP:] = ((y_SD - y_hat_SD.double()).square().sum(1) / spread).cpu().numpy() if spread else np.nan
    return SplicedText(prompt.with_codes(lm, *entries(codes, len(prompt.ids))), loss_T, spliced_loss_T, error_T)


def _edits(dictionary: Dictionary, seen: dict[str, Tensor], y_hat_SD: Tensor) -> Edits:
    """As `splice`; nothing is encoded again where all is read before anything is written, and so is what the untouched model has there."""
    config, order = dictionary.config, list(seen)
    first = min(map(order.index, config.writes))
    if any(order.index(site) > first for site in config.reads):
        return splice(dictionary, seen)
    parts = dict(zip(config.writes, y_hat_SD.split(list(config.blocks_out), dim=1), strict=True))
    return {site: partial(_behind_first, part_SD) for site, part_SD in parts.items()}


def _behind_first(part_SD: Tensor, value_CSD: Tensor) -> Tensor:
    return torch.cat([value_CSD[:, :SKIP], part_SD[None].to(value_CSD.dtype)], 1)


def _losses(logits_CSV: Tensor, ids_CS: Tensor) -> np.ndarray:
    """-log p of each token of the one context, nan for the first: [T]."""
    logits_SV, targets_S = logits_CSV[0, :-1].float(), ids_CS[0, 1:]
    losses_S = logits_SV.logsumexp(-1) - logits_SV.gather(1, targets_S[:, None])[:, 0]
    return np.concatenate([[np.nan], losses_S.double().cpu().numpy()])


@torch.inference_mode()
def shares(dictionary: Dictionary, codes: PromptCodes, token: int) -> np.ndarray:
    """What each latent that fires on a token adds to what all of them write there: its part along the sum, as a share of the sum's length.
    In the order of the codes, [N]; they sum to 1, and one that is below zero works against the others."""
    part = slice(int(codes.starts[token]), int(codes.starts[token + 1]))
    device = next(dictionary.parameters()).device
    latents_N, values_N = (torch.from_numpy(entries[part].copy()).to(device) for entries in (codes.latents, codes.values))
    count = len(latents_N)
    alone = SparseCodes.ragged(torch.arange(count, device=device), latents_N, values_N, count + 1, dictionary.config.d_sae)
    decoded = dictionary.decode(alone).double()
    added_ND = decoded[:-1] - decoded[-1]  # the last row is that of no latent: biases
    sum_D = added_ND.sum(0)
    return (added_ND @ sum_D / sum_D.square().sum().clamp_min(1e-300)).cpu().numpy()

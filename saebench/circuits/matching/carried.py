"""What a matching of layers is good for: whether matched latents fire on the same tokens, and whether the later layer can be written with
the codes of the earlier one (methods.md A4).

The later layer's site is approximated by encoding the earlier one with A, renumbering, and decoding with B, in units of the folded scales.
Beside it stand B's own reconstruction (as good as it gets), the earlier layer's activation as it is, and the same codes under
a random matching. Position 0 of each context is neither replaced nor measured.
Shape suffixes: `F` latents, `N` entries of codes, `B` tokens, `C` contexts, `S` positions, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from saebench.circuits.matching.assignment import NONE
from saebench.codes import SparseCodes
from saebench.dictionaries import Dictionary
from saebench.dictionaries.fit import check_model
from saebench.errors import UserError
from saebench.lm import LanguageModel

SKIP = 1


@dataclass(frozen=True)
class Together:
    """How matched latents fire together."""

    rate_F: np.ndarray
    """Share of the firings of each latent of A on which its partner fires; NaN where it never fires or has none."""
    phi_F: np.ndarray
    """Correlation of their firing; NaN where one of them never or always fires."""

    @property
    def score(self) -> float:
        """The matching score: mean of the rates."""
        return float(np.nanmean(self.rate_F)) if np.isfinite(self.rate_F).any() else float("nan")


def fire_together(codes_a: SparseCodes, codes_b: SparseCodes, partner_F: np.ndarray) -> Together:
    """Co-activation of each latent of A with its partner in B (-1 for none) over the same tokens. Raises UserError for other tokens."""
    if len(codes_a) != len(codes_b):
        raise UserError(f"codes of {len(codes_a)} and of {len(codes_b)} tokens: both must be of the same")
    tokens_N, latents_N, _ = (part.cpu().numpy() for part in codes_a.nonzero())
    other_tokens, other_latents, _ = (part.cpu().numpy() for part in codes_b.nonzero())
    partners_N = partner_F[latents_N]
    hit_N = np.isin(tokens_N * codes_b.d_sae + partners_N, other_tokens * codes_b.d_sae + other_latents) & (partners_N != NONE)
    both_F, n_a = (np.bincount(latents_N, weights=w, minlength=codes_a.d_sae) for w in (hit_N, None))
    n_b = np.where(partner_F == NONE, 0, codes_b.firings().cpu().numpy()[partner_F])
    n = float(len(codes_a))
    with np.errstate(invalid="ignore", divide="ignore"):
        rate_F = np.where(partner_F == NONE, np.nan, both_F / n_a)
        phi_F = (n * both_F - n_a * n_b) / np.sqrt(n_a * (n - n_a) * n_b * (n - n_b))
    return Together(rate_F, phi_F)


@dataclass(frozen=True)
class Carried:
    """The later layer written in four ways. Explained variance is 1 - FVU; losses are in nats per token."""

    explained: dict[str, float]
    """By way: `matched`, `own` (B reading its own site), `unchanged` (the earlier activation), `random` (another matching)."""
    loss: dict[str, float]
    """The same and `clean`, the model as it is."""


@torch.inference_mode()
def carried(
    lm: LanguageModel,
    ids_CS: Tensor,
    a: Dictionary,
    b: Dictionary,
    partner_F: np.ndarray,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> Carried:
    """Approximate the site that B writes from the one that A reads, by codes that are handed on (`Step.partner_F`, `Folded.scale_F`).

    Raises UserError where a dictionary does not fit the model, or reads or writes more than one site.
    """
    for dictionary in (a, b):
        check_model(dictionary, lm)
        if len(dictionary.config.sites) != 1:
            raise UserError(f"codes are handed on between autoencoders of one site each, not {dictionary.config.architecture!r}")
    site_a, site_b = a.config.reads[0], b.config.writes[0]
    partners = {"matched": partner_F, "random": np.random.default_rng(seed).permutation(partner_F)}
    names = ["matched", "own", "unchanged", "random"]
    error, loss = dict.fromkeys(names, 0.0), dict.fromkeys([*names, "clean"], 0.0)
    total, square, count, batches = torch.zeros(sum(b.config.blocks_out), dtype=torch.float64), 0.0, 0, 0
    for ids in ids_CS.split(batch_size):
        seen = lm.read(ids, list(dict.fromkeys([site_a, site_b])))
        x_CSD, y_CSD = seen[site_a].float(), seen[site_b].float()
        y_BD = y_CSD[:, SKIP:].flatten(0, 1)
        codes = a.encode_contexts(x_CSD, SKIP)
        ways = {name: b.decode(handed_on(codes, to, scale_a, scale_b)) for name, to in partners.items()}
        ways["own"] = b.reconstruct_contexts(y_CSD, SKIP)[1]
        ways["unchanged"] = x_CSD[:, SKIP:].flatten(0, 1)
        total += y_BD.double().sum(0).cpu()
        square += float(y_BD.double().square().sum())
        count += len(y_BD)
        loss["clean"] += _loss(lm, ids) * len(ids)
        batches += len(ids)
        for name, y_hat_BD in ways.items():
            error[name] += float((y_BD - y_hat_BD).double().square().sum())
            with lm.edit({site_b: _putting(y_hat_BD)}):
                loss[name] += _loss(lm, ids) * len(ids)
    variance = square - float(total.square().sum()) / count
    return Carried({n: 1 - error[n] / variance for n in names}, {n: value / batches for n, value in loss.items()})


def handed_on(codes: SparseCodes, partner_F: np.ndarray, scale_a: Tensor, scale_b: Tensor) -> SparseCodes:
    """Codes of A as codes of B: value / scale of A * scale of B, at the partner. What has no partner is left out."""
    tokens_N, latents_N, values_N = codes.nonzero()
    partners_N = torch.from_numpy(partner_F).to(latents_N.device)[latents_N]
    kept = partners_N != NONE
    tokens_N, latents_N, partners_N = tokens_N[kept], latents_N[kept], partners_N[kept]
    values_N = values_N[kept] * (scale_b.to(values_N.device)[partners_N] / scale_a.to(values_N.device)[latents_N])
    return SparseCodes.ragged(tokens_N, partners_N, values_N, len(codes), len(scale_b))


def _loss(lm: LanguageModel, ids_CS: Tensor) -> float:
    logits_CSV = lm.logits(ids_CS)[:, SKIP:-1].float()
    return float(cross_entropy(logits_CSV.flatten(0, 1), ids_CS[:, SKIP + 1 :].long().flatten().to(logits_CSV.device)))


def _putting(y_hat_BD: Tensor) -> Callable[[Tensor], Tensor]:
    def put(value_CSD: Tensor) -> Tensor:
        new_CSD = value_CSD.clone()
        new_CSD[:, SKIP:] = y_hat_BD.view(value_CSD[:, SKIP:].shape).to(value_CSD.dtype)
        return new_CSD

    return put

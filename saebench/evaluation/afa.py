"""How nearly orthogonal the active latents of a token must be, judged by lengths alone (methods.md T7): the ZF plot and eps_LBO.

If all pairs of unit atoms have |cos| <= eps, a code f of h latents and what it writes differ in squared length by at most
eps (||f||_1^2 - ||f||_2^2) <= eps (h - 1) ||f||^2. Read backwards: from both lengths follows the smallest eps that could explain a token.
Works on any dictionary that has decoder rows. Shape suffixes: `B` tokens, `D` width, `F` d_sae, `S` positions, `C` contexts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries import Dictionary
from saebench.dictionaries.fit import check_model
from saebench.errors import UserError
from saebench.lm import Contexts, LanguageModel


@dataclass(frozen=True)
class ZFPoints:
    """One point per token of the ZF plot: x-axis `length`, y-axis `code_length`, colour `error`."""

    length_B: Tensor
    """||y||, of what is to be written."""
    code_length_B: Tensor
    """||f_i ||d_i|| and ||b_dec||, in one vector||."""
    l0_B: Tensor
    """Active latents."""
    error_B: Tensor
    """||y - y_hat||^2 / ||y||^2."""

    @property
    def eps_lbo_B(self) -> Tensor:
        """The smallest bound on |cosines| that explains a token: | ||y||^2 - ||ft||^2 | / ((h - 1) ||ft||^2); NaN for fewer than two
        active latents, which nothing needs to explain."""
        squares_B = self.code_length_B.square()
        eps_B = (self.length_B.square() - squares_B).abs() / ((self.l0_B - 1).clamp_min(1) * squares_B)
        return torch.where(self.l0_B > 1, eps_B, torch.nan)

    def eps_lbo_for_violin(self, quantile: float = 0.99) -> Tensor:
        """eps_LBO of the tokens that have one, values above this quantile set to it."""
        eps = self.eps_lbo_B
        eps = eps[~eps.isnan()]
        return eps.clamp_max(eps.quantile(quantile)) if len(eps) else eps

    def figures(self) -> dict[str, float]:
        """Medians over tokens of eps_LBO and of code length / length, mean L0, share of tokens with fewer than two active latents."""
        eps = self.eps_lbo_B
        return {
            "eps_lbo_median": float(eps.nanmedian()),
            "code_length_ratio_median": float((self.code_length_B / self.length_B.clamp_min(1e-30)).median()),
            "l0": float(self.l0_B.mean()),
            "too_few_active": float(eps.isnan().double().mean()),
        }


def zf_points(dictionary: Dictionary, codes: SparseCodes, y_BD: Tensor, y_hat_BD: Tensor) -> ZFPoints:
    """Points of tokens whose codes, targets and reconstructions are known, in float64. Raises UserError for a dictionary without
    decoder rows."""
    W_dec_FD = getattr(dictionary, "W_dec", None)
    if not isinstance(W_dec_FD, Tensor) or W_dec_FD.shape != (codes.d_sae, y_BD.shape[1]):
        raise UserError(f"architecture {dictionary.config.architecture!r} has no decoder row per latent: eps_LBO is not defined")
    norm_F = W_dec_FD.detach().double().norm(dim=1)
    written_N = codes.values.detach().reshape(-1).double() * norm_F[codes.indices.reshape(-1).long()]
    squares_B = written_N.new_zeros(len(codes)).index_add_(0, codes.tokens, written_N.square())
    b_dec = getattr(dictionary, "b_dec", None)
    if isinstance(b_dec, Tensor):
        squares_B += b_dec.detach().double().square().sum()
    y, y_hat = y_BD.detach().double(), y_hat_BD.detach().double()
    length_B = y.norm(dim=1)
    error_B = (y - y_hat).square().sum(1) / length_B.square().clamp_min(1e-30)
    return ZFPoints(length_B, squares_B.sqrt(), codes.l0().double(), error_B)


@torch.inference_mode()
def zf_data(dictionary: Dictionary, lm: LanguageModel, contexts: Contexts, *, batch_size: int = 16) -> ZFPoints:
    """Points of the last token of every context (the book takes 1000 contexts of 128 tokens). Raises UserError for a dictionary that
    is not of this model's sites, or has no decoder rows."""
    check_model(dictionary, lm)
    config, dictionary = dictionary.config, dictionary.to(lm.device)
    parts = []
    for start in range(0, len(contexts), batch_size):
        seen = lm.read(contexts.ids_NS[start : start + batch_size], list(config.sites))
        x_CSD = torch.cat([seen[site].float() for site in config.reads], -1)
        y_CSD = torch.cat([seen[site].float() for site in config.writes], -1)
        codes, y_hat_CD = dictionary.reconstruct_contexts(x_CSD, x_CSD.shape[1] - 1)
        parts.append(zf_points(dictionary, codes, y_CSD[:, -1], y_hat_CD))
    return ZFPoints(*(torch.cat([getattr(part, name) for part in parts]) for name in ZFPoints.__dataclass_fields__))


def zf_slopes(spans: Sequence[float] = (0.25, 0.5, 1.0)) -> dict[float, tuple[float, float]]:
    """Slopes of the lower and the upper line of the ZF plot for values of eps (h - 1): between them lie the tokens that this much
    explains. The upper one is infinite from 1 on."""
    return {span: (math.sqrt(1 / (1 + span)), math.sqrt(1 / (1 - span)) if span < 1 else math.inf) for span in spans}

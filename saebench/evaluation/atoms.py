"""How far a dictionary's directions behave as atoms ("Towards Atoms"; methods.md T17): geometry under the atomic inner product
<u, v>_S = u S v^T / (||u||_S ||v||_S), S the inverse second moment of the activations, and what coherence guarantees.

R^2 is easy on few tokens with many atoms, and S makes distinct directions nearly orthogonal by itself: so all of it is measured on held-out
tokens, beside a dictionary of random atoms with as many latents active.
Shape suffixes: `B` tokens, `D` width, `F` atoms, `N` and `M` vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries.atoms import Threshold, ThresholdDictionary, whitening
from saebench.dictionaries.scaling import Scaling
from saebench.errors import UserError

ROWS_AT_ONCE = 1024
TOKENS_AT_ONCE = 4096
FLOOR = Threshold.model_fields["floor"].default


class Coder(Protocol):
    """Anything that encodes and reconstructs, as every dictionary does."""

    def encode(self, x_BD: Tensor) -> SparseCodes: ...
    def reconstruct(self, x_BD: Tensor, codes: SparseCodes) -> Tensor: ...


def second_moment(x_BD: Tensor) -> Tensor:
    """E[x^T x] in float64: [D, D]."""
    x_BD = x_BD.double()
    return x_BD.T @ x_BD / len(x_BD)


def atomic_inner_products(u_ND: Tensor, v_MD: Tensor, second_moment_DD: Tensor, floor: float = 1e-6) -> Tensor:
    """<u, v>_S of all pairs, between -1 and 1: [N, M] float64."""
    whiten_DD, _ = whitening(second_moment_DD, floor)
    return _unit_rows(u_ND.double() @ whiten_DD) @ _unit_rows(v_MD.double() @ whiten_DD).T


def coherences(atoms_FD: Tensor) -> Iterator[Tensor]:
    """|cosine| of every pair of different atoms, each once, in blocks: [pairs of a block]. Give whitened atoms for atomic coherence."""
    unit_FD = _unit_rows(atoms_FD)
    for start in range(0, len(unit_FD), ROWS_AT_ONCE):
        block = (unit_FD[start : start + ROWS_AT_ONCE] @ unit_FD[start:].T).abs_()
        yield block[torch.ones_like(block, dtype=torch.bool).triu_(1)]


def coherence(atoms_FD: Tensor) -> float:
    """mu: the largest |cosine| of two different atoms; 0 for one atom."""
    return max((float(pairs.max()) for pairs in coherences(atoms_FD) if len(pairs)), default=0.0)


def unique_support(mu: float) -> float:
    """The largest number K of active atoms with which codes are unique, mu < 1 / (2K - 1); infinite for orthogonal atoms."""
    return math.inf if mu <= 0 else math.ceil((1 / mu + 1) / 2) - 1


def rip_bound(mu: float, active: int) -> float:
    """What the restricted isometry constant of this many active atoms cannot exceed: (K - 1) mu."""
    return (active - 1) * mu


def recovery_interval(mu: float, active: int, smallest: float, largest: float) -> tuple[float, float] | None:
    """Between which thresholds one step of thresholding finds the support of every code of `active` coefficients in
    [smallest, largest] exactly; None where coherence is too high for that to be certain."""
    low, high = mu * active * largest, smallest - mu * (active - 1) * largest
    return (low, high) if low < high else None


def q_star(atoms_FD: Tensor, l0_B: Tensor) -> float:
    """The largest quantile q for which mu_q < 1 / (2 K_q - 1), mu_q and K_q being that quantile of all pairs' coherence and of the
    tokens' L0: the share of pairs and of tokens for which unique codes are certain."""
    sizes_N, tokens_N = l0_B.clamp_min(1).unique(return_counts=True)  # a token without active atoms is no harder than with one
    bounds_N = (1 / (2 * sizes_N.double() - 1)).flip(0)
    below_N = torch.zeros(len(bounds_N) + 1, dtype=torch.int64)
    total = 0
    for pairs in coherences(atoms_FD):
        below_N += torch.bincount(torch.searchsorted(bounds_N, pairs.double(), right=True), minlength=len(below_N)).cpu()
        total += len(pairs)
    share_of_tokens_N = tokens_N.cumsum(0) / tokens_N.sum()
    share_of_pairs_N = (below_N[:-1].cumsum(0) / max(1, total)).flip(0) if total else torch.ones(len(sizes_N))
    return float(torch.minimum(share_of_tokens_N.double().cpu(), share_of_pairs_N.double()).max())


def r_squared(dictionary: Coder, x_BD: Tensor) -> tuple[float, Tensor]:
    """1 - SSE / SST on raw activations, SST around their mean, and L0 of every token [B]."""
    error, l0 = 0.0, []
    with torch.no_grad():
        for x in x_BD.split(TOKENS_AT_ONCE):
            codes = dictionary.encode(x)
            error += float((dictionary.reconstruct(x, codes) - x).double().square().sum())
            l0.append(codes.l0())
    spread = float((x_BD.double() - x_BD.double().mean(0)).square().sum())
    return 1 - error / spread, torch.cat(l0)


def random_atoms(
    x_BD: Tensor, d_sae: int, l0: float, *, seed: int = 0, floor: float = FLOOR, centre: bool = True
) -> ThresholdDictionary:
    """The baseline: random atoms in the whitened space of a sample [B, D], thresholds that leave `l0` of them active, each equally
    often, and one factor on the latents that fits the sample best."""
    dictionary = ThresholdDictionary(Threshold(d_sae=d_sae, d_in=x_BD.shape[1], target_l0=l0, floor=floor, centre=centre))
    mean_D = x_BD.mean(0) if centre else torch.zeros_like(x_BD[0])
    dictionary.initialise(x_BD - mean_D, x_BD - mean_D, torch.Generator().manual_seed(seed))
    scaling = Scaling(mean_D, torch.ones_like(mean_D))
    dictionary.fold(scaling, scaling)
    with torch.no_grad():
        sample_BD = x_BD[:TOKENS_AT_ONCE]
        written_BD = dictionary(sample_BD) - mean_D
        factor = (written_BD * (sample_BD - mean_D)).sum() / written_BD.square().sum().clamp_min(1e-30)
        for tensor in (dictionary.W_enc_FD, dictionary.b_enc, dictionary.threshold):
            tensor *= factor.clamp_min(1e-6)
    return dictionary.eval().requires_grad_(False)


def atom_figures(
    dictionary: Coder, fit_BD: Tensor, held_out_BD: Tensor, *, floor: float = FLOOR, centre: bool = True, seed: int = 0
) -> dict[str, float]:
    """How atom-like a dictionary with decoder rows `W_dec` is. S comes from `fit_BD`, with `centre` from its deviations from the mean,
    and R^2 and L0 from `held_out_BD` (raw activations).

    r_squared, l0; mean and largest atomic coherence; unique_support, the L0 up to which codes are certainly unique; q_star; and
    r_squared, mean coherence and q_star of random atoms with the same L0. Raises UserError for a dictionary that has no decoder rows as
    wide as the activations."""
    atoms_FD = getattr(dictionary, "W_dec", None)
    if not isinstance(atoms_FD, Tensor) or atoms_FD.shape[1] != fit_BD.shape[1]:
        raise UserError(f"atoms are decoder rows as wide as the activations, {fit_BD.shape[1]}: this dictionary has none")
    whiten_DD, _ = whitening(second_moment(fit_BD - fit_BD.mean(0) if centre else fit_BD), floor)
    r2, l0_B = r_squared(dictionary, held_out_BD)
    mean_l0 = float(l0_B.double().mean())
    random = random_atoms(fit_BD, len(atoms_FD), min(max(mean_l0, 1e-3), len(atoms_FD)), seed=seed, floor=floor, centre=centre)
    random_r2, random_l0_B = r_squared(random, held_out_BD)
    whitened, whitened_random = atoms_FD.double() @ whiten_DD, random.W_dec.double() @ whiten_DD
    mu = coherence(whitened)
    return {
        "r_squared": r2,
        "l0": mean_l0,
        "coherence": mu,
        "mean_coherence": _mean(coherences(whitened)),
        "unique_support": unique_support(mu),
        "q_star": q_star(whitened, l0_B),
        "random_r_squared": random_r2,
        "random_l0": float(random_l0_B.double().mean()),
        "random_mean_coherence": _mean(coherences(whitened_random)),
        "random_q_star": q_star(whitened_random, random_l0_B),
    }


def _mean(blocks: Iterator[Tensor]) -> float:
    total, count = 0.0, 0
    for pairs in blocks:
        total, count = total + float(pairs.sum()), count + len(pairs)
    return total / max(1, count)


def _unit_rows(rows_ND: Tensor) -> Tensor:
    return rows_ND / rows_ND.norm(dim=1, keepdim=True).clamp_min(1e-30)

"""The same roles for latents that read along a context, and what they say of the model's heads.

For a dictionary on the heads' outputs a firing's value is a sum over heads and source positions (dictionaries/attention_output.py); for
Lorsa, whose latents are heads, over source positions (its z-pattern). A firing is shared out by the absolute size of these parts, firings
are weighted by their value, and the share that falls on a role's places (heads.py) is the latent's score. Attention to where a head
gathers nothing counts for nothing. What the latents say of a head is the sum over latents of what passes through it.
Shape suffixes: `C` contexts, `S` source positions, `T` positions that look, `H` heads (1 for Lorsa), `M` latents that fire in a context,
`F` d_sae, `R` roles, `P` the two kinds of text, `E` width of a head, `D` width of what is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.circuits.heads.roles import LEAST, ON_TEXT, ROLES, even_scores, repeat_places, text_places
from saebench.dictionaries import Dictionary, SparseAutoencoder
from saebench.dictionaries.attention_output import SITE
from saebench.dictionaries.fit import check_model
from saebench.dictionaries.lorsa import LorsaDictionary
from saebench.errors import UserError
from saebench.features.sources import Sources, sources_at
from saebench.lm import LanguageModel
from saebench.lm.attention import attention_input, attention_weights
from saebench.lm.random_tokens import repeated_random

AT_ONCE = 256  # latents of a context

Parts = Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]
"""Of a context: latents [M], pattern [H, S, S], absolute size of what each source holds for each of them [M, H, S], values [S, M]."""


@dataclass(frozen=True)
class FeatureRoles:
    """What reaches each latent through each head from each role's places."""

    mass_FHR: Tensor
    """Sum over firings of value * share."""
    through_FHP: Tensor
    """The same from all places, on text and on repeated random tokens."""
    even_R: Tensor
    """What even attention to positions that all hold the same would have."""

    @property
    def score_FR(self) -> Tensor:
        """Share of each latent's value that comes from each role's places; NaN where it does not fire."""
        return self.mass_FHR.sum(1) / _by_role(self.through_FHP.sum(1))

    @property
    def head_score_HR(self) -> Tensor:
        """The same of all that passes through a head."""
        return self.mass_FHR.sum(0) / _by_role(self.through_FHP.sum(0))

    @property
    def share_FH(self) -> Tensor:
        """Each head's share in the value of each latent on text; NaN where it does not fire."""
        return self.through_FHP[..., 0] / self.through_FHP[..., 0].sum(1, keepdim=True)

    def of(self, latent: int, least: float = LEAST) -> tuple[str, ...]:
        """The roles of a latent, the clearest first."""
        return _roles((self.score_FR[latent] - self.even_R) / (1 - self.even_R), least)

    def of_head(self, head: int, least: float = LEAST) -> tuple[str, ...]:
        """The roles of a head of the model by all that passes through it."""
        return _roles((self.head_score_HR[head] - self.even_R) / (1 - self.even_R), least)

    def families(self, least: float = LEAST) -> list[dict[str, int]]:
        """For each head, how many of the latents that it dominates have which clearest role; `none` counts those without any."""
        owner_F = dominating(self.share_FH)
        counts: list[Counter[str]] = [Counter() for _ in range(self.mass_FHR.shape[1])]
        for latent, owner in enumerate(owner_F.tolist()):
            if owner >= 0:
                counts[owner][next(iter(self.of(latent, least)), "none")] += 1
        return [dict(count.most_common()) for count in counts]


def _by_role(through_P: Tensor) -> Tensor:
    """The total that each role's share is of: [..., R]."""
    parts = [through_P[..., 0 if role in ON_TEXT else 1] for role in ROLES]
    return torch.stack(parts, -1)


def _roles(excess_R: Tensor, least: float) -> tuple[str, ...]:
    order = excess_R.nan_to_num(-1).argsort(descending=True, stable=True).tolist()
    return tuple(ROLES[i] for i in order if excess_R[i] >= least)


@dataclass(frozen=True)
class Polysemanticity:
    """How many latents share each head."""

    dominated_H: Tensor
    """Latents of which the head holds more than half."""
    effective_H: Tensor
    """How many latents of equal weight would concentrate as much as those that use the head: (sum w)^2 / sum w^2; 0 for an unused one."""


def dominating(share_FH: Tensor, share: float = 0.5) -> Tensor:
    """The head that holds more than `share` of each latent, -1 where none does: [F]."""
    best = share_FH.nan_to_num(0).max(1)
    return torch.where(best.values > share, best.indices, -1)


def polysemanticity(share_FH: Tensor, weight_F: Tensor | None = None) -> Polysemanticity:
    """From each head's share in each latent: of the length it writes (`attention_output.head_shares`), or of what reaches it
    (`FeatureRoles.share_FH`). `weight_F` says how much each latent counts, such as its density; by default alike."""
    share_FH = share_FH.nan_to_num(0)
    owner_F = dominating(share_FH)
    mass_FH = share_FH if weight_F is None else share_FH * weight_F[:, None]
    effective_H = mass_FH.sum(0).square() / mass_FH.square().sum(0).clamp_min(1e-30)
    return Polysemanticity(torch.bincount(owner_F[owner_F >= 0], minlength=share_FH.shape[1]), effective_H)


@torch.inference_mode()
def feature_roles(
    dictionary: Dictionary, lm: LanguageModel, ids_CS: Tensor, *, count: int = 8, length: int | None = None, seed: int = 0
) -> FeatureRoles:
    """The roles of every latent of an attention-output dictionary or of every Lorsa head, on texts [C, S] and on `count` rows of repeated
    random tokens. Raises UserError for a dictionary of another kind or model, and for texts that are too short."""
    check_model(dictionary, lm)
    repeats_CS = repeated_random(lm, count, length, seed)
    places = [text_places(ids_CS.shape[1]), repeat_places((repeats_CS.shape[1] - 1) // 2)]
    sums: list[list[Tensor]] = []
    for kind, ids in enumerate((ids_CS, repeats_CS)):
        places_RTS = places[kind].float()
        mass_FHR = through_FH = None
        for ids_S in ids:
            for latents_M, pattern_HSS, sources_MHS, values_SM in _parts(dictionary, lm, ids_S):
                mass_MHR, through_MH = _masses(pattern_HSS, sources_MHS, values_SM, places_RTS)
                if mass_FHR is None or through_FH is None:
                    mass_FHR = torch.zeros(dictionary.config.d_sae, *mass_MHR.shape[1:])
                    through_FH = torch.zeros(mass_FHR.shape[:2])
                mass_FHR.index_add_(0, latents_M, mass_MHR)
                through_FH.index_add_(0, latents_M, through_MH)
        if mass_FHR is None or through_FH is None:
            raise UserError("no latent fires on these texts: give more of them, or is the dictionary dead?")
        sums.append([mass_FHR, through_FH])
    return FeatureRoles(
        torch.cat([mass for mass, _ in sums], -1),
        torch.stack([through for _, through in sums], -1),
        even_scores(ids_CS.shape[1], repeats_CS.shape[1]),
    )


def _masses(pattern_HSS: Tensor, sources_MHS: Tensor, values_SM: Tensor, places_RTS: Tensor) -> tuple[Tensor, Tensor]:
    """Value * share by role [M, H, R], and from all places [M, H], over the last T positions."""
    size = places_RTS.shape[1]
    rows_HTS, values_TM = pattern_HSS[:, -size:], values_SM[-size:].abs()
    all_HTM = rows_HTS @ sources_MHS.permute(1, 2, 0)
    weight_TM = values_TM / all_HTM.sum(0).clamp_min(1e-30)
    there_HRTS = rows_HTS[:, None] * places_RTS
    there_HRTM = there_HRTS @ sources_MHS.permute(1, 2, 0)[:, None]
    return torch.einsum("hrtm,tm->mhr", there_HRTM, weight_TM), torch.einsum("htm,tm->mh", all_HTM, weight_TM)


def _parts(dictionary: Dictionary, lm: LanguageModel, ids_S: Tensor) -> Parts:
    reads = dictionary.config.reads
    if isinstance(dictionary, LorsaDictionary):
        x_CSD = lm.read(ids_S[None], reads)[reads[0]].float()
        values_SF = dictionary.encode(x_CSD).to_dense()
        size = dictionary.group_size
        for group, latents_M in _split(_active(values_SF), size):
            sources_MS = (x_CSD[0] @ dictionary.W_V_FD[latents_M].T + dictionary.b_V[latents_M]).T.abs()
            pattern_HSS = dictionary.attention_pattern(x_CSD, [group * size])[0]
            yield tuple(t.cpu() for t in (latents_M, pattern_HSS, sources_MS[:, None], values_SF[:, latents_M]))
        return
    layer = SITE.fullmatch(reads[0]) if len(reads) == 1 else None
    if layer is None or not isinstance(dictionary, SparseAutoencoder):
        raise UserError(
            f"{dictionary.config.architecture!r} at {' + '.join(reads)} does not read along a context: roles are for Lorsa and for "
            "dictionaries of one blocks.N.attn.hook_z"
        )
    number = int(layer[1])
    seen = lm.read(ids_S[None], [reads[0], attention_input(number)])
    host = attention_weights(lm, number)
    x_CSD = seen[attention_input(number)].float()
    pattern_HSS, v_HSE = host.pattern(x_CSD)[0].cpu(), host.values(x_CSD)[0]
    values_SF = dictionary.encode(seen[reads[0]][0].float()).to_dense()
    W_FHE = dictionary.weights().folded().W_enc_FD.unflatten(1, (host.num_heads, -1))
    active = _active(values_SF)
    for latents_M in active.split(AT_ONCE) if len(active) else ():
        sources_MHS = torch.einsum("hse,mhe->mhs", v_HSE, W_FHE[latents_M]).abs()
        yield latents_M.cpu(), pattern_HSS, sources_MHS.cpu(), values_SF[:, latents_M].cpu()


def _active(values_SF: Tensor) -> Tensor:
    return (values_SF != 0).any(0).nonzero()[:, 0]


def _split(latents_M: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Latents by their group of so many."""
    groups_M = latents_M // size
    for group in groups_M.unique().tolist():
        yield group, latents_M[groups_M == group]


def feature_sources(lm: LanguageModel, dictionary: Dictionary, ids: list[int], latent: int) -> Sources:
    """What each head and each source position adds to a latent's value on the last of some tokens. Raises UserError for a dictionary that
    does not read along a context, and for an unknown latent."""
    check_model(dictionary, lm)
    if not 0 <= latent < dictionary.config.d_sae:
        raise UserError(f"latent {latent} is not one of the {dictionary.config.d_sae:,}, counted from 0")
    found = sources_at(lm, dictionary, dictionary.config.reads, ids, latent)
    if found is None:
        raise UserError(
            f"{dictionary.config.architecture!r} at {' + '.join(dictionary.config.reads)} does not read along a context"
        )
    return found

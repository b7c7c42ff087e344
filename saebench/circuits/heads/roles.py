"""What attention heads do: the roles of every head of a model, from where it looks on text and on random tokens that are repeated.

The weight that a position t of a text gives to the positions s before it falls into five parts, which add up to 1:

    sink       s = 0, whatever stands there
    self       s = t
    previous   s = t - 1
    short      s = t - 2 ... t - 8
    long       s < t - 8

On BOS and random tokens that are repeated, from the second copy, two more places, which there are one each:

    induction  behind the previous occurrence of the token at t
    duplicate  that occurrence itself

A score is the mean weight over positions, and its `excess` what it has beyond attention that is even, (score - even) / (1 - even): 0 for
a head that looks nowhere in particular, 1 for one that does nothing else. A head has the roles whose excess is at least `LEAST`.
The same parts and places are taken for latents in feature_roles.py; retrieval heads are in retrieval.py.
Shape suffixes: `C` contexts, `S` positions looked at, `T` positions that look, `L` layers, `H` heads of a layer, `R` roles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.lm import LanguageModel
from saebench.lm.attention import AttentionWeights, attention_input, attention_weights
from saebench.lm.random_tokens import repeated_random

ON_TEXT = ("sink", "self", "previous", "short", "long")
ON_REPEATS = ("induction", "duplicate")
ROLES = (*ON_TEXT, *ON_REPEATS)
SHORT = 8  # the farthest back that is short range
LEAST = 0.4
BATCH = 4  # contexts whose patterns are held at once


def text_places(size: int) -> Tensor:
    """Which part of a row each source position is in: [R, T, S] bool over `ON_TEXT`, for rows in which all parts exist, T = size - 10 of
    them. Raises UserError for contexts that have no such row."""
    first = SHORT + 2
    if size <= first:
        raise UserError(f"contexts of {size} tokens have no long range: use at least {first + 1}")
    t, s = torch.arange(first, size)[:, None], torch.arange(size)[None]
    back, inside = t - s, s > 0
    parts = [~inside & (back > 0), back == 0, back == 1, inside & (back > 1) & (back <= SHORT), inside & (back > SHORT)]
    return torch.stack(parts)


def repeat_places(length: int) -> Tensor:
    """The places of induction and duplicate for the second copy of `length` tokens behind BOS: [R, T, S] bool over `ON_REPEATS`."""
    t, s = torch.arange(length + 1, 2 * length + 1)[:, None], torch.arange(2 * length + 1)[None]
    return torch.stack([s == t - length + 1, s == t - length])


@dataclass(frozen=True)
class HeadRoles:
    """Where each head of a model looks."""

    score_LHR: Tensor
    """Mean weight on each role's places, in the order of `ROLES`."""
    even_R: Tensor
    """The same for even attention."""

    @property
    def excess_LHR(self) -> Tensor:
        """Beyond even attention, as a share of what there could be."""
        return (self.score_LHR - self.even_R) / (1 - self.even_R)

    def of(self, layer: int, head: int, least: float = LEAST) -> tuple[str, ...]:
        """The roles of a head, the clearest first; empty where it has none."""
        excess_R = self.excess_LHR[layer, head]
        order = excess_R.argsort(descending=True, stable=True).tolist()
        return tuple(ROLES[i] for i in order if excess_R[i] >= least)

    def heads(self, role: str, least: float = LEAST) -> list[tuple[int, int]]:
        """The (layer, head) that have a role, the clearest first. Raises UserError for an unknown one."""
        if role not in ROLES:
            raise UserError(f"role {role!r} is unknown: use one of {', '.join(ROLES)}")
        excess_LH = self.excess_LHR[..., ROLES.index(role)]
        order = excess_LH.flatten().argsort(descending=True, stable=True).tolist()
        pairs = (divmod(i, excess_LH.shape[1]) for i in order)
        return [(layer, head) for layer, head in pairs if excess_LH[layer, head] >= least]

    def table(self) -> list[dict[str, object]]:
        """One row a head: `layer`, `head`, `roles`, and the score of each."""
        layers, heads = self.score_LHR.shape[:2]
        return [
            {"layer": layer, "head": head, "roles": self.of(layer, head)}
            | dict(zip(ROLES, self.score_LHR[layer, head].tolist(), strict=True))
            for layer in range(layers)
            for head in range(heads)
        ]


def roles_of_patterns(on_text_CHSS: Tensor, on_repeats_CHSS: Tensor) -> Tensor:
    """The scores of attention patterns (rows look, columns are looked at) on texts and on repeated random tokens: [H, R]."""
    text, length = text_places(on_text_CHSS.shape[-1]), (on_repeats_CHSS.shape[-1] - 1) // 2
    scores = [_mean_on(on_text_CHSS, text), _mean_on(on_repeats_CHSS, repeat_places(length))]
    return torch.cat(scores, 1)


def _mean_on(pattern_CHSS: Tensor, places_RTS: Tensor) -> Tensor:
    """Mean weight of the last rows on some places: [H, R]."""
    rows_CHTS = pattern_CHSS[:, :, -places_RTS.shape[1] :]
    places_RTS = places_RTS.to(rows_CHTS)
    return torch.einsum("chts,rts->hr", rows_CHTS, places_RTS) / (len(rows_CHTS) * rows_CHTS.shape[2])


def even_scores(text_size: int, repeats_size: int) -> Tensor:
    """The scores of a head that looks at all positions up to its own alike: [R]."""
    patterns = (torch.ones(size, size).tril() / torch.arange(1.0, size + 1)[:, None] for size in (text_size, repeats_size))
    text_SS, repeats_SS = patterns
    return roles_of_patterns(text_SS[None, None], repeats_SS[None, None])[0]


@torch.inference_mode()
def head_roles(lm: LanguageModel, ids_CS: Tensor, *, count: int = 8, length: int | None = None, seed: int = 0) -> HeadRoles:
    """The roles of every head, on texts [C, S] (contexts as `pack` makes them) and on `count` rows of repeated random tokens.

    Raises UserError for texts that are too short or too long, and for attention of an unknown kind.
    """
    repeats_CS = repeated_random(lm, count, length, seed)
    text_RTS, repeats_RTS = text_places(ids_CS.shape[1]), repeat_places((repeats_CS.shape[1] - 1) // 2)
    layers = [attention_weights(lm, layer) for layer in range(lm.site_table.num_layers)]
    scores = []
    for ids, places_RTS in ((ids_CS, text_RTS), (repeats_CS, repeats_RTS)):
        total_LHR: Tensor | float = 0.0
        for batch in ids.split(BATCH):
            found = (_mean_on(pattern_CHSS, places_RTS) for pattern_CHSS in patterns(lm, layers, batch))
            total_LHR = total_LHR + len(batch) * torch.stack(list(found)).cpu()
        scores.append(total_LHR / len(ids))
    return HeadRoles(torch.cat(scores, -1), even_scores(ids_CS.shape[1], repeats_CS.shape[1]))


def patterns(lm: LanguageModel, layers: Sequence[AttentionWeights], ids_CS: Tensor) -> Iterator[Tensor]:
    """Attention weights of every layer on some contexts, one layer after the other: [C, H, S, S]."""
    sites = [attention_input(layer) for layer in range(len(layers))]
    seen = lm.read(ids_CS, sites)
    return (weights.pattern(seen[site].float()) for weights, site in zip(layers, sites, strict=True))

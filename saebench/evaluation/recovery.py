"""What a dictionary found of a truth that is known (`saebench.synthetic`): directions, firings, hierarchy, absorption, composition.

Shape suffixes: `F` found latents, `G` true features, `D` width, `B` tokens, `N` active entries, `E` pairs of a parent and a child.
Rows of dictionaries need not be unit; all cosines are signed unless said otherwise, since latents are non-negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from saebench.codes import SparseCodes

BLOCK = 1024  # rows or pairs of rows handled at once


@dataclass(frozen=True)
class Matching:
    """The best one-to-one assignment of found latents to true features."""

    found_G: Tensor
    """The latent matched to each true feature, -1 where there are fewer latents than features: int64."""
    cosine_G: Tensor
    """Cosine of each pair; 0 for features without a latent."""
    mean_matched_cosine: float
    """Mean of `cosine_G`."""
    recovered: float
    """Share of true features whose cosine is above the threshold."""
    mean_max_cosine: float
    """Mean over true features of the largest cosine with any latent: one latent may serve several features."""


def matched_cosine(found_FD: Tensor, true_GD: Tensor, *, threshold: float = 0.9) -> Matching:
    """Match latents to true features so that the sum of cosines is largest (Hungarian algorithm, Kuhn 1955).

        maximise  sum_g cos(found[m(g)], true[g])   over one-to-one m

    `found_FD` [F, D] are decoder rows, `true_GD` [G, D] the planted directions. All F * G cosines are held in float32, and again
    in float64 by SciPy; time grows with the cube of the size at worst. 16k x 16k takes 3.5 GB and, on two cores, 20 s (a dictionary
    that found the truth) to 60 s (a random one).
    """
    cosine_GF = normalize(true_GD.detach().float()) @ normalize(found_FD.detach().float()).T
    best_G = cosine_GF.amax(1)
    rows, columns = linear_sum_assignment(cosine_GF.neg_().cpu().numpy())
    features_G, latents_G = torch.from_numpy(rows), torch.from_numpy(columns)
    found_G, cosine_G = torch.full((len(true_GD),), -1), torch.zeros(len(true_GD))
    found_G[features_G] = latents_G
    cosine_G[features_G] = -cosine_GF.cpu()[features_G, latents_G]
    return Matching(
        found_G,
        cosine_G,
        mean_matched_cosine=_mean(cosine_G),
        recovered=_mean(cosine_G > threshold),
        mean_max_cosine=_mean(best_G),
    )


@dataclass(frozen=True)
class FiringScores:
    """How well matched latents fire where their true features do; means over the features that fire at all."""

    precision: float
    recall: float
    f1: float
    weighted_precision: float
    """`weighted_*`: means weighted by how often the true feature fires."""
    weighted_recall: float
    weighted_f1: float
    features: int
    """True features that fire in this sample: what the means are over."""


def firing_scores(codes: SparseCodes, true_codes: SparseCodes, matching: Matching) -> FiringScores:
    """Precision, recall and F1 of the firing of each matched latent against its true feature, averaged over features.

        precision_g = both / found    recall_g = both / true    F1_g = 2 both / (found + true)

    with the tokens on which the latent (found), the feature (true), or both fire. A feature whose latent never fires, or that
    has none, counts with 0. `codes` [B] over F latents and `true_codes` [B] over G features describe the same tokens.
    """
    count = true_codes.d_sae
    feature_F = torch.full((codes.d_sae,), -1)
    matched_G = matching.found_G >= 0
    feature_F[matching.found_G[matched_G]] = torch.arange(count)[matched_G]

    true_keys = _keys(true_codes)
    tokens_N, latents_N = _entries(codes, like=true_codes)
    features_N = feature_F[latents_N]
    hits_N = (features_N >= 0) & _among(tokens_N * count + features_N, true_keys)
    both_G = torch.bincount(features_N[hits_N], minlength=count).double()
    found_G = torch.bincount(features_N[features_N >= 0], minlength=count).double()
    true_G = torch.bincount(true_keys % count, minlength=count).double()

    fires_G = true_G > 0
    both_G, found_G, true_G = both_G[fires_G], found_G[fires_G], true_G[fires_G]
    scores_G = {"precision": both_G / found_G.clamp_min(1), "recall": both_G / true_G, "f1": 2 * both_G / (found_G + true_G)}
    means = {name: _mean(score_G) for name, score_G in scores_G.items()}
    weighted = {f"weighted_{name}": _ratio(float(score_G @ true_G), float(true_G.sum())) for name, score_G in scores_G.items()}
    return FiringScores(features=len(true_G), **means, **weighted)


@dataclass(frozen=True)
class HierarchyAngles:
    """Mean absolute cosines in a dictionary with a hierarchy; NaN where there is no such pair."""

    parent_child: float
    siblings: float
    unrelated: float
    """Between features of different trees."""


def conditional_orthogonality(
    found_FD: Tensor, true_GD: Tensor, matching: Matching, parents_G: Tensor, *, pairs: int = 50_000, seed: int = 0
) -> dict[str, HierarchyAngles]:
    """Whether the found dictionary keeps levels orthogonal while siblings interfere, as the truth does (MP-SAE, Costa et al. 2025).

        mean |cos(d_i, d_j)|   over parents with their children, over siblings, and over pairs of different trees

    for `true` (the rows of `true_GD`) and for `found` (the matched rows of `found_FD`), over the same pairs, namely those in which
    both features have a latent. `parents_G` [G] holds each feature's parent, -1 for roots. Of siblings and of unrelated features
    at most `pairs` pairs are drawn, with repetition, by `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    matched_G = matching.found_G >= 0
    has_parent_G = (parents_G >= 0) & matched_G
    children = has_parent_G.nonzero().flatten()
    families = {
        "parent_child": (children, parents_G[children]),
        "siblings": _sibling_pairs(children, parents_G, pairs, generator),
        "unrelated": _unrelated_pairs(matched_G.nonzero().flatten(), parents_G, pairs, generator),
    }
    dictionaries = {"true": true_GD.detach().cpu(), "found": found_FD.detach().cpu()[matching.found_G]}
    angles = {}
    for name, rows in dictionaries.items():
        unit_GD = normalize(rows.float())
        cosines = {}
        for family, (left, right) in families.items():
            kept = matched_G[left] & matched_G[right]
            parts = zip(left[kept].split(BLOCK), right[kept].split(BLOCK), strict=True)
            cosines[family] = _mean(torch.cat([(unit_GD[i] * unit_GD[j]).sum(1).abs() for i, j in parts]))
        angles[name] = HierarchyAngles(**cosines)
    return angles


@dataclass(frozen=True)
class Absorption:
    """How often a child's latent stands in for its parent's."""

    rate: float
    """Absorbed firings of children / all firings of children."""
    share_of_misses: float
    """Absorbed firings of children / firings of children on which the parent's latent is silent; NaN if it never is."""
    missed: float
    """Firings of children on which the parent's latent is silent / all firings of children."""
    absorbing_pairs: float
    """Share of the pairs of parent and child in which the child's decoder row carries the parent's direction."""
    firings: int
    """Firings of children counted."""


def absorption_rate(
    codes: SparseCodes,
    true_codes: SparseCodes,
    matching: Matching,
    parents_G: Tensor,
    found_FD: Tensor,
    true_GD: Tensor,
    *,
    threshold: float = 0.25,
) -> Absorption:
    """Feature absorption (Chanin et al. 2024) on a planted hierarchy, where what is truly in x needs no probe.

    A firing of a child is a token and a feature c with a parent p where c truly fires; then p fires and its direction is in x.
    Counted are those whose c and p both have a latent. Such a firing is

        missed     where the latent of p is silent,
        absorbed   where it is missed, the latent of c fires, and cos(decoder row of c's latent, true direction of p) > threshold.

    Planted children are orthogonal to their parents, so that a latent of the child alone carries nothing of the parent, and one
    of their equal sum 0.71. Returns rate = absorbed / firings and the other ratios. `codes` and `true_codes` describe the same
    tokens; `parents_G` [G] is -1 for roots. NaN where no child fires.
    """
    tokens_N, children_N = _entries(true_codes, like=codes)
    latent_G = matching.found_G
    countable_G = (parents_G >= 0) & (latent_G >= 0)
    countable_G &= latent_G[parents_G] >= 0  # a root looks up a row that is masked already
    pairs_E = countable_G.nonzero().flatten()
    rows_ED = normalize(found_FD.detach().cpu()[latent_G[pairs_E]].float())
    carries_G = torch.zeros(len(parents_G), dtype=torch.bool)
    carries_G[pairs_E] = (rows_ED * normalize(true_GD.detach().cpu().float())[parents_G[pairs_E]]).sum(1) > threshold

    counted_N = countable_G[children_N]
    tokens_N, children_N = tokens_N[counted_N], children_N[counted_N]
    keys = _keys(codes)
    missed_N = ~_among(tokens_N * codes.d_sae + latent_G[parents_G[children_N]], keys)
    child_fires_N = _among(tokens_N * codes.d_sae + latent_G[children_N], keys)
    absorbed = int((missed_N & child_fires_N & carries_G[children_N]).sum())
    missed, firings = int(missed_N.sum()), len(tokens_N)
    return Absorption(
        rate=_ratio(absorbed, firings),
        share_of_misses=_ratio(absorbed, missed),
        missed=_ratio(missed, firings),
        absorbing_pairs=_mean(carries_G[pairs_E]),
        firings=firings,
    )


@dataclass(frozen=True)
class Composition:
    """How many latents are sums of true features."""

    rate: float
    """Share of the latents that are composed."""
    explained_by_one: float
    """Mean share of a row's squared norm that its best true feature explains."""
    explained_by_two: float
    """The same for the best true feature and the one that fits the rest best."""


def composition_rate(
    found_FD: Tensor, true_GD: Tensor, *, gain: float = 0.1, share: float = 0.25, explained: float = 0.3
) -> Composition:
    """The share of latents that are better explained as a sum of two true features than as one.

    For every unit decoder row d, two steps of non-negative orthogonal matching pursuit over the unit true features:

        one:  j = argmax <d, t_j>,  e_1 = max(<d, t_j>, 0)^2
        two:  k = argmax <d - <d, t_j> t_j, t_k>,  weights w_j, w_k >= 0 of the least squares fit,  e_2 = squared norm of the fit

    Composed: e_2 - e_1 > `gain`, and w_k / (w_j + w_k) > `share`, and e_2 > `explained` (so that a row of noise, which two features
    fit a little better than one, does not count). Sums of three to six equal features pass the same test. `found_FD` [F, D],
    `true_GD` [G, D]; memory is BLOCK * G numbers. [project choice: OrtSAE (T8) measures composition against a second, smaller
    dictionary, since there the truth is not known]
    """
    true_GD = normalize(true_GD.detach().float())
    composed, ones, twos = [], [], []
    for rows_BD in found_FD.detach().float().split(BLOCK):
        rows_BD = normalize(rows_BD)
        first_B, j = (rows_BD @ true_GD.T).max(1)
        first_B = first_B.clamp_min(0)
        rest_BG = (rows_BD - first_B[:, None] * true_GD[j]) @ true_GD.T
        k = rest_BG.scatter(1, j[:, None], -torch.inf).argmax(1)
        second_B = (rows_BD * true_GD[k]).sum(1)
        between_B = (true_GD[j] * true_GD[k]).sum(1)
        determinant_B = (1 - between_B.square()).clamp_min(1e-6)
        w_j = (first_B - between_B * second_B) / determinant_B
        w_k = (second_B - between_B * first_B) / determinant_B
        both_B = (w_j > 0) & (w_k > 0)
        one_B = first_B.square()
        two_B = torch.where(both_B, w_j * first_B + w_k * second_B, one_B)
        composed.append(both_B & (two_B - one_B > gain) & (w_k > share * (w_j + w_k)) & (two_B > explained))
        ones.append(one_B)
        twos.append(two_B)
    return Composition(*(_mean(torch.cat(parts)) for parts in (composed, ones, twos)))


def _keys(codes: SparseCodes) -> Tensor:
    """Every active pair of token and latent as token * d_sae + latent, sorted, once each: [N], on the CPU."""
    tokens_N, latents_N, _ = codes.nonzero()
    return torch.unique(tokens_N * codes.d_sae + latents_N).cpu()


def _entries(codes: SparseCodes, *, like: SparseCodes) -> tuple[Tensor, Tensor]:
    """(token, latent) of every active pair. Raises ValueError where the other codes are not of as many tokens."""
    if len(codes) != len(like):
        raise ValueError(f"codes of {len(codes)} and of {len(like)} tokens: both must describe the same tokens")
    keys_N = _keys(codes)
    return keys_N // codes.d_sae, keys_N % codes.d_sae


def _among(keys_N: Tensor, sorted_keys: Tensor) -> Tensor:
    """Which keys are among the sorted ones: [N] bool."""
    if not len(sorted_keys):
        return torch.zeros(len(keys_N), dtype=torch.bool)
    places_N = torch.searchsorted(sorted_keys, keys_N).clamp_max(len(sorted_keys) - 1)
    return sorted_keys[places_N] == keys_N


def _sibling_pairs(children: Tensor, parents_G: Tensor, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of children of one parent: all neighbours by number, the next but one, and so on, up to `pairs` drawn from them."""
    children = children[parents_G[children].argsort(stable=True)]
    mine = parents_G[children]
    left, right, step = [children[:0]], [children[:0]], 1
    while step < len(children) and (same := mine[step:] == mine[:-step]).any():
        left.append(children[:-step][same])
        right.append(children[step:][same])
        step += 1
    all_left, all_right = torch.cat(left), torch.cat(right)
    if len(all_left) > pairs:
        picks = torch.randint(len(all_left), (pairs,), generator=generator)
        return all_left[picks], all_right[picks]
    return all_left, all_right


def _unrelated_pairs(features: Tensor, parents_G: Tensor, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of features whose roots differ."""
    roots_G = torch.arange(len(parents_G))
    while (inner_G := parents_G[roots_G] >= 0).any():
        roots_G = torch.where(inner_G, parents_G[roots_G], roots_G)
    if not len(features):
        return features, features
    left, right = features[torch.randint(len(features), (2, pairs), generator=generator)]
    kept = roots_G[left] != roots_G[right]
    return left[kept], right[kept]


def _mean(values: Tensor) -> float:
    """The mean in float64; NaN of nothing."""
    return float(values.double().mean())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")

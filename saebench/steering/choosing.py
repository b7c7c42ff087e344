"""Three ways to choose latents for a goal: by hand, by contrast, and by what they do to the output.

By contrast: the latents that fire more often in texts of the goal than in others, the surest differences first (features/contrast.py).
By output: a latent may fire on a goal without bringing it about (Arad, Mueller and Belinkov 2025). So its direction u_i is added at all
positions but BOS, and what the model says next is compared with what it says under random directions r of the same length:

    score_i = value_i(a u_i) - mean over r of value_i(a r)

where value_i is the log of the probability that falls on a set of tokens after neutral prompts, or the mean log-likelihood per token of
texts of the goal less that of others. The value without steering would be taken off both terms, and cancels. The paper's score is
of the rank and probability of the same tokens; this one is a difference of logs, so that it compares latents of rare and common tokens.
Shape suffixes: `M` latents, `N` directions, `R` random ones, `B` rows of a batch, `S` positions, `D` width, `V` vocabulary, `T` tokens
of a set.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.dictionaries import Dictionary
from saebench.dictionaries.fit import check_model
from saebench.errors import UserError
from saebench.features.contrast import MIN_FIRINGS, Difference, contrast, contrast_texts
from saebench.features.effects import LogitEffects
from saebench.features.prompts import text_pieces
from saebench.features.store import FeatureStore
from saebench.lm import LanguageModel
from saebench.steering.activity import Activity
from saebench.steering.baselines import random_directions, unit_of
from saebench.steering.chosen import Chosen
from saebench.steering.edits import latent_rows
from saebench.steering.positions import SKIP

NEUTRAL = ("The", "This is", "In the", "It was", "There are", "When the", "If we", "One of the")
STRENGTH = 4.0
PROMOTED = 20  # tokens of a latent, where none are given
RANDOM = 16  # directions that stand for chance
LOGITS_AT_ONCE = 1 << 25


def by_hand(dictionary: Dictionary, latents: int | Sequence[int]) -> Chosen:
    """Latents that somebody named, all with score 1. Raises UserError for none, for one named twice, and for one that the dictionary
    does not have."""
    named = [latents] if isinstance(latents, int) else list(latents)
    try:
        numbers = [operator.index(latent) for latent in named]
    except TypeError:
        raise UserError(f"latents {named} are not all whole numbers: give them as numbers, counted from 0") from None
    if not numbers:
        raise UserError(f"no latent is named: give one or several of the {dictionary.config.d_sae:,}, counted from 0")
    for latent in numbers:
        if not 0 <= latent < dictionary.config.d_sae:
            raise UserError(f"latent {latent} is not one of the {dictionary.config.d_sae:,}, counted from 0")
        if numbers.count(latent) > 1:
            raise UserError(f"latent {latent} is named {numbers.count(latent)} times: name it once")
    return Chosen("by hand", tuple(numbers), (1.0,) * len(numbers))


def by_contrast(
    lm: LanguageModel,
    dictionary: Dictionary,
    positives: Sequence[str],
    negatives: Sequence[str],
    *,
    count: int = 10,
    min_firings: int = MIN_FIRINGS,
) -> Chosen:
    """The latents that fire more per token in the positives, by z of the difference over its standard error by texts.

    Raises UserError for fewer than two texts with tokens on a side, and where no latent with `min_firings` in both together fires more
    in the positives.
    """
    check_model(dictionary, lm)
    return _more(contrast_texts(lm, dictionary, positives, negatives, dictionary.config.d_sae, min_firings), count)


def by_documents(
    store: FeatureStore, positives: np.ndarray, negatives: np.ndarray, *, count: int = 10, min_firings: int = MIN_FIRINGS
) -> Chosen:
    """The same from a feature store, for two sets of its documents [documents, bool], without running the model. Raises UserError as
    `contrast` does, and where no latent fires more in the positives."""
    return _more(contrast(store, positives, negatives, store.d_sae, min_firings), count)


def _more(differences: Sequence[Difference], count: int) -> Chosen:
    """Those that fire more in the first set; they come by |z|, and so by z where that is above zero."""
    _check_count(count)
    more = [difference for difference in differences if difference.z > 0][:count]
    return Chosen("contrast", tuple(d.latent for d in more), tuple(d.z for d in more))


def weighted(chosen: Chosen, positives: Activity, negatives: Activity) -> Chosen:
    """The same latents with weights: by how much their mean activation is larger in the positives than in the negatives. The direction that
    they make together is the part of DiffMean that these latents write. Those that are not larger are left out; raises UserError where
    none is."""
    gain_F = positives.sums_F / max(1, positives.tokens) - negatives.sums_F / max(1, negatives.tokens)
    kept = [place for place, latent in enumerate(chosen.latents) if gain_F[latent] > 0]
    return Chosen(
        f"{chosen.method}, weighted",
        tuple(chosen.latents[place] for place in kept),
        tuple(chosen.scores[place] for place in kept),
        tuple(float(gain_F[chosen.latents[place]]) for place in kept),
    )


def by_output(
    lm: LanguageModel,
    dictionary: Dictionary,
    candidates: Chosen,
    tokens: Sequence[str] | Sequence[int] | None = None,
    *,
    count: int = 5,
    **options: Any,
) -> Chosen:
    """The candidates with the largest output score, of those above zero. Options as in `output_score`. Raises UserError as it does, and
    where no candidate has a score above zero."""
    _check_count(count)
    scores_M = output_score(lm, dictionary, candidates.latents, tokens, **options)
    order = [int(place) for place in np.argsort(-scores_M, kind="stable") if scores_M[place] > 0][:count]
    return Chosen(
        f"{candidates.method}, output score",
        tuple(candidates.latents[place] for place in order),
        tuple(float(scores_M[place]) for place in order),
        tuple(candidates.weights[place] for place in order) if candidates.weights else (),
    )


def output_score(
    lm: LanguageModel,
    dictionary: Dictionary,
    latents: int | Sequence[int],
    tokens: Sequence[str] | Sequence[int] | None = None,
    *,
    positives: Sequence[str] = (),
    negatives: Sequence[str] = (),
    prompts: Sequence[str] = NEUTRAL,
    strength: float = STRENGTH,
    unit: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """By how many nats each latent's direction raises what it should more than random directions of its length do: [M].

    That is the probability of `tokens` (texts of one token each, or ids) after the prompts, by default of the 20 that the latent itself
    promotes; or, with texts on both sides, the log-likelihood per token of the positives less that of the negatives. Of a text the
    first piece counts. `unit` is the length that a strength of 1 adds, by default a tenth of the mean activation's on the prompts.

    Raises UserError for a dictionary that does not fit the model, for one that promotes no tokens where none are given, and for tokens
    that are none.
    """
    chosen = by_hand(dictionary, latents).latents
    check_model(dictionary, lm)
    if not prompts:
        raise UserError("no prompt is given: give at least one, of which nothing is expected")
    if unit is None:
        unit = unit_of(lm, dictionary.config.writes, prompts)
    if not math.isfinite(strength * unit):
        raise UserError(f"strength {strength} times unit {unit} is no length: give finite numbers")
    rows_MD = torch.nn.functional.normalize(latent_rows(dictionary, chosen).to(lm.device), dim=1)
    random_RD = random_directions(rows_MD.shape[1], RANDOM, seed).to(rows_MD)
    steered = _Steered(lm, dictionary, strength * unit)
    if positives or negatives:
        if tokens is not None:
            raise UserError("tokens and texts are both given: a score is of one or the other")
        values_M, values_R = (_preference(steered, rows_ND, positives, negatives) for rows_ND in (rows_MD, random_RD))
        return values_M - values_R.mean()
    if tokens is None:
        sets_MT = _promoted(lm, dictionary, chosen)
    else:
        sets_MT = torch.tensor([_token_ids(lm, tokens)], device=lm.device).expand(len(chosen), -1)
    return _mass(steered, rows_MD, random_RD, sets_MT, prompts)


class _Steered:
    """The model with one direction added to each text of a batch."""

    def __init__(self, lm: LanguageModel, dictionary: Dictionary, length: float):
        self.lm, self.config, self.length = lm, dictionary.config, length

    def log_probabilities(self, ids: Sequence[int], rows_ND: Tensor, last: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Of every next token of one text under each direction, or of that behind it: [B, S, V] for some directions after the other."""
        at_once = max(1, LOGITS_AT_ONCE // (len(ids) * self.lm.hf.config.vocab_size))
        for start in range(0, len(rows_ND), at_once):
            part = slice(start, min(start + at_once, len(rows_ND)))
            added_BD = (self.length * rows_ND[part]).to(self.lm.hf.dtype)
            blocks = added_BD.split(list(self.config.blocks_out), dim=1)
            with self.lm.edit({site: _adder(block_BD) for site, block_BD in zip(self.config.writes, blocks, strict=True)}):
                logits_BSV = self.lm.logits(torch.tensor([list(ids)]).expand(len(added_BD), -1))
            yield part, (logits_BSV[:, -1:] if last else logits_BSV).float().log_softmax(-1)


def _adder(row_BD: Tensor) -> Any:
    def add_rows(x_BSD: Tensor) -> Tensor:
        moved_BSD = x_BSD.clone()
        moved_BSD[:, SKIP:] += row_BD[:, None]
        return moved_BSD

    return add_rows


def _mass(steered: _Steered, rows_MD: Tensor, random_RD: Tensor, sets_MT: Tensor, prompts: Sequence[str]) -> np.ndarray:
    """Log of the probability of each latent's tokens behind the prompts, less that under random directions, mean over prompts: [M]."""
    scores_M = torch.zeros(len(rows_MD), dtype=torch.float64, device=rows_MD.device)
    for prompt in prompts:
        ids = steered.lm.prompt_ids(prompt)
        if len(ids) <= SKIP:
            raise UserError(f"prompt {prompt!r} has no token behind the first, where nothing is added: give a word at least")
        chance_RV = torch.cat([logp_B1V[:, 0] for _, logp_B1V in steered.log_probabilities(ids, random_RD, last=True)])
        for part, logp_B1V in steered.log_probabilities(ids, rows_MD, last=True):
            scores_M[part] += logp_B1V[:, 0].gather(1, sets_MT[part]).logsumexp(1)
            scores_M[part] -= torch.stack([chance_V[sets_MT[part]].logsumexp(1) for chance_V in chance_RV]).mean(0)
    return (scores_M / len(prompts)).cpu().numpy()


def _preference(steered: _Steered, rows_ND: Tensor, positives: Sequence[str], negatives: Sequence[str]) -> np.ndarray:
    """Log-likelihood per token of the positives less that of the negatives under each direction, means over texts: [N]."""
    values = []
    for side, texts in (("positives", positives), ("negatives", negatives)):
        first = {number: ids for number, ids in reversed(text_pieces(steered.lm, texts)) if len(ids) > SKIP}
        if not first:
            raise UserError(f"the {side} have no tokens: give texts of a few words at least on each side")
        value_N = torch.zeros(len(rows_ND), dtype=torch.float64, device=rows_ND.device)
        for ids in first.values():
            next_S1 = torch.tensor(ids[1:], device=rows_ND.device)[:, None]
            for part, logp_BSV in steered.log_probabilities(ids, rows_ND):
                value_N[part] += logp_BSV[:, :-1].gather(2, next_S1.expand(len(logp_BSV), -1, 1)).mean((1, 2))
        values.append(value_N / len(first))
    return (values[0] - values[1]).cpu().numpy()


def _promoted(lm: LanguageModel, dictionary: Dictionary, latents: Sequence[int]) -> Tensor:
    """The tokens whose logits each latent raises most, nothing but the final norm in between: [M, T]."""
    effects = LogitEffects(dictionary, lm)
    if effects.rows_FD is None:
        raise UserError(
            "the dictionary does not write the residual stream, so its latents promote no tokens: give tokens or texts"
        )
    logits_MV = effects.rows_FD[list(latents)] @ effects.W_U_VD.T
    return logits_MV.topk(min(PROMOTED, logits_MV.shape[1]), dim=1).indices.to(lm.device)


def _token_ids(lm: LanguageModel, tokens: Sequence[str] | Sequence[int]) -> list[int]:
    """The ids of tokens given as texts or ids. Raises UserError for none, for a text that is not one token, and for an id that is none."""
    if isinstance(tokens, str) or not len(tokens):
        raise UserError(f"tokens {tokens!r} are no list of tokens: give at least one, in a list")
    ids: list[int] = []
    for token in tokens:
        found = lm.tokenizer(token, add_special_tokens=False)["input_ids"] if isinstance(token, str) else [int(token)]
        if len(found) != 1:
            pieces = ", ".join(repr(lm.token_strings[i]) for i in found)
            raise UserError(f"{token!r} is {len(found)} tokens ({pieces}): give texts of one token each")
        if not 0 <= found[0] < lm.hf.config.vocab_size:
            raise UserError(f"token {found[0]} is not one of the {lm.hf.config.vocab_size:,} of the model, counted from 0")
        ids += found
    return list(dict.fromkeys(ids))


def _check_count(count: int) -> None:
    if count < 1:
        raise UserError(f"count={count} chooses nothing: use at least 1")

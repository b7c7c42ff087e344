"""LangFIR: features of a language, or of any concept with positive examples only, found against random tokens (methods.md I3).

    cons_mono(i)   share of the texts in which latent i is active on at least one token (BOS apart)
    cons_rand(i)   the same of sequences of uniformly random tokens, no special ones, as long as the texts
    chosen         cons_mono(i) >= tau_hi and cons_rand(i) <= tau_lo, weighted by the mean activation on the texts

Random tokens fire what any text fires; what all texts fire and random tokens do not is left. Only the abstract of the paper could be read:
the thresholds and all detail are inferred. Steering is `add(dictionary, chosen.latents, weights=chosen.weights)`; `language_check` takes
their span out and asks whether that language alone suffers.

Random tokens fire little of what any real text has in common, so that with a small model a part of that is chosen too. Measured on a GPT-2
of a million parameters that was trained on Genesis in six languages (TopK, 1024 latents, k = 16, a stream of 4 layers): taking out all that
passes the thresholds at layer 2, 7 to 29 latents, raises the loss of the language by 11 to 41 %, and that of the others by 3 to 29 %; a
fifth to a quarter of the rise in nats is the language's own, where a sixth would be chance. Of the three best latents at layer 3 it is a
third, 0.31 to 0.56 in four languages, chance in Swedish; English has none that passes. Few latents and a late layer are more of a language.

Shape suffixes: `U` texts or sequences, `F` d_sae, `B` texts of a batch, `S` positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
import torch

from saebench.dictionaries import Dictionary
from saebench.errors import UserError
from saebench.features.prompts import PIECE, PIECES_AT_ONCE, text_pieces, tokenise
from saebench.lm import LanguageModel
from saebench.steering.activity import Activity, activity_of_ids
from saebench.steering.chosen import Chosen
from saebench.steering.edits import orthogonal
from saebench.steering.hooks import steer

MOST = 100  # texts that are read, as many as the method is described with


def langfir(
    lm: LanguageModel,
    dictionary: Dictionary,
    texts: Sequence[str],
    *,
    sequences: int | None = None,
    tau_hi: float = 0.9,
    tau_lo: float = 0.1,
    seed: int = 0,
    sites: Sequence[str] | None = None,
) -> Chosen:
    """The latents that nearly all texts fire and hardly any of `sequences` random ones (default as many as texts), by the difference of
    the two shares, of equal ones the more active first. Of more than 100 texts 100 are read, spread evenly; of each the first 128 tokens.

    Raises UserError for fewer than two texts with tokens, for thresholds outside of 0 to 1, and where no latent passes them.
    """
    if not (0 < tau_hi <= 1 and 0 <= tau_lo < 1):
        raise UserError(
            f"tau_hi={tau_hi} and tau_lo={tau_lo} are shares of texts: give tau_hi above 0, tau_lo below 1, both within 0 to 1"
        )
    if sequences is not None and sequences < 1:
        raise UserError(f"sequences={sequences} leaves nothing to compare with: use at least 1")
    mono = _texts(lm, texts)
    random = random_sequences(lm, [len(ids) for ids, _ in mono], mono[0][1], sequences or len(mono), seed)
    fires = activity_of_ids(lm, dictionary, [ids for ids, _ in mono], sites=sites)
    by_chance = activity_of_ids(lm, dictionary, random, sites=sites)
    return contrasted(fires, by_chance, tau_hi, tau_lo)


def contrasted(mono: Activity, random: Activity, tau_hi: float = 0.9, tau_lo: float = 0.1) -> Chosen:
    """The same from what fires on the texts, and on random sequences."""
    mono_F, random_F = (seen.texts_F / len(seen.tokens_U) for seen in (mono, random))
    kept = np.flatnonzero((mono_F >= tau_hi) & (random_F <= tau_lo))
    mean_F = mono.sums_F / max(1, mono.tokens)
    margin_F = mono_F - random_F
    order = kept[np.lexsort((kept, -mean_F[kept], -margin_F[kept]))]
    return Chosen("LangFIR", tuple(order.tolist()), tuple(margin_F[order].tolist()), tuple(mean_F[order].tolist()))


def random_sequences(lm: LanguageModel, lengths: Sequence[int], added: int, count: int, seed: int = 0) -> list[list[int]]:
    """Sequences of tokens drawn uniformly from all but the special ones, of these lengths in turn; with `added` behind the token that
    texts begin with."""
    tokenizer = lm.tokenizer
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ordinary = np.setdiff1d(
        np.arange(min(len(tokenizer), lm.hf.config.vocab_size)), list(marked | set(tokenizer.all_special_ids))
    )
    if not len(ordinary):
        raise UserError("the tokenizer has special tokens only: no random text can be made of it")
    first = tokenise(lm, "")[0][:added]
    rng = np.random.default_rng(seed)
    return [first + rng.choice(ordinary, lengths[i % len(lengths)] - added).tolist() for i in range(count)]


def language_check(
    lm: LanguageModel, dictionary: Dictionary, chosen: Chosen, texts_by_language: Mapping[str, Sequence[str]]
) -> dict[str, tuple[float, float]]:
    """Loss in nats per token on the texts of each language, before and after the latents' directions are taken out at all positions but
    BOS. Texts should be others than the latents were chosen on. Raises UserError for a language whose texts have no tokens."""
    edit = orthogonal(dictionary, chosen.latents)
    found = {}
    for language, texts in texts_by_language.items():
        pieces = sorted((ids for _, ids in text_pieces(lm, texts) if len(ids) > 1), key=len)
        if not pieces:
            raise UserError(f"the texts of {language!r} have no tokens: give texts of a few words at least")
        before = _loss(lm, pieces)
        with steer(lm, edit):
            found[language] = before, _loss(lm, pieces)
    return found


def _texts(lm: LanguageModel, texts: Sequence[str]) -> list[tuple[list[int], int]]:
    """The ids of each text that has tokens, of the first piece of it, and how many were put before it."""
    size = min(PIECE, lm.max_context or PIECE)
    found = [(ids[:size], added) for ids, added in (tokenise(lm, text) for text in texts) if len(ids) > max(1, added)]
    if len(found) < 2:
        raise UserError(f"{len(found)} of the texts has tokens to read: give two texts at least, better a hundred")
    count = min(MOST, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def _loss(lm: LanguageModel, pieces: list[list[int]]) -> float:
    """Mean loss per predicted token of pieces that are sorted by length."""
    total, count = 0.0, 0
    for length, alike in groupby(pieces, len):
        some = list(alike)
        for start in range(0, len(some), PIECES_AT_ONCE):
            ids_BS = torch.tensor(some[start : start + PIECES_AT_ONCE], device=lm.device)
            logits = lm.logits(ids_BS)[:, :-1].float().flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(logits, ids_BS[:, 1:].flatten(), reduction="sum"))
            count += len(ids_BS) * (length - 1)
    return total / count

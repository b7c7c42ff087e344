"""What fires on a text that is in no store: the model is run on it and the dictionary reads along.

Shape suffixes: `T` tokens of the text, `N` entries, `C` contexts, `S` positions, `D` width of what is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries import Dictionary
from saebench.errors import UserError
from saebench.features.examples import Example
from saebench.lm import LanguageModel

MAX_TOKENS = 512
PIECE, PIECES_AT_ONCE = 128, 16  # tokens of the pieces that many texts are read in


@dataclass(frozen=True)
class Prompt:
    """The tokens of a text as the model reads it; `added` and `left_out` as in `PromptCodes`."""

    ids: list[int]
    added: int
    left_out: int

    @classmethod
    def of(cls, lm: LanguageModel, text: str, max_tokens: int = MAX_TOKENS) -> Prompt:
        """As many tokens as there is room for. Raises UserError for a text without tokens."""
        ids, added = tokenise(lm, text)
        if len(ids) == added:
            raise UserError("the text has no tokens: type something")
        room = min(max_tokens, lm.max_context or max_tokens)
        return cls(ids[:room], added, max(0, len(ids) - room))

    def with_codes(self, lm: LanguageModel, tokens_N: np.ndarray, latents_N: np.ndarray, values_N: np.ndarray) -> PromptCodes:
        """With what fires on which token, in any order."""
        order_N = np.lexsort((-np.abs(values_N), tokens_N))
        return PromptCodes(
            ids=self.ids,
            tokens=[lm.token_strings[i] for i in self.ids],
            starts=np.concatenate([[0], np.cumsum(np.bincount(tokens_N, minlength=len(self.ids)))]),
            latents=latents_N[order_N],
            values=values_N[order_N],
            added=self.added,
            left_out=self.left_out,
        )


@dataclass(frozen=True)
class PromptCodes:
    """The codes of a text: entries starts[t] to starts[t + 1] are those of token t, largest (in size) first. Nothing fires on the first
    token, which is put before the text where the tokenizer has one for that."""

    ids: list[int]
    tokens: list[str]
    """The text of each token."""
    starts: np.ndarray
    latents: np.ndarray
    values: np.ndarray
    added: int
    """Tokens put before the text: 1, or 0 for a tokenizer that has none for that."""
    left_out: int
    """Tokens at the end of the text for which there was no room."""

    def __len__(self) -> int:
        return len(self.ids)

    def strongest(self, token: int, count: int = 10) -> list[tuple[int, float]]:
        """The latents that fire most strongly on a token, with their values."""
        part = slice(self.starts[token], min(self.starts[token + 1], self.starts[token] + count))
        return list(zip(self.latents[part].tolist(), self.values[part].tolist(), strict=True))

    def by_latent(self, latent: int) -> np.ndarray:
        """The value of a latent on each token, 0 where it is silent: [T]."""
        values_T = np.zeros(len(self), dtype=np.float32)
        places_N = np.flatnonzero(self.latents == latent)
        values_T[np.searchsorted(self.starts, places_N, side="right") - 1] = self.values[places_N]
        return values_T

    def top_latents(self, count: int = 20, by: Literal["max", "sum"] = "max") -> list[tuple[int, float]]:
        """The latents with the largest value on any token, or the largest sum (in size, where values have a sign), with that figure."""
        if by == "max":
            order_N = np.argsort(-np.abs(self.values), kind="stable")
            found, first = np.unique(self.latents[order_N], return_index=True)
            figures = self.values[order_N[first]]
        else:
            found, place_N = np.unique(self.latents, return_inverse=True)
            figures = np.bincount(place_N, weights=self.values, minlength=len(found))
        order = np.argsort(-np.abs(figures), kind="stable")[:count]
        return list(zip(found[order].tolist(), figures[order].tolist(), strict=True))

    def example(self, latent: int) -> Example:
        """The text with the values of a latent, its strongest firing in focus."""
        values_T = self.by_latent(latent)
        return Example(ids=self.ids, values=values_T.tolist(), focus=int(np.abs(values_T).argmax()), document="")


def read_prompt(
    lm: LanguageModel, dictionary: Dictionary, text: str, max_tokens: int = MAX_TOKENS, *, sites: Sequence[str] | None = None
) -> PromptCodes:
    """Run the model on a text and encode what the dictionary reads, or what stands at `sites`, as a store names them.

    A BOS token, or for tokenizers without one the token that ends documents, is put before the text. What exceeds `max_tokens`, or the
    model's positions, is left out. Raises UserError for a text without tokens, and for a dictionary that names no site.
    """
    prompt = Prompt.of(lm, text, max_tokens)
    return prompt.with_codes(lm, *encode_ids(lm, dictionary, torch.tensor([prompt.ids]), sites))


def feature_on_text(
    lm: LanguageModel, dictionary: Dictionary, latent: int, text: str, *, sites: Sequence[str] | None = None
) -> Example:
    """A text with the values of one latent on each token, its strongest firing in focus. Raises UserError as `read_prompt` does, and for
    an unknown latent."""
    if not 0 <= latent < dictionary.config.d_sae:
        raise UserError(f"latent {latent} is not one of the {dictionary.config.d_sae:,}, counted from 0")
    return read_prompt(lm, dictionary, text, sites=sites).example(latent)


def tokenise(lm: LanguageModel, text: str) -> tuple[list[int], int]:
    """The tokens of a text as a document begins in a corpus, and how many of them were put before it."""
    tokenizer = lm.tokenizer
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return (ids, 0) if first is None else ([first, *ids], 1)


@torch.inference_mode()
def encode_ids(
    lm: LanguageModel, dictionary: Dictionary, ids_CS: Tensor, sites: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The codes of some contexts: tokens [N], numbered row by row, latents [N], values [N], in the order of the tokens. Nothing fires on
    the first token of a context. Raises UserError for a dictionary that names no site."""
    sites = list(sites or dictionary.config.reads)
    if not sites:
        raise UserError("the dictionary names no site: say which sites of the model it reads")
    read = lm.read(ids_CS, sites)
    x_CSD = torch.cat([read[site].flatten(2).float() for site in sites], -1)
    codes = dictionary.encode_contexts(x_CSD.to(next(dictionary.parameters()).device))
    return entries(codes, ids_CS.shape[1])


def entries(codes: SparseCodes, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `encode_ids`, from the codes of all tokens but the first of contexts of `size` tokens."""
    rows_N, latents_N, values_N = (t.cpu().numpy() for t in codes.nonzero())
    return rows_N // (size - 1) * size + rows_N % (size - 1) + 1, latents_N.astype(np.int32), values_N


def text_pieces(lm: LanguageModel, texts: Sequence[str], size: int = PIECE) -> list[tuple[int, list[int]]]:
    """Texts in pieces of up to `size` tokens, each begun as a document is: the number of the text and the token ids of each, in order."""
    size = min(size, lm.max_context or size)
    pieces: list[tuple[int, list[int]]] = []
    for number, text in enumerate(texts):
        ids, added = tokenise(lm, text)
        first, body = ids[:added], ids[added:]
        pieces += [(number, first + body[start : start + size - added]) for start in range(0, len(body), size - added)]
    return pieces


def encode_pieces(
    lm: LanguageModel, dictionary: Dictionary, pieces: Sequence[tuple[int, list[int]]], sites: Sequence[str] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The codes of pieces, those of one length together: the place of the piece among them [N], the position in it [N], latents [N] and
    values [N]. Each batch has all entries of its pieces; pieces of one token have none."""
    for places, ids_CS in batches(pieces):
        tokens_N, latents_N, values_N = encode_ids(lm, dictionary, ids_CS, sites)
        length = ids_CS.shape[1]
        yield places[tokens_N // length], tokens_N % length, latents_N, values_N


def batches(pieces: Sequence[tuple[int, list[int]]]) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Pieces of one length together: their places among all [C], and their tokens [C, S]. Pieces of one token are left out."""
    by_length = sorted(range(len(pieces)), key=lambda place: len(pieces[place][1]))
    for length, alike in groupby(by_length, lambda place: len(pieces[place][1])):
        places = np.fromiter(alike, dtype=np.int64)
        for start in range(0, len(places) if length > 1 else 0, PIECES_AT_ONCE):
            some = places[start : start + PIECES_AT_ONCE]
            yield some, torch.tensor([pieces[place][1] for place in some.tolist()])

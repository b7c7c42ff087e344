"""Text packed into token contexts of one length, with the document and position of every token.

Documents follow each other, each behind a separator; every context starts with the BOS token where the tokenizer has one.
Shape suffixes: `N` contexts, `S` positions in a context.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.lm.text import Text
from saebench.progress import progress

BATCH_OF_DOCUMENTS = 64
NO_DOCUMENT = -1


@dataclass(frozen=True)
class Contexts:
    """Token contexts: `ids_NS`, the index of each token's document (`documents_NS`, into `names`; -1 for an added BOS), and its
    position in that document (`positions_NS`, -1 for an added BOS or separator). All int32."""

    ids_NS: Tensor
    documents_NS: Tensor
    positions_NS: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.ids_NS)

    def __getitem__(self, part: slice | Tensor) -> Contexts:
        return Contexts(self.ids_NS[part], self.documents_NS[part], self.positions_NS[part], self.names)

    @property
    def context_size(self) -> int:
        return self.ids_NS.shape[1]

    @property
    def num_tokens(self) -> int:
        return self.ids_NS.numel()

    @property
    def identity(self) -> str:
        """A short hash of the token ids and their shape."""
        digest = hashlib.sha256(str(tuple(self.ids_NS.shape)).encode())
        digest.update(self.ids_NS.contiguous().numpy().data)
        return digest.hexdigest()[:16]


def pack(text: Text, tokenizer: Any, context_size: int, num_tokens: int | None = None) -> Contexts:
    """Tokenise `text` into contexts of `context_size` tokens, about `num_tokens` in all (None: the whole text).

    The last, incomplete context is dropped. Raises UserError when the text is empty or shorter than one context.
    """
    if context_size < 2:
        raise UserError(f"context_size={context_size} is too small: use at least 2")
    bos = tokenizer.bos_token_id
    separator = bos if bos is not None else tokenizer.eos_token_id
    body = context_size - (bos is not None)
    wanted = None if num_tokens is None else max(1, num_tokens // context_size)

    names: list[str] = []
    pieces: list[Tensor] = []
    length = 0
    with progress("tokenise", (wanted or 0) * context_size, "tokens") if wanted else nullcontext() as report:
        for name, ids in _encode(text, tokenizer):
            pieces.append(torch.tensor(ids if separator is None else [separator, *ids], dtype=torch.int32))
            names.append(name)
            length += len(pieces[-1])
            if report is not None and wanted is not None:
                report(min(len(pieces[-1]), wanted * context_size - (length - len(pieces[-1]))))
            if wanted is not None and length >= wanted * body:
                break
    if not names:
        raise UserError(f"text {text.name!r} is empty: nothing to tokenise")
    if length < body:
        raise UserError(
            f"text {text.name!r} has {length} tokens, less than one context of {context_size}: use more text or a smaller context_size"
        )
    count = length // body if wanted is None else min(wanted, length // body)

    first = 0 if separator is None else -1
    ids = torch.cat(pieces)[: count * body].view(count, body)
    documents = torch.cat([torch.full((len(piece),), number, dtype=torch.int32) for number, piece in enumerate(pieces)])
    positions = torch.cat([torch.arange(first, first + len(piece), dtype=torch.int32) for piece in pieces])
    documents, positions = documents[: count * body].view(count, body), positions[: count * body].view(count, body)
    if bos is not None:
        column = torch.full((count, 1), bos, dtype=torch.int32)
        nowhere = torch.full_like(column, NO_DOCUMENT)
        ids, documents, positions = (torch.cat(pair, 1) for pair in ((column, ids), (nowhere, documents), (nowhere, positions)))
    return Contexts(ids, documents, positions, names)


def _encode(text: Text, tokenizer: Any) -> Iterator[tuple[str, list[int]]]:
    documents = iter(text)
    while batch := list(itertools.islice(documents, BATCH_OF_DOCUMENTS)):
        encoded = tokenizer([document.text for document in batch], add_special_tokens=False, verbose=False)["input_ids"]
        yield from zip((document.name for document in batch), encoded, strict=True)

"""Tokens drawn at random, twice over: what induction is measured on."""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.lm import LanguageModel

LONGEST = 60  # random tokens in one copy, where the model's positions and vocabulary allow


def repeated_random(lm: LanguageModel, count: int = 8, length: int | None = None, seed: int = 0) -> Tensor:
    """BOS, then different random tokens, twice: [count, 1 + 2 * length]. `length` is 60 by default, or as many as fit. Raises UserError
    where the vocabulary or the model's positions are less than asked for."""
    usual = usual_tokens(lm)
    room = LONGEST if lm.max_context is None else (lm.max_context - 1) // 2
    length = length or min(LONGEST, room, len(usual))
    lm.check_context(1 + 2 * length)
    if length > len(usual):
        raise UserError(f"length={length} exceeds the {len(usual)} tokens of the vocabulary: lower it")
    generator = torch.Generator().manual_seed(seed)
    half = torch.stack([usual[torch.randperm(len(usual), generator=generator)[:length]] for _ in range(count)])
    start = lm.tokenizer.bos_token_id
    return torch.cat([torch.full((count, 1), 0 if start is None else start), half, half], 1)


def usual_tokens(lm: LanguageModel) -> Tensor:
    """All token ids but special ones."""
    special = set(lm.tokenizer.all_special_ids)
    return torch.tensor([i for i in range(lm.hf.config.vocab_size) if i not in special])

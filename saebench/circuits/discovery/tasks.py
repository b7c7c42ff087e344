"""Tasks whose circuits are known, or small enough to be found by ablating everything: a token that comes again, and sorting."""

from __future__ import annotations

import torch

from saebench.circuits.discovery.examples import Examples
from saebench.errors import UserError

LETTERS, SORTED = 3, 6  # of the sorting task: kinds of letters, and how many of them there are


def induction_task(vocabulary: int, count: int = 16, length: int = 16, first: int = 5, seed: int = 0) -> Examples:
    """BOS (0), `length` distinct tokens of 1 to `vocabulary`, and the one at `first` again. The answer is what followed it, the other one
    what stands three places further. In the counterfactual its first occurrence is another token, so that there is nothing to repeat.

    Raises UserError where `first` leaves no room for both, or the vocabulary is too small.
    """
    if not 0 <= first < length - 4:
        raise UserError(f"first={first} leaves no room among {length} tokens: use 0 to {length - 5}")
    if vocabulary < length + 1:
        raise UserError(f"a vocabulary of {vocabulary} has no {length + 1} distinct tokens: lower length")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.stack([1 + torch.randperm(vocabulary, generator=generator)[: length + 1] for _ in range(count)])
    clean = torch.cat([torch.zeros(count, 1, dtype=torch.int64), tokens[:, :length], tokens[:, first : first + 1]], 1)
    patch = clean.clone()
    patch[:, 1 + first] = tokens[:, length]
    return Examples(clean, torch.full((count,), length + 1), tokens[:, first + 1], tokens[:, first + 4], patch)


def sorting_task(count: int = 16, written: int = 2, seed: int = 0) -> Examples:
    """Six letters (0, 1, 2) and the first `written` of them sorted: the answer is the next one. In the counterfactual one letter differs so
    that the same start is right and the next letter is another, which is also what the answer is compared with."""
    generator = torch.Generator().manual_seed(seed)
    clean: list[torch.Tensor] = []
    patch: list[torch.Tensor] = []
    answers: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    while len(clean) < count:
        letters = torch.randint(0, LETTERS, (SORTED,), generator=generator)
        changed = letters.clone()
        changed[torch.randint(SORTED, (1,), generator=generator)] = torch.randint(0, LETTERS, (1,), generator=generator)
        right, other = letters.sort().values, changed.sort().values
        if torch.equal(right[:written], other[:written]) and right[written] != other[written]:
            clean.append(torch.cat([letters, right[:written]]))
            patch.append(torch.cat([changed, right[:written]]))
            answers.append(right[written])
            others.append(other[written])
    ends = torch.full((count,), SORTED - 1 + written)
    return Examples(torch.stack(clean), ends, torch.stack(answers), torch.stack(others), torch.stack(patch))

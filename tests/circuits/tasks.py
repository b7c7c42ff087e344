"""Tasks whose circuit is known or can be found by ablating everything."""

import torch

from saebench.circuits.discovery.examples import Examples


def induction_task(lm, count=16, length=16, first=5, seed=0):
    """BOS, distinct random tokens, then one of them again: the answer is what followed it, the other what stands three places behind.
    In the counterfactual its first occurrence is another token, so that there is nothing to repeat."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = lm.hf.config.vocab_size
    tokens = torch.stack([1 + torch.randperm(vocabulary - 1, generator=generator)[: length + 1] for _ in range(count)])
    clean = torch.cat([torch.zeros(count, 1, dtype=torch.int64), tokens[:, :length], tokens[:, first : first + 1]], 1)
    patch = clean.clone()
    patch[:, 1 + first] = tokens[:, length]
    return Examples(clean, torch.full((count,), clean.shape[1] - 1), tokens[:, first + 1], tokens[:, first + 4], patch)


def sorting_task(count=16, written=2, seed=0):
    """Six letters (0, 1, 2) and the first `written` of them sorted: the answer is the next one. In the counterfactual one letter differs so
    that the same start is right and the next letter is another."""
    generator = torch.Generator().manual_seed(seed)
    clean, patch, answers, others = [], [], [], []
    while len(clean) < count:
        letters = torch.randint(0, 3, (6,), generator=generator)
        changed = letters.clone()
        changed[torch.randint(6, (1,), generator=generator)] = torch.randint(0, 3, (1,), generator=generator)
        right, other = letters.sort().values, changed.sort().values
        if torch.equal(right[:written], other[:written]) and right[written] != other[written]:
            clean.append(torch.cat([letters, right[:written]]))
            patch.append(torch.cat([changed, right[:written]]))
            answers.append(right[written])
            others.append(other[written])
    ends = torch.full((count,), 5 + written)
    return Examples(torch.stack(clean), ends, torch.stack(answers), torch.stack(others), torch.stack(patch))

"""What steering costs: how likely a text is to the untouched model, how much it repeats itself, what edits do to neutral text.

Shape suffixes: `B` texts, `S` positions, `C` contexts, `V` vocabulary, `R` texts after one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from saebench.lm import LanguageModel
from saebench.steering.edits import Edit
from saebench.steering.hooks import steer
from saebench.steering.positions import SKIP, Positions

NGRAM = 3
NEUTRAL_AT_ONCE = 8


def nll(lm: LanguageModel, prompt: Sequence[int], written: Sequence[Sequence[int]]) -> list[float]:
    """-log p per token of texts of one length that were written after a prompt, in nats, by the model as it is: [R]."""
    ids_BS = torch.tensor([[*prompt, *some] for some in written])
    logits_BSV = lm.logits(ids_BS)[:, len(prompt) - 1 : -1].float()
    wanted_BS = ids_BS[:, len(prompt) :].to(logits_BSV.device)
    losses_BS = torch.nn.functional.cross_entropy(logits_BSV.transpose(1, 2), wanted_BS, reduction="none")
    return losses_BS.double().mean(1).tolist()


def repetition(ids: Sequence[int]) -> float:
    """Share of a text's runs of three tokens that it had before; 0 for a text of fewer."""
    runs = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def side_effect(lm: LanguageModel, edits: Sequence[Edit], neutral_CS: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """KL(untouched || steered) per token in nats, and ||x' - x|| / ||x|| at the sites of the edits, on each neutral context: [C], [C].
    All of a context is edited but BOS, wherever the edits are meant to act."""
    if not edits:
        return np.zeros(len(neutral_CS)), np.zeros(len(neutral_CS))
    sites = sites_of(edits)
    kls, sizes = [], []
    for ids_CS in neutral_CS.split(NEUTRAL_AT_ONCE):
        with lm.watching(sites) as clean:
            before = lm.logits(ids_CS)[:, SKIP:].float().log_softmax(-1)
        with steer(lm, everywhere(edits)), lm.watching(sites) as steered:
            after = lm.logits(ids_CS)[:, SKIP:].float().log_softmax(-1)
        kls.append((before.exp() * (before - after)).sum(-1).double().mean(1).cpu())
        x, moved = (torch.cat([seen[site][:, SKIP:].flatten(2).float() for site in sites], -1) for seen in (clean, steered))
        sizes.append(((moved - x).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-12)).double().mean(1).cpu())
    return torch.cat(kls).numpy(), torch.cat(sizes).numpy()


def sites_of(edits: Sequence[Edit]) -> list[str]:
    """The sites that edits write, each once."""
    return list(dict.fromkeys(site for edit in edits for site in edit.sites))


def everywhere(edits: Sequence[Edit]) -> list[Edit]:
    """The same edits at all positions but BOS."""
    return [replace(edit, positions=Positions()) for edit in edits]


def spread(ids_NS: Tensor, count: int) -> Tensor:
    """So many contexts, spread evenly: [C, S]."""
    count = min(count, len(ids_NS))
    return ids_NS[torch.arange(count) * len(ids_NS) // max(1, count)]


def prompts_of(lm: LanguageModel, ids_NS: Tensor, count: int = 24, size: int = 12) -> list[str]:
    """Pieces of text to go on from, of `size` tokens each, spread over token contexts."""
    step = max(size + 1, ids_NS.numel() // count)
    rows = ids_NS[:, 1:].flatten()
    pieces = [
        lm.tokenizer.decode(rows[start : start + size].tolist(), skip_special_tokens=True)
        for start in range(0, len(rows) - size, step)
    ]
    return [piece for piece in dict.fromkeys(pieces) if piece.strip()][:count]

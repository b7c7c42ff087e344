"""Retrieval heads: heads that look at what is to be copied from far back while the model copies it (Wu et al. 2024), and what is lost
without them.

A needle of random tokens stands at some depth of a text, and its first tokens stand again at the end; the model then has the rest of it to
write. At each token of the needle that the model gets right, a head has retrieved where the position it looks at most is that token's
own in the needle. Tokens are given as they should be (teacher forcing), so one pass measures a whole needle.
Shape suffixes: `C` prompts, `S` positions, `L` layers, `H` heads of a layer, `T` tokens that are to be copied, `D` width of heads' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from saebench.circuits.heads.roles import patterns
from saebench.errors import UserError
from saebench.lm import LanguageModel
from saebench.lm.attention import attention_weights
from saebench.lm.random_tokens import usual_tokens

CUE = 4  # tokens of the needle that are given again
BATCH = 4
Head = tuple[int, int]


@dataclass(frozen=True)
class Needles:
    """Prompts that end in a second copy of a needle."""

    ids_CS: Tensor
    starts_C: Tensor
    """Where the needle begins."""
    length: int
    cue: int = CUE

    @property
    def targets_T(self) -> Tensor:
        """Positions of the tokens that are to be written, the same in all prompts."""
        size = self.ids_CS.shape[1]
        return torch.arange(size - self.length + self.cue, size)

    @property
    def needed_CT(self) -> Tensor:
        """Where each of them stands in the needle."""
        return self.starts_C[:, None] + torch.arange(self.cue, self.length)


def needles(lm: LanguageModel, texts_CS: Tensor, length: int = 16, *, depths: int = 4, cue: int = CUE, seed: int = 0) -> Needles:
    """Put a needle of `length` different random tokens into every text [C, S], at one of so many depths in turn, and again at the end; what
    stood there is overwritten. Raises UserError where a text has no room for both, or the cue leaves nothing to write."""
    size = texts_CS.shape[1]
    room = size - 2 * length - 1
    if room < depths or not 0 < cue < length:
        raise UserError(
            f"needles of {length} tokens with {cue} given do not fit into texts of {size}: use longer texts or shorter needles"
        )
    generator = torch.Generator().manual_seed(seed)
    usual = usual_tokens(lm)
    if length > len(usual):
        raise UserError(f"length={length} exceeds the {len(usual)} tokens of the vocabulary: lower it")
    ids_CS = texts_CS.long().clone()
    starts_C = 1 + torch.arange(len(ids_CS)) % depths * (room // depths)
    for ids_S, start in zip(ids_CS, starts_C.tolist(), strict=True):
        needle = usual[torch.randperm(len(usual), generator=generator)[:length]]
        ids_S[start : start + length] = ids_S[size - length :] = needle
    return Needles(ids_CS, starts_C, length, cue)


@dataclass(frozen=True)
class Retrieval:
    """What heads retrieve."""

    score_LH: Tensor
    """Share of the copied tokens that each head looked at most while they were written; NaN if the model copies none."""
    copied: float
    """Share of the tokens that the model gets right."""
    loss: float
    """In nats per token of the copy."""

    def strongest(self, count: int) -> list[Head]:
        """The (layer, head) with the highest scores."""
        order = self.score_LH.nan_to_num(-1).flatten().argsort(descending=True, stable=True)[:count].tolist()
        return [divmod(i, self.score_LH.shape[1]) for i in order]


@torch.inference_mode()
def retrieval_scores(lm: LanguageModel, prompts: Needles) -> Retrieval:
    """Score every head. Raises UserError for prompts longer than the model's positions, and for attention of an unknown kind."""
    lm.check_context(prompts.ids_CS.shape[1])
    layers = [attention_weights(lm, layer) for layer in range(lm.site_table.num_layers)]
    right_CT, loss_CT = _copied(lm, prompts)
    hits_LH, rows = 0.0, prompts.targets_T - 1
    for ids_CS, needed_CT, right in zip(
        prompts.ids_CS.split(BATCH), prompts.needed_CT.split(BATCH), right_CT.split(BATCH), strict=True
    ):
        looked_LCHT = torch.stack([p[:, :, rows].argmax(-1).cpu() for p in patterns(lm, layers, ids_CS)])
        hits_LH = hits_LH + ((looked_LCHT == needed_CT[:, None]) & right[:, None]).sum((1, 3))
    return Retrieval(hits_LH / right_CT.sum(), float(right_CT.float().mean()), float(loss_CT.mean()))


def _copied(lm: LanguageModel, prompts: Needles) -> tuple[Tensor, Tensor]:
    """Whether each token of the copy is the model's first choice, and its loss: [C, T]."""
    right, loss = [], []
    for ids_CS in prompts.ids_CS.split(BATCH):
        targets_CT = ids_CS[:, prompts.targets_T]
        logits_CTV = lm.logits(ids_CS)[:, prompts.targets_T - 1].float().cpu()
        right.append(logits_CTV.argmax(-1) == targets_CT)
        loss.append(cross_entropy(logits_CTV.flatten(0, 1), targets_CT.flatten(), reduction="none").view(targets_CT.shape))
    return torch.cat(right), torch.cat(loss)


@dataclass(frozen=True)
class Ablation:
    """Copying without some heads, and without as many others."""

    heads: tuple[Head, ...]
    copied: float
    loss: float
    random_copied: Tensor
    """One entry a draw of other heads."""
    random_loss: Tensor


@torch.inference_mode()
def ablate(lm: LanguageModel, prompts: Needles, heads: Sequence[Head], *, draws: int = 10, seed: int = 0) -> Ablation:
    """Set the outputs of heads to 0 at all positions and measure the copy, beside `draws` random sets of as many other heads. Raises
    UserError for a head that the model lacks, and where too few others are left."""
    num_layers = lm.site_table.num_layers
    num_heads = attention_weights(lm, 0).num_heads
    everything = [(layer, head) for layer in range(num_layers) for head in range(num_heads)]
    for head in heads:
        if head not in everything:
            raise UserError(f"head {head} is not one of the {num_layers} layers of {num_heads} heads, counted from 0")
    others = [head for head in everything if head not in set(heads)]
    if not heads or len(others) < len(heads):
        raise UserError(
            f"{len(heads)} of {len(everything)} heads cannot be held against as many others: name at least one, and fewer"
        )
    generator = torch.Generator().manual_seed(seed)
    sets = [list(heads)]
    sets += [[others[i] for i in torch.randperm(len(others), generator=generator)[: len(heads)].tolist()] for _ in range(draws)]
    found = []
    for some in sets:
        with lm.edit(without_heads(some, num_heads)):
            right_CT, loss_CT = _copied(lm, prompts)
        found.append((float(right_CT.float().mean()), float(loss_CT.mean())))
    rest = torch.tensor(found[1:]).reshape(-1, 2)
    return Ablation(tuple(heads), *found[0], rest[:, 0], rest[:, 1])


def without_heads(heads: Sequence[Head], num_heads: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """The edits for `LanguageModel.edit` that set heads' outputs to 0."""

    def edit(numbers: list[int]) -> Callable[[Tensor], Tensor]:
        def silence(z_BSD: Tensor) -> Tensor:
            z_BSHE = z_BSD.clone().unflatten(-1, (num_heads, -1))
            z_BSHE[:, :, numbers] = 0
            return z_BSHE.flatten(2)

        return silence

    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    return {f"blocks.{layer}.attn.hook_z": edit(numbers) for layer, numbers in by_layer.items()}

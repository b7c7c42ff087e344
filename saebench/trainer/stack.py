"""Members that take their steps together: dictionaries of one architecture and shape, with settings of their own beside that.

At small shapes a step is calls more than work. A stack makes each call once for all its members: normalising, losses, backward pass and
counting. Members keep their own parameters, which lie in the stack's memory, their optimiser, its norm and its clipping; so files
and everything between steps are those of members that train alone.
Shape suffixes: `n` members, `B` tokens, `D` width of what is read or written, `F` d_sae of each.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from saebench.dictionaries import Losses, Scaling, TrainingBatch
from saebench.dictionaries.topk import KRule, TopKDictionary
from saebench.dictionaries.transcoder import TranscoderDictionary
from saebench.errors import NotFinite
from saebench.kernels import current_implementation
from saebench.kernels.latent_gradient import collected_in
from saebench.kernels.latent_numbers import latent_firings
from saebench.kernels.stacked import unstacked
from saebench.trainer.member import Member, figures, join
from saebench.trainer.stacked_topk import StackedTopK

LARGEST = 1 << 22
"""Numbers in the activations of a stack, n B D: with more, kernels and not calls are what takes time."""
SPARSE = 24
"""Stacked members keep at most one latent in so many: others are faster alone, by dense products."""


class Diverged(Exception):
    """NaN or Inf in the training of a member, whose name is the message."""


class Stack:
    """Members that take their steps together, by name; one alone takes them as ever. Their parameters move into memory of the stack."""

    def __init__(self, members: Mapping[str, Member]):
        self.members = dict(members)
        first, *others = self._each = list(members.values())
        self.sequential = first.dictionary.config.sequential
        if not others:
            return
        self.dictionary = StackedTopK([member.dictionary for member in self._each])
        for number, member in enumerate(self._each):
            member.move_into(self.dictionary.memory(number))
        self._silent_nF = torch.stack([member.silent_F for member in self._each])
        for member, silent_F in zip(self._each, self._silent_nF, strict=True):
            member.silent_F = silent_F
        self._read, self._write = (_one_or_all([getattr(member, by) for member in self._each]) for by in ("read", "write"))
        self._same_target = len(self._write) == 1 and all(torch.equal(member.mean_D, first.mean_D) for member in others)
        self._mean_n1D = torch.stack([member.mean_D for member in self._each])[:, None]

    def step(self, activations: Mapping[str, Tensor], step: int) -> None:
        """One optimiser step of each member on a batch of raw activations by site. Raises Diverged."""
        try:
            if len(self._each) == 1:
                self._each[0].step(activations, step)
            else:
                self._step(activations, step)
        except NotFinite:
            raise Diverged(self._not_finite(activations)) from None

    def _step(self, activations: Mapping[str, Tensor], step: int) -> None:
        training = self._each[0].training
        x, y = join(activations, self.dictionary.config)
        x_nBD = self._scaled(x, self._read)
        y_nBD = x_nBD if y is x else self._scaled(y, self._write)
        dead_nF = self._silent_nF >= training.dead_after_tokens
        foreseen = [dead for member in self._each if (dead := member.dead_at_most()) is not None]
        batch = TrainingBatch(x_nBD, y_nBD, dead_nF, step, training.steps, most_dead=max(foreseen) if foreseen else None)
        losses = self.dictionary.losses(batch)
        for member in self._each:
            member.optimiser.forget_gradients()
        losses.total.sum().backward()
        self._hand_out_gradients()
        self._count(losses, torch.stack([member.take_step(step) for member in self._each]))
        if training.resamples_after(step):
            for member, x_BD, y_BD in zip(self._each, x_nBD, y_nBD, strict=True):
                member.resample(TrainingBatch(x_BD, x_BD if y is x else y_BD, member.dead_F, step, training.steps, member.seed))

    def _scaled(self, x_BD: Tensor, scalings: Sequence[Scaling]) -> Tensor:
        """[n, B, D]; the same memory for all members where they scale alike."""
        scaled = [each(x_BD) for each in scalings]
        return scaled[0].expand(len(self._each), -1, -1) if len(scaled) == 1 else torch.stack(scaled)

    @torch.no_grad()
    def _hand_out_gradients(self) -> None:
        """To what members' own parameters have already, such as AuxK's, comes their part of the stack's."""
        num = len(self._each)
        found = [(name, term) for name, parts in self.dictionary.collected.items() for term in parts.terms]
        for (name, _), terms in zip(found, unstacked([term for _, term in found], num), strict=True):
            for member, term in zip(self._each, terms, strict=True):
                own = collected_in(getattr(member.dictionary, name))
                assert own is not None
                own.terms.append(term)
        for name, stacked in self.dictionary.named_parameters():
            if stacked.grad is not None:
                for member, part in zip(self._each, stacked.grad.chunk(num), strict=True):
                    own = getattr(member.dictionary, name)
                    own.grad = part.view(own.shape) if own.grad is None else own.grad + part.view(own.shape)
        self.dictionary.forget_gradients()

    @torch.no_grad()
    def _count(self, losses: Losses, norm_n: Tensor) -> None:
        num, mean_n1D = len(self._each), self._mean_n1D
        firings_nF = latent_firings(losses.codes).view(num, -1)
        tokens = losses.squared_error_B.shape[1]
        self._silent_nF.add_(tokens).masked_fill_(firings_nF > 0, 0)
        if self._same_target:  # one row for all
            losses.target_BD, mean_n1D = losses.target_BD[:1], mean_n1D[:1]
        found = figures(losses, norm_n, firings_nF, mean_n1D)
        rows = [value_n.double().expand(num).unbind() for value_n in found.values()]
        for number, member in enumerate(self._each):
            member.add({name: row[number] for name, row in zip(found, rows, strict=True)}, tokens)

    @torch.no_grad()
    def _not_finite(self, activations: Mapping[str, Tensor]) -> str:
        """The first member that cannot encode this."""
        for name, member in self.members.items():
            try:
                member.dictionary.encode(member.read(join(activations, member.dictionary.config)[0]))
            except NotFinite:
                return name
        return next(iter(self.members))


def stacks(members: Mapping[str, Member]) -> list[Stack]:
    """All members in as few stacks as can be, in their order: those that cannot be stacked are alone in theirs."""
    found: list[dict[str, Member]] = []
    latest: dict[Hashable, dict[str, Member]] = {}
    for name, member in members.items():
        kind, width = _kind(member), max(len(member.read.scale_D), len(member.mean_D))
        if kind in latest and (len(latest[kind]) + 1) * member.training.batch_size * width <= LARGEST:
            latest[kind][name] = member
        else:
            found.append({name: member})
            if kind is not None:
                latest[kind] = found[-1]
    return [Stack(each) for each in found]


def _kind(member: Member) -> Hashable | None:
    """What members of a stack share; None where there is no stack for it."""
    config = member.dictionary.config
    if type(member.dictionary) not in (TopKDictionary, TranscoderDictionary) or current_implementation() == "reference":
        return None
    assert isinstance(config, KRule)
    if config.skip or config.orthogonality or config.k * SPARSE > config.d_sae or member.training.weights != "float32":
        return None
    shape = config.d_sae, config.blocks_in, config.blocks_out
    return config.architecture, config.reads, config.writes, shape, config.decoder, config.subtract_b_dec, config.aux_coefficient


def _one_or_all(scalings: Sequence[Scaling]) -> Sequence[Scaling]:
    """One where they are alike."""
    first = scalings[0]
    alike = all(torch.equal(each.shift_D, first.shift_D) and torch.equal(each.scale_D, first.scale_D) for each in scalings)
    return scalings[:1] if alike else scalings

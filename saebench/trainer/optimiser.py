"""Adam whose gradients need not exist: matrices of latent rows take their step row by row, where the gradient of a row is summed.

The step of torch.optim.Adam, with the gradient clipped to a global norm before it and rows that are kept at length 1 held there. Kernels
hand over the gradients of matrices as terms (kernels/latent_gradient.py), everything else comes from autograd. Where the terms show at a
glance that the gradient is not too long, nothing is clipped and its length is found on the way; else it is measured first, exactly.

Matrices of latent rows may be read in bfloat16 (`rounded`). The parameters themselves stay float32 and take the steps, whoever else changes
them changes those, and files and checkpoints hold them; the copies are made anew where a parameter was changed by others since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saebench.dictionaries import Dictionary
from saebench.kernels.implementations import primitives_for
from saebench.kernels.latent_gradient import Parts, collect
from saebench.kernels.primitives import AdamRule, Gradient, Primitives
from saebench.kernels.row_lengths import keep_lengths, lengths_to_leave

MOMENTS = ("exp_avg", "exp_avg_sq")


def asking_waits(device: torch.device) -> bool:
    """Whether a number in a tensor is known only once all work before is done."""
    return device.type != "cpu"


class _Matrix:
    """One parameter as rows [F, D], the copy of it that kernels read, its moments, and where its gradient comes from."""

    def __init__(self, parameter: nn.Parameter, unit: bool, momentum: torch.dtype, rounded: torch.dtype | None):
        self.parameter, self.unit, self.master = parameter, unit, parameter.data
        self.rows = parameter.data.flatten(1) if parameter.ndim > 1 else parameter.data.view(1, -1)
        self.copy = None if rounded is None else parameter.data.to(rounded)
        self.copied = parameter._version  # which counts changes in place, by others than the kernels: those round themselves
        first = momentum if parameter.ndim > 1 and parameter.dtype == torch.float32 else parameter.dtype
        self.moments = [torch.zeros(parameter.shape, dtype=dtype, device=parameter.device) for dtype in (first, parameter.dtype)]
        self.parts = collect(parameter) if parameter.ndim == 2 else Parts()
        self.step = 0
        if self.copy is None:
            keep_lengths(parameter)

    @property
    def gradient(self) -> Gradient | None:
        """What the backward pass left; None where it did not come by."""
        grad, terms, own_F = self.parameter.grad, self.parts.terms, self.parts.own_F
        if grad is None and not terms and own_F is None:
            return None
        if self.copy is not None:  # rows of tokens are gathered once for every latent active on them
            terms = [replace(term, rows_BD=term.rows_BD.to(self.copy.dtype)) for term in terms]
        return Gradient(tuple(terms), None if grad is None else grad.reshape(self.rows.shape), own_F)

    def update(self, gradient: Gradient, rule: AdamRule, factor: Tensor) -> Tensor | None:
        """Take a step; perhaps returns the gradient's square."""
        m_FD, v_FD = (moment.view(self.rows.shape) for moment in self.moments)
        if self.copy is None:
            lengths = lengths_to_leave(self.parameter, self.primitives)
            return self.primitives.update(self.rows, m_FD, v_FD, gradient, self.unit, rule, factor, **lengths)
        copy_FD = self.copy.view(self.rows.shape)
        return self.primitives.update(copy_FD, m_FD, v_FD, gradient, self.unit, rule, factor, self.rows)

    @property
    def primitives(self) -> Primitives:
        return primitives_for(self.rows) if self.copy is None else primitives_for(self.copy, self.rows)

    def show_copy(self) -> None:
        if self.copy is not None:
            if self.copied != self.parameter._version:
                self.copy.copy_(self.master)
                self.copied = self.parameter._version
            self.parameter.data = self.copy

    def show_master(self) -> None:
        if self.copy is not None:
            self.parameter.data = self.master

    def forget(self) -> None:
        self.parameter.grad = None
        self.parts.clear()


class Adam:
    """The optimiser of one dictionary."""

    def __init__(
        self,
        dictionary: Dictionary,
        betas: tuple[float, float],
        eps: float,
        clip: float,
        momentum: torch.dtype = torch.float32,
        weights: torch.dtype | None = None,
    ):
        """`clip` is the largest norm of the gradient of all parameters together; longer ones are scaled down to it. `momentum` is the type
        in which the running mean of a matrix' gradient is kept; the step is taken before it is rounded. `weights` is the type in which
        kernels read matrices of latent rows within `rounded`, by default their own."""
        self.betas, self.eps, self.clip = betas, eps, clip
        unit, copied = ({id(W) for W in rows} for rows in (dictionary.unit_rows(), dictionary.latent_rows()))
        self._matrices = {
            name: _Matrix(p, id(p) in unit, momentum, weights if id(p) in copied else None)
            for name, p in dictionary.named_parameters()
            if p.requires_grad
        }

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Inside of this, which is for losses and their backward pass, the matrices of latent rows are what kernels read: rounded copies,
        if so set."""
        try:
            for matrix in self._matrices.values():
                matrix.show_copy()
            yield
        finally:
            for matrix in self._matrices.values():
                matrix.show_master()

    def forget_gradients(self) -> None:
        """To be called before a backward pass."""
        for matrix in self._matrices.values():
            matrix.forget()

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Take a step with the gradients that the backward pass left, and forget them; returns their norm before clipping, 0-dim."""
        found = [(matrix, gradient) for matrix in self._matrices.values() if (gradient := matrix.gradient) is not None]
        if not found:
            return torch.zeros(())
        if measure := not self._surely_short(found):
            squares = [self._square(matrix, gradient) for matrix, gradient in found]
            factor = (self.clip / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp(max=1.0).float()
        else:
            squares, factor = [], torch.ones((), device=found[0][0].rows.device)
        for matrix, gradient in found:
            matrix.step += 1
            rule = AdamRule(lr, self.betas, self.eps, matrix.step)
            square = matrix.update(gradient, rule, factor)
            if not measure:
                assert square is not None
                squares.append(square)
            matrix.forget()
        return torch.stack(squares).sum().sqrt()

    def _surely_short(self, found: list[tuple[_Matrix, Gradient]]) -> bool:
        """Whether a bound shows that the gradient is not longer than `clip`, and every update tells its length."""
        total = 0.0
        for matrix, gradient in found:
            bound = getattr(matrix.primitives, "gradient_bound", None)
            if bound is None or asking_waits(matrix.rows.device):
                return False
            total += bound(matrix.rows, gradient)
        return total <= self.clip**2

    @staticmethod
    def _square(matrix: _Matrix, gradient: Gradient) -> Tensor:
        return matrix.primitives.gradient_square(matrix.rows, gradient, matrix.unit)

    @torch.no_grad()
    def forget_rows(self, name: str, rows: Tensor) -> None:
        """Set the moments of some rows of a parameter to zero."""
        for moment in self._matrices[name].moments:
            moment[rows] = 0.0

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by parameter's number and name."""
        tensors: dict[str, Tensor] = {}
        for number, matrix in enumerate(self._matrices.values()):
            tensors |= {f"{number}.{name}": moment for name, moment in zip(MOMENTS, matrix.moments, strict=True)}
            tensors[f"{number}.step"] = torch.tensor(float(matrix.step))
        return tensors

    def load_state(self, tensors: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        for number, matrix in enumerate(self._matrices.values()):
            for name, moment in zip(MOMENTS, matrix.moments, strict=True):
                moment.copy_(tensors[f"{number}.{name}"])
            matrix.step = int(tensors[f"{number}.step"])

"""Attention whose heads each write one number, and the few heads of a token that count (methods.md T13, K8).

A group of heads shares queries and keys, so it is one ordinary attention head as wide as the group: z = softmax(causal(q k^T)) v, where
column h of v is what head h reads. Scores of all heads exist for one block of contexts at a time and attention weights for one block of
groups; what is kept are the selected entries. The backward pass computes a block anew, so it needs no more memory than the forward.
Shape suffixes: `C` contexts, `S` positions, `D` width of the input, `G` groups, `E` width of queries and keys, `H` heads of a group,
`F` all heads, `B` tokens, `K` selected heads of a token, `R` pairs of coordinates that are rotated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from saebench.codes import SparseCodes
from saebench.kernels.implementations import current_implementation, primitives_for
from saebench.kernels.stock import select_topk

BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class AttentionRule:
    """How positions attend: the factor on q . k, rotary frequencies in radians per position (empty for none), the bound that scores are
    squashed to, and how many positions up to its own a position sees (None: all)."""

    scale: float
    frequencies_R: Tensor
    soft_cap: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class Heads:
    """The weights of attention heads in groups; the heads of a group follow each other."""

    W_Q_GDE: Tensor
    b_Q_GE: Tensor
    W_K_GDE: Tensor
    b_K_GE: Tensor
    W_V_FD: Tensor
    b_V_F: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.W_Q_GDE, self.b_Q_GE, self.W_K_GDE, self.b_K_GE, self.W_V_FD, self.b_V_F

    def groups(self, part: slice) -> Heads:
        """Some of the groups, with their heads."""
        size = len(self.W_V_FD) // len(self.W_Q_GDE)
        heads = slice(part.start * size, part.stop * size)
        return Heads(*(t[part] for t in self.tensors()[:4]), *(t[heads] for t in self.tensors()[4:]))


def rotate(x_CGSE: Tensor, frequencies_R: Tensor) -> Tensor:
    """Rotary positions: coordinates i and R + i turn by position * frequency[i]; those behind 2 R stay."""
    pairs = len(frequencies_R)
    if not pairs:
        return x_CGSE
    angles_SR = torch.arange(x_CGSE.shape[-2], device=x_CGSE.device, dtype=frequencies_R.dtype)[:, None] * frequencies_R
    cos_SR, sin_SR = angles_SR.cos().to(x_CGSE.dtype), angles_SR.sin().to(x_CGSE.dtype)
    first, second, rest = x_CGSE.split([pairs, pairs, x_CGSE.shape[-1] - 2 * pairs], -1)
    return torch.cat([first * cos_SR - second * sin_SR, second * cos_SR + first * sin_SR, rest], -1)


def attention_pattern(q_CGSE: Tensor, k_CGSE: Tensor, rule: AttentionRule) -> Tensor:
    """Attention weights of queries and keys that are rotated already, dense: [C, G, S, S], rows sum to 1."""
    scores = q_CGSE @ k_CGSE.mT * rule.scale
    if rule.soft_cap is not None:
        scores = rule.soft_cap * (scores / rule.soft_cap).tanh()
    return scores.masked_fill(~_visible(scores.shape[-1], rule.window, scores.device), -torch.inf).softmax(-1)


def attend(q_CGSE: Tensor, k_CGSE: Tensor, v_CGSH: Tensor, rule: AttentionRule) -> Tensor:
    """What every head of every group gathers: pattern @ v [C, G, S, H], without the pattern where the machine has a way."""
    size = q_CGSE.shape[-2]
    if current_implementation() == "reference":
        return attention_pattern(q_CGSE, k_CGSE, rule) @ v_CGSH
    if rule.soft_cap is None and (rule.window is None or rule.window >= size):
        return scaled_dot_product_attention(q_CGSE, k_CGSE, v_CGSH, is_causal=True, scale=rule.scale)
    primitives = primitives_for(q_CGSE)
    if hasattr(primitives, "attention"):  # no library does these without the pattern
        return _Fused.apply(q_CGSE, k_CGSE, v_CGSH, rule, primitives)
    if rule.soft_cap is not None:
        return attention_pattern(q_CGSE, k_CGSE, rule) @ v_CGSH
    visible_SS = _visible(size, rule.window, q_CGSE.device)
    return scaled_dot_product_attention(q_CGSE, k_CGSE, v_CGSH, attn_mask=visible_SS, scale=rule.scale)


class _Fused(torch.autograd.Function):
    """Attention by an implementation's own kernel."""

    @staticmethod
    def forward(ctx: Any, q_CGSE: Tensor, k_CGSE: Tensor, v_CGSH: Tensor, rule: AttentionRule, primitives: Any) -> Tensor:
        z_CGSH, lse_CGS = primitives.attention(q_CGSE, k_CGSE, v_CGSH, rule.scale, rule.soft_cap, rule.window)
        ctx.save_for_backward(q_CGSE, k_CGSE, v_CGSH, lse_CGS, z_CGSH)
        ctx.rule, ctx.primitives = rule, primitives
        return z_CGSH.to(v_CGSH.dtype)

    @staticmethod
    def backward(ctx: Any, grad_CGSH: Tensor) -> tuple[Tensor | None, ...]:
        rule: AttentionRule = ctx.rule
        settings = (rule.scale, rule.soft_cap, rule.window)
        grads = ctx.primitives.attention_gradients(*ctx.saved_tensors, grad_CGSH, *settings)
        return *(grad.to(t.dtype) for grad, t in zip(grads, ctx.saved_tensors, strict=False)), None, None


def _visible(size: int, window: int | None, device: torch.device) -> Tensor:
    ones_SS = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    return ones_SS if window is None else ones_SS.triu(1 - window)


def queries_keys(x_CSD: Tensor, heads: Heads, rule: AttentionRule) -> tuple[Tensor, Tensor]:
    """Queries and keys of every group, rotated: [C, G, S, E] each."""
    q_CGSE = torch.einsum("csd,gde->cgse", x_CSD, heads.W_Q_GDE) + heads.b_Q_GE[:, None]
    k_CGSE = torch.einsum("csd,gde->cgse", x_CSD, heads.W_K_GDE) + heads.b_K_GE[:, None]
    return rotate(q_CGSE, rule.frequencies_R), rotate(k_CGSE, rule.frequencies_R)


def head_outputs(x_CSD: Tensor, heads: Heads, rule: AttentionRule) -> Tensor:
    """z of every head at every position: [C, S, F], differentiable by autograd."""
    contexts, size = x_CSD.shape[:2]
    v_CSF = x_CSD @ heads.W_V_FD.T + heads.b_V_F
    v_CGSH = v_CSF.view(contexts, size, len(heads.W_Q_GDE), -1).transpose(1, 2)
    z_CGSH = attend(*queries_keys(x_CSD, heads, rule), v_CGSH, rule)
    return z_CGSH.transpose(1, 2).reshape(contexts, size, -1)


def select_heads(
    x_CSD: Tensor,
    heads: Heads,
    rule: AttentionRule,
    k: int,
    *,
    signed: bool = False,
    skip: int = 0,
    among_F: Tensor | None = None,
) -> SparseCodes:
    """The k heads with the largest z, at every position but the first `skip`: codes of C * (S - skip) tokens, row-major.

    An entry that is not positive becomes padding; with `signed` heads rank by |z| and keep their sign. `among_F` restricts the choice to
    some heads. Differentiable in input and weights, with the selection held constant; ties go to the lowest index.
    """
    k = min(k, len(heads.W_V_FD))
    if current_implementation() == "reference":
        z_BF = head_outputs(x_CSD, heads, rule)[:, skip:].flatten(0, 1)
        z_BF = z_BF if among_F is None else z_BF * among_F
        ranks_BF = z_BF.detach().abs() if signed else z_BF.detach()
        indices_BK = torch.sort(ranks_BF, dim=1, descending=True, stable=True).indices[:, :k]
        values_BK = z_BF.gather(1, indices_BK)
        return SparseCodes(indices_BK, values_BK if signed else values_BK.relu(), z_BF.shape[1])
    values_BK, indices_BK = _SelectHeads.apply(x_CSD, *heads.tensors(), rule, k, signed, skip, among_F)
    return SparseCodes(indices_BK, values_BK, len(heads.W_V_FD))


class _SelectHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_CSD: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        *weights, rule, k, signed, skip, among_F = arguments
        heads, kept = Heads(*weights), x_CSD.shape[1] - skip
        values_BK = x_CSD.new_empty(len(x_CSD) * kept, k)
        indices_BK = torch.empty(len(values_BK), k, dtype=torch.int64, device=x_CSD.device)
        blocks = list(_blocks(x_CSD, heads))
        ctx.graph = None
        for contexts, parts in blocks:
            rows = slice(contexts.start * kept, contexts.stop * kept)
            if len(blocks) == len(parts) == 1 and any(ctx.needs_input_grad):  # all fits in one block: the graph may as well stay
                ctx.graph = _graph(x_CSD, heads, rule, skip, ctx.needs_input_grad[0])
                z_bF = ctx.graph[1].detach().flatten(0, 1)
            else:
                z_bF = torch.cat(
                    [head_outputs(x_CSD[contexts], heads.groups(part), rule)[:, skip:] for part in parts], -1
                ).flatten(0, 1)
            if among_F is not None:
                z_bF = z_bF * among_F
            values, indices_BK[rows] = select_topk(z_bF.abs() if signed else z_bF, k)
            values_BK[rows] = z_bF.gather(1, indices_BK[rows]) if signed else values.relu_()
        ctx.save_for_backward(x_CSD, values_BK, indices_BK, *weights)
        ctx.rule, ctx.skip = rule, skip
        ctx.mark_non_differentiable(indices_BK)
        return values_BK, indices_BK

    @staticmethod
    def backward(ctx: Any, grad_BK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_CSD, values_BK, indices_BK, *weights = ctx.saved_tensors
        heads, kept = Heads(*weights), x_CSD.shape[1] - ctx.skip
        size = len(heads.W_V_FD) // len(heads.W_Q_GDE)
        grad_BK = grad_BK * (values_BK != 0)
        grad_x = torch.zeros_like(x_CSD) if ctx.needs_input_grad[0] else None
        grads = Heads(*(torch.zeros_like(weight) for weight in weights))
        for contexts, parts in _blocks(x_CSD, heads):
            rows = slice(contexts.start * kept, contexts.stop * kept)
            grad_bF = grad_BK.new_zeros(rows.stop - rows.start, len(heads.W_V_FD)).scatter_(1, indices_BK[rows], grad_BK[rows])
            grad_cSF = grad_bF.view(contexts.stop - contexts.start, kept, -1)
            for part in parts:
                graph = ctx.graph or _graph(x_CSD[contexts], heads.groups(part), ctx.rule, ctx.skip, grad_x is not None)
                (x, *leaves), z_cSH = graph
                wanted = leaves if grad_x is None else [*leaves, x]
                news = torch.autograd.grad(z_cSH, wanted, grad_cSF[..., part.start * size : part.stop * size])
                for total, new in zip(grads.groups(part).tensors(), news, strict=False):
                    total += new
                if grad_x is not None:
                    grad_x[contexts] += news[-1]
        ctx.graph = None
        return grad_x, *grads.tensors(), None, None, None, None, None


def _graph(x_CSD: Tensor, heads: Heads, rule: AttentionRule, skip: int, to_input: bool) -> tuple[list[Tensor], Tensor]:
    """Fresh leaves, the input first, and z of all positions but the first `skip` as autograd's function of them."""
    with torch.enable_grad():
        leaves = [x_CSD.detach().requires_grad_(to_input), *(t.detach().requires_grad_() for t in heads.tensors())]
        return leaves, head_outputs(leaves[0], Heads(*leaves[1:]), rule)[:, skip:]


def _blocks(x_CSD: Tensor, heads: Heads) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of contexts whose z fits in 64 MiB, each with blocks of groups whose attention weights do."""
    contexts, size = x_CSD.shape[:2]
    groups, row = len(heads.W_Q_GDE), size * x_CSD.element_size()
    at_once = min(contexts, max(1, BLOCK_BYTES // (row * len(heads.W_V_FD))))
    together = min(groups, max(1, BLOCK_BYTES // (at_once * row * size)))
    parts = [slice(start, min(start + together, groups)) for start in range(0, groups, together)]
    for start in range(0, contexts, at_once):
        yield slice(start, min(start + at_once, contexts)), parts

"""The contract between operations and implementations: what a machine must be able to do, without gradients.

An operation (`encode_topk.py`, `sparse_decode.py`, ...) holds the mathematics, the gradients and the dense reference. What costs time in
it is one of the functions here, and every implementation offers all of them under these names: `stock.py` (torch operations, any
device and dtype), `cpu/` (compiled C++, float32), `triton/` (CUDA). `implementations.py` says which one serves a tensor.

Shape suffixes: `B` tokens, `K` entries of a token, `N` entries in all, `D` width, `F` d_sae, `M` a part of the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from saebench.codes import SparseCodes


@dataclass(frozen=True)
class Term:
    """A part of the gradient of a matrix of latent rows that is not summed yet: row i of it is the sum over entries (token b, latent i)
    of value * rows[b]. Entries of value 0 add nothing."""

    codes: SparseCodes
    rows_BD: Tensor


@dataclass(frozen=True)
class Gradient:
    """The gradient of a matrix of latent rows [F, D]: the sum of terms, of `dense_FD`, and of own_F[i] times the matrix' own row i."""

    terms: Sequence[Term] = ()
    dense_FD: Tensor | None = None
    own_F: Tensor | None = None


@dataclass(frozen=True)
class AdamRule:
    """One step of Adam: m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)."""

    lr: float
    betas: tuple[float, float]
    eps: float
    step: int
    """t, from 1."""


class Primitives(Protocol):
    """What every implementation offers. Tensors are contiguous and on one device; results are new tensors unless said otherwise.

    Where a matrix W of latent rows is bfloat16, tokens and biases may be float32: scores are products with tokens rounded to the type of
    W, everything else reads tokens as they are, and sums, comparisons and results are float32."""

    def topk(
        self, x_BD: Tensor, W_FD: Tensor, b_F: Tensor, scale_F: Tensor | None, k: int, latents_M: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The k largest of z = (x W^T + b) * scale in each row, by value in float32 or better and, of equal ones, by lowest index; only
        among `latents_M` (ascending) where given. Indices int32 and ReLU(z), [B, K] each, K = min(k, F or M), in any order."""
        ...

    def above(
        self, x_BD: Tensor, W_FD: Tensor, b_F: Tensor, scale_F: Tensor | None, threshold_F: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All z = (x W^T + b) * scale with z > threshold, strictly: offsets [B + 1] int64, indices [N] int32 ascending in each row, z [N].
        Thresholds may be -inf."""
        ...

    def decode(self, codes: SparseCodes, W_FD: Tensor, bias_D: Tensor | None = None) -> Tensor:
        """sum over the entries of each token of value * W[index], plus bias: [B, D]. A latent may occur twice in a row."""
        ...

    def dots(self, codes: SparseCodes, rows_BD: Tensor, W_FD: Tensor) -> Tensor:
        """rows[b] . W[index] at every entry, also where the value is 0, in the shape of the values."""
        ...

    def by_latent(self, indices_N: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
        """Positions of the entries sorted by latent, stable, [N] int32; and where each latent's begin, [F + 1] int32."""
        ...

    def sums(self, codes: SparseCodes, rows_BD: Tensor) -> Tensor:
        """The sum of one term: [F, D]. Exact zeros for latents without entries; the same bits every time."""
        ...

    def gradient_square(self, W_FD: Tensor, gradient: Gradient, unit: bool) -> Tensor:
        """The sum of squares of a gradient, 0-dim; with `unit`, of what is left when each row's component along W's row is removed."""
        ...

    def update(
        self,
        W_FD: Tensor,
        m_FD: Tensor,
        v_FD: Tensor,
        gradient: Gradient,
        unit: bool,
        rule: AdamRule,
        factor: Tensor,
        master_FD: Tensor | None = None,
    ) -> Tensor | None:
        """One pass over the latents, in place: sum the gradient of a row, with `unit` remove its component along the row, multiply by
        `factor` (0-dim, on the device), take Adam's step (m may be bfloat16; the step is taken before it is rounded), with `unit` scale
        the row to length 1 (methods.md K12). Rows without entries take their step too. The gradient is never stored. With `master_FD`,
        float32 weights, that is done to them and W, bfloat16, becomes their rounded copy. May return what `gradient_square` would
        have."""
        ...


class Fused(Primitives, Protocol):
    """What an implementation may offer besides; operations ask for each by name."""

    CROWDED: int
    """With more than one entry in so many active, the gradient of a matrix is summed at once by dense products."""

    def decode_error(
        self, codes: SparseCodes, W_FD: Tensor, bias_D: Tensor, y_BD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """bias + decode(codes) - y [B, D], its squared length [B], and perhaps its `dots` with the rows of the entries."""
        ...

    def decode_error_pair(
        self, codes: SparseCodes, beside: Tensor, W_FD: Tensor, bias_D: Tensor, y_BD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`decode_error`, and squared lengths and products of the error of the code with values `beside`; not for crowded codes."""
        ...

    def weighted_sum(self, weights_B: Tensor, rows_BD: Tensor) -> Tensor:
        """sum of weights[b] * rows[b]: [D]."""
        ...

    def totals(self, codes: SparseCodes) -> Tensor:
        """The sum of each latent's values: [F]."""
        ...

    def row_lengths(self, W_FD: Tensor, from_D: Tensor | None = None) -> Tensor:
        """||W[f] - from|| for every row: [F]. Where this is offered, `update` takes `lengths_F` and leaves ||W[f]|| of the new rows there,
        the same bits."""
        ...

    def gradient_bound(self, W_FD: Tensor, gradient: Gradient) -> float:
        """An upper bound of `gradient_square` that costs little, for tensors in memory: on a device it would be waited for. Where it is
        offered, `update` returns the square itself."""
        ...

    def attention(
        self, q_CGSE: Tensor, k_CGSE: Tensor, v_CGSH: Tensor, scale: float, soft_cap: float | None, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """Causal attention [C, G, S, H] without its pattern, and the logarithm of each position's weights' sum [C, G, S];
        `attention_gradients` is its way back (lorsa_attention.py)."""
        ...

    def pursue(self, x_BD: Tensor, atoms_FD: Tensor, steps: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All steps of matching pursuit: atoms, coefficients and norms [B, T], and what is left [B, D] (matching_pursuit.py)."""
        ...

"""Lorsa, low-rank sparse attention (He et al. 2025; methods.md T13): predicts an attention layer's output from its input by many heads,
of which each reads one direction and writes one, and few are active at a position.

    A^g = softmax(causal(q k^T * scale)), q = x W_Q^g + b_Q^g, k alike, rotated as in the host model     groups g share attention
    z^h_t = sum_{s <= t} A^g[t, s] (x_s . w_V^h + b_V^h)                                                  head h is of group h // size
    y_hat_t = sum over the k heads with the largest z^h_t of z^h_t w_O^h + b_dec,   rows w_O of W_dec of unit length

The latents are the heads, their activations are z. Position 0 of a context (BOS) is read but not predicted.
Shape suffixes: `C` contexts, `S`, `T` positions, `B` tokens, `D` width of what is read or written, `F` d_sae, `G` groups, `E` d_qk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.dictionaries.auxk import default_k_aux, missed_share, missed_squares
from saebench.dictionaries.base import Dictionary, DictionaryConfig, Losses, TrainingBatch, register
from saebench.dictionaries.geometry import random_directions, random_unit_rows, scale_to_unit
from saebench.dictionaries.scaling import Scaling
from saebench.errors import UserError
from saebench.kernels import sparse_decode
from saebench.kernels.lorsa_attention import AttentionRule, Heads, attention_pattern, head_outputs, queries_keys, select_heads
from saebench.lm.attention import AttentionWeights, attention_input, attention_weights

EXAMPLE = 'site = "blocks.2.attn.hook_in" and target = "blocks.2.hook_attn_out"'
SKIP = 1  # position 0 has an outlying norm: neither trained on nor counted
SAMPLE_CONTEXTS = 32  # that biases and scales are initialised from


class Lorsa(DictionaryConfig):
    """Configuration of a Lorsa dictionary; `d_sae` is the number of heads."""

    architecture = "lorsa"
    sequential = True
    largest_lr_rise = 1.0  # what suits other short runs turns queries and keys too fast: most heads die

    k: int = Field(default=32, gt=0)
    """Heads active at each position, at most."""
    score: Literal["relu", "abs"] = "relu"
    """What is kept: the largest positive z, or the largest |z| with its sign."""
    num_qk: int | None = Field(default=None, gt=0)
    """Groups of heads that share queries and keys; default as many per head of the model as leave d_qk heads in a group."""
    d_qk: int | None = Field(default=None, gt=0)
    """Width of queries and keys; default that of the model's heads."""
    initial: Literal["host", "random"] = "host"
    """Where queries and keys start: as those of the model's layer, or at random."""
    initial_directions: Literal["random", "active_subspace"] = "active_subspace"
    """Where what heads read and write starts: reading at random and writing what correlates with it, or by the model's value and output
    matrices, in the directions of each of its heads that hold `active_share` of the values' variance (methods.md T13 c)."""
    active_share: float = Field(default=0.99, gt=0, le=1)
    """Share of the variance that the active subspace holds."""
    rotary_dim: int | None = Field(default=None, ge=0, multiple_of=2)
    """Coordinates of queries and keys that positions rotate; default those of the model."""
    rotary_base: float | None = Field(default=None, gt=0)
    """Base of the rotary frequencies; default that of the model."""
    rotary_frequencies: tuple[float, ...] | None = None
    """The frequencies themselves, in radians per position, for a model whose are not powers of one base."""
    scale: float | None = Field(default=None, gt=0)
    """Factor on q . k; default that of the model, or 1 / sqrt(d_qk) where no model is asked for."""
    soft_cap: float | None = Field(default=None, gt=0)
    """Bound that attention scores are squashed to by tanh; default that of the model."""
    window: int | None = Field(default=None, gt=0)
    """Positions that a position sees, its own included; default those of the model."""
    aux_coefficient: float = Field(default=0.0, ge=0)
    """Weight of AuxK, by which dead heads learn to predict the residual; 0 leaves it out."""
    k_aux: int | None = Field(default=None, gt=0)
    """Dead heads that AuxK uses at each position; default the power of two nearest half the width."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if len(self.reads) > 1 or len(self.writes) != 1 or self.rewrites:
            raise ValueError(f"lorsa reads one site and writes another: give site and target, such as {EXAMPLE}")
        if self.k > self.d_sae:
            raise ValueError(f"k={self.k} exceeds d_sae={self.d_sae}: lower k or raise d_sae")
        if self.num_qk is not None and self.d_sae % self.num_qk:
            raise ValueError(f"num_qk={self.num_qk} does not divide d_sae={self.d_sae}: groups have equally many heads")
        if self.rotary_dim is not None and self.d_qk is not None and self.rotary_dim > self.d_qk:
            raise ValueError(f"rotary_dim={self.rotary_dim} exceeds d_qk={self.d_qk}: lower it")
        if self.rotary_dim and self.rotary_base is None and 2 * len(self.rotary_frequencies or ()) != self.rotary_dim:
            raise ValueError(f"rotary_dim={self.rotary_dim} needs rotary_base: give it, or leave both to the model")
        return self

    @property
    def default_id(self) -> str:
        return f"{self.architecture}-{self.d_sae}-k{self.k}"

    @property
    def from_host(self) -> bool:
        """Whether weights start from those of the model."""
        return self.initial == "host" or self.initial_directions == "active_subspace"

    @property
    def needs_lm(self) -> bool:
        return self.from_host or self.d_qk is None or self.rotary_dim is None

    @property
    def layer(self) -> int:
        """The layer whose attention it predicts. Raises UserError where the target is of no layer."""
        found = re.match(r"blocks\.(\d+)\.", self.writes[0])
        if found is None:
            raise UserError(
                f"target {self.writes[0]!r} is not of one layer: lorsa predicts an attention layer, such as {EXAMPLE}"
            )
        return int(found.group(1))

    def for_lm(self, lm: Any) -> Self:
        """The same with groups, widths and the way positions attend filled in from the model's layer. Raises UserError where
        the layer does not fit."""
        if not self.needs_lm:
            return self
        host = attention_weights(lm, self.layer)
        inputs = (attention_input(self.layer), f"blocks.{self.layer}.ln1.hook_out")
        if self.from_host and self.reads and self.reads[0] not in inputs:
            raise UserError(f"site {self.reads[0]!r} is not what layer {self.layer}'s attention reads: use {inputs[0]}")
        if self.initial == "host" and self.d_qk not in (None, host.d_head):
            raise UserError(f"d_qk={self.d_qk} is not the {host.d_head} of the model's heads: leave it out, or initial='random'")
        step = host.num_heads if self.initial == "host" else 1
        if (self.num_qk or self.d_sae) % step:
            raise UserError(f"{'num_qk' if self.num_qk else 'd_sae'} is not a multiple of the model's {step} heads: change it")
        rule, d_qk = host.rule, self.d_qk or host.d_head
        update: dict[str, Any] = {
            "num_qk": self.num_qk or most_groups(self.d_sae, d_qk, step),
            "d_qk": d_qk,
            "scale": self.scale or rule.scale,
            "soft_cap": self.soft_cap or rule.soft_cap,
            "window": self.window or rule.window,
        }
        if self.rotary_dim is None:
            update["rotary_dim"] = 2 * len(rule.frequencies_R)
        if self.rotary_dim is None and self.rotary_base is None:
            base = (getattr(lm.hf.config, "rope_parameters", None) or {}).get("rope_theta")
            if base is not None and torch.allclose(frequencies(len(rule.frequencies_R), base), rule.frequencies_R.cpu()):
                update["rotary_base"] = base
            else:
                update["rotary_frequencies"] = tuple(rule.frequencies_R.tolist())
        return self.model_copy(update=update)

    def build(self) -> Dictionary:
        if self.d_qk is None:
            raise UserError("d_qk is not known: give it, or name the model (lm=...) when training")
        return super().build()


def most_groups(d_sae: int, d_qk: int, step: int = 1) -> int:
    """The largest number of groups, a multiple of `step` that divides d_sae, that leaves at least d_qk heads in each if any does."""
    return max(n for n in range(step, d_sae + 1, step) if d_sae % n == 0 and (n == step or n * d_qk <= d_sae))


def frequencies(pairs: int, base: float) -> Tensor:
    """Rotary frequencies in radians per position: base^(-i / pairs), [pairs]."""
    return torch.tensor([base ** (-i / pairs) for i in range(pairs)])


@register(Lorsa)
class LorsaDictionary(Dictionary):
    """Groups of heads with one pattern each; heads that read one direction and write one."""

    config: Lorsa

    def __init__(self, config: Lorsa):
        super().__init__(config)
        d_in, d_out, d_sae = config.d_in, config.width_out, config.d_sae
        assert d_in is not None and config.d_qk is not None
        d_qk, groups = config.d_qk, config.num_qk or most_groups(d_sae, config.d_qk)
        self.W_Q, self.W_K = (nn.Parameter(torch.zeros(groups, d_in, d_qk)) for _ in range(2))
        self.b_Q, self.b_K = (nn.Parameter(torch.zeros(groups, d_qk)) for _ in range(2))
        self.W_V_FD = nn.Parameter(torch.zeros(d_sae, d_in))  # by rows, as decoders are
        self.b_V = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        pairs = (config.rotary_dim or 0) // 2
        known = torch.tensor(config.rotary_frequencies or ())
        frequencies_R = known if config.rotary_base is None else frequencies(pairs, config.rotary_base)
        self.register_buffer("rotary_frequencies", frequencies_R, persistent=False)
        self.register_buffer("variance", torch.ones(()))  # of the target per coordinate: makes the loss scale-free
        self.rotary_frequencies: Tensor
        self.variance: Tensor

    @property
    def rule(self) -> AttentionRule:
        """How positions attend."""
        config = self.config
        scale = config.scale or self.W_Q.shape[2] ** -0.5
        return AttentionRule(scale, self.rotary_frequencies, config.soft_cap, config.window)

    @property
    def heads(self) -> Heads:
        """The weights that make z."""
        return Heads(self.W_Q, self.b_Q, self.W_K, self.b_K, self.W_V_FD, self.b_V)

    @property
    def group_size(self) -> int:
        """Heads that share queries and keys; head h is of group h // group_size."""
        return len(self.W_V_FD) // len(self.W_Q)

    def _select(self, x_CSD: Tensor, skip: int, among_F: Tensor | None = None, k: int | None = None) -> SparseCodes:
        if x_CSD.ndim != 3:
            raise ValueError(
                f"lorsa reads whole contexts [C, S, D], not {tuple(x_CSD.shape)}: tokens without their context say too little"
            )
        signed = self.config.score == "abs"
        return select_heads(x_CSD, self.heads, self.rule, k or self.config.k, signed=signed, skip=skip, among_F=among_F)

    def encode(self, x_CSD: Tensor) -> SparseCodes:
        return self._select(x_CSD, 0)

    def decode(self, codes: SparseCodes) -> Tensor:
        return sparse_decode(codes, self.W_dec) + self.b_dec

    def encode_contexts(self, x_CSD: Tensor, skip: int = 1) -> SparseCodes:
        return self._select(x_CSD, skip)

    def reconstruct_contexts(self, x_CSD: Tensor, skip: int = 1) -> tuple[SparseCodes, Tensor]:
        codes = self._select(x_CSD, skip)
        return codes, self.decode(codes)

    def attention_pattern(self, x_CSD: Tensor, heads: Sequence[int] | Tensor) -> Tensor:
        """Where some heads look: attention weights [C, heads, S, S] from each position (rows) to those up to it."""
        groups = torch.as_tensor(heads, device=x_CSD.device) // self.group_size
        shared, place = groups.unique(return_inverse=True)
        W_Q, b_Q, W_K, b_K = (t[shared] for t in self.heads.tensors()[:4])
        chosen = Heads(W_Q, b_Q, W_K, b_K, self.W_V_FD, self.b_V)
        return attention_pattern(*queries_keys(x_CSD, chosen, self.rule), self.rule)[:, place]

    def z_pattern(self, x_SD: Tensor, head: int) -> Tensor:
        """What each source position (columns) adds to a head's z at each target position (rows): [T, S], rows sum to z. The head's
        activation is that z wherever it is among the k."""
        value_S = x_SD @ self.W_V_FD[head] + self.b_V[head]
        return self.attention_pattern(x_SD[None], [head])[0, 0] * value_S

    @torch.no_grad()
    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator, lm: Any = None) -> None:
        """Queries and keys as the model's, or Xavier. Directions by the model's matrices; or random ones to read, and to write the
        target's covariance with what they gather. Values are centred, so that a head is positive about half the time, and
        scaled so that all outputs together miss the target least."""
        config, y_BD = self.config, y[:, SKIP:].flatten(0, 1)
        self.variance.copy_((y_BD - y_BD.mean(0)).square().mean())
        self.b_dec.copy_(y_BD.mean(0))
        host = attention_weights(lm, config.layer) if config.from_host else None
        for W, b, name in ((self.W_Q, self.b_Q, "Q"), (self.W_K, self.b_K, "K")):
            b.zero_()
            if config.initial == "host":
                assert host is not None
                self._copy(getattr(host, f"W_{name}_HDE"), getattr(host, f"b_{name}_HE"), W, b)
            else:
                W.copy_(torch.randn(W.shape, generator=generator) * (2 / (W.shape[1] + W.shape[2])) ** 0.5)
        follow = config.initial_directions == "active_subspace"
        if follow:
            assert host is not None
            self._follow_host(host, x, generator)
        else:
            self.W_V_FD.copy_(random_unit_rows(len(self.W_V_FD), x.shape[2], generator))
        self.b_V.zero_()
        mean_F = torch.zeros_like(self.b_V)
        x_CSD, y_CSD = x[:SAMPLE_CONTEXTS], y[:SAMPLE_CONTEXTS, SKIP:] - self.b_dec
        for x_1SD, y_SD in zip(x_CSD.split(1), y_CSD, strict=True):  # z of all heads is large
            z_SF = head_outputs(x_1SD, self.heads, self.rule)[0, SKIP:]
            mean_F += z_SF.sum(0)
            if not follow:
                self.W_dec += z_SF.T @ y_SD
        scale_to_unit(self.W_dec)
        self.b_V -= mean_F / y_CSD[..., 0].numel()
        written_BD = sparse_decode(self._select(x_CSD, SKIP), self.W_dec)
        factor = (written_BD * y_CSD.flatten(0, 1)).sum() / written_BD.square().sum().clamp_min(1e-12)
        factor = factor if factor > 0 else y_CSD.norm() / written_BD.norm().clamp_min(1e-12)
        self.W_V_FD *= factor
        self.b_V *= factor

    def _copy(self, W_HDE: Tensor, b_HE: Tensor, W_GDE: Tensor, b_GE: Tensor) -> None:
        """Set queries or keys to the model's, each head's repeated, in terms of normalised inputs."""
        repeats = len(W_GDE) // len(W_HDE)
        W_HDE, b_HE = W_HDE.cpu(), b_HE.cpu()
        if self.scalings is not None:
            read = self.scalings[0].to("cpu")
            b_HE = b_HE + torch.einsum("d,hde->he", read.shift_D, W_HDE)
            W_HDE = W_HDE / read.scale_D[:, None]
        W_GDE.copy_(W_HDE.repeat_interleave(repeats, 0))
        b_GE.copy_(b_HE.repeat_interleave(repeats, 0))

    def _follow_host(self, host: AttentionWeights, x: Tensor, generator: torch.Generator) -> None:
        """Head h reads W_V r and writes r W_O of one of the model's heads, r a random unit vector in the space of its values."""
        x_BD = x[:, SKIP:].flatten(0, 1)
        owner_F = torch.arange(len(self.W_V_FD)) * host.num_heads // len(self.W_V_FD)
        for number in range(host.num_heads):
            mine = (owner_F == number).nonzero()[:, 0]
            W_V_DE, W_O_ED = host.W_V_HDE[number].cpu(), host.W_O_HED[number].cpu()
            r_FE = random_directions(len(mine), x_BD @ W_V_DE, generator, self.config.active_share)
            self.W_V_FD[mine] = r_FE @ W_V_DE.T
            self.W_dec[mine] = r_FE @ W_O_ED
        scale_to_unit(self.W_V_FD)
        scale_to_unit(self.W_dec)

    def losses(self, batch: TrainingBatch) -> Losses:
        """Squared error / (width * variance) + aux_coefficient * AuxK, over all positions but the first."""
        y_BD = batch.y[:, SKIP:].flatten(0, 1)
        codes = self._select(batch.x, SKIP)
        error_BD = self.decode(codes) - y_BD
        total = error_BD.square().sum(1).mean() / (y_BD.shape[1] * self.variance)
        parts = {"reconstruction": total.detach()}
        if self.config.aux_coefficient and batch.dead_F.any():
            k_aux = self.config.k_aux or default_k_aux(y_BD.shape[1])
            spare = self._select(batch.x, SKIP, batch.dead_F, k_aux)
            aux = missed_share(missed_squares(spare, self.W_dec, error_BD), error_BD)
            total = total + self.config.aux_coefficient * aux
            parts["auxk"] = aux.detach()
        return Losses(total, parts, codes, error_BD.detach().square().sum(1), y_BD)

    def unit_rows(self) -> Sequence[Tensor]:
        return (self.W_dec,)

    @torch.no_grad()
    def fold(self, read: Scaling, write: Scaling) -> None:
        """Shifts go into biases and scales into matrices; rows of W_dec keep their length, activations take on the target's units."""
        for W, b in ((self.W_Q, self.b_Q), (self.W_K, self.b_K)):
            W *= read.scale_D[:, None]
            b -= torch.einsum("d,gde->ge", read.shift_D, W)
        out = write.uniform
        assert out is not None  # one site is written
        self.W_V_FD *= read.scale_D / out
        self.b_V /= out
        self.b_V -= self.W_V_FD @ read.shift_D
        self.b_dec /= out
        self.b_dec += write.shift_D
        self.variance /= out**2

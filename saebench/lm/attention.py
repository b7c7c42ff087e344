"""One attention layer of a model as plain tensors, whatever the model calls its modules.

Read from the Hugging Face module by the shapes that are common: one fused projection (GPT-2, GPT-NeoX) or three (Llama, Mistral, Qwen2,
Gemma, OPT, ...), keys and values shared by several heads or not, rotary positions or none. What was read is tried on a few tokens against
the module itself, so a layer that works otherwise (normalised queries, position biases) is refused instead of misread.
Shape suffixes: `C` contexts, `S` positions, `D` width, `H` heads, `E` width of a head, `R` pairs of coordinates that are rotated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saebench.errors import UserError
from saebench.kernels.lorsa_attention import AttentionRule, attend, attention_pattern, rotate
from saebench.lm.model import LanguageModel

PROBE = (2, 12)  # contexts and positions, fewer where the model has fewer
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the output's norm; less exact types get COARSE
COARSE = 3e-2


@dataclass(frozen=True)
class AttentionWeights:
    """The weights of a layer, heads apart; a key or value head that serves several query heads is repeated for each. Biases that the
    model lacks are 0. float32."""

    W_Q_HDE: Tensor
    b_Q_HE: Tensor
    W_K_HDE: Tensor
    b_K_HE: Tensor
    W_V_HDE: Tensor
    b_V_HE: Tensor
    W_O_HED: Tensor
    b_O_D: Tensor
    rule: AttentionRule
    num_key_heads: int

    @property
    def num_heads(self) -> int:
        return len(self.W_Q_HDE)

    @property
    def d_head(self) -> int:
        return self.W_Q_HDE.shape[2]

    def queries_keys(self, x_CSD: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys, [C, H, S, E] each."""
        q_CHSE = torch.einsum("csd,hde->chse", x_CSD, self.W_Q_HDE) + self.b_Q_HE[:, None]
        k_CHSE = torch.einsum("csd,hde->chse", x_CSD, self.W_K_HDE) + self.b_K_HE[:, None]
        return rotate(q_CHSE, self.rule.frequencies_R), rotate(k_CHSE, self.rule.frequencies_R)

    def values(self, x_CSD: Tensor) -> Tensor:
        """[C, H, S, E]"""
        return torch.einsum("csd,hde->chse", x_CSD, self.W_V_HDE) + self.b_V_HE[:, None]

    def pattern(self, x_CSD: Tensor) -> Tensor:
        """Attention weights for inputs of the attention module: [C, H, S, S]."""
        return attention_pattern(*self.queries_keys(x_CSD), self.rule)

    def output(self, x_CSD: Tensor) -> Tensor:
        """What the attention module writes for these inputs: [C, S, D]."""
        z_CHSE = attend(*self.queries_keys(x_CSD), self.values(x_CSD), self.rule)
        return torch.einsum("chse,hed->csd", z_CHSE, self.W_O_HED) + self.b_O_D


def attention_input(layer: int) -> str:
    """The site that the attention module of a layer reads."""
    return f"blocks.{layer}.attn.hook_in"


def attention_weights(lm: LanguageModel, layer: int) -> AttentionWeights:
    """Read an attention layer. Raises UserError for a layer the model lacks, and for attention of a kind that is not known."""
    site = lm.site(attention_input(layer))
    module = site.module(lm.hf)
    core = next(
        (m for m in module.modules() if hasattr(m, "c_attn") or hasattr(m, "q_proj") or hasattr(m, "query_key_value")), None
    )
    config = lm.hf.config
    heads = getattr(config, "num_attention_heads", 0)
    kind = f"layer {layer} of model {lm.name!r} ({type(module).__name__})"
    out = next((getattr(core, n) for n in ("c_proj", "o_proj", "out_proj", "dense") if hasattr(core, n)), None)
    if core is None or out is None or not heads:
        raise UserError(f"{kind} has no projections of a known name: this kind of attention is not supported")
    (W_Q, b_Q), (W_K, b_K), (W_V, b_V) = _projections(core, heads)
    W_O, b_O = _matrix(out)
    key_heads = W_K.shape[1] // (W_Q.shape[1] // heads)
    split = lambda W, b, n: (  # noqa: E731
        W.unflatten(1, (n, -1)).transpose(0, 1).repeat_interleave(heads // n, 0),
        b.unflatten(0, (n, -1)).repeat_interleave(heads // n, 0),
    )
    weights = AttentionWeights(
        *split(W_Q, b_Q, heads),
        *split(W_K, b_K, key_heads),
        *split(W_V, b_V, key_heads),
        W_O.unflatten(0, (heads, -1)),
        b_O,
        _rule(lm, core, layer, W_Q.shape[1] // heads),
        key_heads,
    )
    _check(lm, layer, weights, kind)
    return weights


def _matrix(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight [in, out] and bias [out] of a linear map of either layout."""
    weight = module.weight.detach().float()
    if isinstance(module, nn.Linear):
        weight = weight.T
    bias = getattr(module, "bias", None)
    return weight, weight.new_zeros(weight.shape[1]) if bias is None else bias.detach().float()


def _projections(core: nn.Module, heads: int) -> list[tuple[Tensor, Tensor]]:
    """Weight [D, heads * E] and bias of queries, keys and values."""
    if hasattr(core, "q_proj"):
        return [_matrix(getattr(core, name)) for name in ("q_proj", "k_proj", "v_proj")]
    if hasattr(core, "c_attn"):
        W, b = _matrix(core.c_attn)
        return list(zip(W.chunk(3, 1), b.chunk(3), strict=True))
    W, b = _matrix(core.query_key_value)  # head by head: its query, key and value follow each other
    W, b = W.unflatten(1, (heads, 3, -1)), b.unflatten(0, (heads, 3, -1))
    return [(W[:, :, i].flatten(1), b[:, i].flatten()) for i in range(3)]


def _rule(lm: LanguageModel, core: Any, layer: int, d_head: int) -> AttentionRule:
    config = lm.hf.config
    scale = float(getattr(core, "scaling", 1.0))  # GPT-Neo has none and does not scale
    rotary: Any = next((m for m in lm.hf.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)), None)
    frequencies_R = torch.zeros(0, device=lm.device) if rotary is None else rotary.inv_freq.detach().float().to(lm.device)
    if rotary is not None and 2 * len(frequencies_R) == d_head:
        scale *= float(getattr(rotary, "attention_scaling", 1.0)) ** 2  # it multiplies both rotated queries and keys
    window = getattr(core, "sliding_window", getattr(config, "sliding_window", None))
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        window = None
    if getattr(core, "attention_type", None) == "local":
        window = config.window_size
    return AttentionRule(scale, frequencies_R, getattr(core, "attn_logit_softcapping", None), window)


def _check(lm: LanguageModel, layer: int, weights: AttentionWeights, kind: str) -> None:
    """Raises UserError where the weights do not give what the module gives."""
    size = min(PROBE[1], lm.max_context or PROBE[1])
    ids_CS = torch.randint(0, lm.hf.config.vocab_size, (PROBE[0], size), generator=torch.Generator().manual_seed(0))
    read, wrote = attention_input(layer), f"blocks.{layer}.attn.hook_out"
    seen = lm.read(ids_CS, [read, wrote])
    expected = seen[wrote].float()
    missed = float((weights.output(seen[read].float()) - expected).norm() / expected.norm().clamp_min(1e-30))
    if not missed < TOLERANCE.get(lm.hf.dtype, COARSE):
        raise UserError(f"{kind} works in a way that is not known: its weights alone give another output (off by {missed:.0%})")

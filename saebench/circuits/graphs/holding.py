"""The model itself, with parts of it held as they were on a prompt and something added to it: many interventions in one pass.

A graph takes attention patterns and the scales of norms as constants. Three measures differ in which of them stay constant when something
changes, while MLPs always compute:

    free      nothing is held
    patterns  attention looks where it looked (the published protocol of interventions; circuit-tracer's default)
    all       norms keep their scales too: what is left is what the dictionaries' latents and errors leave out of the MLPs

Shape suffixes: `B` interventions, `S` positions, `D` width of a site, `H` heads, `E` width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from saebench.circuits.graphs.frozen import FrozenAttention, FrozenNorm
from saebench.circuits.graphs.replacement import LocalModel
from saebench.lm.attention import attention_input

Held = Literal["free", "patterns", "all"]


@contextmanager
def holding(model: LocalModel, held: Held, added: Mapping[str, Tensor]) -> Iterator[None]:
    """The language model while the block runs, on the prompt [B, S] of the linear model, with some of it held and `added` [B, S, D] added
    to what stands at some sites."""
    seen: dict[str, Tensor] = {}
    replaced: dict[str, Callable[[Tensor], Tensor]] = {}
    if held != "free":
        for layer in range(model.layers):
            replaced[f"blocks.{layer}.attn.hook_z"] = partial(_gathered, model.attention[layer], seen, attention_input(layer))
    if held == "all":
        for step, norm in enumerate(model.norms):
            site = f"blocks.{step // 2}.ln{step % 2 + 1}" if step < 2 * model.layers else "ln_final"
            replaced[f"{site}.hook_out"] = partial(_scaled, norm, seen, f"{site}.hook_in")
        for layer, attention in enumerate(model.attention):
            if attention.post is not None:
                site, before = f"blocks.{layer}.ln1_post.hook_out", f"blocks.{layer}.attn.hook_out"
                replaced[site] = partial(_scaled, attention.post, seen, before)
    kept = {function.args[2] for function in replaced.values()}  # type: ignore[attr-defined]

    def at(site: str) -> Callable[[Tensor], Tensor | None]:
        def function(x_BSD: Tensor) -> Tensor | None:
            out_BSD = x_BSD
            if site in replaced:
                out_BSD = replaced[site](x_BSD).to(x_BSD.dtype)
            if site in added:
                out_BSD = out_BSD + added[site].to(x_BSD.dtype)
            if site in kept:
                seen[site] = out_BSD
            return None if out_BSD is x_BSD else out_BSD

        return function

    # Two names can be of one place: what is replaced there comes before what is added, and both before it is kept.
    with model.lm.edit({site: at(site) for site in dict.fromkeys([*replaced, *added, *kept])}):
        yield


def _gathered(attention: FrozenAttention, seen: Mapping[str, Tensor], site: str, _: Tensor) -> Tensor:
    """What the heads gather from what stands at the site, where they looked: [B, S, H * E]."""
    weights = attention.weights
    v_BHSE = seen[site].float()[:, None] @ weights.W_V_HDE + weights.b_V_HE[:, None]
    return (attention.pattern_HSS @ v_BHSE).transpose(1, 2).flatten(2)


def _scaled(norm: FrozenNorm, seen: Mapping[str, Tensor], site: str, _: Tensor) -> Tensor:
    return norm(seen[site].float())


def same_prompt(model: LocalModel, count: int) -> Tensor:
    """The prompt, once for each intervention: [B, S]."""
    return torch.tensor([model.ids]).expand(count, -1)

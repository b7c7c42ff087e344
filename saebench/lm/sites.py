"""Sites: the places in a model that can be read and replaced, under their TransformerLens names.

A name such as `blocks.3.hook_resid_post` is resolved once, through TransformerLens' own table for the architecture, to the input
or output of one module of the plain Hugging Face model. Reading and replacing then use that module's hooks directly, which
costs nothing beyond the model's own forward pass.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from saebench.errors import UserError

SEPARATOR = "/"  # between model and site, where several models are read
# Names shown to people, best known first; others that resolve are accepted too.
COMMON = (
    "hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post",
    "attn.hook_z", "attn.hook_in", "mlp.hook_in", "mlp.hook_pre", "mlp.hook_post", "ln1.hook_out", "ln2.hook_out",
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One place: the input or the output of the module at `path` of the Hugging Face model."""

    name: str
    path: str
    side: Literal["in", "out"]

    def module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.path)


class SiteTable:
    """All sites of one model by name."""

    def __init__(self, model: nn.Module, boot: Callable[[nn.Module], Any]):
        """`boot` wraps a Hugging Face model in a TransformerBridge; it gets a twin that shares all tensors of `model`, because
        a bridge replaces the modules of the model it wraps."""
        shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        twin = copy.deepcopy(model, shared)
        paths = {id(module): path for path, module in twin.named_modules()}
        self.bridge = boot(twin)
        self.sites: dict[str, Site] = {}
        for name, hook in self.bridge.hook_dict.items():
            owner, _, end = hook.name.rpartition(".")
            if not owner or end not in ("hook_in", "hook_out"):
                continue
            original = getattr(self.bridge.get_submodule(owner), "original_component", None)
            if (path := paths.get(id(original))) is not None:
                self.sites[name] = Site(name, path, "in" if end == "hook_in" else "out")
        layers = {int(m.group(1)) for name in self.sites if (m := re.match(r"blocks\.(\d+)\.", name))}
        self.num_layers = max(layers, default=-1) + 1

    def __getitem__(self, name: str) -> Site:
        """Raises UserError for an unknown name, with the valid ones."""
        if name not in self.sites:
            layer = re.match(r"blocks\.(\d+)\.", name)
            why = f"the model has layers 0 to {self.num_layers - 1}; " if layer and int(layer.group(1)) >= self.num_layers else ""
            raise UserError(f"unknown site {name!r}: {why}valid sites are {self.describe()}")
        return self.sites[name]

    def names(self) -> list[str]:
        """The common names, layer by layer, in the order in which the model computes them."""
        per_layer = [f"blocks.{layer}.{kind}" for layer in range(self.num_layers) for kind in COMMON]
        return [name for name in ["hook_embed", *per_layer, "ln_final.hook_out"] if name in self.sites]

    def describe(self) -> str:
        kinds = [kind for kind in COMMON if f"blocks.0.{kind}" in self.sites]
        others: list[str] = [name for name in ("hook_embed", "ln_final.hook_out") if name in self.sites]
        return ", ".join([f"blocks.N.{kind}" for kind in kinds] + others) + f" (N from 0 to {self.num_layers - 1})"


class _AllRead(Exception):
    """Raised inside a forward pass when every wanted site has been seen."""


def read_sites(
    model: nn.Module, sites: list[Site], run: Callable[[], Any], ignored: Callable[[], bool] = lambda: False
) -> dict[str, Tensor]:
    """Run the model until every site has been computed, and no further. Returns one tensor per site, as the model holds it; what is
    computed while `ignored` says so is not read."""
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[Tensor], None]:
        def keep(value: Tensor) -> None:
            if ignored():
                return
            seen[name] = value
            if len(seen) == len(sites):
                raise _AllRead

        return keep

    with hooked(model, {site: keeper(site.name) for site in sites}), suppress(_AllRead):
        run()
    return seen


@contextmanager
def hooked(model: nn.Module, functions: dict[Site, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Call a function on the tensor of each site while the block runs; what it returns, unless None, takes the tensor's place.

    No hook is left behind when the block ends or raises.
    """
    handles = []
    try:
        for site, function in functions.items():
            module = site.module(model)
            if site.side == "out":
                handles.append(module.register_forward_hook(_output_hook(function)))
            else:
                handles.append(module.register_forward_pre_hook(_input_hook(function), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(function: Callable[[Tensor], Tensor | None]) -> Callable:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        new = function(value)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def _input_hook(function: Callable[[Tensor], Tensor | None]) -> Callable:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        key = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        new = function(kwargs[key])
        return None if new is None else (args, {**kwargs, key: new})

    return hook

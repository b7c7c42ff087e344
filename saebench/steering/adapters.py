"""Low-rank adapters (LoRA) on a language model: attached, detached to the last bit, and kept as an ordinary peft directory.

The projections that an adapter changes are replaced inside `lm.hf`, which stays the same object, so that sites, edits and generation go on
working. Detaching puts the very modules back that were there. Attach before a block of `steer` begins, not inside it: its hooks are on the
modules that stand there when it begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from saebench.errors import UserError
from saebench.files import (
    MANIFEST,
    check_files,
    read_manifest,
    read_tensors,
    replacing_directory,
    sha256,
    write_manifest,
    write_tensors,
)
from saebench.lm import LanguageModel

FORMAT, VERSION = "saebench-adapter", 1
FIELDS = {"model", "trained"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME, PREFIX = "default", "base_model.model."  # peft's name of the only adapter, and what its files put before names of modules


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter that is attached to no model."""

    config: Any
    """peft's LoraConfig."""
    tensors: Mapping[str, Tensor]
    """Its matrices, by peft's names without the prefix of files."""
    model: str | None = None
    """Hash of the weights that it was trained on; None where its directory does not say."""
    trained: Mapping[str, Any] = field(default_factory=dict)
    """What people may want to know of its training; JSON."""

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    def save(self, path: str | Path) -> None:
        """Write a peft directory with a manifest beside it (docs/formats.md). Raises UserError where the path exists."""
        path = Path(path)
        if path.exists():
            raise UserError(f"{path} exists already: name another place or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_directory(path) as temporary:
            self.config.save_pretrained(temporary)
            write_tensors(temporary / WEIGHTS, {PREFIX + name: t for name, t in self.tensors.items()}, {"format": "pt"})
            hashes = {name: sha256(temporary / name) for name in (CONFIG, WEIGHTS)}
            write_manifest(temporary, FORMAT, VERSION, {"model": self.model, "trained": dict(self.trained)}, hashes)


def load_adapter(path: str | Path) -> Adapter:
    """Open a saved adapter, or any LoRA directory that peft wrote. Raises UserError for anything missing or damaged."""
    path = Path(path)
    if not path.is_dir() or not (path / CONFIG).exists():
        raise UserError(f"{path} is not an adapter: it has no {CONFIG}")
    manifest: dict[str, Any] = {"model": None, "trained": {}}
    if (path / MANIFEST).exists():
        manifest = read_manifest(path, FORMAT, VERSION, FIELDS)
        check_files(path, manifest["files"])
    peft = import_peft()
    try:
        config = peft.PeftConfig.from_pretrained(str(path))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path / CONFIG} is not the configuration of a peft adapter: {' '.join(str(error).split())[:200]}"
        ) from error
    if config.peft_type != peft.PeftType.LORA:
        raise UserError(f"{path} is an adapter of type {config.peft_type}, and only LORA can be attached here")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in read_tensors(path / WEIGHTS).items()}
    return Adapter(config, tensors, manifest["model"], manifest["trained"])


def attach(lm: LanguageModel, adapter: Adapter | str | Path) -> None:
    """Let a model compute with an adapter until `detach`. Raises UserError where it does not fit, and where one is attached already; the
    model is untouched then."""
    adapter = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
    if adapter.model is not None and "unknown" not in (adapter.model, lm.fingerprint) and adapter.model != lm.fingerprint:
        raise UserError(
            f"the adapter was trained on a model with other weights ({adapter.model}) than {lm.name!r} has ({lm.fingerprint}): "
            "load the model that it was trained on"
        )
    inject(lm, adapter.config)
    try:
        own = adapter_tensors(lm)
        for name in sorted(set(own) ^ set(adapter.tensors)):
            raise UserError(f"tensor {name!r} of the adapter is {'missing' if name in own else 'unknown'} for model {lm.name!r}")
        for name, tensor in adapter.tensors.items():
            if own[name].shape != tensor.shape:
                raise UserError(
                    f"tensor {name!r} of the adapter is {tuple(tensor.shape)}, for model {lm.name!r} it is "
                    f"{tuple(own[name].shape)}: wrong model?"
                )
        import_peft().set_peft_model_state_dict(lm.hf, dict(adapter.tensors), adapter_name=NAME)
        lm.hf.requires_grad_(False)
    except BaseException:
        detach(lm)
        raise


def detach(lm: LanguageModel) -> None:
    """Take the adapter off: the model is the one from before, to the last bit. Without one, nothing happens."""
    for name, layer in list(adapter_layers(lm).items()):
        parent, _, child = name.rpartition(".")
        setattr(lm.hf.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(lm.hf, "peft_config"):
        del lm.hf.peft_config


@contextmanager
def attached(lm: LanguageModel, adapter: Adapter | str | Path) -> Iterator[None]:
    """The model with an adapter while the block runs; other threads wait."""
    with lm.edit({}):
        attach(lm, adapter)
        try:
            yield
        finally:
            detach(lm)


# --- what training needs ---


def import_peft() -> Any:
    """The peft package. Raises UserError where it is missing."""
    try:
        import peft
    except ImportError:
        raise UserError('adapters need the peft package: pip install "saebench[steering]"') from None
    return peft


def inject(lm: LanguageModel, config: Any) -> None:
    """Put untrained adapter layers in place, in float32. Raises UserError where one is attached, or nothing matches."""
    peft = import_peft()
    if adapter_layers(lm):
        raise UserError("an adapter is attached to the model already: detach it first")
    _ = lm.site_table  # names of sites are looked up on plain modules
    try:
        peft.inject_adapter_in_model(config, lm.hf, adapter_name=NAME)
    except (ValueError, RuntimeError) as error:
        detach(lm)
        raise UserError(f"the adapter does not fit model {lm.name!r}: {' '.join(str(error).split())[:200]}") from error
    except BaseException:
        detach(lm)
        raise
    for parameter in parameters(lm):
        parameter.data = parameter.data.float()
    lm.hf.eval()


def adapter_layers(lm: LanguageModel) -> dict[str, Any]:
    """The modules that stand in place of projections, by their names in the model; none where no adapter is attached."""
    return {name: module for name, module in lm.hf.named_modules() if hasattr(module, "get_base_layer")}


def adapter_tensors(lm: LanguageModel) -> dict[str, Tensor]:
    """The matrices of the attached adapter by peft's names, as they are."""
    return dict(import_peft().get_peft_model_state_dict(lm.hf, adapter_name=NAME, save_embedding_layers=False))


def parameters(lm: LanguageModel) -> list[nn.Parameter]:
    """The matrices of the attached adapter."""
    return [p for layer in adapter_layers(lm).values() for name, p in layer.named_parameters() if f".{NAME}." in name]


@contextmanager
def disabled(lm: LanguageModel) -> Iterator[None]:
    """The model without its adapter while the block runs; the adapter stays in place."""
    layers = list(adapter_layers(lm).values())
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def projections(lm: LanguageModel, layers: Sequence[int]) -> tuple[list[str], bool]:
    """The names of all linear maps inside some layers, and whether they keep their weights as [in, out], as GPT-2 does. Raises UserError
    for a layer that the model does not have."""
    from transformers.pytorch_utils import Conv1D

    count = lm.site_table.num_layers
    names: list[str] = []
    transposed = False
    for layer in layers:
        if not 0 <= layer < count:
            raise UserError(f"layer {layer} is unknown: model {lm.name!r} has layers 0 to {count - 1}")
        path = lm.site(f"blocks.{layer}.hook_resid_post").path
        for name, module in lm.hf.get_submodule(path).named_modules(prefix=path):
            if isinstance(module, nn.Linear | Conv1D):
                names.append(name)
                transposed |= isinstance(module, Conv1D)
    return names, transposed


def layer_of(site: str) -> int | None:
    """The layer that a site belongs to, None for those outside of layers."""
    found = re.match(r"blocks\.(\d+)\.", site)
    return int(found[1]) if found else None

"""`saebench doctor`: what this machine has, which kernels run, and what is missing with the way to get it."""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from typing import Any

OPTIONAL = {
    "datasets": ("Hugging Face data sets as text", "pip install 'saebench[datasets]'"),
    "wandb": ("metrics on Weights & Biases", "pip install 'saebench[wandb]'"),
    "tensorboard": ("metrics in TensorBoard", "pip install 'saebench[tensorboard]'"),
    "triton": ("kernels for CUDA devices", "pip install 'saebench[triton]'"),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # no options of its own


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from saebench.kernels.implementations import report
    from saebench.lm.model import BUILTIN
    from saebench.progress import say
    from saebench.recipes import recipe_names
    from saebench.runs import versions

    cuda = torch.cuda.is_available()
    checks = _checks(BUILTIN)
    result = {
        "versions": versions(),
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "kernels": report(),
        "bfloat16_units": cuda or _cpu_has_bfloat16(),
        "optional": {name: find_spec(name) is not None for name in OPTIONAL},
        "recipes": recipe_names(),
        "problems": checks,
    }
    say("versions   " + ", ".join(f"{name} {number}" for name, number in result["versions"].items()))
    say(f"device     {result['device']}, {result['cores']} cores, {result['torch_threads']} torch threads")
    for kind, implementation in result["kernels"].items():
        say(f"kernels    {kind}: {implementation}")
    if not result["bfloat16_units"]:
        say("bfloat16   emulated by this processor: compute in float32, store as you like")
    for name, (purpose, command) in OPTIONAL.items():
        say(
            f"{name:<10} "
            + (f"installed: {purpose}" if result["optional"][name] else f"missing: {purpose}; get it with {command}")
        )
    say("recipes    " + ", ".join(result["recipes"]))
    for problem in checks:
        say(f"problem    {problem}")
    if not checks:
        say("all well")
    return result


def _checks(builtin: Any) -> list[str]:
    from saebench.errors import UserError
    from saebench.lm import builtin_text

    problems = []
    missing = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (builtin / name).exists()]
    if missing:
        problems.append(f"the bundled model lacks {', '.join(missing)}: install saebench again")
    try:
        next(iter(builtin_text()))
    except UserError as error:
        problems.append(str(error))
    return problems


def _cpu_has_bfloat16() -> bool:
    import torch

    ops = getattr(torch.ops, "mkldnn", None)
    return bool(ops is not None and getattr(ops, "_is_mkldnn_bf16_supported", lambda: False)())

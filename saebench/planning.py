"""Memory and time of a recipe before it runs: sizes by arithmetic, speeds by a few steps of the real work on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from saebench.activations import ActivationStream
from saebench.activations.batches import GROUP_TOKENS
from saebench.activations.encoding import STORAGE
from saebench.activations.stream import CALIBRATION_CONTEXTS
from saebench.dictionaries import DictionaryConfig
from saebench.kernels.scores import BLOCK_BYTES
from saebench.pipeline import Pipeline
from saebench.trainer import Member, TrainConfig
from saebench.trainer.checkpoint import KEPT
from saebench.trainer.loop import fit_to_source, sample_contexts, sample_tokens

BARE_PROCESS = 780 << 20  # Python, torch and transformers, with what evaluation needs besides the model
FLOAT = 4
REPEATS = 3
REPORT_SECONDS = 3  # characteristic features and the report, whatever the size


def plan(pipeline: Pipeline) -> dict[str, Any]:
    """Tokens, bytes and seconds that a recipe will take. Loads the model, runs a few of its batches and training steps."""
    recipe = pipeline.recipe
    activations, training = recipe.activations, recipe.training
    contexts, held_out = pipeline.contexts
    lm = pipeline.lm
    stream = pipeline.stream()
    configs = fit_to_source(recipe.dictionary_configs(), stream, lm)

    ids_BS = contexts.ids_NS[: activations.batch_size]
    forward = _median_seconds(lambda: lm.read(ids_BS, activations.sites)) / ids_BS.numel()
    whole = _median_seconds(lambda: lm.logits(ids_BS)) / ids_BS.numel()
    step = sum(_seconds_per_step(config, training, stream) for config in configs.values())
    train_tokens = training.steps * training.batch_size
    width = sum(stream.widths.values())

    parameters = {name: _parameters(config) for name, config in configs.items()}
    # bytes a parameter: itself and Adam's moments; the copy that kernels read; at the end the finished dictionary besides
    kept = 2 * FLOAT + getattr(torch, training.momentum).itemsize
    copied = torch.bfloat16.itemsize if training.weights == "bfloat16" else 0
    parts = {
        "process and model": BARE_PROCESS + sum(p.numel() * p.element_size() for p in lm.hf.parameters()),
        "dictionaries with optimiser": (kept + copied) * sum(parameters.values()) + FLOAT * max(parameters.values()),
        "batches and activations": (2 * GROUP_TOKENS + training.batch_size * 8) * width * FLOAT + BLOCK_BYTES * 2,
    }
    stored = contexts.num_tokens * width * STORAGE[activations.storage].itemsize if activations.mode == "store" else 0
    read_tokens = contexts.num_tokens
    if activations.mode == "stream":  # whole groups, one more to initialise from, and what statistics are measured on
        read_tokens = (-(-train_tokens // GROUP_TOKENS) + 1) * min(GROUP_TOKENS, contexts.num_tokens)
        read_tokens += min(CALIBRATION_CONTEXTS, len(contexts)) * contexts.context_size
    return {
        "tokens": {"harvest": contexts.num_tokens, "train": train_tokens, "evaluate": held_out.num_tokens},
        "epochs": train_tokens / (contexts.num_tokens * (1 - 1 / contexts.context_size)),
        "parameters": parameters,
        "bytes": {
            "store": stored,
            "checkpoints": (KEPT + 1) * kept * sum(parameters.values()),
            "memory": sum(parts.values()),
            "memory_parts": parts,
        },
        "seconds": {
            "harvest": round(read_tokens * forward, 1),
            "train": round(training.steps * step, 1),
            "evaluate": round(REPORT_SECONDS + held_out.num_tokens * (4 * whole + forward) * len(configs), 1),
        },
    }


def _parameters(config: DictionaryConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in config.build().parameters())


def _seconds_per_step(config: DictionaryConfig, training: TrainConfig, stream: ActivationStream) -> float:
    size, sites = training.batch_size, list(config.sites)
    if config.sequential:
        batch = sample_contexts(stream, sites, training.seed, size)
    else:
        batch = {site: x.repeat(-(-size // len(x)), 1)[:size] for site, x in sample_tokens(stream, sites, 0, size).items()}
    member = Member.create(config, training, batch, lm=stream.lm)
    return _median_seconds(lambda: member.step(batch, 0))


def _median_seconds(work: Callable[[], Any]) -> float:
    work()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[REPEATS // 2]

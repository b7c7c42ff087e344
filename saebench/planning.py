"""Memory and time of a recipe before it runs: sizes by arithmetic, speeds by a few steps of the real work on this machine."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saebench.activations import ActivationStream
from saebench.activations.batches import GROUP_TOKENS
from saebench.activations.encoding import STORAGE
from saebench.activations.stream import CALIBRATION_CONTEXTS
from saebench.dictionaries import Dictionary, DictionaryConfig
from saebench.dictionaries.l0_control import SparsityRule
from saebench.kernels.nearest_rows import nearest_rows
from saebench.kernels.scores import BLOCK_BYTES
from saebench.pipeline import Pipeline
from saebench.trainer import Member, TrainConfig
from saebench.trainer.checkpoint import KEPT
from saebench.trainer.loop import SAMPLE_TOKENS, fit_to_source, sample_contexts, sample_tokens

BARE_PROCESS = 780 << 20  # Python, torch and transformers, with what evaluation needs besides the model
FLOAT = 4
REPEATS = 5
BATCHES = 4
FEW_LATENTS = 4096
REPORT_SECONDS = 2  # characteristic features and the report, whatever the size
ENCODED = 2  # times a token is: for the figures, and for the report
COMPARED = 2  # times latents are: decoder rows, and both matrices for the report; less than the square of a few foretells


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
    work = [_work(config, training, stream) for config in configs.values()]
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
            "train": round(sum(w.train for w in work), 1),
            "evaluate": round(
                REPORT_SECONDS
                + held_out.num_tokens * sum(4 * whole + forward + ENCODED * w.encode for w in work)
                + sum(COMPARED * w.compare for w in work),
                1,
            ),
        },
    }


def _parameters(config: DictionaryConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in config.build().parameters())


@dataclass(frozen=True)
class _Work:
    """Seconds that a dictionary takes."""

    train: float
    encode: float
    """A token."""
    compare: float
    """All its latents with each other, by what they read or write."""


def _work(config: DictionaryConfig, training: TrainConfig, stream: ActivationStream) -> _Work:
    """Both ends of a training are measured. It begins with no latent that counts as dead, and with the first L0 of a rule that glides to
    another. It ends at the target L0, and with those latents dead, for AuxK to work on, that a few batches do not wake."""
    batches = _batches(config, training, stream)
    first = last = Member.create(config, training, batches[0], lm=stream.lm)
    early = _seconds_per_step(first, batches, 0)
    share = training.dead_after_tokens / training.num_tokens
    if isinstance(config, SparsityRule) and config.target_l0 and config.first_l0:
        share = _share_above(config.first_l0 / config.target_l0, config.coefficient_warmup)
        del first  # two of them need not fit
        last = Member.create(config.model_copy(update={"initial_l0": config.target_l0}), training, batches[0], lm=stream.lm)
        _seconds_per_step(last, batches, 0)
    last.silent_F.masked_fill_(last.silent_F == last.silent_F.max(), training.dead_after_tokens)
    late = _seconds_per_step(last, batches, training.steps - 1)
    return _Work(
        train=training.steps * (min(1.0, share) * early + max(0.0, 1 - share) * late),
        encode=_encoding_seconds(last.finished(), batches[0]),
        compare=_comparing_seconds(config.d_sae, sum(config.blocks_out)),
    )


def _share_above(ratio: float, glide: float) -> float:
    """(mean L0 - target) / (first L0 - target) where L0 glides from `ratio` times the target to it, evenly in its logarithm."""
    return glide * ((ratio - 1) / math.log(ratio) - 1) / (ratio - 1) if ratio > 1 else 0.0


def _batches(config: DictionaryConfig, training: TrainConfig, stream: ActivationStream) -> list[dict[str, Tensor]]:
    """A few batches as training reads them; rows come again where the text is shorter than one."""
    size, sites = training.batch_size, list(config.sites)
    count = max(1, min(BATCHES, SAMPLE_TOKENS // size))
    if config.sequential:
        contexts = sample_contexts(stream, sites, training.seed, size * count)
        per_batch = max(1, size // stream.context_size)
        parts = {site: x.split(per_batch)[:count] for site, x in contexts.items()}
    else:
        rows = sample_tokens(stream, sites, 0, size * count)
        whole = {site: x.repeat(-(-size // len(x)), 1) if len(x) < size else x for site, x in rows.items()}
        parts = {site: x[: len(x) // size * size].split(size) for site, x in whole.items()}
    return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)]


def _seconds_per_step(member: Member, batches: Sequence[dict[str, Tensor]], step: int) -> float:
    work = itertools.cycle(batches)
    return _median_seconds(lambda: member.step(next(work), step))


@torch.inference_mode()
def _encoding_seconds(dictionary: Dictionary, batch: dict[str, Tensor]) -> float:
    """Of a token."""
    x = torch.cat([batch[site] for site in dictionary.config.reads], -1)
    return _median_seconds(lambda: dictionary.encode(x)) / math.prod(x.shape[:-1])


def _comparing_seconds(d_sae: int, width: int) -> float:
    """Of a few rows, and more by its square."""
    rows_FD = torch.randn(min(d_sae, FEW_LATENTS), width, generator=torch.Generator().manual_seed(0))
    return _median_seconds(lambda: nearest_rows(rows_FD, 1)) * (d_sae / len(rows_FD)) ** 2


def _median_seconds(work: Callable[[], Any]) -> float:
    work()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[REPEATS // 2]

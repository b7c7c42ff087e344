"""The training loop: any set of dictionaries, from any source of activations, in one pass over its batches.

source -> Batches -> every member takes a step -> metrics.jsonl every N steps, a checkpoint every M
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from saebench.activations import Batches, Source
from saebench.dictionaries import Dictionary, DictionaryConfig
from saebench.errors import Interrupted, UserError
from saebench.progress import progress, say
from saebench.trainer.checkpoint import read_checkpoint, write_checkpoint
from saebench.trainer.config import TrainConfig
from saebench.trainer.interrupt import stop_on_interrupt
from saebench.trainer.logs import MetricsLog
from saebench.trainer.member import Member

SAMPLE_TOKENS = 32768


def train(
    dictionaries: DictionaryConfig | Sequence[DictionaryConfig] | Mapping[str, DictionaryConfig],
    source: Source,
    training: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    device: str = "auto",
) -> Dictionary | list[Dictionary]:
    """Train one dictionary, or several side by side on the same batches; returns them in the order given, for raw activations.

    With `out`, metrics, checkpoints and the finished dictionaries are kept under that directory, and the same call continues
    where an earlier one stopped, to bit-identical weights. Raises UserError for configurations that do not fit the source,
    for NaN in the activations, and `Interrupted` after a Ctrl-C, with a checkpoint written.
    """
    training = training or TrainConfig()
    single = isinstance(dictionaries, DictionaryConfig)
    named = name_dictionaries([dictionaries] if isinstance(dictionaries, DictionaryConfig) else dictionaries)
    fitted = fit_to_source(named, source)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = _Run(fitted, source, training, Path(out) if out is not None else None, device).go()
    return trained[0] if single else trained


def name_dictionaries(dictionaries: Sequence[DictionaryConfig] | Mapping[str, DictionaryConfig]) -> dict[str, DictionaryConfig]:
    """Dictionaries by id; those without one are named after their settings, with a number where that repeats."""
    if isinstance(dictionaries, Mapping):
        return dict(dictionaries)
    named: dict[str, DictionaryConfig] = {}
    for config in dictionaries:
        name, number = config.default_id, 2
        while name in named:
            name, number = f"{config.default_id}-{number}", number + 1
        named[name] = config
    if not named:
        raise UserError("no dictionaries to train: name at least one")
    return named


def fit_to_source(named: dict[str, DictionaryConfig], source: Source) -> dict[str, DictionaryConfig]:
    """Fill in site and width from the source. Raises UserError for a site that it lacks, or an ambiguous one."""
    fitted = {}
    for name, config in named.items():
        site = config.site
        if site is None:
            if len(source.widths) > 1:
                raise UserError(
                    f"dictionary {name!r} names no site and the activations have several: set site to one of {', '.join(source.widths)}"
                )
            site = next(iter(source.widths))
        source.check_sites([site])
        fitted[name] = config.for_site(site, source.widths[site])
    return fitted


def sample_tokens(source: Source, site: str, seed: int, count: int = SAMPLE_TOKENS) -> Tensor:
    """Shuffled activations to initialise from: [count or fewer, D]."""
    count = min(count, source.num_contexts * (source.context_size - 1))  # position 0 is left out
    batches = Batches(source, [site], count, seed=seed)
    try:
        return next(batches)[site]
    finally:
        batches.close()


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self, dictionaries: dict[str, DictionaryConfig], source: Source, training: TrainConfig, out: Path | None, device: str
    ):
        self.dictionaries, self.source, self.training, self.out, self.device = dictionaries, source, training, out, device
        self.sites = list(dict.fromkeys(config.site or "" for config in dictionaries.values()))
        self.seconds = 0.0

    def go(self) -> list[Dictionary]:
        found = read_checkpoint(self.out / "checkpoint") if self.out else None
        members = self._members()
        step, metrics_bytes = 0, 0
        if found:
            states, saved = found
            for name, member in members.items():
                member.load_state({key: t.to(self.device) for key, t in states[name].items()})
            step, metrics_bytes, self.seconds = saved["step"], saved["metrics_bytes"], saved["seconds"]
            say(f"continuing at step {step} of {self.training.steps}")
        log = None
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
            log = MetricsLog(self.out / "metrics.jsonl", metrics_bytes, list(self.training.loggers), self.out.name)
        batches = Batches(self.source, self.sites, self.training.batch_size, seed=self.training.seed, position=step)
        try:
            self._steps(members, batches, step, log)
        finally:
            batches.close()
            if log:
                log.close()
        return self._finish(members)

    def _members(self) -> dict[str, Member]:
        samples = {site: sample_tokens(self.source, site, self.training.seed).to(self.device) for site in self.sites}
        return {
            name: Member.create(config, self.training, samples[config.site or ""], self.source.statistics(config.site or ""))
            for name, config in self.dictionaries.items()
        }

    def _steps(self, members: dict[str, Member], batches: Batches, first: int, log: MetricsLog | None) -> None:
        training, size = self.training, self.training.batch_size
        started, step = time.perf_counter(), first
        watch = stop_on_interrupt() if self.out else nullcontext(None)
        with watch as stop, progress("train", training.steps * size, "tokens", first * size) as report:
            for step in range(first, training.steps):
                batch = next(batches)
                for name, member in members.items():
                    member.step(batch[self.dictionaries[name].site or ""].to(self.device), step)
                note = ""
                done = step + 1
                if done % training.log_every == 0 or done == training.steps:
                    note = self._log(members, done, log)
                report(size, note)
                stopping = bool(stop and stop.requested and done < training.steps)
                if self.out and (done % training.checkpoint_every == 0 or stopping):
                    self._checkpoint(members, done, log, time.perf_counter() - started)
                if stopping:
                    raise Interrupted(f"stopped at step {done} of {training.steps}; run the same command again to continue")
        self.seconds += time.perf_counter() - started

    def _log(self, members: dict[str, Member], done: int, log: MetricsLog | None) -> str:
        notes = []
        for name, member in members.items():
            metrics = member.read_metrics()
            if not all(map(_finite, metrics.values())):
                raise UserError(f"training of {name!r} diverged before step {done}: lower training.lr (now {member.lr:g})")
            lr = member.lr * self.training.rate_at(done - 1)
            if log:
                log.write({"step": done, "tokens": done * self.training.batch_size, "dictionary": name, "lr": lr, **metrics})
            notes.append(f"fvu {metrics['fvu']:.3f} l0 {metrics['l0']:.1f} dead {metrics['dead']:.1%}")
        return notes[0] if len(notes) == 1 else f"{len(notes)} dictionaries, first {notes[0]}"

    def _checkpoint(self, members: dict[str, Member], step: int, log: MetricsLog | None, seconds: float) -> None:
        assert self.out and log
        states = {name: member.state() for name, member in members.items()}
        saved = {"step": step, "position": step, "metrics_bytes": log.size, "seconds": self.seconds + seconds}
        write_checkpoint(self.out / "checkpoint", states, saved)

    def _finish(self, members: dict[str, Member]) -> list[Dictionary]:
        trained = []
        for name, member in members.items():
            dictionary = member.finished()
            dictionary.trained_on = {
                "site": self.dictionaries[name].site,
                "activations": self.source.identity,
                "tokens": self.training.steps * self.training.batch_size,
                "input_scale": member.scale,
                "seed": self.training.seed,
            }
            if self.out:
                path = self.out / "dictionaries" / name
                if path.exists():
                    shutil.rmtree(path)
                dictionary.save(path)
            trained.append(dictionary)
        return trained


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")

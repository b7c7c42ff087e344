"""The training loop: any set of dictionaries, from any source of activations, in one pass over its batches.

source -> Batches -> every member takes a step -> metrics.jsonl every N steps, a checkpoint every M
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saebench.activations import Batches, ContextBatches, Source
from saebench.config import first_difference
from saebench.dictionaries import Dictionary, DictionaryConfig
from saebench.errors import Interrupted, UserError
from saebench.progress import progress, say
from saebench.trainer.checkpoint import read_checkpoint, write_checkpoint
from saebench.trainer.config import TrainConfig
from saebench.trainer.interrupt import stop_on_interrupt
from saebench.trainer.logs import MetricsLog
from saebench.trainer.member import Member
from saebench.trainer.stack import Diverged, Stack, stacks

if TYPE_CHECKING:
    from saebench.lm import LanguageModel

SAMPLE_TOKENS = 32768


def train(
    dictionaries: DictionaryConfig | Sequence[DictionaryConfig] | Mapping[str, DictionaryConfig],
    source: Source,
    training: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    lm: LanguageModel | None = None,
    device: str = "auto",
) -> Dictionary | list[Dictionary]:
    """Train one dictionary, or several side by side on the same batches; returns them in the order given, for raw activations.

    With `out`, metrics, checkpoints and the finished dictionaries are kept under that directory, and the same call continues
    where an earlier one stopped, to bit-identical weights. `lm` is the model that the activations come from, for dictionaries
    that start from its weights; a stream brings it along. Raises UserError for configurations that do not fit the source,
    for NaN in the activations, and `Interrupted` after a Ctrl-C, with a checkpoint written.
    """
    training = training or TrainConfig()
    single = isinstance(dictionaries, DictionaryConfig)
    named = name_dictionaries([dictionaries] if isinstance(dictionaries, DictionaryConfig) else dictionaries)
    lm = lm or getattr(source, "lm", None)
    fitted = fit_to_source(named, source, lm)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if lm is None and (wanting := [name for name, config in fitted.items() if config.needs_lm]):
        raise UserError(f"dictionary {wanting[0]!r} starts from the model's weights: pass lm=..., the model of the activations")
    trained = _Run(fitted, source, training, Path(out) if out is not None else None, lm, device).go()
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


def fit_to_source(
    named: dict[str, DictionaryConfig], source: Source, lm: LanguageModel | None = None
) -> dict[str, DictionaryConfig]:
    """Fill in sites and widths from the source, and what depends on the model where it is known. Raises UserError for a site that the
    source lacks, or an ambiguous one, and for a dictionary that reads sequences where the source has none."""
    fitted = {}
    for name, config in named.items():
        try:
            fitted[name] = config.for_sites(source.widths)
            fitted[name] = fitted[name] if lm is None else fitted[name].for_lm(lm)
        except UserError as error:
            raise UserError(f"dictionary {name!r}: {error}") from None
        source.check_sites(list(fitted[name].sites))
        if config.sequential and not source.ordered:
            raise UserError(
                f"dictionary {name!r}: {config.architecture} reads sequences and these activations are shuffled rows without an order: "
                "harvest contexts (activations.mode store or stream)"
            )
    return fitted


def sample_tokens(source: Source, sites: Sequence[str], seed: int, count: int = SAMPLE_TOKENS) -> dict[str, Tensor]:
    """Shuffled activations to initialise from, by site: [count or fewer, D]."""
    count = min(count, source.num_contexts * (source.context_size - source.skip))
    batches = Batches(source, sites, count, seed=seed, end=1)
    try:
        return next(batches)
    finally:
        batches.close()


def sample_contexts(source: Source, sites: Sequence[str], seed: int, count: int = SAMPLE_TOKENS) -> dict[str, Tensor]:
    """Whole contexts to initialise from, by site: [C, S, D] of about `count` tokens."""
    batches = ContextBatches(source, sites, max(1, count // source.context_size), seed=seed)
    try:
        return next(batches)
    finally:
        batches.close()


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self,
        dictionaries: dict[str, DictionaryConfig],
        source: Source,
        training: TrainConfig,
        out: Path | None,
        lm: LanguageModel | None,
        device: str,
    ):
        self.dictionaries, self.source, self.training = dictionaries, source, training
        self.out, self.lm, self.device = out, lm, device
        self.seconds = 0.0

    def go(self) -> list[Dictionary]:
        found = read_checkpoint(self.out / "checkpoint") if self.out else None
        if found and (difference := first_difference(found[1]["settings"], self._settings())):
            key, there, here = difference
            raise UserError(
                f"{self.out} holds a training with other settings ({key}: {there!r} there, {here!r} here): use another out, or remove it"
            )
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
        batches = self._batches(step)
        try:
            self._steps(members, batches, step, log)
        finally:
            for drawn in batches.values():
                drawn.close()
            if log:
                log.close()
        return self._finish(members)

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that goes on from it."""
        dictionaries = {
            name: {"architecture": config.architecture, **config.model_dump(mode="json")}
            for name, config in self.dictionaries.items()
        }
        return {
            "dictionaries": dictionaries,
            "training": self.training.model_dump(mode="json"),
            "activations": self.source.identity,
        }

    def _sites(self, sequential: bool) -> list[str]:
        """The sites that dictionaries need, as contexts or as tokens."""
        configs = [config for config in self.dictionaries.values() if config.sequential == sequential]
        return list(dict.fromkeys(site for config in configs for site in config.sites))

    def _members(self) -> dict[str, Member]:
        samples = {}
        for sequential, draw in ((False, sample_tokens), (True, sample_contexts)):
            if sites := self._sites(sequential):
                drawn = draw(self.source, sites, self.training.seed)
                samples[sequential] = {site: x.to(self.device) for site, x in drawn.items()}
        statistics = {site: self.source.statistics(site) for sequential in samples for site in self._sites(sequential)}
        return {
            name: Member.create(config, self.training, samples[config.sequential], statistics, self.lm)
            for name, config in self.dictionaries.items()
        }

    def _batches(self, position: int) -> dict[bool, Batches | ContextBatches]:
        """Where steps get their data: shuffled tokens (False), whole contexts (True), each where some dictionary needs it."""
        size, seed = self.training.batch_size, self.training.seed
        drawn: dict[bool, Batches | ContextBatches] = {}
        if sites := self._sites(False):
            drawn[False] = Batches(self.source, sites, size, seed=seed, position=position, end=self.training.steps)
        if sites := self._sites(True):
            contexts = max(1, size // self.source.context_size)
            drawn[True] = ContextBatches(self.source, sites, contexts, seed=seed, position=position)
        return drawn

    def _steps(
        self, members: dict[str, Member], batches: dict[bool, Batches | ContextBatches], first: int, log: MetricsLog | None
    ) -> None:
        training, size = self.training, self.training.batch_size
        started, step = time.perf_counter(), first
        together = stacks(members) if training.stack else [Stack({name: member}) for name, member in members.items()]
        for stack in together:
            if len(stack.members) > 1:
                say(f"{len(stack.members)} dictionaries step together: {', '.join(stack.members)}")
        watch = stop_on_interrupt() if self.out else nullcontext(None)
        with watch as stop, progress("train", training.steps * size, "tokens", first * size) as report:
            for step in range(first, training.steps):
                drawn = {kind: {site: x.to(self.device) for site, x in next(each).items()} for kind, each in batches.items()}
                for stack in together:
                    try:
                        stack.step(drawn[stack.sequential], step)
                    except Diverged as error:
                        raise _diverged(str(error), members[str(error)], step + 1) from None
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
                raise _diverged(name, member, done)
            lr = member.rate_at(done - 1)
            if log:
                log.write({"step": done, "tokens": done * self.training.batch_size, "dictionary": name, "lr": lr, **metrics})
            notes.append(f"fvu {metrics['fvu']:.3f} l0 {metrics['l0']:.1f} dead {metrics['dead']:.1%}")
        return notes[0] if len(notes) == 1 else f"{len(notes)} dictionaries, first {notes[0]}"

    def _checkpoint(self, members: dict[str, Member], step: int, log: MetricsLog | None, seconds: float) -> None:
        assert self.out and log
        states = {name: member.state() for name, member in members.items()}
        saved: dict[str, Any] = {"step": step, "position": step, "metrics_bytes": log.size, "seconds": self.seconds + seconds}
        saved["settings"] = self._settings()
        write_checkpoint(self.out / "checkpoint", states, saved)

    def _finish(self, members: dict[str, Member]) -> list[Dictionary]:
        trained = []
        for name, member in members.items():
            dictionary = member.finished()
            dictionary.trained_on = {
                "reads": list(dictionary.config.reads),
                "writes": list(dictionary.config.writes),
                "activations": self.source.identity,
                "model": getattr(self.source, "model_fingerprint", None),
                "tokens": self.training.steps * self.training.batch_size,
                "input_scale": float(member.read.scale_D[0]),
                "scales": member.scales,
                "gamma": {site: self.source.statistics(site).gamma for site in dictionary.config.reads},
                "seed": member.seed,
            }
            if self.out:
                path = self.out / "dictionaries" / name
                if path.exists():
                    shutil.rmtree(path)
                dictionary.save(path)
            trained.append(dictionary)
        return trained


def _diverged(name: str, member: Member, step: int) -> UserError:
    return UserError(
        f"training of {name!r} diverged before step {step}: lower its learning rate "
        f"(training.lr or dictionaries.N.lr, now {member.lr:g})"
    )


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")

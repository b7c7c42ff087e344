"""Dose-response: what methods do to what a model writes, and what that costs, over the same prompts, strengths and seeds.

Five figures of every method at every strength: the target, the perplexity of the text under the untouched model, its repetition,
the divergence from the untouched model on neutral text, and the size of the edit there. Means are over prompts, each the mean of its
seeds; 95 % intervals are Student's t over prompts (contexts for neutral text). `best` chooses a strength on one half of the
prompts and reports the other, so that no method profits from having had many strengths.
Shape suffixes: `P` prompts, `R` seeds, `B` texts, `S` positions, `C` contexts, `V` vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.lm import LanguageModel
from saebench.progress import progress
from saebench.steering.baselines import Kind, Method
from saebench.steering.edits import Edit
from saebench.steering.hooks import check_edit, steer
from saebench.steering.measures import nll, repetition, side_effect
from saebench.steering.targets import Target

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
BATCH = 64  # texts written at once
BREAKS = 3.0  # times the perplexity of untouched text, from which on fluency counts as broken: docs/decisions.md
UNTOUCHED = "untouched"


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values_N: np.ndarray) -> Estimate:
        """Student's t over independent values; without an interval where there is one value alone."""
        from scipy.special import stdtrit

        mean = float(np.mean(values_N))
        if len(values_N) < 2:
            return cls(mean, math.nan, math.nan)
        reach = float(stdtrit(len(values_N) - 1, 0.975) * np.std(values_N, ddof=1) / math.sqrt(len(values_N)))
        return cls(mean, mean - reach, mean + reach)


@dataclass(frozen=True)
class Dose:
    """A method at one strength."""

    method: str
    group: str
    kind: Kind | str
    strength: float
    target_PR: np.ndarray
    nll_PR: np.ndarray
    """-log p per token of what was written, by the untouched model after the same prompt, in nats."""
    repetition_PR: np.ndarray
    """Share of the text's runs of three tokens that it had before."""
    kl_C: np.ndarray
    """KL(untouched || steered) per token of neutral contexts, in nats."""
    size_C: np.ndarray
    """||x' - x|| / ||x|| at the sites of the edits on neutral contexts, mean over tokens."""
    seconds_per_token: float
    texts: list[list[str]] = field(repr=False, default_factory=list)
    """What was written, by prompt and seed."""

    def estimate(self, figure: str, prompts: slice = slice(None)) -> Estimate:
        """`target`, `perplexity`, `repetition`, `kl` or `size`, over some of the prompts. A perplexity's interval is that of its log."""
        if figure in ("kl", "size"):
            return Estimate.of(self.kl_C if figure == "kl" else self.size_C)
        if figure == "perplexity":
            log = Estimate.of(self.nll_PR[prompts].mean(1))
            return Estimate(*(math.exp(min(700.0, value)) for value in (log.mean, log.low, log.high)))
        return Estimate.of({"target": self.target_PR, "repetition": self.repetition_PR}[figure][prompts].mean(1))


@dataclass(frozen=True)
class Effects:
    """All methods at all strengths, and the model untouched."""

    target: str
    prompts: list[str]
    untouched: Dose
    doses: list[Dose]

    def of(self, method: str) -> list[Dose]:
        """A method at its strengths, ascending."""
        return sorted((dose for dose in self.doses if dose.method == method), key=lambda dose: dose.strength)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(dose.method for dose in self.doses))

    def fluent(self, dose: Dose) -> bool:
        """Whether the perplexity of what is written is at most three times that of untouched text."""
        return bool(dose.nll_PR.mean() <= self.untouched.nll_PR.mean() + math.log(BREAKS))

    def breaks_at(self, method: str) -> float | None:
        """The smallest strength from which on fluency is broken; None where it never is."""
        broken = None
        for dose in reversed(self.of(method)):
            if self.fluent(dose):
                break
            broken = dose.strength
        return broken

    def best(self, method: str) -> Dose | None:
        """The strength with the highest target among the fluent ones, judged by every other prompt; None where none is fluent. Report
        its figures on the others: `dose.estimate(figure, REPORTED)`."""
        fluent = [dose for dose in self.of(method) if self.fluent(dose)]
        return max(fluent, key=lambda dose: dose.target_PR[CHOOSING].mean(), default=None)

    def rows(self) -> list[dict[str, Any]]:
        """A flat table, the model untouched first: method, kind, strength, figures with intervals, seconds per token."""
        return [
            {"method": dose.method, "kind": dose.kind, "strength": dose.strength}
            | {
                f"{figure}{end}": getattr(dose.estimate(figure), part)
                for figure in ("target", "perplexity", "repetition", "kl", "size")
                for end, part in (("", "mean"), ("_low", "low"), ("_high", "high"))
            }
            | {"seconds_per_token": dose.seconds_per_token}
            for dose in [self.untouched, *self.doses]
        ]


CHOOSING, REPORTED = slice(0, None, 2), slice(1, None, 2)


def dose_response(
    lm: LanguageModel,
    methods: Sequence[Method],
    prompts: Sequence[str],
    target: Target,
    *,
    neutral: Tensor,
    strengths: Sequence[float] = STRENGTHS,
    seeds: int = 3,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    on_dose: Callable[[Effects], None] | None = None,
) -> Effects:
    """Let the model write with every method at every strength, after every prompt and with every seed, and measure.

    `neutral` are token contexts [C, S] that the side effect is measured on. A method that is a prompt is measured once, at strength 1;
    `on_dose` gets what is known after every dose. Raises UserError for too few prompts, names that repeat, strengths that are no numbers
    above 0, and what does not fit the model.
    """
    _check(methods, prompts, strengths, seeds)
    for method in methods:
        for edit in method.edits:
            check_edit(lm, edit)
    neutral = neutral[:, : lm.max_context].long()
    plan = [(method, strength) for method in methods for strength in (strengths if method.dosed else (1.0,))]
    measure = _Measure(lm, list(prompts), target, neutral, seeds, max_new_tokens, temperature)
    with progress("steer", len(plan) + 1, "doses") as report:
        untouched = measure.dose(Method(UNTOUCHED, "control"), 0.0)
        report(1)
        doses = []
        for method, strength in plan:
            doses.append(measure.dose(method, strength))
            if on_dose is not None:
                on_dose(Effects(target.name, list(prompts), untouched, list(doses)))
            report(1)
    return Effects(target.name, list(prompts), untouched, doses)


def _check(methods: Sequence[Method], prompts: Sequence[str], strengths: Sequence[float], seeds: int) -> None:
    if len(prompts) < 4:
        raise UserError(f"{len(prompts)} prompts are too few for an interval: give at least 4")
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty: give each some text")
    if not methods:
        raise UserError("no method to measure: give at least one")
    names = [method.name for method in methods]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two methods are called {repeated!r}: give each its own name")
    if not strengths or any(not math.isfinite(s) or s <= 0 for s in strengths):
        raise UserError(f"strengths {list(strengths)} are not numbers above 0: 0 is measured anyway")
    if seeds < 1:
        raise UserError(f"seeds={seeds}: use at least 1")


@dataclass
class _Measure:
    """What all doses have in common."""

    lm: LanguageModel
    prompts: list[str]
    target: Target
    neutral_CS: Tensor
    seeds: int
    max_new_tokens: int
    temperature: float

    def dose(self, method: Method, strength: float) -> Dose:
        edits = method.at(strength)
        ids, texts, seconds = self.write(method, edits)
        written = np.array([nll(self.lm, self.lm.prompt_ids(prompt), ids[p]) for p, prompt in enumerate(self.prompts)])
        flat = self.target.score([text for some in texts for text in some])
        repeated = np.array([[repetition(some) for some in of_prompt] for of_prompt in ids])
        nothing_C = np.full(len(self.neutral_CS), math.nan)  # a prompt edits nothing
        kl_C, size_C = (nothing_C, nothing_C) if method.prefix else side_effect(self.lm, edits, self.neutral_CS)
        tokens = sum(len(some) for of_prompt in ids for some in of_prompt)
        return Dose(
            method.name, method.group or method.name, method.kind, strength, np.reshape(flat, (len(self.prompts), self.seeds)),
            written, repeated, kl_C, size_C, seconds / max(1, tokens), texts,
        )  # fmt: skip

    def write(self, method: Method, edits: list[Edit]) -> tuple[list[list[list[int]]], list[list[str]], float]:
        """Token ids and texts by prompt and seed, and the seconds it took. Prompts of one length are written together; the seed of a batch
        does not depend on the method."""
        starts = [self.lm.prompt_ids(method.prefix + prompt) for prompt in self.prompts]
        ids: list[list[list[int]]] = [[[] for _ in range(self.seeds)] for _ in starts]
        places = sorted(((p, r) for p in range(len(starts)) for r in range(self.seeds)), key=lambda pr: (len(starts[pr[0]]), pr))
        seconds = 0.0
        for length, alike in groupby(places, lambda pr: len(starts[pr[0]])):
            some = list(alike)
            for first in range(0, len(some), BATCH):
                batch = some[first : first + BATCH]
                prompt_BS = torch.tensor([starts[p] for p, _ in batch])
                began = time.perf_counter()
                with steer(self.lm, edits):
                    new_BS = self.lm.generate_ids(
                        prompt_BS, self.max_new_tokens, temperature=self.temperature, seed=length * 1000 + first, whole=True
                    )
                seconds += time.perf_counter() - began
                for (p, r), row in zip(batch, new_BS.tolist(), strict=True):
                    ids[p][r] = row
        texts = [[self.lm.tokenizer.decode(some, skip_special_tokens=True) for some in of_prompt] for of_prompt in ids]
        return ids, texts, seconds

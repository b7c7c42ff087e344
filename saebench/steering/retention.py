"""What unlearning costs: every setting that was tried with what it forgot and what it kept, on texts that took no part in it.

Losses are -log p of each token in nats, means over tokens; nothing counts for the first token of a piece (BOS).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch

from saebench.dictionaries import Dictionary
from saebench.errors import UserError
from saebench.features.prompts import PIECES_AT_ONCE, text_pieces, tokenise
from saebench.lm import LanguageModel
from saebench.progress import say
from saebench.steering.activity import activity
from saebench.steering.adapters import attached
from saebench.steering.chosen import Chosen
from saebench.steering.unlearning import CrispSettings, Unlearned, check_texts, unlearn

HELD_OUT_ONE_IN = 4
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 8, 48


@dataclass(frozen=True)
class Retention:
    """What a model does with an adapter, beside what it does without; losses of the two are named `_before` and `_after`."""

    target_loss_before: float
    target_loss_after: float
    benign_loss_before: float
    benign_loss_after: float
    neutral_loss_before: float
    neutral_loss_after: float
    perplexity_before: float
    """Of continuations of neutral texts, sampled by the model itself and read by it without the adapter."""
    perplexity_after: float
    activation_before: float
    """Sum of the chosen latents' activations per token of target text, over all dictionaries."""
    activation_after: float

    @property
    def forgetting(self) -> float:
        """Rise of the loss on target text, in nats per token."""
        return self.target_loss_after - self.target_loss_before

    @property
    def benign_change(self) -> float:
        """Rise of the loss on benign text, in nats per token."""
        return self.benign_loss_after - self.benign_loss_before

    @property
    def general_change(self) -> float:
        """Rise of the loss on neutral text, in percent of it."""
        return 100 * (self.neutral_loss_after / self.neutral_loss_before - 1)

    @property
    def activation_fall(self) -> float:
        """Share of the chosen latents' activation on target text that is gone."""
        return 1 - self.activation_after / self.activation_before if self.activation_before else math.nan


@dataclass(frozen=True)
class Trial:
    """One setting of a sweep; where it found no latents or training broke off, only why."""

    settings: CrispSettings
    unlearned: Unlearned | None = None
    retention: Retention | None = None
    failed: str = ""

    def row(self) -> dict[str, Any]:
        """All of it as a row of a table: settings, figures, size of the adapter in parameters, seconds of training."""
        row = self.settings.model_dump(mode="json") | {"failed": self.failed}
        if self.unlearned is None or self.retention is None:
            return row
        derived = ("forgetting", "benign_change", "general_change", "activation_fall")
        row |= asdict(self.retention) | {name: getattr(self.retention, name) for name in derived}
        latents = sum(len(one) for one in self.unlearned.chosen)
        return row | {"latents": latents, "parameters": self.unlearned.adapter.parameters, "seconds": self.unlearned.seconds}


def sweep(
    lm: LanguageModel,
    dictionaries: Dictionary | Sequence[Dictionary],
    target: Sequence[str],
    benign: Sequence[str],
    neutral: Sequence[str],
    settings: Sequence[CrispSettings],
) -> list[Trial]:
    """Unlearn with each of the settings, and measure each: all come back in their order, none is left out. Of every set each fourth text
    is held out to be measured on, the others choose and train (the neutral ones as coherence text). Raises UserError where a set has fewer
    than eight texts, there are no settings, and where none of them led to an adapter."""
    if not settings:
        raise UserError("no settings are given: a sweep needs one at least")
    dictionaries = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
    sets = {"target": target, "benign": benign, "neutral": neutral}
    for name, texts in sets.items():
        check_texts(name, texts)
        if len(texts) < 2 * HELD_OUT_ONE_IN:
            raise UserError(
                f"{name} has {len(texts)} texts, and one in {HELD_OUT_ONE_IN} is held out: give {2 * HELD_OUT_ONE_IN} at least"
            )
    (target_in, target_out), (benign_in, benign_out), (neutral_in, neutral_out) = (held_out(texts) for texts in sets.values())
    trials = []
    for number, one in enumerate(settings, 1):
        say(f"setting {number} of {len(settings)}")
        try:
            unlearned = unlearn(lm, dictionaries, target_in, benign_in, neutral_in, one)
        except UserError as error:
            trials.append(Trial(one, failed=str(error)))
            continue
        measured = retention(lm, dictionaries, unlearned, target_out, benign_out, neutral_out)
        trials.append(Trial(one, unlearned, measured))
    if all(trial.failed for trial in trials):
        raise UserError(f"no setting led to an adapter; of the first: {trials[0].failed}")
    return trials


def held_out(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts to train on, and each fourth, which is not."""
    last = HELD_OUT_ONE_IN - 1
    return (
        [text for number, text in enumerate(texts) if number % HELD_OUT_ONE_IN != last],
        [text for number, text in enumerate(texts) if number % HELD_OUT_ONE_IN == last],
    )


def retention(
    lm: LanguageModel,
    dictionaries: Sequence[Dictionary],
    unlearned: Unlearned,
    target: Sequence[str],
    benign: Sequence[str],
    neutral: Sequence[str],
) -> Retention:
    """Measure a model with and without an adapter on held-out texts."""
    figures = {}
    prompts_BS = _prompts(lm, neutral)
    for when in ("before", "after"):
        with attached(lm, unlearned.adapter) if when == "after" else nullcontext():
            for name, texts in (("target", target), ("benign", benign), ("neutral", neutral)):
                figures[f"{name}_loss_{when}"] = text_loss(lm, texts)
            figures[f"activation_{when}"] = activation_on(lm, dictionaries, unlearned.chosen, target)
            written_BS = lm.generate_ids(prompts_BS, NEW_TOKENS, temperature=1.0, whole=True)
        whole_BS = torch.cat([prompts_BS.to(written_BS.device), written_BS], 1)
        figures[f"perplexity_{when}"] = math.exp(_losses(lm, whole_BS)[:, -NEW_TOKENS:].mean())
    return Retention(**figures)


def activation_on(lm: LanguageModel, dictionaries: Sequence[Dictionary], chosen: Sequence[Chosen], texts: Sequence[str]) -> float:
    """The sum of chosen latents' activations per token of some texts, over all dictionaries."""
    total = 0.0
    for dictionary, one in zip(dictionaries, chosen, strict=True):
        fired = activity(lm, dictionary, texts)
        total += float(fired.sums_F[list(one.latents)].sum()) / fired.tokens
    return total


def text_loss(lm: LanguageModel, texts: Sequence[str]) -> float:
    """The mean loss of the tokens of some texts, in pieces of up to 128, in nats. Raises UserError where they have none."""
    pieces = sorted((ids for _, ids in text_pieces(lm, texts) if len(ids) > 1), key=len)
    if not pieces:
        raise UserError("the texts have no tokens: give texts of a few words at least")
    total, count = 0.0, 0
    for _, alike in groupby(pieces, len):
        same = list(alike)
        for start in range(0, len(same), PIECES_AT_ONCE):
            losses_BS = _losses(lm, torch.tensor(same[start : start + PIECES_AT_ONCE]))
            total += float(losses_BS.double().sum())
            count += losses_BS.numel()
    return total / count


def _losses(lm: LanguageModel, ids_BS: torch.Tensor) -> torch.Tensor:
    """-log p of each token but the first: [B, S - 1]."""
    logits_BSV = lm.logits(ids_BS)[:, :-1].float()
    picked_BS = logits_BSV.gather(2, ids_BS[:, 1:, None].to(logits_BSV.device, torch.int64))[..., 0]
    return logits_BSV.logsumexp(-1) - picked_BS


def _prompts(lm: LanguageModel, texts: Sequence[str]) -> torch.Tensor:
    """The first tokens of some texts: [B, S], S as many as the shortest allows."""
    begun = [tokenise(lm, text)[0][:PROMPT_TOKENS] for text in texts[:PROMPTS]]
    size = max(1, min(len(ids) for ids in begun))
    return torch.tensor([ids[:size] for ids in begun if len(ids) >= size])

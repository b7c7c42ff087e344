"""One prompt, continued as the model is and with edits, side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from saebench.errors import UserError
from saebench.lm import LanguageModel
from saebench.steering.edits import Edit
from saebench.steering.hooks import steer
from saebench.steering.measures import nll, repetition

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """What was written after a prompt."""

    text: str
    perplexity: float
    """Of the text after the prompt, under the untouched model; nan for none."""
    repetition: float
    """Share of its runs of three tokens that it had before."""
    tokens: int
    seconds_per_token: float


def write(
    lm: LanguageModel,
    edits: Edit | Sequence[Edit],
    prompt: str,
    max_new_tokens: int = 60,
    *,
    temperature: float = 0.8,
    seed: int = 0,
    on_text: OnText | None = None,
) -> Sample:
    """Continue a prompt under edits, `on_text` getting the text piece by piece. Raises UserError for an empty prompt or one beyond the
    model's positions, a temperature that is none, and edits that do not fit the model; no hook is left then."""
    check_writing(prompt, temperature)
    start = lm.prompt_ids(prompt)
    lm.check_generation(len(start), max_new_tokens)
    began = time.perf_counter()
    with steer(lm, edits):
        ids = lm.continue_prompt(prompt, max_new_tokens, temperature=temperature, seed=seed, on_text=on_text)
    seconds = time.perf_counter() - began
    loss = nll(lm, start, [ids])[0] if ids else math.nan
    text = lm.tokenizer.decode(torch.tensor(ids, dtype=torch.int64), skip_special_tokens=True)
    return Sample(text, math.exp(min(700.0, loss)), repetition(ids), len(ids), seconds / max(1, len(ids)))


def side_by_side(
    lm: LanguageModel,
    edits: Edit | Sequence[Edit],
    prompt: str,
    max_new_tokens: int = 60,
    *,
    temperature: float = 0.8,
    seed: int = 0,
) -> tuple[Sample, Sample]:
    """The prompt continued as the model is, and with the edits; same seed, same temperature. Raises UserError as `write` does."""
    untouched, steered = (write(lm, some, prompt, max_new_tokens, temperature=temperature, seed=seed) for some in ([], edits))
    return untouched, steered


def check_writing(prompt: str, temperature: float) -> None:
    """Raises UserError for a prompt without text, and for a temperature that is no number from 0."""
    if not prompt.strip():
        raise UserError("the prompt is empty: give it some text to go on from")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(
            f"temperature {temperature} is no number from 0: use 0 for the likeliest text, 1 for the model's own variety"
        )

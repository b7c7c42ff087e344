"""Labels from any OpenAI-compatible chat endpoint, for those who have one: what it will cost first, then the labels, each with a score.

Each latent takes two questions: one for a label, from examples of the labelling half of the corpus, and one for its score: in which of some
held-out snippets does the latent fire, going by that label? Nothing is asked unless `label_by_endpoint` is called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import IO, TypeVar

import numpy as np

from saebench.errors import Interrupted
from saebench.features.labelling.asking import Asker, Snippets, read_label, read_numbers
from saebench.features.labelling.chat import Endpoint, Malformed, Stopped
from saebench.features.labelling.kept import KeptLabels
from saebench.features.labelling.label import Label
from saebench.features.labelling.labels import kept_labels
from saebench.features.labelling.scoring import score
from saebench.features.store import FeatureStore
from saebench.progress import progress, say

__all__ = ["Endpoint", "Estimate", "estimate", "label_by_endpoint"]

CHARACTERS_A_TOKEN = 3.0  # of prompts: code has a bit more, so that the estimate is rather too high
LABEL_ANSWER, SCORE_ANSWER = 25, 30  # tokens
LABEL_CHARACTERS = 80
LOOKED_AT = 20  # latents whose questions are written for an estimate
MALFORMED_IN_A_ROW = 5  # answers, after which it is no accident
TRIES = 2  # for an answer that makes sense

T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """What labelling will take, before anything is sent. Tokens are estimated from characters, and rather too many."""

    latents: int
    calls: int
    prompt_tokens: int
    answer_tokens: int
    cost: float | None
    """In the currency of the prices, None where none were given."""
    labelled: int
    """Latents that have a label of this model already, and are not asked about."""

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", about {self.cost:.2f} at the given prices"
        done = f" ({self.labelled:,} are labelled already)" if self.labelled else ""
        return (
            f"{self.latents:,} latents{done}: up to {self.calls:,} calls, about {self.prompt_tokens:,} prompt tokens and "
            f"{self.answer_tokens:,} answer tokens{cost}"
        )


def estimate(
    store: FeatureStore,
    latents: Iterable[int],
    *,
    model: str = "",
    prompt_price: float | None = None,
    answer_price: float | None = None,
    seed: int = 0,
) -> Estimate:
    """What it takes to label some latents with a model: calls, tokens, and their cost at prices for a million tokens. Sends nothing.

    Raises UserError for an unknown latent."""
    asked, known = _to_ask(store, latents, model)
    asker = Asker(store, seed)
    looked_at = (
        [asked[i] for i in np.unique(np.linspace(0, len(asked) - 1, min(LOOKED_AT, len(asked))).astype(int))] if asked else []
    )
    characters = calls = 0
    for latent in looked_at:
        questions = _questions(asker, latent, latent in known)
        calls += len(questions)
        characters += sum(len(message["content"]) for messages in questions for message in messages)
    share = len(asked) / max(1, len(looked_at))
    calls, prompt = round(calls * share), round(characters * share / CHARACTERS_A_TOKEN)
    answer = round(calls * (LABEL_ANSWER + SCORE_ANSWER) / 2)
    cost = (
        None
        if prompt_price is None and answer_price is None
        else (prompt * (prompt_price or 0) + answer * (answer_price or 0)) / 1e6
    )
    return Estimate(len(asked), calls, prompt, answer, cost, len(known.keys() - set(asked)))


def _questions(asker: Asker, latent: int, labelled: bool) -> list[list[dict[str, str]]]:
    """What will be asked about a latent, with a label of the usual length."""
    question, snippets = asker.label_question(latent), asker.snippets(latent)
    if question is None:
        return []
    scoring = [] if snippets is None else [asker.score_question("x" * LABEL_CHARACTERS, snippets)]
    return scoring if labelled else [question, *scoring]


def label_by_endpoint(
    store: FeatureStore, endpoint: Endpoint, latents: Iterable[int], *, seed: int = 0, workers: int = 4, again: bool = False
) -> dict[int, Label]:
    """Ask an endpoint for labels of some latents and their scores; returns all that are kept of the store by now.

    Each label is kept as it arrives, beside the store, so that a stopped call loses none, and a latent that has one of this model is asked
    about only if `again`. Latents with too few firings are left out, and those for which nothing that makes sense is answered are
    counted at the end. Raises UserError in one line where the endpoint cannot be used, and Interrupted on Ctrl-C, after the
    questions on the way have been answered.
    """
    kept = kept_labels(store)
    strange = in_a_row = 0
    with kept.writing() as file:
        asked, known = _to_ask(store, latents, "" if again else endpoint.model)
        work = _Work(Asker(store, seed), endpoint, kept, file, known, threading.Event())
        with ThreadPoolExecutor(workers) as pool, progress("label", len(asked), "latents") as report:
            pending = [pool.submit(work.label, latent) for latent in asked]
            try:
                for future in as_completed(pending):
                    try:
                        future.result()
                        in_a_row = 0
                    except Malformed:
                        strange, in_a_row = strange + 1, in_a_row + 1
                        if in_a_row >= MALFORMED_IN_A_ROW:
                            raise
                    report(1)
            except BaseException as error:
                _end(work.stop, pending)
                if isinstance(error, KeyboardInterrupt):
                    raise Interrupted(f"interrupted; labels so far are in {kept.path}: call again to go on") from None
                raise
    if strange:
        say(
            f"{strange} of {len(asked)} latents have no label or no score: the answers made no sense; call again to try once more"
        )
    return kept.read()


def _end(stop: threading.Event, pending: Sequence[Future[None]]) -> None:
    """Ask no more; what is on the way is still kept."""
    stop.set()
    for future in pending:
        future.cancel()


def _to_ask(store: FeatureStore, latents: Iterable[int], model: str) -> tuple[list[int], dict[int, Label]]:
    """The latents that lack a label of a model, or its score, and the labels of it that there are. Raises UserError for an unknown one."""
    wanted = list(dict.fromkeys(latents))
    for latent in wanted:
        store.check_latent(latent)
    known = {latent: label for latent, label in kept_labels(store).read().items() if model and label.model == model}
    return [latent for latent in wanted if latent not in known or known[latent].score is None], known


@dataclass
class _Work:
    """Asking about one latent after the other, in several threads."""

    asker: Asker
    endpoint: Endpoint
    kept: KeptLabels
    file: IO[bytes]
    known: dict[int, Label]
    stop: threading.Event

    def label(self, latent: int) -> None:
        """Ask for a label and then for its score, and keep each as it comes. Raises Malformed where the answers made no sense."""
        label = self.known.get(latent)
        try:
            if label is None:
                question = self.asker.label_question(latent)
                if question is None:
                    return
                text = self.sensible(question, read_label)
                label = Label(latent, text, "endpoint", model=self.endpoint.model)
                self.kept.add(self.file, label)
            snippets = self.asker.snippets(latent)
            if snippets is not None:
                self.kept.add(self.file, self.scored(label, snippets))
        except Stopped:
            return

    def scored(self, label: Label, snippets: Snippets) -> Label:
        """The label with its score on held-out snippets."""
        count = len(snippets.texts)
        named = self.sensible(self.asker.score_question(label.text, snippets), lambda answer: read_numbers(answer, count))
        fires, chosen = np.array(snippets.fires), np.isin(np.arange(1, count + 1), list(named))
        precision = float(fires[chosen].mean()) if chosen.any() else float("nan")
        found = score(chosen[fires], np.ones(int(fires.sum())), chosen[~fires], precision)
        return replace(
            label,
            score=found.balanced_accuracy,
            error=found.error,
            precision=precision if chosen.any() else None,
            recall=found.recall,
            positives=found.positives,
            negatives=found.negatives,
        )

    def sensible(self, question: list[dict[str, str]], read: Callable[[str], T | None]) -> T:
        """What can be read from an answer, the first time it makes sense."""
        answer = ""
        for _ in range(TRIES):
            if self.stop.is_set():
                raise Stopped
            answer = self.endpoint.ask(question, self.stop)
            found = read(answer)
            if found is not None:
                return found
        raise Malformed(f"{self.endpoint.model} answers beside the question: {' '.join(answer.split())[:80]!r}")

"""Selected features beside what they have to beat, in one call: methods made from two sets of texts, and their dose-response.

Features: by contrast and by output score among those, the best few alike and all weighted by how much more active they are; by LangFIR
from the positives alone; and whatever is given. Baselines: DiffMean, the first component, a prompt. Controls: random directions, random
latents of the same density, and contrast among random directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from saebench.dictionaries import Dictionary
from saebench.dictionaries.fit import check_model
from saebench.errors import UserError
from saebench.lm import LanguageModel
from saebench.progress import say
from saebench.steering.activity import activity
from saebench.steering.baselines import (
    LEAST_TEXTS,
    Method,
    diff_mean,
    first_component,
    random_dictionary,
    random_directions,
    random_latents,
    unit_of,
)
from saebench.steering.choosing import by_contrast, by_output, weighted
from saebench.steering.chosen import Chosen
from saebench.steering.edits import add
from saebench.steering.effect import Effects, dose_response
from saebench.steering.langfir import langfir
from saebench.steering.targets import Likeness, Target

Found = TypeVar("Found")
CANDIDATES = 150  # by contrast, that the output score chooses among
PREFIX_TOKENS = 96


def compare(
    lm: LanguageModel,
    dictionary: Dictionary,
    positives: Sequence[str],
    negatives: Sequence[str],
    prompts: Sequence[str],
    *,
    neutral: Tensor,
    target: Target | None = None,
    count: int = 5,
    chosen: Sequence[Chosen] = (),
    controls: int = 5,
    seed: int = 0,
    **options: Any,
) -> Effects:
    """Steer towards the positives by every method, and measure (`effect.dose_response`, whose options it takes). The target is by default
    the likeness to the positives; selections without weights have `count` latents; `chosen` are selections made elsewhere.

    Raises UserError for fewer than two texts on a side (four without a target), for prompts or contexts that do not fit, and where no
    method finds a feature. A single method that finds none is left out, with a line that says so.
    """
    for side, texts in (("positives", positives), ("negatives", negatives)):
        if len(texts) < LEAST_TEXTS:
            raise UserError(f"{len(texts)} {side} say too little about a concept: give at least {LEAST_TEXTS}")
    wanted = target or Likeness.between(lm.tokenizer, positives, negatives)
    methods = methods_for(
        lm, dictionary, positives, negatives, prompts, count=count, chosen=chosen, controls=controls, seed=seed,
        room=options.get("max_new_tokens", 32),
    )  # fmt: skip
    return dose_response(lm, methods, prompts, wanted, neutral=neutral, **options)


def methods_for(
    lm: LanguageModel,
    dictionary: Dictionary,
    positives: Sequence[str],
    negatives: Sequence[str],
    prompts: Sequence[str],
    *,
    count: int = 5,
    chosen: Sequence[Chosen] = (),
    controls: int = 5,
    seed: int = 0,
    room: int = 32,
) -> list[Method]:
    """The methods that `compare` measures, each of strength 1 in tenths of the mean activation's length."""
    check_model(dictionary, lm)
    sites = dictionary.config.writes
    unit = unit_of(lm, sites, [*positives, *negatives])

    with_it, without = (activity(lm, dictionary, texts) for texts in (positives, negatives))
    selections = [found.best(count) for found in chosen]
    candidates = _tried(lambda: by_contrast(lm, dictionary, positives, negatives, count=CANDIDATES))
    if candidates is not None:
        raising = _tried(
            lambda: by_output(lm, dictionary, candidates, positives=positives[:8], negatives=negatives[:8], count=CANDIDATES)
        )
        for found in (candidates, *_kept(raising)):
            selections += [found.best(count), *_kept(_tried(partial(weighted, found, with_it, without)))]
    selections += _kept(_tried(lambda: langfir(lm, dictionary, positives, seed=seed)))
    if not selections:
        raise UserError("no method found a feature that fires more in the positives: give more text, or another dictionary")
    methods = [
        Method(found.method, "features", (add(dictionary, found.latents, unit=unit, weights=found.weights),))
        for found in selections
    ]

    (site,) = sites if len(sites) == 1 else (sites[-1],)
    width = lm.width(site)
    difference_D = diff_mean(lm, site, positives, negatives)
    methods += [
        Method("DiffMean", "baseline", (add(difference_D, site=site, unit=unit),)),
        Method("PCA", "baseline", (add(first_component(lm, site, positives, difference_D), site=site, unit=unit),)),
    ]
    if prefix := _prefix(lm, positives, prompts, room):
        methods.append(Method("prompt", "baseline", prefix=prefix))
    for number, row_D in enumerate(random_directions(width, controls, seed)):
        edits = (add(row_D, site=site, unit=unit),)
        methods.append(Method(f"random direction {number + 1}", "control", edits, group="random direction"))
    like = (candidates or selections[0]).latents[:count]
    for number, latents in enumerate(_tried(lambda: random_latents(without, like, controls, seed)) or []):
        edits = (add(dictionary, latents, unit=unit),)
        methods.append(Method(f"random latents {number + 1}", "control", edits, group="random latents"))
    methods += _untrained(lm, dictionary, site, positives, negatives, count, unit, seed)
    return methods


def _untrained(
    lm: LanguageModel,
    dictionary: Dictionary,
    site: str,
    positives: Sequence[str],
    negatives: Sequence[str],
    count: int,
    unit: float,
    seed: int,
) -> list[Method]:
    """Contrast among as many random directions, of which as many are active at a time as a TopK of usual sparsity has."""
    d_sae = dictionary.config.d_sae
    k = min(d_sae, getattr(dictionary.config, "k", 32))
    random = random_dictionary(lm, site, [*positives, *negatives], d_sae, k, seed)
    found = _tried(lambda: by_contrast(lm, random, positives, negatives, count=count))
    return [] if found is None else [Method("random dictionary", "control", (add(random, found.latents, unit=unit),))]


def _prefix(lm: LanguageModel, positives: Sequence[str], prompts: Sequence[str], room: int) -> str:
    """Positives put before a prompt, as many tokens as there is room for, at most 96."""
    longest = max(len(lm.prompt_ids(prompt)) for prompt in prompts)
    left = PREFIX_TOKENS if lm.max_context is None else min(PREFIX_TOKENS, lm.max_context - longest - room - 8)
    if left < 4:
        say(f"the prompt as a baseline is left out: prompts leave {max(0, left)} positions for it")
        return ""
    ids = lm.tokenizer("\n".join(text.strip("\n") for text in positives[:20]), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return lm.tokenizer.decode(ids[:left]) + "\n"


def _tried(make: Callable[[], Found]) -> Found | None:
    """What a method found, or None, with its own line that says why it found nothing."""
    try:
        return make()
    except UserError as error:
        say(f"left out: {error}")
        return None


def _kept(found: Found | None) -> list[Found]:
    return [] if found is None else [found]

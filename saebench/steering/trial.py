"""Edits that a person set by hand, tried on the text of a feature store: what they are measured on, and their dose-response as a file.

Random directions are the control, as long as the change that the edits make on neutral text. Strengths count those of the strongest
edit; the others keep their proportion to it. `python -m saebench.steering.trial` measures in a process of its own, for pages.
Shape suffixes: `C` contexts, `S` positions, `D` width of all sites side by side, `N` entries, `P` pieces, `U` texts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from saebench.config import Config
from saebench.dictionaries import Dictionary, load_dictionary
from saebench.errors import UserError
from saebench.features.documents import paragraphs
from saebench.features.prompts import PIECE, encode_pieces, text_pieces
from saebench.features.store import FeatureStore
from saebench.files import identity, locked, read_json, write_json
from saebench.lm import LanguageModel, load_lm
from saebench.steering.baselines import Method, random_directions, unit_of_ids
from saebench.steering.edits import Edit, add
from saebench.steering.effect import STRENGTHS, Dose, Effects, dose_response
from saebench.steering.hooks import steer
from saebench.steering.measures import everywhere, sites_of, spread
from saebench.steering.positions import SKIP, Positions
from saebench.steering.presets import Setting
from saebench.steering.targets import Likeness, Pattern, Target

SHARES = (0.25, 0.5, 1.0, 2.0)  # strengths of edits that are a share of a change
CONTEXTS, TOKENS = 8, 64
PROMPTS, PROMPT_TOKENS = 8, 10
CONTROLS, SEEDS, WRITTEN = 3, 2, 24
OTHERS = 24  # pieces of the indexed text that examples are told from
NAME = "these edits"
ARRAYS = ("target_PR", "nll_PR", "repetition_PR", "kl_C", "size_C")


# --- text of a store ---


def neutral(store: FeatureStore, count: int = CONTEXTS, size: int = TOKENS) -> Tensor:
    """Contexts spread over a store, the first tokens of each: [C, S]."""
    return spread(store.contexts.ids_NS, count)[:, :size].long()


def prompts(store: FeatureStore, count: int = PROMPTS, size: int = PROMPT_TOKENS) -> list[str]:
    """Beginnings of contexts spread over a store, without BOS; each text once, none blank."""
    pieces = [_text(store, context, size) for context in _spread(store, count)]
    return [piece for piece in dict.fromkeys(pieces) if piece.strip()]


def unit(lm: LanguageModel, dictionary: Dictionary, store: FeatureStore) -> float:
    """What a strength of 1 adds: a tenth of the mean length of the activations that the dictionary writes, on neutral text."""
    return unit_of_ids(lm, dictionary.config.writes, neutral(store))


def _spread(store: FeatureStore, count: int) -> list[int]:
    return spread(torch.arange(store.num_contexts), count).tolist()


def _text(store: FeatureStore, context: int, size: int) -> str:
    """The beginning of a context, without what was put between documents."""
    ids, positions = (column[context, 1 : 1 + size].tolist() for column in (store.contexts.ids_NS, store.contexts.positions_NS))
    return "".join(store.token_strings[i] for i, position in zip(ids, positions, strict=True) if position >= 0)


# --- what is measured ---


class Trial(Config):
    """What is to be measured: edits, and what they are to reach."""

    edits: tuple[Setting, ...] = Field(min_length=1)
    target: Literal["firing", "pattern", "examples"] = "firing"
    """Tokens on which the features fire, lines in which a pattern is found, or likeness to examples."""
    pattern: str = ""
    examples: str = ""
    """Texts set apart by empty lines."""
    unit_of_store: bool = False
    """Whether additions count in the unit measured on the store, whatever unit the edits have."""

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The edits that do something, at strength 1 of the strongest: what is measured depends on no more."""
        most = max(abs(setting.strength) for setting in self.edits)
        return tuple(s.model_copy(update={"strength": s.strength / most}) for s in self.edits if s.strength)

    def path(self, store: FeatureStore) -> Path:
        """Where its result is kept, or would be: steering/doses/ of the run that a store belongs to."""
        normal = self.model_copy(update={"edits": self.settings})
        key = identity([normal.model_dump(mode="json"), store.identity])
        return store.path.parent.parent / "steering" / "doses" / f"{key}.json"

    @property
    def strengths(self) -> tuple[float, ...]:
        return STRENGTHS if any(setting.how == "add" for setting in self.edits) else SHARES

    def aim(self, lm: LanguageModel, dictionary: Dictionary, store: FeatureStore) -> Target:
        """The target. Raises UserError for a missing pattern or one that is none, and for too few examples."""
        if self.target == "firing":
            return Firing(lm, dictionary, tuple({latent for setting in self.edits for latent in setting.latents}))
        if self.target == "pattern":
            if not self.pattern:
                raise UserError(r"the pattern is empty: give a regular expression, such as ^\s*def ")
            return Pattern.of(self.pattern)
        others = [_text(store, context, TOKENS) for context in _spread(store, OTHERS)]
        return Likeness.between(lm.tokenizer, paragraphs(self.examples), others, "likeness to the examples")

    def made(self, lm: LanguageModel, dictionary: Dictionary, store: FeatureStore) -> list[Edit]:
        """Its edits at strength 1 of the strongest. Raises UserError where all strengths are 0, and as `Setting.edit` does."""
        if not self.settings:
            raise UserError("all strengths are 0, so there is nothing to measure: set one")
        edits = [setting.edit({setting.dictionary: dictionary}) for setting in self.settings]
        if not self.unit_of_store:
            return edits
        own = unit(lm, dictionary, store)
        return [replace(edit, unit=own) if edit.how == "add" else edit for edit in edits]


@dataclass(frozen=True)
class Firing:
    """Share of a text's tokens on which any of some latents fires, the text read by itself and without edits."""

    lm: LanguageModel
    dictionary: Dictionary
    latents: tuple[int, ...]
    name: str = "tokens they fire on (share)"

    def score(self, texts: Sequence[str]) -> np.ndarray:
        pieces = text_pieces(self.lm, texts, PIECE)
        texts_P = np.array([number for number, _ in pieces], dtype=np.int64)
        tokens_U, firing_U = np.zeros(len(texts)), np.zeros(len(texts))
        np.add.at(tokens_U, texts_P, [len(ids) - 1 for _, ids in pieces])
        for places_N, positions_N, latents_N, _ in encode_pieces(self.lm, self.dictionary, pieces):
            chosen = np.isin(latents_N, self.latents)
            tokens = np.unique(np.stack([places_N[chosen], positions_N[chosen]]), axis=1)
            np.add.at(firing_U, texts_P[tokens[0]], 1)
        return firing_U / np.maximum(1, tokens_U)


def measure(lm: LanguageModel, dictionary: Dictionary, store: FeatureStore, trial: Trial, **options: Any) -> Effects:
    """The dose-response of a trial's edits, as one method, against random directions; options as `dose_response` takes them.

    Raises UserError as `aim`, `made` and `dose_response` do, and for edits that change nothing on neutral text.
    """
    target, edits, ids_CS = trial.aim(lm, dictionary, store), trial.made(lm, dictionary, store), neutral(store)
    methods = [Method(NAME, "features", tuple(edits))]
    for number, random in enumerate(_random(dictionary, change(lm, edits, ids_CS), edits[0].positions)):
        methods.append(Method(f"random direction {number + 1}", "control", tuple(random), group="random direction"))
    chosen: dict[str, Any] = {"strengths": trial.strengths, "seeds": SEEDS, "max_new_tokens": WRITTEN} | options
    return dose_response(lm, methods, prompts(store), target, neutral=ids_CS, **chosen)


def change(lm: LanguageModel, edits: Sequence[Edit], ids_CS: Tensor) -> float:
    """The mean over tokens of ||x' - x||, all sites of the edits side by side, on contexts of which all but BOS is edited. Raises UserError
    where it is zero."""
    sites = sites_of(edits)
    with lm.watching(sites) as clean:
        lm.logits(ids_CS)
    with steer(lm, everywhere(edits)), lm.watching(sites) as moved:
        lm.logits(ids_CS)
    x_CSD, moved_CSD = (torch.cat([seen[site].flatten(2).float() for site in sites], -1) for seen in (clean, moved))
    length = float((moved_CSD - x_CSD)[:, SKIP:].norm(dim=-1).double().mean())
    if not length > 0:
        raise UserError("on neutral text these edits change nothing: choose features that fire there, or add or clamp these")
    return length


def _random(dictionary: Dictionary, length: float, positions: Positions) -> list[list[Edit]]:
    """Additions of random directions of one length over all sites, at strength 1."""
    config, made = dictionary.config, []
    for row_D in random_directions(sum(config.blocks_out), CONTROLS):
        parts = zip(config.writes, row_D.split(list(config.blocks_out)), strict=True)
        made.append([add(part, site=site, unit=length * float(part.norm()), positions=positions) for site, part in parts])
    return made


# --- as a file ---


def keep(effects: Effects, path: Path) -> None:
    doses = [
        asdict(dose) | {name: getattr(dose, name).tolist() for name in ARRAYS} for dose in (effects.untouched, *effects.doses)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"target": effects.target, "prompts": effects.prompts, "doses": doses})


def kept(path: Path) -> Effects:
    """Raises UserError where the file is missing or damaged."""
    found = read_json(path)
    try:
        doses = [Dose(**(dose | {name: np.array(dose[name]) for name in ARRAYS})) for dose in found["doses"]]
        return Effects(found["target"], found["prompts"], doses[0], doses[1:])
    except (TypeError, KeyError, IndexError):
        raise UserError(f"{path} is damaged: remove it, and measure again") from None


def main(store_path: str, dictionary_path: str, part: str, model: str, dtype: str, trial: str) -> None:
    """Measure a trial, given as JSON, unless its result is there; without getting in anyone's way."""
    os.nice(10)
    store, wanted = FeatureStore(store_path), Trial.model_validate_json(trial)
    path = wanted.path(store)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.stem}.lock")):
        if path.exists():
            return
        lm, dictionary = load_lm(model, dtype=getattr(torch, dtype)), load_dictionary(dictionary_path)
        keep(measure(lm, dictionary.parts()[part] if part else dictionary, store, wanted), path)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")

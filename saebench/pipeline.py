"""The steps of a recipe, shared by the commands: model, text, activations, training, evaluation.

Recipe -> contexts to train and to evaluate on -> a store or stream -> dictionaries in a run -> evals/core.json
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from saebench.activations import ActivationStore, ActivationStream, Source, harvest
from saebench.activations.store import FIELDS, FORMAT, VERSION
from saebench.dictionaries import Dictionary, load_dictionary
from saebench.errors import UserError
from saebench.evaluation import evaluate
from saebench.features import Feature, FeatureStore, characteristic_features, index
from saebench.features.building import fingerprint
from saebench.figures.report import write_report
from saebench.files import MANIFEST, identity, read_manifest
from saebench.lm import Contexts, LanguageModel, load_lm, load_text, pack
from saebench.progress import say
from saebench.recipes import Recipe
from saebench.runs import Run
from saebench.trainer import train
from saebench.trainer.loop import fit_to_source

SUITES = ("core",)
TOKENS_REPORTED = 262_144  # that the features of a report are drawn from, where no feature store is there yet


@dataclass
class Pipeline:
    """One recipe being carried out. The model and the text are opened when first needed."""

    recipe: Recipe
    _opened: ActivationStore | ActivationStream | None = None

    @cached_property
    def lm(self) -> LanguageModel:
        model = self.recipe.model
        return load_lm(model.name, device=model.device, dtype=getattr(torch, model.dtype))

    @cached_property
    def contexts(self) -> tuple[Contexts, Contexts]:
        """Contexts to train on and to evaluate on. Raises UserError when the text is too short."""
        text, activations, tokenizer = self.recipe.text, self.recipe.activations, self.lm.tokenizer
        self.lm.check_context(activations.context_size)
        source = load_text(text.source, split=text.split, column=text.column)
        limit = max(1, self.recipe.evaluation.num_tokens // activations.context_size)
        other = text.evaluation or ("builtin:held_out" if text.source == "builtin" else None)
        if other is not None:
            training = pack(source, tokenizer, activations.context_size, activations.num_tokens)
            held_out = pack(
                load_text(other, column=text.column), tokenizer, activations.context_size, limit * activations.context_size
            )
            return training, held_out
        wanted = activations.num_tokens and math.ceil(activations.num_tokens / (1 - text.held_out))
        whole = pack(source, tokenizer, activations.context_size, wanted)
        kept = max(1, round(len(whole) * text.held_out))
        if len(whole) <= kept:
            raise UserError(
                f"text {text.source!r} fills one context only, so nothing is left to evaluate on: use more text or set text.evaluation"
            )
        return whole[:-kept], whole[len(whole) - kept :][:limit]

    def check(self) -> None:
        """Everything that can be found wrong before anything is written, one forward pass of the model included."""
        for site in self.recipe.activations.sites:
            self.lm.width(site)
        source: Source | None = self._given_store()
        if source is None:
            source = self.stream()
            first = torch.arange(min(self.recipe.activations.batch_size, len(self.contexts[0])))
            for site, encoded in source.fetch(first, list(source.widths)).items():
                if not encoded.values.isfinite().all():
                    raise UserError(
                        f"NaN or Inf in the activations of site {site!r}, contexts 0 to {len(first) - 1}: check the model's weights"
                    )
        fit_to_source(self.recipe.dictionary_configs(), source)

    def store_path(self, beside: Path) -> Path:
        """Where the recipe's activations are kept: as given, or acts/NAME-HASH next to the run's folder."""
        recipe = self.recipe
        if recipe.activations.path is not None:
            return Path(recipe.activations.path)
        key = identity([recipe.model.model_dump(), recipe.text.model_dump(), recipe.activations.model_dump()])
        return beside.parent / "acts" / f"{recipe.name}-{key[:8]}"

    def source(self, beside: Path) -> ActivationStore | ActivationStream:
        """The activations: a given store as it is, a harvested one, or a stream. A store is verified byte by byte, once."""
        if self._opened is None:
            self._opened = self._open_source(beside)
        return self._opened

    def _open_source(self, beside: Path) -> ActivationStore | ActivationStream:
        activations = self.recipe.activations
        if activations.mode == "stream":
            return self.stream()
        store = self._given_store()
        if store is None:
            store = harvest(
                self.lm, self.contexts[0], activations.sites, self.store_path(beside),
                storage=activations.storage, batch_size=activations.batch_size,
            )  # fmt: skip
        store.verify()
        return store

    def stream(self) -> ActivationStream:
        """The activations computed by the model when asked for, whatever the recipe's mode."""
        activations = self.recipe.activations
        return ActivationStream(self.lm, self.contexts[0], activations.sites, batch_size=activations.batch_size)

    def _given_store(self) -> ActivationStore | None:
        """The finished store that `activations.path` names; None where there is none yet, or one that a stopped harvest left."""
        activations = self.recipe.activations
        return self._kept_store(Path(activations.path)) if activations.path is not None and activations.mode == "store" else None

    def _kept_store(self, path: Path) -> ActivationStore | None:
        """The finished store in a directory, checked against the recipe's model and sites, if there is one."""
        if not (path / MANIFEST).exists() or not read_manifest(path, FORMAT, VERSION, FIELDS)["complete"]:
            return None
        store = ActivationStore(path)
        store.check_sites(self.recipe.activations.sites)
        if store.config["model_fingerprint"] != self.lm.fingerprint:
            raise UserError(
                f"{store.path} holds activations of model {store.config['model']!r} ({store.config['model_fingerprint']}), the recipe "
                f"names {self.recipe.model.name!r} ({self.lm.fingerprint}): correct model.name or activations.path"
            )
        return store

    def train(self, run: Run) -> Run:
        """Harvest and train into a run, continuing what an earlier call left."""
        if run.finished:
            return run
        with timed(run, "activations"):
            source = self.source(run.path.parent)
            before = run.record["activations"].get("identity", source.identity)
            if before != source.identity:
                raise UserError(
                    f"the activations are not those that {run.path} began with ({source.identity}, not {before}): "
                    "restore them, or use --overwrite or another --out"
                )
        run.record["model"] = {"name": self.recipe.model.name, "fingerprint": self._fingerprint(source)}
        run.record["activations"] = {
            "identity": source.identity,
            "tokens": source.num_tokens,
            "path": str(getattr(source, "path", "")),
        }
        run.save()
        with timed(run, "training"):
            configs = self.recipe.dictionary_configs()
            lm = self.lm if any(config.needs_lm for config in configs.values()) else None
            train(configs, source, self.recipe.training, out=run.path, lm=lm, device=self.recipe.model.device)
        run.record["finished"] = True
        run.save()
        return run

    def _fingerprint(self, source: Source) -> str:
        return source.config["model_fingerprint"] if isinstance(source, ActivationStore) else self.lm.fingerprint

    def check_model(self, run: Run) -> None:
        """Raises UserError where the recipe's model has other weights than the one that the run was trained on."""
        trained_on = run.record["model"]["fingerprint"]
        if trained_on != self.lm.fingerprint:
            raise UserError(
                f"{run.path} was trained on a model {self.recipe.model.name!r} with other weights ({trained_on}, now "
                f"{self.lm.fingerprint}): restore that model, or train again"
            )

    def evaluate(self, run: Run, suite: str = "core") -> dict[str, Any]:
        """Measure every dictionary of a run on the held-out text and write evals/SUITE.json."""
        if suite not in SUITES:
            raise UserError(f"unknown suite {suite!r}: use one of {', '.join(SUITES)}")
        paths = run.dictionaries()
        self.check_model(run)
        held_out = self.contexts[1]
        results = {}
        with timed(run, "evaluation"):
            for name, dictionary in parts(paths):
                say(f"evaluating {name} on {held_out.num_tokens:,} held-out tokens")
                results[name] = evaluate(dictionary, self.lm, held_out, batch_size=self.recipe.evaluation.batch_size)
        run.write_evaluation(suite, results)
        return results

    def report(self, run: Run, evaluation: dict[str, Any], count: int = 12) -> tuple[Path, dict[str, list[Feature]]]:
        """Write the run's report.html with `count` characteristic features of each dictionary; returns its path and the features."""
        features = {}
        for name, dictionary in parts(run.dictionaries()):
            store = self._feature_store(run, name, dictionary, TOKENS_REPORTED)
            features[name] = characteristic_features(dictionary, store, count)
        return write_report(run, evaluation, features, self.lm.token_strings.__getitem__), features

    def index(
        self, run: Run, names: Sequence[str] | None = None, *, tokens: int, overwrite: bool = False
    ) -> dict[str, FeatureStore]:
        """Build the feature stores of a run's dictionaries, or of those named, over up to so many tokens of the text they were trained on.
        Raises UserError for a name the run does not have."""
        found = dictionaries(run, names)
        with timed(run, "index"):
            return {name: self._build_store(run, name, dictionary, tokens, overwrite) for name, dictionary in found.items()}

    def _feature_store(self, run: Run, name: str, dictionary: Dictionary, tokens: int) -> FeatureStore:
        """The feature store of a dictionary as it is, whatever its tokens; or a new one."""
        path = run.features(name)
        if (path / MANIFEST).exists():
            store = FeatureStore(path)
            if store.config["dictionary"] == fingerprint(dictionary):
                return store
        return self._build_store(run, name, dictionary, tokens, overwrite=True)

    def _build_store(self, run: Run, name: str, dictionary: Dictionary, tokens: int, overwrite: bool) -> FeatureStore:
        source = self._opened or self._kept_store(self.store_path(run.path.parent)) or self.stream()
        limit = max(1, tokens // source.context_size)
        # one of fewer tokens, such as a report makes, gives way
        return index(dictionary, source, run.features(name), lm=self.lm, limit=limit, overwrite=overwrite, grow=True)


def feature_stores(run: Run, names: Sequence[str] | None = None) -> dict[str, FeatureStore]:
    """The finished feature stores of a run by dictionary, or of those named. Raises UserError where there is none."""
    found = {
        path.parent.name: path.parent
        for path in sorted((run.path / "features").glob(f"*/{MANIFEST}"))
        if path.parent.name[0] != "."
    }
    for name in names or ():
        if name not in found:
            raise UserError(
                f"{run.path} has no feature store of {name!r}: it has {', '.join(found) or 'none'}; run `saebench index {run.path}`"
            )
    if not found:
        raise UserError(f"{run.path} has no feature store yet: run `saebench index {run.path}`")
    return {name: FeatureStore(path) for name, path in found.items() if not names or name in names}


def dictionaries(run: Run, names: Sequence[str] | None = None) -> dict[str, Dictionary]:
    """The trained dictionaries of a run that are measured and shown, by name, or those named. Raises UserError for another name."""
    found = dict(parts(run.dictionaries()))
    check_named(run, found, names or ())
    return {name: dictionary for name, dictionary in found.items() if not names or name in names}


def check_named(run: Run, found: Mapping[str, Dictionary], names: Sequence[str]) -> None:
    """Raises UserError for the first name that is not among the dictionaries found."""
    if unknown := [name for name in names if name not in found]:
        raise UserError(f"{run.path} has no dictionary {unknown[0]!r}: it has {', '.join(found)}")


def parts(paths: dict[str, Path]) -> Iterator[tuple[str, Dictionary]]:
    """The dictionaries that are measured and shown, by name: ID, or ID@PART for those that stand for several."""
    for name, path in paths.items():
        for part, dictionary in load_dictionary(path).parts().items():
            yield f"{name}@{part}" if part else name, dictionary


@contextmanager
def timed(run: Run, what: str) -> Iterator[None]:
    """Add the seconds of the block to the run's record."""
    started = time.perf_counter()
    yield
    seconds = run.record["seconds"]
    seconds[what] = round(seconds.get(what, 0.0) + time.perf_counter() - started, 2)
    run.save()

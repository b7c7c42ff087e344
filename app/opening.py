"""What the browser opens: the runs named on the command line, and nothing else. Opened once for all visitors, and again when it changes.

A run, dictionary or store that cannot be opened carries the sentence that says why; the others are not concerned.
"""

from __future__ import annotations

import glob
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pandas  # noqa: F401 (before there are threads: plotly uses what it finds of it, be it half imported)
import streamlit as st

from saebench.dictionaries import Dictionary, DictionaryConfig, load_dictionary, parse_dictionary
from saebench.errors import UserError
from saebench.features.labelling.labels import Labels, read_offline
from saebench.features.labelling.notes import Notes
from saebench.features.store import FeatureStore
from saebench.files import MANIFEST, read_json
from saebench.lm import LanguageModel, load_lm
from saebench.runs import RUN, Run
from saebench.trainer.logs import read_metrics

Stamp = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Entry:
    """One dictionary of a run, ID or ID@PART, and where its feature store is, or would be. The same where run and name are the same."""

    run: Opened
    name: str

    def __eq__(self, other: object) -> bool:  # not by the whole run, which holds its entries
        return isinstance(other, Entry) and (self.run.path, self.name) == (other.run.path, other.name)

    def __hash__(self) -> int:
        return hash((self.run.path, self.name))

    @property
    def store_path(self) -> Path:
        return self.run.path / "features" / self.name

    @property
    def indexed(self) -> bool:
        return (self.store_path / MANIFEST).exists()

    @property
    def key(self) -> str:
        """A name for what is kept in memory of this store as it is now."""
        return f"{self.store_path}:{stamp(self.store_path / MANIFEST)}"


@dataclass(frozen=True)
class Opened:
    """A run as far as it can be opened."""

    name: str
    """What it is called here: its directory's name, or more of its path where two are called the same."""
    path: Path
    record: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return bool(self.record.get("finished"))


def stamp(path: Path) -> Stamp | None:
    """What changes when a file is replaced."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


# --- runs ---


def given() -> list[Path]:
    return [Path(name) for name in sys.argv[1:]]


def check_given() -> None:
    if not given():
        raise UserError("No run was given: start with `saebench browse RUN...`")


def names_of(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def runs() -> dict[str, Opened]:
    """The runs of the command line by name, in their order."""
    paths = given()
    return {name: _run(name, path) for name, path in zip(names_of(paths), paths, strict=True)}


def _run(name: str, path: Path) -> Opened:
    try:
        record = _record(str(path), stamp(path / RUN))
    except (UserError, OSError) as error:
        return Opened(name, path, problem=str(error))
    run = Opened(name, path, record)
    found = {p.name for p in (path / "dictionaries").glob("*") if p.is_dir() and not p.name.startswith(".")}
    stores = {p.parent.name for p in (path / "features").glob(f"*/{MANIFEST}") if not p.parent.name.startswith(".")}
    parts = {name for name in stores if "@" in name}
    whole = found - {name.partition("@")[0] for name in parts}
    for entry in sorted(whole | stores):
        run.entries[entry] = Entry(run, entry)
    return run


@st.cache_resource(show_spinner=False, max_entries=100)
def _record(path: str, at: Stamp | None) -> dict[str, Any]:
    return Run.open(path).record


def evaluation(run: Opened, suite: str = "core") -> dict[str, dict[str, Any]]:
    """Figures by dictionary, as evals/SUITE.json has them; nothing before they are measured. Raises UserError for a damaged file."""
    path = run.path / "evals" / f"{suite}.json"
    at = stamp(path)
    return {} if at is None else _evaluation(str(path), at)


@st.cache_resource(show_spinner=False, max_entries=100)
def _evaluation(path: str, at: Stamp) -> dict[str, dict[str, Any]]:
    found = read_json(Path(path))
    if not isinstance(found, dict) or not isinstance(found.get("dictionaries"), dict):
        raise UserError(f"{path} is damaged: it has no figures by dictionary")
    return found["dictionaries"]


def metrics(run: Opened) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    path = run.path / "metrics.jsonl"
    return _metrics(str(path), stamp(path))


@st.cache_resource(show_spinner=False, max_entries=100)
def _metrics(path: str, at: Stamp | None) -> list[dict[str, Any]]:
    try:
        return read_metrics(Path(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def config(entry: Entry) -> DictionaryConfig:
    """The settings of a dictionary. Raises UserError where they are missing or damaged."""
    path = entry.run.path / "dictionaries" / entry.name.partition("@")[0] / "config.json"
    return _config(str(path), stamp(path))


@st.cache_resource(show_spinner=False, max_entries=1000)
def _config(path: str, at: Stamp | None) -> DictionaryConfig:
    found = read_json(Path(path))
    return parse_dictionary({"architecture": found["architecture"], **found["config"]}, path)


# --- stores, and what is kept beside them ---


def store(entry: Entry) -> FeatureStore:
    """The feature store of a dictionary. Raises UserError where there is none, or a damaged one, with what to do."""
    if not entry.indexed:
        raise UserError(f"{entry.name} has no feature store yet: run `saebench index {entry.run.path}`")
    return _store(str(entry.store_path), stamp(entry.store_path / MANIFEST))


@st.cache_resource(show_spinner="Opening the feature store", max_entries=64)
def _store(path: str, at: Stamp | None) -> FeatureStore:
    return FeatureStore(path)


def read_ahead(entry: Entry) -> None:
    """Begin to read what pages need of any store, while the first of them is being made."""
    _reading(entry.key, store(entry))


@st.cache_resource(show_spinner=False, max_entries=64)
def _reading(key: str, _store: FeatureStore) -> Thread:
    thread = Thread(target=_read_ahead, args=(_store,), daemon=True)
    thread.start()
    return thread


def _read_ahead(opened: FeatureStore) -> None:
    with suppress(UserError, OSError):  # the page that needs it says so
        _ = opened.counts_F, opened.token_strings, opened.contexts


def beside(entry: Entry) -> tuple[tuple[str, Stamp | None], ...]:
    """What changes when labels, bookmarks or notes do, which are kept beside the store."""
    paths = sorted(entry.store_path.parent.glob(f"{glob.escape(entry.name)}.*"))
    return tuple((path.name, stamp(path)) for path in paths if not path.name.endswith(".lock"))


def labels(entry: Entry) -> Labels:
    """All labels of a store, as they are now."""
    return _labels(entry.key, beside(entry), store(entry))


@st.cache_resource(show_spinner=False, max_entries=32)
def _labels(key: str, at: object, _store: FeatureStore) -> Labels:
    return Labels.open(_store)


def label_columns(entry: Entry) -> tuple[list[str], np.ndarray]:
    """The label of every latent, "" for none, and its score, NaN for none."""
    return _label_columns(entry.key, beside(entry), store(entry).d_sae, labels(entry))


@st.cache_resource(show_spinner=False, max_entries=32)
def _label_columns(key: str, at: object, d_sae: int, _labels: Labels) -> tuple[list[str], np.ndarray]:
    texts, scores = [""] * d_sae, np.full(d_sae, np.nan)
    for latent, text in _labels.texts.items():
        texts[latent] = text
    for latent, score in _labels.scores.items():
        scores[latent] = np.nan if score is None else score
    return texts, scores


def unlabelled(entry: Entry) -> bool:
    """Whether the offline labels of a store are still to be made."""
    return _unlabelled(entry.key, beside(entry), store(entry))


@st.cache_resource(show_spinner=False, max_entries=64)
def _unlabelled(key: str, at: object, _store: FeatureStore) -> bool:
    return read_offline(_store) is None


def notes(entry: Entry) -> Notes:
    """Bookmarks, own labels and notes, as they are now."""
    return _notes(entry.key, store(entry))


@st.cache_resource(show_spinner=False, max_entries=64)
def _notes(key: str, _store: FeatureStore) -> Notes:
    return Notes.open(_store)


# --- the model and the dictionary, for what is computed live ---


def dictionary(entry: Entry) -> Dictionary:
    """The dictionary itself. Raises UserError where it is missing or damaged."""
    whole, _, part = entry.name.partition("@")
    path = entry.run.path / "dictionaries" / whole
    loaded = _dictionary(str(path), stamp(path / "config.json"))
    return loaded.parts()[part] if part else loaded


@st.cache_resource(show_spinner="Opening the dictionary", max_entries=16)
def _dictionary(path: str, at: Stamp | None) -> Dictionary:
    return load_dictionary(path)


def lm(run: Opened) -> LanguageModel:
    """The language model that a run was made with. Raises UserError where it is not to be had, or is another one by now."""
    model = run.record["recipe"]["model"]
    found = _lm(model["name"], model["dtype"])
    expected = run.record["model"].get("fingerprint", found.fingerprint)
    if found.fingerprint != expected:
        raise UserError(
            f"model {model['name']!r} has other weights now ({found.fingerprint}) than when {run.name} was made ({expected})"
        )
    return found


@st.cache_resource(show_spinner="Loading the language model", max_entries=4)
def _lm(name: str, dtype: str) -> LanguageModel:
    import torch

    return load_lm(name, dtype=getattr(torch, dtype))

"""Labels of latents: short texts that say where they fire, with the rule behind each and its score on held-out contexts.

`label_offline` makes them from a feature store alone, without a model and without a key. They are kept beside the store, in
`ID.labels.parquet`, so that the store itself stays as it is. `Labels` opens all labels of a store: a person's own (`notes.py`), those of an
endpoint (`endpoint.py`) and these.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saebench.errors import UserError
from saebench.features.labelling.corpus import Corpus
from saebench.features.labelling.finding import LEAST, Found, Labeller
from saebench.features.labelling.firings import Firings
from saebench.features.labelling.kept import KeptLabels
from saebench.features.labelling.label import ENDPOINT, OFFLINE, Label, beside
from saebench.features.labelling.notes import Notes
from saebench.features.labelling.rules import Rule, find_places
from saebench.features.labelling.scoring import Score, score
from saebench.features.labelling.wording import kind, wording
from saebench.features.layout import details_name
from saebench.features.scanning import blocks
from saebench.features.store import FeatureStore
from saebench.files import locked, replacing
from saebench.progress import progress

FORMAT, VERSION = "saebench-labels", 1
NO_PATTERN, SELDOM, NEVER = "no simple pattern", "fires too seldom to say", "never fires"
LEAST_FIT, PARTLY = 0.15, 0.4
"""Held-out fit (`Score.fit`) below which a rule is no label, and below which it is one for a part of the firings."""
SAVE_SECONDS = 20.0
PLACES_SCORED = 300  # at which a rule is true, of which the precision is taken


def labels_path(store: FeatureStore) -> Path:
    """Where the offline labels of a store are kept."""
    return beside(store.path, OFFLINE)


def lock_path(store: FeatureStore) -> Path:
    """What is locked while a store is labelled."""
    return store.path.with_name(f".{store.path.name}.labels.lock")


# --- making them ---


def label_offline(store: FeatureStore, latents: Iterable[int] | None = None, *, seed: int = 0, overwrite: bool = False) -> Labels:
    """Label the latents of a store, all of them or some, from its tokens and firings alone, and keep the labels beside the store.

    Contexts are divided by a hash with `seed`: labels are made from one half and scored on the other. Labels that are kept already, of the
    same store and seed, are made again only to `overwrite` them, so a stopped call goes on where it was. Raises UserError for an unknown
    latent, for a damaged file of labels, and where another process is labelling the store.
    """
    wanted_F = np.full(store.d_sae, latents is None)
    for latent in latents or ():
        store.check_latent(latent)
        wanted_F[latent] = True
    with locked(lock_path(store), busy=f"labelling {store.path}"):
        kept = read_offline(store, seed)
        tables = [SCHEMA.empty_table() if kept is None else kept]
        known = tables[0]["latent"].to_numpy()
        if overwrite:
            tables = [tables[0].filter(~wanted_F[known])]
        else:
            wanted_F[known] = False
        if not wanted_F.any():
            return Labels.open(store)
        saved = time.monotonic()
        try:
            with progress("label", int(wanted_F.sum()), "latents") as report:
                for labels in _labelled(store, wanted_F, seed):
                    tables.append(_table(labels))
                    report(len(labels))
                    if time.monotonic() - saved > SAVE_SECONDS:
                        tables, saved = [_save(store, tables, seed)], time.monotonic()
        finally:
            _save(store, tables, seed)
    return Labels.open(store)


def _labelled(store: FeatureStore, wanted_F: np.ndarray, seed: int) -> Iterator[list[Label]]:
    """Labels of the wanted latents, some at a time."""
    silent = np.flatnonzero(wanted_F & (store.counts_F == 0))
    if len(silent):
        yield [Label(latent, NEVER, "offline", kind="none") for latent in silent.tolist()]
    wanted_F = wanted_F & (store.counts_F > 0)
    if not wanted_F.any():
        return
    corpus = Corpus(store, seed)
    labeller = Labeller(corpus)
    for block in blocks(store, latents_F=wanted_F):
        entries = [(latent, tokens_N, values_N) for latent, tokens_N, values_N in block if wanted_F[latent]]
        numbers = [latent for latent, _, _ in entries]
        starts = np.cumsum([0] + [len(tokens_N) for _, tokens_N, _ in entries])
        tokens_N, values_N = np.concatenate([e[1] for e in entries]), np.concatenate([e[2] for e in entries])
        labelling, scoring = (Firings.of(half, starts, tokens_N, values_N) for half in (corpus.labelling, corpus.scoring))
        found = labeller.find(labelling)
        promoted = promoted_tokens(store, numbers)
        yield [_label(number, place, found[place], scoring, promoted[place]) for place, number in enumerate(numbers)]


def _label(latent: int, place: int, found: Found | None, scoring: Firings, promoted: Sequence[int]) -> Label:
    if found is None or scoring.count_G[place] < LEAST:
        return Label(latent, SELDOM, "offline", kind="none")
    rule = found.rule
    measured = score_rule(rule, scoring, place)
    precision = None if np.isnan(measured.precision) else measured.precision
    fit = measured.fit
    clear = measured.above_chance and fit >= LEAST_FIT
    text = wording(rule, scoring.corpus, promoted) if clear else NO_PATTERN
    return Label(
        latent,
        f"partly: {text}" if clear and fit < PARTLY else text,
        "offline",
        measured.balanced_accuracy,
        measured.error,
        precision,
        measured.recall,
        measured.recall_by_value,
        measured.positives,
        measured.negatives,
        kind(rule) if clear else "none",
        rule.json(),
    )


def score_rule(rule: Rule, firings: Firings, latent: int) -> Score:
    """The score of a rule for one of the latents, on their half of the corpus."""
    silent_P = ~firings.in_pool_GP[latent]
    places, _ = find_places(rule.conditions[0], firings.half, PLACES_SCORED)
    named = places[rule.holds(firings.corpus.view(places))]
    precision = float(firings.at(latent, named).mean()) if len(named) else float("nan")
    hits_P, values_P = rule.holds(firings.view(latent)), firings.values_P[firings.part(latent)]
    return score(hits_P, values_P, rule.holds(firings.half.pool)[silent_P], precision)


def promoted_tokens(store: FeatureStore, latents: Sequence[int]) -> list[list[int]]:
    """The tokens whose logit each of some latents, ascending, raises most, strongest first."""
    found: list[list[int]] = []
    for number, (first, last) in enumerate(store.manifest["ranges"]):
        here = [latent - first for latent in latents if first <= latent < last]
        if here:
            lists = pq.read_table(store.path / details_name(number), columns=["promoted"])["promoted"]
            found += lists.take(pa.array(here)).to_pylist()
    return found


# --- keeping them ---

SCHEMA = pa.schema(
    [("latent", pa.int32()), ("text", pa.string()), ("source", pa.string())]
    + [(name, pa.float64()) for name in ("score", "error", "precision", "recall", "recall_by_value")]
    + [("positives", pa.int32()), ("negatives", pa.int32()), ("kind", pa.string()), ("rule", pa.string()), ("model", pa.string())]
)


def _table(labels: Sequence[Label]) -> pa.Table:
    return pa.Table.from_pylist([vars(label) for label in labels], schema=SCHEMA)


def _save(store: FeatureStore, tables: Sequence[pa.Table], seed: int) -> pa.Table:
    table = pa.concat_tables([table.replace_schema_metadata(None) for table in tables]).sort_by("latent")
    with replacing(labels_path(store)) as temporary:
        pq.write_table(table.replace_schema_metadata(_metadata(store, seed)), temporary)
    return table


def _metadata(store: FeatureStore, seed: int) -> dict[str, str]:
    return {"format": FORMAT, "version": str(VERSION), "store": store.identity, "seed": str(seed)}


def read_offline(store: FeatureStore, seed: int | None = None) -> pa.Table | None:
    """The offline labels that are kept of a store; None where there are none of it as it is now, or of another seed.
    Raises UserError for a damaged file."""
    path = labels_path(store)
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): remove it and label again") from None
    found = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    expected = _metadata(store, int(found.get("seed", "0")) if seed is None else seed)
    if any(found.get(key) != value for key, value in expected.items()) or table.schema.names != SCHEMA.names:
        return None
    return table


# --- looking them up ---


class Labels:
    """All labels of a store. Of several for a latent the first counts: one's own, then an endpoint's, then the offline one."""

    def __init__(self, given: dict[int, list[Label]], offline: pa.Table | None):
        self._given = given
        self._offline = SCHEMA.empty_table() if offline is None else offline
        self._latents = self._offline["latent"].to_numpy()

    @classmethod
    def open(cls, store: FeatureStore) -> Labels:
        """The labels beside a store, as they are now. Raises UserError naming a damaged file."""
        given: dict[int, list[Label]] = {}
        for latent, text in Notes.open(store).labels().items():
            given.setdefault(latent, []).append(Label(latent, text, "own"))
        for latent, label in kept_labels(store).read().items():
            given.setdefault(latent, []).append(label)
        return cls(given, read_offline(store))

    def __len__(self) -> int:
        """Latents that have a label."""
        return len(self._latents) + len(self._given.keys() - set(self._latents.tolist()))

    def all_of(self, latent: int) -> list[Label]:
        """All labels of a latent, the one that counts first."""
        row = int(np.searchsorted(self._latents, latent))
        found = list(self._given.get(latent, []))
        if row < len(self._latents) and self._latents[row] == latent:
            found += [Label(**values) for values in self._offline.slice(row, 1).to_pylist()]
        return found

    def of(self, latent: int) -> Label | None:
        """The label of a latent, or None."""
        return next(iter(self.all_of(latent)), None)

    @cached_property
    def texts(self) -> dict[int, str]:
        """The text of the label that counts, by latent."""
        offline = dict(zip(self._latents.tolist(), self._offline["text"].to_pylist(), strict=True))
        return offline | {latent: labels[0].text for latent, labels in self._given.items()}

    @cached_property
    def scores(self) -> dict[int, float | None]:
        """The score of the label that counts, by latent."""
        offline = dict(zip(self._latents.tolist(), self._offline["score"].to_pylist(), strict=True))
        return offline | {latent: labels[0].score for latent, labels in self._given.items()}

    def search(self, text: str, count: int | None = None) -> list[int]:
        """The latents with a label, be it the one that counts or another, in which all words of a text occur, whatever their case: those
        with a label of one's own first, then by the score of the one that counts. No words find nothing."""
        words = text.lower().split()
        if not words:
            return []
        found = sorted({latent for latent, label in self._lower if all(word in label for word in words)})
        own = {latent for latent, labels in self._given.items() if labels[0].source == "own"}
        scores = np.array([2.0 if latent in own else self.scores[latent] or 0.0 for latent in found])
        return np.array(found, dtype=np.int64)[np.argsort(-scores, kind="stable")][:count].tolist()

    @cached_property
    def _lower(self) -> list[tuple[int, str]]:
        offline = zip(self._latents.tolist(), self._offline["text"].to_pylist(), strict=True)
        given = ((label.latent, label.text) for labels in self._given.values() for label in labels)
        return [(latent, text.lower()) for latent, text in (*offline, *given)]


def kept_labels(store: FeatureStore) -> KeptLabels:
    """The endpoint's labels beside a store."""
    return KeptLabels(beside(store.path, ENDPOINT), store.config["dictionary"])

"""The features of two dictionaries against each other: pairs that match, features that only one has, and any two side by side.

The choice stands in the query string: `by`, `least-MEASURE`, `kind`, `order`, `named`, `from-KIND`, `pair`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass

import address
import layout
import numpy as np
import opening
import paging
import streamlit as st
from naming import names, store_of
from opening import Entry
from texts import weights_key

from saebench.dictionaries import Dictionary
from saebench.errors import UserError
from saebench.features import matching
from saebench.features.examples import top_examples
from saebench.features.matching import NONE, Matching, Side
from saebench.features.store import FeatureStore
from saebench.figures.matching import nearest_histogram

MEASURES = {"writing": "What they write", "firing": "When they fire"}
FIGURES = {"writing": "cosine", "firing": "phi"}
ORDERS = {"alike": "Most alike", "unlike": "Least alike", "frequent": "Most frequent"}
LEAST = {"writing": 0.7, "firing": 0.5}
PAGE, EXAMPLES = 25, 6


@dataclass(frozen=True)
class Both:
    """The two dictionaries, with their stores where they have one."""

    first: Entry
    second: Entry
    stores: tuple[FeatureStore | None, FeatureStore | None]

    @property
    def entries(self) -> tuple[Entry, Entry]:
        return self.first, self.second

    @property
    def indexed(self) -> tuple[FeatureStore, FeatureStore]:
        """The stores of two that have one."""
        first, second = self.stores
        assert first is not None and second is not None
        return first, second


def show(first: Entry, second: Entry) -> None:
    both = Both(first, second, (store_of(first), store_of(second)))
    obstacles = {"writing": _no_cosine(both), "firing": _no_phi(both)}
    possible = {key: name for key, name in MEASURES.items() if not obstacles[key]}
    for key, obstacle in obstacles.items():
        if obstacle:
            layout.note(f"Features cannot be matched by {MEASURES[key].lower()}: {obstacle}.")
    if not possible:
        return
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        by = address.widget(
            st.segmented_control, "by", "Match by", next(iter(possible)), options=list(possible), format_func=MEASURES.__getitem__
        )
        least = address.widget(
            st.slider,
            f"least-{by}",
            f"Alike from this {FIGURES[by]} on",
            LEAST[by],
            min_value=0.05,
            max_value=1.0,
            step=0.05,
            width=280,
        )
    found = _by_writing(both) if by == "writing" else _by_firing(both)
    _summary(both, found, by, least)
    _pair(both)
    _list(both, found, by, least)


# --- matching ---


def _no_cosine(both: Both) -> str:
    """Why what the two write cannot be compared; nothing where it can."""
    models = {entry.run.record["model"].get("fingerprint") for entry in both.entries}
    if len(models) > 1:
        return "they are of different models"
    try:
        matching.check_directions(*(opening.dictionary(entry) for entry in both.entries))
    except UserError as error:
        return str(error)
    return ""


def _no_phi(both: Both) -> str:
    """Why their firings cannot be compared; nothing where they can."""
    for entry, store in zip(both.entries, both.stores, strict=True):
        if store is None:
            return f"{entry.run.name} / {entry.name} has no feature store (`saebench index {entry.run.path}` builds it)"
    try:
        matching.check_tokens(*both.indexed)
    except UserError as error:
        return str(error)
    return ""


def _by_writing(both: Both) -> Matching:
    key = "|".join(f"{weights_key(entry)} {entry.key}" for entry in both.entries)
    alive = [None if store is None else store.counts_F > 0 for store in both.stores]
    return _match_directions(key, *(opening.dictionary(entry) for entry in both.entries), *alive)


@st.cache_resource(show_spinner="Comparing what the features write", max_entries=8)
def _match_directions(
    key: str, _a: Dictionary, _b: Dictionary, _alive_a_F: np.ndarray | None, _alive_b_F: np.ndarray | None
) -> Matching:
    return matching.match_directions(_a, _b, _alive_a_F, _alive_b_F)


def _by_firing(both: Both) -> Matching:
    return _match_firings("|".join(entry.key for entry in both.entries), *both.indexed)


@st.cache_resource(show_spinner="Comparing when the features fire", max_entries=8)
def _match_firings(key: str, _a: FeatureStore, _b: FeatureStore) -> Matching:
    return matching.match_firings(_a, _b)


# --- all of them ---


def _summary(both: Both, found: Matching, by: str, least: float) -> None:
    sides = (found.a, found.b)
    rows = []
    kinds = (
        ("Matched", "each is the nearest of the other", Side.matched),
        ("Shared", "the nearest is as near, but nearer to another", Side.shared),
        ("Unmatched", "nothing in the other is so near", Side.unmatched),
    )
    for name, meaning, of in kinds:
        shares = []
        for side in sides:
            count, size = int(of(side, least).sum()), len(side.latents_M)
            shares.append(f'{count:,} <span class="sb-dim">{count / max(1, size):.1%}</span>')
        rows.append((f'<div class="sb-wrap">{name}<br><span class="sb-dim">{meaning}</span></div>', *shares))
    rows.append(("Mean of the nearest", *(f"{side.similarity_M.mean() if len(side.similarity_M) else 0:.3f}" for side in sides)))
    left, right = st.columns((5, 6), gap="medium")
    with left:
        layout.table(("", both.first.name, both.second.name), rows, numbers=(1, 2))
        drawn = "" if found.complete else f"For {len(found.a.latents_M):,} and {len(found.b.latents_M):,} latents, drawn evenly. "
        dead = "" if None in both.stores else "Latents that never fire are left out."
        measure = "cosine of what two features write" if by == "writing" else "correlation (phi) of firing on the same tokens"
        layout.show(f'<span class="sb-dim">{drawn}Alike: {measure} of at least {least:.2f}. {dead}</span>')
    with right:
        figure = nearest_histogram(
            [side.similarity_M for side in sides], [entry.name for entry in both.entries], FIGURES[by], least
        )
        layout.plot(figure, key="nearest")


def _list(both: Both, found: Matching, by: str, least: float) -> None:
    kinds = {"matched": "Matched pairs", "first": "Only in the first", "second": "Only in the second"}
    with st.container(horizontal=True, vertical_alignment="bottom"):
        kind = address.widget(
            st.segmented_control, "kind", "Features", "matched", options=list(kinds), format_func=kinds.__getitem__
        )
        order = address.widget(
            st.selectbox, "order", "Order", "alike", options=list(ORDERS), format_func=ORDERS.__getitem__, width=170
        )
        wanted = address.widget(st.text_input, "named", "Search", "", placeholder="in labels, or a number", width=220)
    if kind == "matched":
        a_N, b_N, similarity_N = found.pairs(least)
    else:
        side = found.a if kind == "first" else found.b
        kept = np.flatnonzero(side.unmatched(least))
        kept = kept[np.argsort(-side.similarity_M[kept], kind="stable")]
        own_N, other_N, similarity_N = side.latents_M[kept], side.nearest_M[kept], side.similarity_M[kept]
        a_N, b_N = (own_N, other_N) if kind == "first" else (other_N, own_N)
    chosen = _ordered(both, kind, order, wanted, a_N, b_N, similarity_N)
    if not len(chosen):
        layout.empty("None." if not wanted else "None of them has that in its label.")
        return
    start = paging.start(f"from-{kind}", len(chosen), PAGE)
    rows = [_row(both, int(a_N[i]), int(b_N[i]), float(similarity_N[i])) for i in chosen[start : start + PAGE].tolist()]
    layout.table(
        (both.first.name, both.second.name, FIGURES[by], "First fires on", "Second fires on", ""), rows, numbers=(2, 3, 4)
    )
    paging.turn("compare", f"from-{kind}", start, len(chosen), PAGE)
    st.download_button(
        "CSV of all", _csv(both, by, a_N[chosen], b_N[chosen], similarity_N[chosen]),
        file_name="features.csv", mime="text/csv", icon=":material/download:", on_click="ignore",
    )  # fmt: skip


def _ordered(
    both: Both, kind: str, order: str, wanted: str, a_N: np.ndarray, b_N: np.ndarray, similarity_N: np.ndarray
) -> np.ndarray:
    """Places in a list, in the order that was chosen, of those that were searched for."""
    chosen = np.arange(len(a_N))
    if wanted.strip():
        text = wanted.strip().casefold()
        named = [names(entry) for entry in both.entries]
        hit = lambda i: any(  # noqa: E731
            latent != NONE and (text == str(latent) or text in name(latent).casefold())
            for latent, name in ((int(a_N[i]), named[0]), (int(b_N[i]), named[1]))
        )
        chosen = np.array([i for i in chosen.tolist() if hit(i)], dtype=np.int64)
    if order == "unlike":
        return chosen[::-1]
    side = 1 if kind == "second" else 0
    store = both.stores[side]
    if order == "frequent" and store is not None:
        counts_N = store.counts_F[(a_N, b_N)[side][chosen]]
        return chosen[np.argsort(-counts_N, kind="stable")]
    return chosen


def _row(both: Both, a: int, b: int, similarity: float) -> tuple[str, ...]:
    chips, densities = [], []
    for entry, store, latent in zip(both.entries, both.stores, (a, b), strict=True):
        chips.append("" if latent == NONE else layout.latent_chip(entry, latent, text=names(entry)(latent)))
        densities.append("" if latent == NONE or store is None else f"{store.density_F[latent]:.3%}")
    look = "" if NONE in (a, b) else layout.a("side by side", "compare", pair=f"{a}-{b}")
    return chips[0], chips[1], f"{similarity:.3f}" if NONE not in (a, b) else "", *densities, look


def _csv(both: Both, by: str, a_N: np.ndarray, b_N: np.ndarray, similarity_N: np.ndarray) -> Callable[[], str]:
    """The list as CSV, written when it is asked for."""
    named = [names(entry) for entry in both.entries]
    heads = [f"{entry.run.name}/{entry.name}{what}" for entry in both.entries for what in ("", " label")]
    cells = lambda latent, name: ("", "") if latent == NONE else (latent, name(latent))  # noqa: E731

    def write() -> str:
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow([*heads, FIGURES[by]])
        for a, b, similarity in zip(a_N.tolist(), b_N.tolist(), similarity_N.tolist(), strict=True):
            writer.writerow([*cells(a, named[0]), *cells(b, named[1]), f"{similarity:.6f}"])
        return out.getvalue()

    return write


# --- two of them ---


def _pair(both: Both) -> None:
    """Open a window with the pair that was asked for."""
    first, _, second = address.get("pair").partition("-")
    if not (first.isdecimal() and second.isdecimal()):
        address.drop("pair")
        return
    latents = int(first), int(second)
    for entry, latent in zip(both.entries, latents, strict=True):
        if latent >= opening.config(entry).d_sae:
            layout.problem(f"{entry.name} has no latent {latent}: it has {opening.config(entry).d_sae:,}, counted from 0")
            return
    st.dialog("Side by side", width="large", on_dismiss=_close)(_side_by_side)(both, latents)


def _close() -> None:
    address.drop("pair")


def _side_by_side(both: Both, latents: tuple[int, int]) -> None:
    known = []
    if not _no_cosine(both):
        cosine = matching.cosine(opening.dictionary(both.first), latents[0], opening.dictionary(both.second), latents[1])
        known.append(("cosine", f"{cosine:.3f}"))
    if not _no_phi(both):
        found = matching.fire_together(both.indexed[0], latents[0], both.indexed[1], latents[1])
        known += [
            ("phi", f"{found.phi:.3f}"),
            ("Jaccard", f"{found.jaccard:.3f}"),
            ("tokens on which both fire", f"{found.tokens:,}"),
        ]
    layout.figures(known)
    for column, entry, store, latent in zip(st.columns(2, gap="medium"), both.entries, both.stores, latents, strict=True):
        with column:
            layout.heading(f"{entry.run.name} / {entry.name}")
            layout.show(layout.latent_chip(entry, latent, text=names(entry)(latent)))
            if store is None:
                layout.empty(f"No contexts without a feature store: `saebench index {entry.run.path}`")
                continue
            examples = top_examples(store, latent, EXAMPLES)
            if not examples:
                layout.empty("Fires nowhere in the indexed text.")
                continue
            layout.contexts(examples, float(store.latents["max"][latent].as_py()), store)

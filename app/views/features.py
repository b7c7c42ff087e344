"""Features: all latents of a dictionary, as a table or as a map; a click opens one."""

from __future__ import annotations

import html
import io
import json
from typing import Any

import address
import background
import filtering
import grid
import layout
import numpy as np
import opening
import pyarrow as pa
import streamlit as st
from grid import Column
from opening import Entry
from pyarrow.csv import write_csv

from saebench.features.layout_map import LatentMap, map_path, read_map
from saebench.features.store import FeatureStore
from saebench.figures.features import latent_map
from saebench.figures.tokens import alone

VIEWS, COLOURS = ("Table", "Map"), ("Density", "Group")
HEIGHT = 640


def show() -> None:
    entry, store = layout.choose_store()
    layout.title("Features", f"{entry.run.name} / {entry.name}: {store.d_sae:,} latents over {store.num_tokens:,} tokens")
    filtering.widgets()
    with st.container(horizontal=True, vertical_alignment="center"):
        view = address.widget(
            st.segmented_control, "view", "View", "Table", options=list(VIEWS), label_visibility="collapsed", required=True
        )
        colour = "Density"
        if view == "Map":
            colour = address.widget(
                st.segmented_control,
                "colour",
                "Colour",
                colour,
                options=list(COLOURS),
                label_visibility="collapsed",
                required=True,
            )
        filtering.toggles()
        filters = filtering.chosen()
        found = filtering.rows(entry, store, filters)
        layout.show(f'<span class="sb-dim">{len(found):,} of {store.d_sae:,} latents. A click on one opens it.</span>')
        if opening.unlabelled(entry):
            background.offer(
                f"labels {entry.key}", "Label all", "Labelling",
                lambda: ["-m", "saebench", "label", str(entry.run.path), "--dictionary", entry.name],
            )  # fmt: skip
    if not len(found):
        layout.empty("No latent passes these filters.")
    elif view == "Table":
        _table(entry, store, filters)
    else:
        _map(entry, store, found, colour)


# --- the table ---

COLUMNS = (
    Column("latent", "Latent", "int", "4.4rem"),
    Column("starred", "★", "text", "1.8rem", "bookmarked"),
    Column("label", "Label", "text", "minmax(12rem, 3fr)"),
    Column("score", "Score", "f2", "4.3rem", "how well the label finds firings on held-out contexts; 0.5 is chance"),
    Column("top token", "Top token", "text", "minmax(6.5rem, 1fr)", "with the largest share of the summed values"),
    Column("share", "Share", "p1", "4.3rem", "of the summed values, on the strongest token"),
    Column("density", "Fires on", "p4", "5.6rem", "share of tokens"),
    Column("max", "Max", "f2", "4.4rem", "largest value"),
    Column("mean", "Mean", "f2", "4.4rem", "of the values where it fires"),
    Column("distinct tokens", "Tokens", "int", "4.3rem", "different tokens it fires on"),
    Column("contexts", "Contexts", "int", "5rem", "contexts it fires in"),
)


def _table(entry: Entry, store: FeatureStore, filters: filtering.Filters) -> None:
    address.get("sort")  # grid.js writes it
    packed = _packed(entry.key, opening.beside(entry), filters, entry, store)
    grid.show(packed, f"table-{entry.run.name}-{entry.name}", HEIGHT)
    stem = f"{entry.run.name.replace('/', '-')}-{entry.name}"
    st.download_button(
        "These latents as CSV", lambda: _csv(entry, store, filters), f"{stem}-latents.csv", "text/csv", icon=":material/download:",
        on_click="ignore",
    )  # fmt: skip


@st.cache_resource(show_spinner=False, max_entries=8)
def _packed(key: str, beside: object, filters: filtering.Filters, _entry: Entry, _store: FeatureStore) -> bytes:
    table = _listed(_entry, _store, filters)
    columns = [column for column in COLUMNS if column.name in table.column_names]
    link = address.link("feature", run=_entry.run.name, dictionary=_entry.name) + "&feature="
    return grid.pack(table, columns, link, f"{key} {filters}")


def _listed(entry: Entry, store: FeatureStore, filters: filtering.Filters) -> pa.Table:
    table = _columns(entry.key, opening.beside(entry), entry, store)
    found = filtering.rows(entry, store, filters)
    return table if len(found) == len(table) else table.take(pa.array(found))


def _csv(entry: Entry, store: FeatureStore, filters: filtering.Filters) -> bytes:
    table = _listed(entry, store, filters)
    for number, column in enumerate(table.schema):
        if pa.types.is_string(column.type):  # as JSON strings: white space is kept and nothing is taken for a formula
            table = table.set_column(
                number, column.name, pa.array([json.dumps(text, ensure_ascii=False) for text in table[number].to_pylist()])
            )
    out = io.BytesIO()
    write_csv(table, out)
    return out.getvalue()


def _open(entry: Entry, latent: int) -> None:
    address.go("feature", run=entry.run.name, dictionary=entry.name, feature=latent)


@st.cache_resource(show_spinner="Reading the latents", max_entries=8)
def _columns(key: str, beside: object, _entry: Entry, _store: FeatureStore) -> pa.Table:
    latents = _store.latents
    texts, scores = opening.label_columns(_entry)
    stars = np.full(_store.d_sae, "", dtype=object)
    stars[opening.notes(_entry).bookmarks()] = "★"
    strings = pa.array([alone(text) for text in _store.token_strings])
    small = lambda name: latents[name].cast(pa.float32())  # noqa: E731
    columns: dict[str, Any] = {
        "latent": latents["latent"],
        "starred": pa.array(stars, type=pa.string()),
        "label": texts,
        "score": pa.array(scores, type=pa.float32(), from_pandas=True),
        "top token": strings.take(latents["top_token"].combine_chunks()),
        "share": small("top_token_share"),
        "density": small("density"),
        "max": small("max"),
        "mean": small("mean"),
        "distinct tokens": latents["distinct_tokens"].cast(pa.int32()),
        "contexts": latents["contexts"].cast(pa.int32()),
    }
    if not any(texts):
        del columns["label"], columns["score"]
    return pa.table(columns)


# --- the map ---


def _map(entry: Entry, store: FeatureStore, found: np.ndarray, colour: str) -> None:
    places = _places(entry.key, opening.stamp(map_path(store)), store)
    if places is None:
        whole, _, part = entry.name.partition("@")
        layout.show(
            "<p>The map lays out the directions that the latents write: those that are alike lie near each other. It is computed once, "
            "takes a minute or a few, and is kept beside the feature store.</p>"
        )
        background.offer(
            f"map {entry.key}", "Compute the map", "Computing the map",
            lambda: ["-m", "saebench.features.layout_map", str(entry.store_path), str(entry.run.path / "dictionaries" / whole), part],
            type="primary",
        )  # fmt: skip
        return
    beside = opening.beside(entry)
    shown = found[store.counts_F[found] > 0]
    others = np.setdiff1d(np.flatnonzero(store.counts_F > 0), shown, assume_unique=True)
    names = _names(entry.key, beside, entry, store)
    figure = latent_map(
        places.x_F[shown], places.y_F[shown], shown, [names[latent] for latent in shown.tolist()],
        places.cluster_F[shown] if colour == "Group" else np.log10(store.density_F[shown]),
        by_cluster=colour == "Group", others=(places.x_F[others], places.y_F[others]), height=HEIGHT,
    )  # fmt: skip
    for point in layout.plot(figure, key=f"map-{colour}", select=True):
        _open(entry, int(point["customdata"]))


@st.cache_resource(show_spinner=False, max_entries=16)
def _places(key: str, at: object, _store: FeatureStore) -> LatentMap | None:
    return read_map(_store)


@st.cache_resource(show_spinner=False, max_entries=8)
def _names(key: str, beside: object, _entry: Entry, _store: FeatureStore) -> list[str]:
    """What hovering says of each latent, escaped."""
    texts, _ = opening.label_columns(_entry)
    tokens = _store.latents["top_token"].to_pylist()
    strings = [html.escape(alone(text)) for text in _store.token_strings]
    return [
        html.escape(text) if text else strings[token] if token is not None else ""
        for text, token in zip(texts, tokens, strict=True)
    ]

"""The contexts of a feature: the strongest, a sample of every strength, those shared with another feature; on one token, with a text."""

from __future__ import annotations

from typing import Any

import address
import layout
import numpy as np
import opening
import streamlit as st
from opening import Entry

from saebench.features.examples import Example, cofiring_examples, quantile_groups, top_examples
from saebench.features.search import together
from saebench.features.store import Details, FeatureStore
from saebench.figures.feature_page import examples_csv, feature_page
from saebench.figures.tokens import alone

KINDS = {"top": "Strongest", "strengths": "Every strength", "both": "With another feature"}
COUNT, STEP, SEARCHED = 12, 24, 500
ANY = -1


def show(entry: Entry, store: FeatureStore, latent: int, details: Details) -> None:
    strongest = float(np.abs(details.edges).max())
    with st.container(horizontal=True, vertical_alignment="bottom"):
        kind = address.widget(
            st.segmented_control, "show", "Contexts", "top", options=list(KINDS), format_func=KINDS.__getitem__,
            label_visibility="collapsed", required=True,
        )  # fmt: skip
        layout.shade_key(strongest)
    if kind == "top":
        _top(entry, store, latent, details, strongest)
    elif kind == "strengths":
        _strengths(entry, store, latent, strongest)
    else:
        _both(entry, store, latent, details, strongest)


def _top(entry: Entry, store: FeatureStore, latent: int, details: Details, strongest: float) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        tokens = [ANY, *(token for token, *_ in details.tokens)]
        asked = address.get_number("on", ANY)
        if asked not in tokens and 0 <= asked < len(store.token_strings):
            tokens.append(asked)
        name = lambda token: "any token" if token == ANY else alone(store.token_strings[token])  # noqa: E731
        on = address.widget(st.selectbox, "on", "Firing on", ANY, options=tokens, format_func=name, width=180)
        text = address.widget(st.text_input, "with", "With the text", "", placeholder="anywhere in the context shown", width=260)
    wanted = max(1, address.get_number("count", COUNT))
    found = examples(store, latent, None if on == ANY else on, text, wanted + 1)
    if not found:
        layout.empty(f"None of the {SEARCHED} strongest contexts has this text." if text else "It never fires on this token.")
        return
    _contexts(entry, store, latent, found[:wanted], strongest)
    if len(found) > wanted and st.button("More", key="more", icon=":material/expand_more:"):
        address.put("count", wanted + STEP, COUNT)
        address.rerun()


def examples(store: FeatureStore, latent: int, token: int | None, text: str, count: int) -> list[Example]:
    """The strongest contexts, those on a token or with a text only."""
    if not text:
        return top_examples(store, latent, count, token_id=token)
    strings, wanted = store.token_strings, text.casefold()
    found = top_examples(store, latent, SEARCHED, token_id=token)
    return [e for e in found if wanted in "".join(strings[i] for i in e.ids).casefold()][:count]


def _strengths(entry: Entry, store: FeatureStore, latent: int, strongest: float) -> None:
    for group in quantile_groups(store, latent):
        layout.heading(
            f"{group.low:.2f} to {group.high:.2f}", f"{group.firings:,} firings, of which {len(group.examples)} drawn at random"
        )
        _contexts(entry, store, latent, group.examples, strongest)


def _both(entry: Entry, store: FeatureStore, latent: int, details: Details, strongest: float) -> None:
    near = details.coactive[0][0] if details.coactive else (latent + 1) % store.d_sae
    other = address.widget(
        st.number_input, "other", "The other latent", near, min_value=0, max_value=store.d_sae - 1, step=1, width=180
    )
    figures = together(store, latent, other)
    label = opening.labels(entry).of(other)
    layout.show(
        layout.latent_chip(entry, other, f"φ {figures.phi:.3f}, Jaccard {figures.jaccard:.3f}", label.text if label else "")
    )
    found = cofiring_examples(store, latent, other)
    if not found:
        layout.empty("The two never fire on the same token.")
        return
    layout.heading(f"{figures.tokens:,} tokens on which both fire", "the strongest; shades are this feature's")
    _contexts(entry, store, latent, found, strongest)


def _contexts(entry: Entry, store: FeatureStore, latent: int, found: list[Example], strongest: float) -> None:
    """Contexts, each with a link to the whole of it."""

    def whole(example: Example) -> str:
        return address.link("corpus", run=entry.run.name, dictionary=entry.name, context=example.context, seen=latent)

    layout.contexts(found, strongest, store, whole=whole)


# --- files ---


def page(entry: Entry, store: FeatureStore, latent: int) -> str:
    """The feature as one HTML file."""
    texts, _ = opening.label_columns(entry)
    details = store.details(latent)
    near = {other for other, _ in (*details.neighbours, *details.read_neighbours)} | {other for other, *_ in details.coactive}
    return feature_page(
        store,
        latent,
        name=f"{entry.run.name} / {entry.name}",
        examples=top_examples(store, latent, 20),
        groups=quantile_groups(store, latent),
        label=opening.labels(entry).of(latent),
        note=opening.notes(entry).of(latent).note,
        labels={other: texts[other] for other in near},
    )


def table(store: FeatureStore, latent: int) -> str:
    """Its examples as CSV."""
    groups: dict[str, Any] = {"strongest": top_examples(store, latent, 100)}
    groups |= {f"{group.low:.4g} to {group.high:.4g}": group.examples for group in quantile_groups(store, latent, per=20)}
    return examples_csv(store, groups)

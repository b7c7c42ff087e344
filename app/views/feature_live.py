"""What of a feature is computed with the model: its values on one's own text, and where an attention feature looks."""

from __future__ import annotations

import html

import address
import layout
import numpy as np
import opening
import streamlit as st
from opening import Entry

from saebench.dictionaries.attention_output import SITE as ATTENTION_OUTPUT
from saebench.features.examples import top_examples
from saebench.features.prompts import feature_on_text
from saebench.features.sources import Sources, example_sources
from saebench.features.store import Details, FeatureStore
from saebench.figures.features import head_bars


@st.fragment
def test(entry: Entry, store: FeatureStore, latent: int, details: Details) -> None:
    """A text box whose text is read by the model at once."""
    with layout.guarded():
        _test(entry, store, latent, details)


def _test(entry: Entry, store: FeatureStore, latent: int, details: Details) -> None:
    layout.heading("Try it on your own text")
    text = address.widget(
        st.text_area,
        "try",
        "Your text",
        "",
        placeholder="type a sentence, then Ctrl+Enter",
        label_visibility="collapsed",
        height=80,
    )
    if not text.strip():
        return
    example = feature_on_text(opening.lm(entry.run), opening.dictionary(entry), latent, text, sites=store.config["sites"])
    largest, seen = max(map(abs, example.values)), float(np.abs(details.edges).max())
    layout.text_block(example.ids, example.values, max(largest, seen), store.token_strings.__getitem__)
    said = f"largest value {largest:.2f}; in the corpus {seen:.2f}" if largest else "It does not fire on this text."
    layout.show(f'<span class="sb-dim">{html.escape(said)}</span>')


def looks_back(store: FeatureStore) -> bool:
    """Whether its latents gather from other positions, as those on the heads' outputs and Lorsa's do."""
    sites = store.config["sites"]
    return store.config["architecture"] == "lorsa" or (len(sites) == 1 and ATTENTION_OUTPUT.fullmatch(sites[0]) is not None)


@st.fragment
def sources(entry: Entry, store: FeatureStore, latent: int) -> None:
    """Where the strongest firings come from: heads and positions."""
    with layout.guarded():
        if looks_back(store) and (found := top_examples(store, latent, 5)):
            layout.heading("Where it looks", "what each position adds to the firing that is outlined")
            number = address.widget(
                st.segmented_control, "look", "Context", 1, options=list(range(1, len(found) + 1)), label_visibility="collapsed"
            )
            parts = example_sources(store, opening.lm(entry.run), opening.dictionary(entry), latent, found[number - 1])
            if parts is not None:
                _sources(store, parts)


def _sources(store: FeatureStore, parts: Sources) -> None:
    shown = slice(-120, None)
    values = parts.by_source_S[shown].tolist()
    first = parts.first + max(0, len(parts.ids) - 120)
    layout.text_block(
        parts.ids[shown], values, max(map(abs, values)), store.token_strings.__getitem__, first=first % store.context_size,
        focus=len(values) - 1, name="adds",
    )  # fmt: skip
    rows = [
        (
            f'<span class="sb-token">{html.escape(repr(store.token_strings[token]))}</span>',
            f"{token_number % store.context_size}",
            f"{value:.3f}",
        )
        for token_number, token, value in parts.strongest(6)
    ]
    left, right = st.columns(2)
    with left:
        layout.table(("Token", "Position", "Adds"), rows, numbers=(1, 2))
        layout.show(f'<span class="sb-dim">all together {parts.value:.3f}, of which {parts.constant:.3f} from no position</span>')
    with right:
        if parts.head_shares_H is not None:
            layout.heading("Heads", "share of what it writes")
            layout.plot(head_bars(parts.head_shares_H), key="heads")
        if parts.pattern_S is not None:
            layout.heading("Attention", "from the firing, by position")
            order = np.argsort(-parts.pattern_S)[:6]
            layout.table(("Position", "Weight"), [(f"{s}", f"{parts.pattern_S[s]:.1%}") for s in order.tolist()], numbers=(0, 1))

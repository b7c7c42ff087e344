"""The documents of a corpus, their contexts, and contexts that are like one."""

from __future__ import annotations

import html
from collections.abc import Sequence

import address
import layout
import paging
import streamlit as st
from naming import link_chip, names
from opening import Entry

from saebench.features.documents import (
    check_context,
    contexts_of,
    names_in,
    strongest_in,
    tokens_by_document,
    values_in,
)  # fmt: skip
from saebench.features.examples import window
from saebench.features.search import ContextHit, similar_contexts
from saebench.features.store import FeatureStore
from saebench.figures.prompt import Shown, html_key, html_tokens, shaded

PAGE, DOCUMENT_CONTEXTS = 40, 12
CHIPS, SIMILAR, SHARED = 5, 8, 6


# --- documents ---


def documents(entry: Entry, store: FeatureStore) -> None:
    """The list of documents, or the contexts of the one that was chosen."""
    document = address.get_number("document")
    if document is not None and 0 <= document < len(store.contexts.names):
        _one_document(entry, store, document)
        return
    address.drop("document")
    wanted = address.widget(st.text_input, "titled", "Search names", "", width=300, icon=":material/search:").casefold()
    tokens = tokens_by_document(store)
    found = [i for i, name in enumerate(store.contexts.names) if wanted in name.casefold() and tokens[i]]
    if not found:
        layout.empty("No document has that in its name.")
        return
    start = paging.start("from-document", len(found), PAGE)
    rows = [
        (layout.a(store.contexts.names[i], "corpus", document=i, **{"from-context": 0}), f"{tokens[i]:,}")
        for i in found[start : start + PAGE]
    ]
    layout.table(("Document", "Tokens"), rows, numbers=(1,))
    paging.turn("corpus", "from-document", start, len(found), PAGE)


def _one_document(entry: Entry, store: FeatureStore, document: int) -> None:
    layout.show(layout.a("all documents", "corpus", document="none"))
    contexts = contexts_of(store, document)
    layout.heading(store.contexts.names[document], f"{len(contexts):,} contexts of up to {store.context_size - 1} tokens")
    start = paging.start("from-context", len(contexts), DOCUMENT_CONTEXTS)
    name = names(entry)
    rows = []
    for context in contexts[start : start + DOCUMENT_CONTEXTS].tolist():
        first, last = context * store.context_size, (context + 1) * store.context_size
        strong = strongest_in(store, first, last, CHIPS)
        chips = [layout.latent_chip(entry, one.latent, f"{one.value:.2f}", name(one.latent)) for one in strong]
        link = layout.a(f"context {context}", "corpus", context=context)
        text, _ = _text(store, context, [0.0] * store.context_size, document=document)
        rows.append(f'<div class="sb-reading"><div>{link}<div class="sb-chips">{"".join(chips)}</div></div>{text}</div>')
    layout.show("".join(rows))
    paging.turn("corpus", "from-context", start, len(contexts), DOCUMENT_CONTEXTS)


def _text(
    store: FeatureStore, context: int, values: Sequence[float], name: str = "activation", document: int | None = None
) -> tuple[str, float]:
    """A context, or what of it is of one document, coloured by values that are called `name`, as HTML; and the value of the darkest."""
    shades, strongest = shaded(values, diverging=True)
    first, documents = context * store.context_size, store.contexts.documents_NS[context].tolist()
    shown = [
        Shown(
            store.token_strings[store.ids_T[first + place]],
            shade,
            [(name, f"{value:.4g}"), ("position", f"{place}")] if value else (),
            dim=of < 0,
        )
        for place, (of, shade, value) in enumerate(zip(documents, shades, values, strict=True))
        if document is None or of == document
    ]
    return html_tokens(shown), strongest


# --- one context ---


def one_context(entry: Entry, store: FeatureStore, context: int) -> None:
    """A context with what stands out in it, and those that are like it. Raises UserError for an unknown one."""
    check_context(store, context)
    _around(store, context)
    first, last = context * store.context_size, (context + 1) * store.context_size
    strong = strongest_in(store, first, last, 24)
    if not strong:
        layout.empty("Nothing fires in this context.")
        return
    asked = address.get_number("seen")
    latent = asked if asked is not None and 0 <= asked < store.d_sae else strong[0].latent
    values = window(store, latent, first, 0, store.context_size).values
    text, strongest = _text(store, context, values)
    layout.show(text)
    name = names(entry)
    layout.show(
        f"{html_key(strongest, 'activation', diverging=min(values) < 0)} {layout.latent_chip(entry, latent, text=name(latent))}"
    )
    layout.heading("What stands out here", "strong features that fire in few contexts; a click colours the text")
    chips = [
        link_chip(str(one.latent), "corpus", name(one.latent), f"{one.value:.2f}", context=context, seen=one.latent)
        for one in strong
    ]
    layout.show(f'<div class="sb-chips">{"".join(chips)}</div>')
    _similar(entry, store, context)


def _around(store: FeatureStore, context: int) -> None:
    links = [layout.a("back to the corpus", "corpus", context="none")]
    links += [layout.a("previous", "corpus", context=context - 1)] if context else []
    links += [layout.a("next", "corpus", context=context + 1)] if context + 1 < store.num_contexts else []
    layout.show(f'<div class="sb-turn">{" ".join(links)}</div>')
    layout.heading(f"Context {context}", ", ".join(names_in(store, context)))


# --- contexts like it ---


def _similar(entry: Entry, store: FeatureStore, context: int) -> None:
    layout.heading("Contexts like this one", "they share strong and rare features; shaded by what is shared")
    found = _alike(entry.key, store, context)
    if not found:
        layout.empty("No other context shares a feature with it.")
        return
    name = names(entry)
    rows = []
    for hit in found:
        first, last = hit.context * store.context_size, (hit.context + 1) * store.context_size
        text, _ = _text(store, hit.context, values_in(store, first, last, hit.shared).tolist(), "shared")
        chips = [layout.latent_chip(entry, latent, f"{weight:.0%}", name(latent)) for latent, weight in hit.shared[:SHARED]]
        link = layout.a(f"context {hit.context}", "corpus", context=hit.context, seen=hit.shared[0][0])
        where = html.escape(", ".join(names_in(store, hit.context)))
        head = f'<b>{hit.score:.0%}</b> {link} <span class="sb-dim">{where}</span>'
        rows.append(f'<div class="sb-reading"><div>{head}<div class="sb-chips">{"".join(chips)}</div></div>{text}</div>')
    layout.show("".join(rows))


@st.cache_resource(show_spinner="Looking for contexts like it", max_entries=200)
def _alike(key: str, _store: FeatureStore, context: int) -> list[ContextHit]:
    return similar_contexts(_store, context, count=SIMILAR)

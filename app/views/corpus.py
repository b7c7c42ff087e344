"""Corpus: what a collection of texts is about, what tells two collections apart, and the documents themselves.

The choice stands in the query string: `corpus` (which part), `set`, `set2`, `unit`, `more`, `look`; `document`, `context` (app/reading.py).
"""

from __future__ import annotations

import address
import contrasts
import layout
import numpy as np
import opening
import reading
import streamlit as st
from contrasts import Found
from naming import link_chip
from opening import Entry
from texts import MAX_CHARACTERS, weights_key

from saebench.dictionaries import Dictionary
from saebench.features.contrast import Difference, Unit, contrast, contrast_texts, document_sets
from saebench.features.documents import common_parts, count_units, paragraphs, tokens_by_document
from saebench.features.store import FeatureStore
from saebench.lm import LanguageModel

PARTS = {"themes": "Themes", "contrast": "Two sets", "texts": "Two texts of yours", "documents": "Documents"}
UNITS = {"document": "Documents", "context": "Contexts"}
READ = 400_000  # characters of a side of texts that are read live


def show() -> None:
    entry, store = layout.choose_store()
    aside = f"{entry.run.name} / {entry.name}: {len(store.contexts.names):,} documents, {store.num_tokens:,} tokens"
    layout.title("Corpus", aside)
    if address.peek("context").isdecimal():
        reading.one_context(entry, store, address.get_number("context"))
        return
    address.drop("context")
    part = address.widget(
        st.segmented_control, "corpus", "Part", "themes", options=list(PARTS), format_func=PARTS.__getitem__,
        label_visibility="collapsed",
    )  # fmt: skip
    {"themes": _themes, "contrast": _contrast, "texts": _texts, "documents": reading.documents}[part](entry, store)


# --- sets of documents ---


def _themes(entry: Entry, store: FeatureStore) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        pattern = _pattern("set", "Documents whose name has")
        unit = _unit()
    if not pattern.strip():
        layout.empty(
            "Which features fire more in some documents than in all others? Say which documents: by a part of their names."
        )
        _suggest(store, "set")
        return
    mask = document_sets(store, pattern)
    if _sizes(store, ((pattern, mask), ("all others", ~mask))):
        contrasts.show(entry, _found(entry, store, (pattern, "all others"), (mask, ~mask), unit), one_sided=True)


def _contrast(entry: Entry, store: FeatureStore) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        first, second = _pattern("set", "Documents whose name has"), _pattern("set2", "against documents whose name has")
        unit = _unit()
    if not first.strip() or not second.strip():
        layout.empty("Which features tell two sets of documents apart? Say which documents: by a part of their names.")
        _suggest(store, "set2" if first.strip() else "set")
        return
    a, b = document_sets(store, first), document_sets(store, second)
    if _sizes(store, ((first, a), (second, b))):
        contrasts.show(entry, _found(entry, store, (first, second), (a, b), unit))


def _pattern(key: str, label: str) -> str:
    return address.widget(
        st.text_input, key, label, "", placeholder="such as test, *.py, or docs/*|*.md", width=300,
        help="A part of the name; or a pattern with * and ?; several are separated by |. Case does not matter.",
    )  # fmt: skip


def _unit() -> Unit:
    return address.widget(
        st.segmented_control, "unit", "Chance is judged by", "document", options=list(UNITS), format_func=UNITS.__getitem__,
        help="By documents, a difference holds for other documents like these. By contexts it holds for these documents only: what can be "
        "said of a few long ones.",
    )  # fmt: skip


def _suggest(store: FeatureStore, key: str) -> None:
    found = common_parts(store.contexts.names)
    if found:
        chips = "".join(link_chip(part, "corpus", aside=f"{number:,} documents", **{key: part}) for part, number in found)
        layout.show(f'<span class="sb-dim">For example</span> {chips}')


def _sizes(store: FeatureStore, sets: tuple[tuple[str, np.ndarray], ...]) -> bool:
    """Say how many documents and tokens the sets have; False where one has none."""
    tokens = tokens_by_document(store)
    layout.figures([(name, f"{mask.sum():,} documents, {tokens[mask].sum():,} tokens") for name, mask in sets])
    for name, mask in sets:
        if not mask.any():
            layout.empty(f"No document is in the set {name}: the names are listed under Documents.")
            return False
    return True


def _found(entry: Entry, store: FeatureStore, names: tuple[str, str], masks: tuple[np.ndarray, np.ndarray], unit: Unit) -> Found:
    differences, units = _differences(entry.key, store, masks[0].tobytes(), masks[1].tobytes(), unit)
    return Found(differences, names, units, unit, contrasts.in_documents(store, masks))


@st.cache_resource(show_spinner="Counting what fires in either set", max_entries=16)
def _differences(key: str, _store: FeatureStore, a: bytes, b: bytes, unit: Unit) -> tuple[list[Difference], tuple[int, int]]:
    in_a, in_b = (np.frombuffer(mask, dtype=bool) for mask in (a, b))
    units = count_units(_store, in_a, unit), count_units(_store, in_b, unit)
    return contrast(_store, in_a, in_b, _store.d_sae, unit=unit), units


# --- texts that are in no store ---


def _texts(entry: Entry, store: FeatureStore) -> None:
    layout.show(
        '<span class="sb-dim">Paste two texts, or upload files. Every file is one text; of a single one, and of what is pasted, every '
        "paragraph is: texts are what chance is judged by.</span>"
    )
    sides = [_side(column, number) for number, column in enumerate(st.columns(2, gap="medium"))]
    if not all(sides):
        layout.empty("The model reads both, and the features are listed that fire more in one of them.")
        return
    key = weights_key(entry)
    found = _read_texts(key, tuple(sides[0]), tuple(sides[1]), opening.lm(entry.run), opening.dictionary(entry))
    examples = contrasts.in_texts(entry, (sides[0], sides[1]))
    contrasts.show(entry, Found(found, ("the first", "the second"), (len(sides[0]), len(sides[1])), "text", examples))


def _side(column: st.delta_generator.DeltaGenerator, number: int) -> list[str]:
    with column:
        name = ("First", "Second")[number]
        pasted = address.widget(
            st.text_area, f"texts{number + 1}", f"{name} texts", "", height=180, max_chars=MAX_CHARACTERS,
            placeholder="Paragraphs, separated by empty lines",
        )  # fmt: skip
        files = st.file_uploader(
            f"{name} files", accept_multiple_files=True, key=f"files{number + 1}", label_visibility="collapsed"
        )
        uploaded = [file.getvalue().decode("utf-8", errors="replace") for file in files]
        texts = paragraphs(pasted) + (uploaded if len(uploaded) > 1 else [part for text in uploaded for part in paragraphs(text)])
        texts = [text for text in texts if text.strip()]
        kept, room = [], READ
        for text in texts:
            kept.append(text[:room])
            room -= len(kept[-1])
            if room <= 0:
                layout.note(f"Only the first {READ:,} characters are read.")
                break
        layout.show(f'<span class="sb-dim">{len(kept):,} texts, {sum(map(len, kept)):,} characters</span>')
        if len(kept) == 1:
            layout.note("One text cannot be told from chance: separate paragraphs by empty lines, or give more texts.")
            return []
    return kept


@st.cache_resource(show_spinner="Running the model on both", max_entries=8)
def _read_texts(
    key: str, a: tuple[str, ...], b: tuple[str, ...], _lm: LanguageModel, _dictionary: Dictionary
) -> list[Difference]:
    return contrast_texts(_lm, _dictionary, a, b, _dictionary.config.d_sae)

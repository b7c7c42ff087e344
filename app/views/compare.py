"""Compare: two dictionaries side by side: their figures, which features both have, and the same text through both."""

from __future__ import annotations

import html
from typing import Any

import address
import layout
import numpy as np
import opening
import pairs
import streamlit as st
import texts
from naming import names
from opening import Entry

from saebench.errors import UserError
from saebench.evaluation.spliced_text import SplicedText
from saebench.figures.prompt import html_key

PARTS = {"features": "Features", "prompt": "The same text through both"}
TINTS = {"difference": "Loss difference", "active": "Active features", "error": "Reconstruction error"}
CHIPS = 2


def show() -> None:
    first = layout.choose()
    second = _second(first)
    layout.title("Compare", f"{title(first)} against {title(second)}")
    if title(first) == title(second):
        layout.note("The same dictionary stands on both sides: choose another one on the left.")
    _figures(first, second)
    part = address.widget(
        st.segmented_control, "about", "About", "features", options=list(PARTS), format_func=PARTS.__getitem__,
        label_visibility="collapsed",
    )  # fmt: skip
    if part == "features":
        pairs.show(first, second)
    else:
        _prompt(first, second)


def title(entry: Entry) -> str:
    return f"{entry.run.name} / {entry.name}"


def _second(first: Entry) -> Entry:
    """What is compared with: before anything was chosen, another dictionary of the run, or of another run."""
    if not address.peek("dictionary2"):
        entries = [entry for run in opening.runs().values() for entry in run.entries.values()]
        others = sorted(
            (e for e in entries if title(e) != title(first)), key=lambda e: (not e.indexed, e.run.name != first.run.name)
        )
        other = next(iter(others), first)
        address.put("run2", other.run.name)
        address.put("dictionary2", other.name)
    return layout.choose(suffix="2", label="Second ")


# --- figures ---


def _figures(first: Entry, second: Entry) -> None:
    columns = [_column(entry) for entry in (first, second)]
    heads = list(dict.fromkeys(name for column in columns for name in column))
    rows = [
        (html.escape(title(entry)), *(html.escape(column.get(name, "-")) for name in heads))
        for entry, column in zip((first, second), columns, strict=True)
    ]
    layout.table(("", *heads), rows, numbers=range(3, len(heads) + 1))


def _column(entry: Entry) -> dict[str, str]:
    """The figures of a dictionary as they are shown, by name."""
    try:
        config, found = opening.config(entry), opening.evaluation(entry.run).get(entry.name, {})
    except UserError as error:
        return {"Kind": str(error)}
    cell = lambda key, form: f"{found[key]:{form}}" if key in found else "-"  # noqa: E731
    wrote = "" if config.rewrites else f" → {', '.join(config.writes)}"
    return {
        "Kind": config.architecture,
        "Site": ", ".join(config.reads) + wrote,
        "Latents": f"{config.d_sae:,}",
        "L0": cell("l0", ".1f"),
        "FVU": cell("fvu", ".4f"),
        "CE recovered": cell("ce_recovered_zero", ".4f"),
        "Loss increase": cell("ce_increase", "+.4f"),
        "Dead": cell("dead", ".1%"),
        **_indexed(entry),
    }


def _indexed(entry: Entry) -> dict[str, str]:
    try:
        store = opening.store(entry)
    except UserError:
        return {}
    return {
        "Firing": f"{np.count_nonzero(store.counts_F):,}",
        "Firings per token": f"{store.num_entries / max(1, store.num_tokens):.1f}",
        "Indexed tokens": f"{store.num_tokens:,}",
    }


# --- the same text through both ---


def _prompt(first: Entry, second: Entry) -> None:
    text = texts.text_area("Text for both")
    if not text.strip():
        layout.empty("Type a text above: it is read with either dictionary in place.")
        return
    tint = texts.shade_by(TINTS, "tint")
    found: list[SplicedText | UserError] = []
    for entry in (first, second):
        try:
            found.append(texts.spliced(entry, text))
        except UserError as error:
            found.append(error)
    reads = [read for read in found if isinstance(read, SplicedText)]
    strongest = max((float(np.nanmax(np.abs(texts.values_of(read, tint, None)), initial=0.0)) for read in reads), default=0.0)
    for column, entry, read in zip(st.columns(2, gap="medium"), (first, second), found, strict=True):
        with column:
            layout.heading(title(entry))
            if isinstance(read, UserError):
                layout.problem(str(read))
                continue
            texts.figures(read)
            layout.show(texts.coloured(read, tint, None, strongest=strongest))
    if reads:
        layout.show(html_key(strongest, texts.UNITS[tint], diverging=tint == "difference"))
    if len(reads) == 2:
        _tokens(first, second, *reads)


def _tokens(first: Entry, second: Entry, a: SplicedText, b: SplicedText) -> None:
    if a.codes.ids != b.codes.ids:
        layout.note("The two models cut the text into different tokens, so it is not set side by side token by token.")
        return
    number = texts.number
    rows: list[tuple[Any, ...]] = []
    for token in range(a.codes.added, len(a.codes)):
        rows.append((
            f"{token}",
            layout.token_chip(a.codes.tokens[token]),
            number(a.loss_T[token], ".2f"),
            number(a.spliced_loss_T[token], ".2f"),
            number(b.spliced_loss_T[token], ".2f"),
            number(a.error_T[token], ".2f"),
            number(b.error_T[token], ".2f"),
            _chips(first, a, token),
            _chips(second, b, token),
        ))  # fmt: skip
    heads = (
        "",
        "Token",
        "Loss",
        "With first",
        "With second",
        "Error first",
        "Error second",
        f"Strongest of {first.name}",
        f"Strongest of {second.name}",
    )
    layout.table(heads, rows, numbers=(0, 2, 3, 4, 5, 6))


def _chips(entry: Entry, read: SplicedText, token: int) -> str:
    name = names(entry)
    chips = [
        layout.latent_chip(entry, latent, f"{value:.2f}", name(latent)) for latent, value in read.codes.strongest(token, CHIPS)
    ]
    return f'<div class="sb-chips">{"".join(chips)}</div>'

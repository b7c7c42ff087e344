"""The features that tell two sets of texts apart: how much, how surely, and where they fire in either."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable
from dataclasses import dataclass

import address
import layout
import numpy as np
import opening
import streamlit as st
import texts
from naming import names
from opening import Entry

from saebench.features.contrast import Difference
from saebench.features.documents import examples_in, interval, largest_values
from saebench.features.examples import Example
from saebench.features.store import FeatureStore
from saebench.figures.contrast import LEVEL, volcano
from saebench.figures.tokens import html_context

CLICKED = "volcano-clicked"
LISTED, EXAMPLES, TEXTS, SHORT = 50, 6, 24, 16
Examples = Callable[[int, int], tuple[list[Example], float]]
"""Takes a latent and a side, 0 or 1; gives its strongest examples there and the value of the darkest shade."""


@dataclass(frozen=True)
class Found:
    """All latents that were tested, and what they were tested on."""

    differences: list[Difference]
    names: tuple[str, str]
    units: tuple[int, int]
    """Documents, contexts or texts in either set."""
    unit: str
    examples: Examples


def in_documents(store: FeatureStore, masks: tuple[np.ndarray, np.ndarray]) -> Examples:
    """Examples from sets of documents of a store."""
    return lambda latent, side: (examples_in(store, latent, masks[side], EXAMPLES), float(largest_values(store)[latent]))


def in_texts(entry: Entry, sides: tuple[list[str], list[str]]) -> Examples:
    """Examples from texts that are in no store: the strongest firing in each, of the first few."""

    def examples(latent: int, side: int) -> tuple[list[Example], float]:
        found = [texts.codes(entry, text).example(latent) for text in sides[side][:TEXTS]]
        found = [example for example in found if any(example.values)]
        found.sort(key=lambda example: -example.values[example.focus])
        strongest = max((example.values[example.focus] for example in found), default=0.0)
        return found[:EXAMPLES], strongest

    return examples


def show(entry: Entry, found: Found, *, one_sided: bool = False) -> None:
    """The list, the figure, and one feature's examples in a window of their own when it is asked for."""
    if not found.differences:
        layout.empty("No feature fires often enough in these texts to be compared.")
        return
    _caution(found)
    _figure(entry, found)
    side = 0
    if not one_sided:
        more = {"first": "More in the first", "second": "More in the second"}
        side = int(
            address.widget(st.segmented_control, "more", "Features", "first", options=list(more), format_func=more.__getitem__)
            == "second"
        )
    listed = [one for one in found.differences if (one.z < 0 if side else one.z > 0)]
    if not listed:
        layout.empty(f"No feature fires more in {found.names[side]}.")
        return
    _table(entry, found, listed[:LISTED])
    if len(listed) > LISTED:
        layout.show(f'<span class="sb-dim">The surest {LISTED} of {len(listed):,}.</span>')
    st.download_button(
        "CSV of all", _csv(entry, found), file_name="contrast.csv", mime="text/csv", icon=":material/download:", on_click="ignore"
    )
    latent = address.get_number("look")
    if latent is not None and 0 <= latent < opening.config(entry).d_sae:
        st.dialog(f"Feature {latent}", width="large", on_dismiss=_close)(_both_sides)(entry, found, latent)
    else:
        address.drop("look")


def _caution(found: Found) -> None:
    sure = sum(one.q <= LEVEL for one in found.differences)
    tested = f"{len(found.differences):,} features that fire often enough"
    if not sure:
        layout.note(
            f"Caution: of {tested} none differs by more than chance would have it, among so many that were tested (false discovery rate "
            f"{LEVEL:.0%}). What is listed here may well be chance."
        )
    else:
        text = f"Of {tested}, {sure:,} differ by more than chance would have it among so many (false discovery rate {LEVEL:.0%})."
        layout.show(f'<span class="sb-dim">{text}</span>')
    if min(found.units) < 6:
        layout.note(
            f"Caution: one set has only {min(found.units)} {found.unit}s. Differences between so few say little about others like them."
        )
    if found.unit == "context":
        layout.note("Chance is judged by contexts: the differences hold for these documents, not for others like them.")


def _figure(entry: Entry, found: Found) -> None:
    """All that were tested; a click on a point asks for its examples, once."""
    points = layout.plot(volcano(found.differences, found.names, names(entry)), "volcano", select=True)
    clicked = int(points[0]["customdata"]) if points else None
    if clicked != st.session_state.get(CLICKED) and clicked is not None:
        address.put("look", clicked)
    st.session_state[CLICKED] = clicked


def _table(entry: Entry, found: Found, listed: list[Difference]) -> None:
    name = names(entry)
    rows = []
    for one in listed:
        low, high = interval(one, min(found.units))
        dim = ' class="sb-dim"' if one.q > LEVEL else ""
        cells = [
            f"{1000 * one.rate_a:.2f}",
            f"{1000 * one.rate_b:.2f}",
            f"{2.0**one.log_ratio:.3g} x",
            f"{1000 * (one.rate_a - one.rate_b):+.2f}<br><small>{1000 * low:+.2f} to {1000 * high:+.2f}</small>",
            f"{one.units_a:,} of {found.units[0]:,}",
            f"{one.units_b:,} of {found.units[1]:,}",
            f"{one.q:.2g}" + ("<br><small>may be chance</small>" if one.q > LEVEL else ""),
        ]
        chip = layout.latent_chip(entry, one.latent, text=name(one.latent))
        rows.append((chip, *(f"<div{dim}>{cell}</div>" for cell in cells), layout.a("examples", "corpus", look=one.latent)))
    a, b = (name if len(name) <= SHORT else f"{name[: SHORT - 1]}…" for name in found.names)
    heads = ("Feature", f"in {a}", f"in {b}", "Ratio", "Difference (95 %)", f"{found.unit}s, {a}", b, "q", "")
    layout.show(
        '<span class="sb-dim">Rates are firings per 1,000 tokens; q is the share of false ones among features at least as different.</span>'
    )
    layout.table(heads, rows, numbers=range(1, 8))


def _csv(entry: Entry, found: Found) -> Callable[[], str]:
    """All differences as CSV, written when it is asked for."""
    name = names(entry)
    fields = ("latent", "firings_a", "firings_b", "units_a", "units_b", "rate_a", "rate_b", "log_ratio", "z", "p", "q")

    def write() -> str:
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow([*fields, "label"])
        writer.writerows([*(getattr(one, field) for field in fields), name(one.latent)] for one in found.differences)
        return out.getvalue()

    return write


# --- one feature in both ---


def _close() -> None:
    address.drop("look")


def _both_sides(entry: Entry, found: Found, latent: int) -> None:
    layout.show(layout.latent_chip(entry, latent, text=names(entry)(latent)))
    text_of = (
        opening.lm(entry.run).token_strings.__getitem__
        if found.unit == "text"
        else opening.store(entry).token_strings.__getitem__
    )
    for column, side in zip(st.columns(2, gap="medium"), (0, 1), strict=True):
        with column:
            layout.heading(found.names[side])
            examples, strongest = found.examples(latent, side)
            if not examples:
                layout.empty("Fires nowhere here.")
                continue
            rows = []
            for example in examples:
                line = html_context(example.ids, example.values, strongest, text_of, focus=example.focus)
                value, document = f"{example.values[example.focus]:.2f}", html.escape(example.document)
                rows.append(
                    f'<div class="sb-row" data-d="{document}"><b>{value}</b><div>{line}<br><small>{document}</small></div></div>'
                )
            layout.show(f'<div class="sb-rows">{"".join(rows)}</div>')

"""Prompt: a text of one's own, token by token: which features fire, how well they stand for what the model computed, what that costs it."""

from __future__ import annotations

import html
from collections.abc import Sequence

import address
import layout
import numpy as np
import opening
import streamlit as st
import texts
from naming import link_chip, names, store_of
from opening import Entry
from texts import NO_FIGURE, number

from saebench.evaluation.spliced_text import SplicedText, shares
from saebench.features.documents import largest_values
from saebench.features.store import FeatureStore
from saebench.figures.prompt import Shown, html_key, html_tokens, shaded
from saebench.figures.tokens import alone

SHADES = {
    "difference": "Loss difference", "feature": "One feature", "active": "Active features", "error": "Reconstruction error",
}  # fmt: skip
LISTS = {"tokens": "Token by token", "features": "Feature by feature"}
RANKS = {"value": "Value", "relative": "Share of its largest"}
PER_TOKEN, FEATURES, OF_TOKEN, PLACES = 3, 30, 60, 6
TINY = 1e-30


def show() -> None:
    entry = layout.choose()
    layout.title("Prompt", f"{entry.run.name} / {entry.name}")
    text = texts.text_area()
    store = store_of(entry)
    if not text.strip():
        layout.empty("Type a text above: every token then shows its features, and what it costs the model to see them alone.")
        if store is not None:
            _suggestions(store)
        return
    read = texts.spliced(entry, text)
    if read.codes.left_out:
        layout.note(f"The text is longer than can be read at once: its last {read.codes.left_out:,} tokens are left out.")
    texts.figures(read)
    chosen = _token(read)
    _text(entry, read, chosen)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        listed = "tokens"
        if chosen is None:
            listed = address.widget(
                st.segmented_control, "listed", "List", "tokens", options=list(LISTS), format_func=LISTS.__getitem__
            )
        scale_F = _scale(store)
    if chosen is not None:
        _one_token(entry, store, read, chosen, scale_F)
    elif listed == "tokens":
        _by_token(entry, read, scale_F)
    else:
        _by_feature(entry, read, scale_F)


# --- what was clicked ---


def _token(read: SplicedText) -> int | None:
    """The token that was clicked, if the text has it."""
    token = address.get_number("at")
    if token is not None and read.codes.added <= token < len(read.codes):
        return token
    address.drop("at")
    return None


def _feature(entry: Entry, read: SplicedText) -> int | None:
    """The feature that was chosen to colour the text by, or the strongest of the text."""
    chosen = address.get_number("shown")
    if chosen is not None and 0 <= chosen < opening.config(entry).d_sae:
        return chosen
    return next((latent for latent, _ in read.codes.top_latents(1)), None)


# --- the text ---


def _text(entry: Entry, read: SplicedText, chosen: int | None) -> None:
    """The coloured text, which stays in sight while the lists below it are read."""
    shown = _feature(entry, read)
    with st.container(key="prompt-text"):
        mode = texts.shade_by(SHADES, "shade")
        link = lambda token: address.link("prompt", at="none" if token == chosen else token)  # noqa: E731
        layout.show(texts.coloured(read, mode, shown, link=link, chosen=chosen))
        _key(entry, read, mode, shown)


def _key(entry: Entry, read: SplicedText, mode: str, latent: int | None) -> None:
    values_T = texts.values_of(read, mode, latent)
    _, strongest = shaded(values_T.tolist())
    if mode != "feature":
        layout.show(html_key(strongest, texts.UNITS[mode], diverging=mode == "difference"))
    elif latent is None:
        layout.empty("Nothing fires on this text.")
    else:
        fires = int((values_T != 0).sum())
        what = f"on {fires} of {len(read.codes) - read.codes.added} tokens" if fires else "does not fire on this text"
        chip = layout.latent_chip(entry, latent, what, names(entry)(latent))
        layout.show(f"{html_key(strongest, 'activation', diverging=bool((values_T < 0).any()))} {chip}")


def _scale(store: FeatureStore | None) -> np.ndarray | None:
    """What values are divided by before features are ranked: nothing, or the largest of each, so that what always fires does not hide
    what seldom does."""
    if store is None:
        return None
    rank = address.widget(
        st.segmented_control, "rank", "Strongest by", "value", options=list(RANKS), format_func=RANKS.__getitem__
    )
    return largest_values(store) if rank == "relative" else None


def strongest(read: SplicedText, token: int, count: int, scale_F: np.ndarray | None) -> list[tuple[int, float]]:
    """The features that are strongest on a token, with their values."""
    found = read.codes.strongest(token, len(read.codes.latents))
    if scale_F is not None:
        found = sorted(found, key=lambda pair: -pair[1] / max(scale_F[pair[0]], TINY))
    return found[:count]


# --- one token ---


def _one_token(entry: Entry, store: FeatureStore | None, read: SplicedText, token: int, scale_F: np.ndarray | None) -> None:
    codes = read.codes
    links = [layout.a("all tokens", "prompt", at="none")]
    links += [layout.a("previous", "prompt", at=token - 1)] if token > codes.added else []
    links += [layout.a("next", "prompt", at=token + 1)] if token + 1 < len(codes) else []
    layout.show(f'<div class="sb-turn">{" ".join(links)}</div>')
    layout.show(
        f'<div class="sb-head">Token <span class="sb-token">{html.escape(alone(codes.tokens[token]))}</span>'
        f"<small>position {token}</small></div>"
    )
    layout.figures([(name, value) for name, value in texts.facts_of(read, token) if name != "position"])
    if not read.active_T[token]:
        layout.empty("No feature fires on this token.")
        return
    in_order = codes.strongest(token, len(codes.latents))
    parts = dict(zip((latent for latent, _ in in_order), shares(opening.dictionary(entry), codes, token), strict=True))
    found = strongest(read, token, OF_TOKEN, scale_F)
    name = names(entry)
    whole = None if store is None else largest_values(store)
    rows = [
        (
            _colour_chip(latent),
            html.escape(name(latent)),
            f"{value:.3f}",
            f"{abs(value) / whole[latent]:.0%}" if whole is not None and whole[latent] else NO_FIGURE,
            _bar(float(parts[latent])),
            layout.a("open", "feature", run=entry.run.name, dictionary=entry.name, feature=latent),
        )
        for latent, value in found
    ]
    heads = ("Feature", "Label", "Value", "Of its largest", "Share of the reconstruction", "")
    layout.table(heads, rows, numbers=(2, 3))
    if len(found) < read.active_T[token]:
        layout.show(f'<span class="sb-dim">The strongest {len(found)} of {read.active_T[token]}.</span>')


def _bar(share: float) -> str:
    kind = "" if share >= 0 else " cold"
    return f'<span class="sb-bar{kind}"><i style="width:{min(1.0, abs(share)):.1%}"></i></span>{share:.1%}'


def _colour_chip(latent: int, text: str = "", aside: str = "") -> str:
    """A feature that colours the text when it is clicked."""
    title = f"colour the text by feature {latent}" + (f": {text}" if text else "")
    return link_chip(str(latent), "prompt", text, aside, title, shade="feature", shown=latent)


# --- all tokens, all features ---


def _by_token(entry: Entry, read: SplicedText, scale_F: np.ndarray | None) -> None:
    name = names(entry)
    rows = []
    for token in range(read.codes.added, len(read.codes)):
        chips = [
            _colour_chip(latent, name(latent), f"{value:.2f}") for latent, value in strongest(read, token, PER_TOKEN, scale_F)
        ]
        rows.append((
            f"{token}",
            layout.token_chip(read.codes.tokens[token], href=address.link("prompt", at=token)),
            number(read.loss_T[token], ".2f"),
            number(read.spliced_loss_T[token], ".2f"),
            number(read.loss_difference_T[token], "+.2f"),
            number(read.error_T[token], ".2f"),
            f"{read.active_T[token]}",
            f'<div class="sb-chips">{"".join(chips)}</div>',
        ))  # fmt: skip
    heads = ("", "Token", "Loss", "With", "Difference", "Error", "Active", "Strongest features")
    layout.table(heads, rows, numbers=(0, 2, 3, 4, 5, 6))


def _by_feature(entry: Entry, read: SplicedText, scale_F: np.ndarray | None) -> None:
    found = read.codes.top_latents(len(read.codes.latents))
    if scale_F is not None:
        found.sort(key=lambda pair: -pair[1] / max(scale_F[pair[0]], TINY))
    found = found[:FEATURES]
    if not found:
        layout.empty("Nothing fires on this text.")
        return
    name = names(entry)
    rows = []
    for latent, most in found:
        values_T = read.codes.by_latent(latent)
        rows.append((
            _colour_chip(latent),
            html.escape(name(latent)),
            f"{most:.3f}",
            f"{np.count_nonzero(values_T)}",
            f'<div class="sb-chips">{"".join(_places(read, values_T))}</div>',
            layout.a("open", "feature", run=entry.run.name, dictionary=entry.name, feature=latent),
        ))  # fmt: skip
    layout.table(("Feature", "Label", "Largest value", "Tokens", "Strongest on", ""), rows, numbers=(2, 3))
    total = len(np.unique(read.codes.latents))
    if len(found) < total:
        layout.show(f'<span class="sb-dim">The {len(found)} strongest of {total:,} that fire on this text.</span>')


def _places(read: SplicedText, values_T: np.ndarray) -> Sequence[str]:
    """Chips of the tokens on which a feature is strongest."""
    order = np.argsort(-np.abs(values_T), kind="stable")[:PLACES]
    return [
        layout.token_chip(read.codes.tokens[token], f"{values_T[token]:.2f}", href=address.link("prompt", at=token))
        for token in order.tolist()
        if values_T[token]
    ]


# --- nothing typed yet ---


def _suggestions(store: FeatureStore) -> None:
    layout.heading("Or begin with a piece of the indexed text")
    rows = []
    for quarter in (1, 2, 3):
        first = store.num_contexts * quarter // 4 * store.context_size + 1
        piece = "".join(store.token_strings[i] for i in store.ids_T[first : first + min(48, store.context_size - 1)])
        href = html.escape(address.link("prompt", text=piece))
        tokens = html_tokens([Shown(piece)])
        rows.append(f'<a class="sb-suggestion" data-go href="{href}">{tokens}</a>')
    layout.show(f'<div class="sb-suggestions">{"".join(rows)}</div>')

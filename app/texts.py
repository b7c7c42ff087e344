"""Texts of a person's own, read by the model and a dictionary: what pages share of reading and showing them."""

from __future__ import annotations

from collections.abc import Callable

import address
import layout
import numpy as np
import opening
import streamlit as st
from opening import Entry

from saebench.dictionaries import Dictionary
from saebench.evaluation.spliced_text import SplicedText, read_spliced
from saebench.features.prompts import PromptCodes, read_prompt
from saebench.figures.prompt import Shown, html_tokens, shaded
from saebench.lm import LanguageModel

MAX_CHARACTERS = 6000  # of a text that stands in the query string
NO_FIGURE = "-"
UNITS = {"difference": "loss difference", "active": "active features", "error": "squared error over the variance of the text"}


def text_area(label: str = "Text") -> str:
    """The text that all pages share, in the query string as `text`."""
    if len(address.peek("text")) > MAX_CHARACTERS:
        address.put("text", address.peek("text")[:MAX_CHARACTERS])
    return address.widget(
        st.text_area, "text", label, "", placeholder="Type or paste a text; Ctrl+Enter reads it", height=130, max_chars=MAX_CHARACTERS
    )  # fmt: skip


def spliced(entry: Entry, text: str) -> SplicedText:
    """A text read with a dictionary: once for all who ask. Raises UserError as `read_spliced` does."""
    return _read(weights_key(entry), text, opening.lm(entry.run), opening.dictionary(entry))


def weights_key(entry: Entry) -> str:
    """A name for what is kept in memory of a dictionary as it is now."""
    path = entry.run.path / "dictionaries" / entry.name.partition("@")[0] / "config.json"
    return f"{path}:{entry.name}:{opening.stamp(path)}"


@st.cache_resource(show_spinner="Running the model on the text", max_entries=256)
def _read(key: str, text: str, _lm: LanguageModel, _dictionary: Dictionary) -> SplicedText:
    return read_spliced(_lm, _dictionary, text)


def codes(entry: Entry, text: str) -> PromptCodes:
    """What fires on a text, without what it costs. Raises UserError as `read_prompt` does."""
    return _encode(weights_key(entry), text, opening.lm(entry.run), opening.dictionary(entry))


@st.cache_resource(show_spinner="Running the model on the text", max_entries=512)
def _encode(key: str, text: str, _lm: LanguageModel, _dictionary: Dictionary) -> PromptCodes:
    return read_prompt(_lm, _dictionary, text)


# --- how it is shown ---


def figures(read: SplicedText) -> None:
    """What a text costs with a dictionary, and how well it is reconstructed."""
    found = read.figures()
    layout.figures([
        ("tokens", f"{len(read.codes) - read.codes.added:,}"),
        ("loss", number(found["loss"], ".3f")),
        ("loss with the dictionary", number(found["spliced_loss"], ".3f")),
        ("difference", number(found["loss_difference"], "+.3f")),
        ("FVU of this text", number(found["fvu"], ".3f")),
        ("active features per token", number(found["l0"], ".1f")),
    ])  # fmt: skip


def number(value: float, form: str) -> str:
    """A figure, or what stands for none."""
    return NO_FIGURE if np.isnan(value) else f"{value:{form}}"


def shade_by(shades: dict[str, str], key: str) -> str:
    """What tokens are to be coloured by."""
    return address.widget(
        st.segmented_control, key, "Colour by", next(iter(shades)), options=list(shades), format_func=shades.__getitem__
    )


def values_of(read: SplicedText, mode: str, latent: int | None) -> np.ndarray:
    """What tokens are coloured by: [T], nan where there is none."""
    if mode == "feature":
        return read.codes.by_latent(latent) if latent is not None else np.zeros(len(read.codes))
    return {"difference": read.loss_difference_T, "active": read.active_T.astype(float), "error": read.error_T}[mode]


def coloured(
    read: SplicedText,
    mode: str,
    latent: int | None,
    *,
    link: Callable[[int], str] | None = None,
    chosen: int | None = None,
    strongest: float | None = None,
) -> str:
    """The text with every token coloured, as HTML; `link` gives where a click on a token leads, `strongest` the value of the darkest."""
    values_T = values_of(read, mode, latent)
    shades, _ = shaded(values_T.tolist(), diverging=mode in ("difference", "feature"), strongest=strongest)
    tokens = []
    for token, text in enumerate(read.codes.tokens):
        added = token < read.codes.added
        facts = (
            [("read first, as before every text", "")]
            if added
            else facts_of(read, token, values_T[token] if mode == "feature" else None)
        )
        href = "" if added or link is None else link(token)
        tokens.append(Shown(text, shades[token], facts, href, token == chosen, added))
    return html_tokens(tokens)


def facts_of(read: SplicedText, token: int, activation: float | None = None) -> list[tuple[str, str]]:
    """The figures of a token by name, with the value of the feature that is shown."""
    facts = [] if activation is None else [("activation", f"{activation:.4g}")]
    return [
        *facts,
        ("loss", number(read.loss_T[token], ".3f")),
        ("with the dictionary", number(read.spliced_loss_T[token], ".3f")),
        ("difference", number(read.loss_difference_T[token], "+.3f")),
        ("reconstruction error", number(read.error_T[token], ".3f")),
        ("active features", f"{read.active_T[token]}"),
        ("position", f"{token}"),
    ]

"""What a latent is called where only a few words fit: its label, or the token it fires on most; and chips that lead somewhere."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import address
import layout
import opening
from opening import Entry

from saebench.errors import UserError
from saebench.features.labelling.labels import NEVER, NO_PATTERN, SELDOM
from saebench.features.store import FeatureStore
from saebench.figures.tokens import alone

MOSTLY = 0.5  # share of the summed values from which on one token stands for a latent


def names(entry: Entry) -> Callable[[int], str]:
    """Gives the plain text for a latent; "" where the dictionary has no feature store that can be read."""
    try:
        store = opening.store(entry)
    except UserError:
        return lambda latent: ""
    texts, _ = opening.label_columns(entry)
    tops, shares = (store.latents[name] for name in ("top_token", "top_token_share"))

    def name(latent: int) -> str:
        if texts[latent] not in ("", NO_PATTERN, SELDOM):
            return texts[latent]
        top = tops[latent].as_py()
        if top is None:
            return NEVER
        token = f"'{alone(store.token_strings[top])}'"
        return f"mostly {token}" if shares[latent].as_py() >= MOSTLY else f"{token} and others"

    return name


def store_of(entry: Entry) -> FeatureStore | None:
    """The feature store of a dictionary for pages that can do without; a damaged one is named on the page."""
    if not entry.indexed:
        return None
    try:
        return opening.store(entry)
    except UserError as error:
        layout.problem(str(error))
        return None


def link_chip(bold: str, page: str, text: str = "", aside: str = "", title: str = "", **params: Any) -> str:
    """A chip that leads to a page, as HTML; all texts are plain."""
    href = html.escape(address.link(page, **params))
    label = f"<span>{html.escape(text)}</span>" if text else ""
    small = f"<small>{html.escape(aside)}</small>" if aside else ""
    return f'<a class="sb-chip" data-go href="{href}" title="{html.escape(title or text)}"><b>{html.escape(bold)}</b>{label}{small}</a>'

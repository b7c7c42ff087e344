"""What the model writes, untouched and steered, as it writes it; what either text is like, and what the edits do to neutral text."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import address
import layout
import numpy as np
import opening
import steering_state
import streamlit as st
from opening import Entry
from steering_state import State
from texts import weights_key

from saebench.dictionaries import Dictionary
from saebench.errors import UserError
from saebench.features.store import FeatureStore
from saebench.figures.prompt import Shown, html_tokens
from saebench.lm import LanguageModel
from saebench.steering import measures, samples, trial
from saebench.steering.hooks import check_edit
from saebench.steering.samples import Sample

MAX_CHARACTERS, MOST_TOKENS, SUGGESTED = 2000, 200, 3
LAST = "steered-text"
NAMES = ("Untouched", "Steered")
PERPLEXITY = "How unlikely the untouched model finds the text: the number of equally likely tokens it would be choosing among at each step."
REPETITION = "Share of the text's runs of three tokens that it had before; near 1 the text goes round in circles."
SECONDS = "Seconds it took to write a token, on this machine as busy as it was."
KL = (
    "How far the edits move the model's next-token probabilities on text of the corpus: KL divergence of steered from untouched, nats per "
    "token, the edits acting everywhere. 0 is no change."
)
SIZE = "How far the edits move the activations there, as a share of their length, on the same text."


@dataclass(frozen=True)
class Asked:
    """What is to be written."""

    prompt: str
    tokens: int
    temperature: float
    seed: int

    def options(self) -> list[str]:
        """As `saebench steer` takes them."""
        return [f"--tokens={self.tokens}", f"--temperature={steering_state.plain(self.temperature)}", f"--seed={self.seed}"]


@dataclass(frozen=True)
class Written:
    """What was written last, and how it came about."""

    of: tuple[str, State, Asked]
    samples: tuple[Sample, Sample]
    kl_C: np.ndarray
    size_C: np.ndarray


# --- what is asked for ---


def prompt(store: FeatureStore) -> None:
    """The text to go on from, with pieces of the indexed text to begin with."""
    if len(address.peek("prompt")) > MAX_CHARACTERS:
        address.put("prompt", address.peek("prompt")[:MAX_CHARACTERS])
    text = address.widget(
        st.text_area, "prompt", "Prompt", "", placeholder="Text that the model goes on from", height=90, max_chars=MAX_CHARACTERS
    )  # fmt: skip
    if text.strip():
        return
    links = [
        f'<a class="sb-suggestion" data-go href="{html.escape(address.link("steering", prompt=piece))}">{html_tokens([Shown(piece)])}</a>'
        for piece in trial.prompts(store, SUGGESTED, 24)
    ]
    layout.show(
        f'<span class="sb-dim">Or from a piece of the indexed text:</span><div class="sb-suggestions">{"".join(links)}</div>'
    )


def settings() -> Asked:
    """How much is written, and how. The prompt is what the query string says."""
    if not math.isfinite(address.get_number("temperature", 0.8)):
        address.drop("temperature")
    tokens = address.widget(st.number_input, "tokens", "New tokens", 60, min_value=1, max_value=MOST_TOKENS, step=10, width=130)
    temperature = address.widget(
        st.number_input, "temperature", "Temperature", 0.8, min_value=0.0, max_value=3.0, step=0.1, format="%.2f", width=130,
        help="0 writes the likeliest text, 1 the model's own variety.",
    )  # fmt: skip
    seed = address.widget(st.number_input, "seed", "Seed", 0, min_value=0, max_value=2**31, step=1, width=130)
    return Asked(address.peek("prompt"), tokens, temperature, seed)


@contextmanager
def telling() -> Iterator[None]:
    """Around what may be refused: the reason stands where it was asked for, and the rest of the page goes on."""
    try:
        yield
    except (UserError, OSError) as error:
        layout.problem(str(error))


# --- writing ---


def unit(entry: Entry, store: FeatureStore) -> float:
    """What a strength of 1 adds."""
    return _unit(f"{weights_key(entry)} {entry.key}", opening.lm(entry.run), opening.dictionary(entry), store)


@st.cache_resource(show_spinner="Measuring the length of the activations", max_entries=64)
def _unit(key: str, _lm: LanguageModel, _dictionary: Dictionary, _store: FeatureStore) -> float:
    return trial.unit(_lm, _dictionary, _store)


def show(entry: Entry, store: FeatureStore, state: State, asked: Asked) -> None:
    """The button, and both texts: as they are being written, or as they were last."""
    now = (f"{weights_key(entry)} {entry.key}", state, asked)
    pressed = st.button("Write", type="primary", icon=":material/play_arrow:", key="write")
    written: Written | None = st.session_state.get(LAST)
    if pressed:
        st.session_state.pop(LAST, None)
        with telling():
            written = st.session_state[LAST] = _write(entry, store, state, asked, now)
        if LAST not in st.session_state:
            return
        assert written is not None
    elif written is not None and written.of[0] == now[0]:
        if written.of != now:
            layout.note("What is set above has changed since these texts were written: press Write.")
        _texts(written)
    else:
        layout.empty("Press Write: the model goes on from the prompt, first as it is, then with the edits, with the same seed.")
        return
    _on_neutral_text(written)


def _write(entry: Entry, store: FeatureStore, state: State, asked: Asked, of: tuple[str, State, Asked]) -> Written:
    """Write both texts into the page. Raises UserError before anything is written where something does not fit."""
    samples.check_writing(asked.prompt, asked.temperature)
    lm = opening.lm(entry.run)
    lm.check_generation(len(lm.prompt_ids(asked.prompt)), asked.tokens)
    edits = steering_state.made(entry, state.settings(unit(entry, store)))
    for edit in edits:
        check_edit(lm, edit)
    places = _places()
    found = []
    for place, some in zip(places, ([], edits), strict=True):
        tell = _teller(place, asked.prompt)
        found.append(
            samples.write(lm, some, asked.prompt, asked.tokens, temperature=asked.temperature, seed=asked.seed, on_text=tell)
        )
        _sample(place, asked.prompt, found[-1])
    with st.spinner("Measuring on neutral text"):
        kl_C, size_C = measures.side_effect(lm, [edit for edit in edits if edit.strength], trial.neutral(store))
    return Written(of, (found[0], found[1]), kl_C, size_C)


@dataclass(frozen=True)
class _Place:
    """Where a text stands, and its figures below it."""

    text: Any
    figures: Any


def _places() -> list[_Place]:
    """A place for either text, under its name."""
    places = []
    for column, name in zip(st.columns(2, gap="medium"), NAMES, strict=True):
        layout.heading(name, where=column)
        places.append(_Place(column.empty(), column.empty()))
    return places


def _teller(place: _Place, prompt: str) -> Callable[[str], None]:
    """Shows a text that grows."""
    pieces: list[str] = []

    def tell(piece: str) -> None:
        pieces.append(piece)
        _text(place, prompt, "".join(pieces))

    return tell


def _text(place: _Place, prompt: str, text: str) -> None:
    body = f'<span class="dim">{html.escape(prompt)}</span><span>{html.escape(text)}</span>'
    layout.show(f'<div class="sb-written sb-tokens">{body}</div>', place.text)


def _sample(place: _Place, prompt: str, sample: Sample) -> None:
    _text(place, prompt, sample.text)
    perplexity = "-" if math.isnan(sample.perplexity) else f"{sample.perplexity:.1f}"
    _told([
        ("perplexity", perplexity, PERPLEXITY),
        ("repetition", f"{sample.repetition:.0%}", REPETITION),
        ("seconds per token", f"{sample.seconds_per_token:.3f}", SECONDS),
    ], place.figures)  # fmt: skip


def _texts(written: Written) -> None:
    for place, sample in zip(_places(), written.samples, strict=True):
        _sample(place, written.of[2].prompt, sample)


def _on_neutral_text(written: Written) -> None:
    layout.heading("On neutral text", f"{len(written.kl_C)} contexts of the indexed text, edited everywhere")
    _told([
        ("KL from the untouched model, nats per token", f"{written.kl_C.mean():.4f}", KL),
        ("size of the edit", f"{written.size_C.mean():.1%}", SIZE),
    ])  # fmt: skip


def _told(items: list[tuple[str, str, str]], where: Any = st) -> None:
    """Key figures in a row: name, value, and what it means, which pointing at it says."""
    boxes = (
        f'<div class="sb-figure" title="{html.escape(meaning)}"><small>{html.escape(name)}</small><b>{html.escape(value)}</b></div>'
        for name, value, meaning in items
    )
    layout.show(f'<div class="sb-figures">{"".join(boxes)}</div>', where)

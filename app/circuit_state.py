"""What is set on the Circuit page, as data, in the query string: the prompt, what is to be explained, and the graph that is looked at.

`explain` is likeliest, token, difference or feature; `logit` and `against` are tokens, `place` the position of a feature (-1 is the last);
`graph` is a saved graph of the run, `node` the id of a node in it or group/NAME, `nodes` and `links` are shares of pruning, `grouped` says
whether supernodes are drawn as one, `zoom` is the part of the picture that is looked at. `prompt` is the Steering page's too, `feature` the
Feature page's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import address
import opening
import streamlit as st
from opening import Entry, Opened

from saebench.circuits.graphs.replacement import prompt_ids
from saebench.circuits.sets.tracing_many import slug as slug_of
from saebench.errors import UserError
from saebench.figures.graph import WHOLE
from saebench.figures.tokens import alone
from saebench.lm import LanguageModel

LIKELIEST, TOKEN, DIFFERENCE, FEATURE = EXPLAIN = ("likeliest", "token", "difference", "feature")
OF_GRAPH = ("node", "zoom")
OF = "circuit-of"
FAR = 20.0  # whole pictures
LETTERS = 32  # of the prompt in a file's name
TYPED = {"↵": "\n", "→": "\t", "·": " "}  # as pages show white space


@dataclass(frozen=True)
class Asked:
    """What a graph is to be made of."""

    prompt: str
    explain: str = LIKELIEST
    token: str = ""
    against: str = ""
    dictionary: str = ""
    latent: int = 0
    place: int = -1

    @property
    def slug(self) -> str:
        """The name of its file: the same for the same prompt and target."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return f"{slug_of(self.prompt)[:LETTERS].rstrip('-')}-{digest}"

    @classmethod
    def of(cls, prompt: str, explain: str, entry: Entry) -> Asked:
        """From the query string, only what counts for this target."""
        if explain == FEATURE:
            latent, place = address.get_number("feature", 0), address.get_number("place", -1)
            return cls(prompt, explain, dictionary=entry.name, latent=latent, place=place)
        token = address.peek("logit") if explain in (TOKEN, DIFFERENCE) else ""
        return cls(prompt, explain, token, address.peek("against") if explain == DIFFERENCE else "")


def traced(run: Opened) -> list[str]:
    """Names of the dictionaries of a run that graphs are made of: those that write what they do not read."""
    found = []
    for name, entry in run.entries.items():
        try:
            if not opening.config(entry).rewrites:
                found.append(name)
        except (UserError, OSError, KeyError, TypeError):  # the page of this dictionary says what is wrong with it
            continue
    return found


def checked(entry: Entry, asked: Asked) -> Asked:
    """The same with its tokens as the vocabulary has them. Raises UserError for what would only fail after the model has run."""
    if not asked.prompt.strip():
        raise UserError("the prompt is empty: type a text whose next token is to be explained")
    lm = opening.lm(entry.run)
    ids, _ = prompt_ids(lm, asked.prompt)
    token, against = (
        one_token(lm, text, what) for text, what in ((asked.token, "the token"), (asked.against, "the other token"))
    )
    if asked.explain in (TOKEN, DIFFERENCE) and not token:
        raise UserError("no token is named: type the one that is to be explained")
    if asked.explain == DIFFERENCE and (not against or against == token):
        raise UserError("a difference is of two tokens: type another one in the second field")
    if asked.explain == FEATURE:
        if asked.dictionary not in (known := traced(entry.run)):
            raise UserError(f"{asked.dictionary} is no dictionary of the graph: choose one of {', '.join(known)} in the sidebar")
        d_sae = opening.config(entry).d_sae
        if not 0 <= asked.latent < d_sae:
            raise UserError(f"there is no feature {asked.latent} in {asked.dictionary}: they are 0 to {d_sae - 1:,}")
        if not -len(ids) <= asked.place < len(ids):
            raise UserError(
                f"position {asked.place} is outside the prompt's {len(ids)} tokens: use 0 to {len(ids) - 1}, or -1 for the last"
            )
    return Asked(asked.prompt, asked.explain, token, against, asked.dictionary, asked.latent, asked.place)


def one_token(lm: LanguageModel, text: str, what: str) -> str:
    """A token as it was typed, or with white space as pages show it. Raises UserError for what is not one token of the vocabulary."""
    if not text:
        return ""
    plain = "".join(TYPED.get(letter, letter) for letter in text)
    for form in (text, plain):
        ids = lm.tokenizer(form, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return form
    pieces = ", ".join(f"'{alone(lm.token_strings[i])}'" for i in ids) or "none"
    raise UserError(
        f"{what} {text!r} is not in the vocabulary as one token, but as {len(ids)}: {pieces}; type one of the vocabulary, "
        "a space in front as ·, a line end as ↵"
    )


def forget_other(run: Opened) -> None:
    """A graph of another run means nothing here: it is forgotten, unless the address names it together with this one."""
    query = st.query_params
    stand = query.get("run", run.name) == run.name and "graph" in query
    if st.session_state.get(OF, str(run.path)) != str(run.path) and not stand:
        address.drop("graph", *OF_GRAPH)
    st.session_state[OF] = str(run.path)


def show_graph(slug: str) -> None:
    """Look at another graph of the run."""
    if slug != address.peek("graph"):
        address.drop(*OF_GRAPH)
    address.put("graph", slug, "")


def zoom() -> tuple[float, ...]:
    """The part of the picture that is looked at, as shares of the whole: left_right_lower_upper. All of it for what is no such part."""
    try:
        ends = tuple(float(part) for part in address.get("zoom").split("_"))
        left, right, low, high = ends
    except ValueError:
        return WHOLE
    ordered = left < right and low < high
    return ends if ordered and all(-FAR < end < FAR for end in ends) else WHOLE

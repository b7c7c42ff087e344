"""A store whose latents fire on known things, and a second reading of rules, in plain Python."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import torch

import saebench as sb
from saebench.activations.encoding import Encoded
from saebench.features import FeatureStore, index
from saebench.lm import Contexts

SELF, CALL, UNIT, TOPIC, EARLY, NOISE, DEAD, SELDOM, NEXT, WORD, REPEAT, CASES, LINE, TWO = range(14)
LATENTS = 14
PLAIN = ["", "red", "green", "blue", "tall", "short", "round", "flat", "warm", "cold", "quick", "slow", "soft", "hard"][1:]
SUBJECT = ["socket", "connect", "host", "port"]
NUMBERS = [str(n) for n in range(10, 40)]
STRINGS = [
    "<start>", "\n", *(f" {word}" for word in PLAIN), *(f" {word}" for word in SUBJECT), *(f" {n}" for n in NUMBERS),
    " self", "(", ")", ":", " init", " size", " px", " pro", " ac", "cess", "The", " the", " THE", "import", " os", ",",
]  # fmt: skip
ID = {text: number for number, text in enumerate(STRINGS)}
SIZE = 41


def corpus(contexts: int = 160, seed: int = 5) -> tuple[list[list[str]], list[str]]:
    """Texts of the tokens by context, and the document of each context."""
    draw = random.Random(seed)
    plain = [f" {word}" for word in PLAIN]
    rows, names = [], []
    for context in range(contexts):
        topical = context % 4 == 0
        row = ["<start>"]
        while len(row) < SIZE:
            if topical and draw.random() < 0.3:
                row.append(f" {draw.choice(SUBJECT)}")
            row += draw.choices(
                [
                    [draw.choice(plain)], [" self"], [" init", "("], [" size", "("],
                    [f" {draw.choice(NUMBERS)}", " px"], [f" {draw.choice(NUMBERS)}"],
                    [draw.choice(plain), ":"], [" pro", "cess"], [" ac", "cess"], [draw.choice(["The", " the", " THE"])],
                    ["\n", "import", draw.choice(plain), ",", draw.choice(plain), "\n"], [")"],
                ],
                weights=[10, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            )[0]  # fmt: skip
        rows.append(row[:SIZE])
        names.append("sockets" if topical else "words")
    return rows, names


def codes(rows: list[list[str]], seed: int = 6) -> np.ndarray:
    """What the latents are made to do [contexts, SIZE, LATENTS]."""
    draw = random.Random(seed)
    found = np.zeros((len(rows), SIZE, LATENTS), dtype=np.float32)
    for context, row in enumerate(rows):
        line, pairs = "", set()
        for at in range(1, SIZE):
            text, before = row[at], row[at - 1]
            after = row[at + 1] if at + 1 < SIZE else ""
            if before == "\n":
                line = text
            fires = {
                SELF: text == " self",
                CALL: text == "(" and before == " init",
                UNIT: text.strip().isdigit() and after == " px",
                TOPIC: context % 4 == 0 and draw.random() < 0.15,
                EARLY: at <= 2,
                NOISE: draw.random() < 0.05,
                SELDOM: context in (1, 2, 3) and at == 20,
                NEXT: after == ":",
                WORD: text == "cess" and before == " pro",
                REPEAT: (before, text) in pairs,
                CASES: text.strip().lower() == "the",
                LINE: line == "import" and text != "\n",
                TWO: text in (" self", ")"),
            }
            pairs.add((before, text))
            if text == "\n":
                line = ""
            for latent, fire in fires.items():
                found[context, at, latent] = fire * (1 + draw.random())
    return found


class Held:
    """A source that holds the wanted codes: with an identity encoder the activations are the codes."""

    def __init__(self, x_NSD: torch.Tensor, contexts: Contexts):
        self.x_NSD, self.contexts = x_NSD, contexts
        self.widths = {"a": x_NSD.shape[2]}
        self.num_contexts, self.context_size = x_NSD.shape[:2]
        self.identity = f"held-{float(x_NSD.double().sum()):.6f}"

    def check_sites(self, sites):
        assert sites == ["a"]

    def fetch(self, contexts_N, sites, out=None):
        return {site: Encoded(self.x_NSD[contexts_N]) for site in sites}


def make(path, rows: list[list[str]], names: list[str], codes_NSF: np.ndarray, strings: list[str] = STRINGS) -> FeatureStore:
    """A store of these codes over this text."""
    ids = {text: number for number, text in enumerate(strings)}
    ids_NS = torch.tensor([[ids[text] for text in row] for row in rows], dtype=torch.int32)
    known = list(dict.fromkeys(names))
    documents_NS = torch.tensor([known.index(name) for name in names], dtype=torch.int32)[:, None].repeat(1, ids_NS.shape[1])
    positions_NS = torch.arange(ids_NS.shape[1], dtype=torch.int32).repeat(len(rows), 1) + 100
    documents_NS[:, 0], positions_NS[:, 0] = -1, -1
    contexts = Contexts(ids_NS, documents_NS, positions_NS, known)
    latents = codes_NSF.shape[2]
    dictionary = sb.TopK(d_sae=latents, k=latents, d_in=latents, site="a", decoder="unit").build().requires_grad_(False)
    dictionary.W_enc_FD.copy_(torch.eye(latents))
    dictionary.W_dec.copy_(torch.eye(latents))
    lm = SimpleNamespace(name="words", fingerprint="words", token_strings=list(strings))
    return index(dictionary, Held(torch.from_numpy(codes_NSF), contexts), path, lm=lm)


def true_at(rule: str, rows: list[list[str]], context: int, at: int) -> bool:
    """Whether a rule, as JSON, is true of a token: read again, in plain Python, from the texts of the tokens."""
    return all(_true(fields, rows[context], at) for fields in json.loads(rule))


def _true(fields: dict, row: list[str], at: int) -> bool:
    kind = fields["kind"]
    if kind == "early":
        return (at if fields["of"] == "context" else 100 + at + 1) <= fields["last"]
    if kind == "around":
        places = [p for p in range(at - fields["before"], at + fields["after"] + 1) if 0 <= p < len(row) and p != at]
        return len({_word(row, p) for p in places} & set(fields["words"])) >= fields["at_least"]
    place = at + fields["at"]
    if not 0 <= place < len(row):
        return False
    if kind == "trait":
        return _trait(fields["name"], row, place)
    column, values = fields["column"], fields["values"]
    if column == "token":
        return ID[row[place]] in values
    if column == "word":
        return _word(row, place) in values
    if column == "before":
        return _before(row, place) in values
    if column == "line":
        return _line(row, place) in values
    word = _word(row, place)
    longer = word.isalpha() and len(word) >= 5
    return longer and (word[:3] if column == "begin" else word[-3:]) in values


def _run(row: list[str], place: int) -> tuple[int, int]:
    """Where the run of tokens that join letter to letter begins and ends."""
    first, last = place, place + 1
    while first > 0 and row[first][0].isalpha() and row[first - 1][-1].isalpha():
        first -= 1
    while last < len(row) and row[last][0].isalpha() and row[last - 1][-1].isalpha():
        last += 1
    return first, last


def _word(row: list[str], place: int) -> str:
    first, last = _run(row, place)
    return "".join(row[first:last]).strip().lower()


def _before(row: list[str], place: int) -> str:
    first, _ = _run(row, place)
    return _word(row, first - 1) if first > 0 else ""


def _line(row: list[str], place: int) -> int:
    """The token that the line begins with, or -1 where that is before the context."""
    start = next((p for p in range(place, 0, -1) if row[p - 1] == "\n" and row[p] != "\n"), None)
    return -1 if start is None else ID[row[start]]


def _trait(name: str, row: list[str], place: int) -> bool:
    text, bare = row[place], row[place].strip()
    if name == "rest of a word":
        return place > 0 and text[0].isalpha() and row[place - 1][-1].isalpha()
    if name == "repeated text":
        return (row[place - 1], text) in {(row[p - 1], row[p]) for p in range(1, place)}
    return {
        "number": bare.isdigit(),
        "capitalised word": bare in ("The",),
        "capitals": bare in ("THE",),
        "letters": bare.isalpha(),
        "punctuation": bool(bare) and all(not c.isalnum() for c in bare),
        "opening bracket": bare.endswith("("),
        "closing bracket": bare.startswith(")"),
        "quotation mark": False,
        "line end": "\n" in text,
        "spaces": False,
        "white space": not bare,
        "token that is not ASCII": False,
        "token after a space": text.startswith(" ") and bool(bare),
    }[name]

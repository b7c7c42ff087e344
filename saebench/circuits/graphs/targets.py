"""What a graph explains: logits, differences of logits, latents, directions.

Each becomes a row of edges. A logit counts less the mean of all logits, which no choice between tokens depends on.
Shape suffixes: `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.circuits.graphs.parts import Place
from saebench.circuits.graphs.replacement import LocalModel
from saebench.errors import UserError

SHARE, MOST = 0.95, 10
FINAL = "ln_final.hook_out"


@dataclass(frozen=True)
class Logit:
    """The logit of a token, by its text or id, at a position (negative ones from the end)."""

    token: str | int
    position: int = -1


@dataclass(frozen=True)
class Difference:
    """The logit of one token less that of another."""

    token: str | int
    other: str | int
    position: int = -1


@dataclass(frozen=True)
class Feature:
    """The pre-activation of a latent, active or not, of a dictionary by its name or number."""

    dictionary: str | int
    position: int
    latent: int


@dataclass(frozen=True)
class Direction:
    """v . x, with x what stands at a site."""

    site: str
    vector: Tensor
    position: int = -1
    label: str = "direction"


Target = str | Logit | Difference | Feature | Direction


@dataclass(frozen=True)
class Row:
    """A target as the linear model takes it: v . x + b at a place, or a latent of a part."""

    kind: str
    label: str
    position: int
    weight: float
    """Its share of what the graph explains; those of a graph add up to 1."""
    probability: float = 0.0
    token: int = -1
    place: Place | None = None
    vector_D: Tensor | None = None
    bias: float = 0.0
    part: int = -1
    latent: int = -1


def rows_of(model: LocalModel, targets: Sequence[Target] | None, share: float = SHARE, most: int = MOST) -> list[Row]:
    """The targets, weighted by the probabilities of the tokens where all are logits at one position, else equally; where there are none
    named, the likeliest tokens after the prompt: the fewest that hold `share` of the probability, at most `most`. Raises UserError."""
    if targets is None:
        probability_V = model.logits_V.softmax(-1)
        values, tokens = probability_V.topk(min(most, len(probability_V)))
        count = int((values.cumsum(0) < share).sum()) + 1
        targets = [Logit(token) for token in tokens[:count].tolist()]
    if not targets:
        raise UserError("there is no target: name one, or leave targets out for the likeliest tokens")
    made = [_row(model, target) for target in targets]
    named = [(row.kind, row.position, row.part, row.latent, row.token) for row in made if row.kind in ("logit", "feature")]
    if len(set(named)) < len(named):
        raise UserError("a target is named twice: name each once")
    logits = all(row.kind == "logit" and row.position == model.size - 1 for row in made)
    raw = [row.probability if logits else 1.0 for row in made]
    return [Row(**{**row.__dict__, "weight": value / sum(raw)}) for row, value in zip(made, raw, strict=True)]


def token_id(model: LocalModel, token: str | int) -> int:
    """Raises UserError for a text that is not one token, and an id that the vocabulary lacks."""
    count = len(model.logits_V)
    if isinstance(token, str):
        ids = model.lm.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = ", ".join(repr(model.lm.token_strings[i]) for i in ids) or "none"
            raise UserError(f"the target {token!r} is {len(ids)} tokens ({pieces}) of the vocabulary: give one token, or its id")
        token = int(ids[0])
    if not 0 <= token < count:
        raise UserError(f"the vocabulary has no token {token}: it has {count:,}, counted from 0")
    return token


def _row(model: LocalModel, target: Target) -> Row:
    if isinstance(target, str):
        target = Logit(target)
    position = target.position + model.size if target.position < 0 else target.position
    if not 0 <= position < model.size:
        raise UserError(f"position {target.position} of a target is outside the prompt's {model.size} tokens")
    if isinstance(target, Feature):
        return _feature(model, target, position)
    if isinstance(target, Direction):
        place = Place.of(target.site, model.layers)
        if place.kind == "written" and place.point % 2:
            raise UserError(f"site {target.site!r} is not linear in what stands before it: use the stream or an input")
        width, vector_D = model.lm.width(target.site), target.vector.detach().float().to(model.lm.device)
        if vector_D.shape != (width,) or not vector_D.isfinite().all():
            raise UserError(
                f"a target at {target.site!r} needs {width} finite numbers, not {tuple(target.vector.shape)}: correct it"
            )
        return Row("direction", target.label, position, 1.0, place=place, vector_D=vector_D)
    W_VD, b_V = model.unembedding()
    place, text = Place.of(FINAL, model.layers), model.lm.token_strings
    token = token_id(model, target.token)
    if isinstance(target, Logit):
        vector_D, bias = W_VD[token] - W_VD.mean(0), float(b_V[token] - b_V.mean())
        n_D = model.stands_at(place, model.stream)[position]
        probability = float(model.squashed(W_VD @ n_D + b_V).softmax(0)[token])
        return Row("logit", _text(text, token), position, 1.0, probability, token, place, vector_D, bias)
    other = token_id(model, target.other)
    label = f"{_text(text, token)} - {_text(text, other)}"
    return Row("difference", label, position, 1.0, 0.0, token, place, W_VD[token] - W_VD[other], float(b_V[token] - b_V[other]))


def dictionary_number(model: LocalModel, dictionary: str | int) -> int:
    """Of a dictionary by its name or number. Raises UserError for one that the model lacks."""
    number = model.names.index(dictionary) if dictionary in model.names else dictionary
    if not isinstance(number, int) or not 0 <= number < len(model.dictionaries):
        raise UserError(f"there is no dictionary {dictionary!r}: use one of {', '.join(model.names)}")
    return number


def _feature(model: LocalModel, target: Feature, position: int) -> Row:
    number = dictionary_number(model, target.dictionary)
    for i, part in enumerate(model.parts):
        if part.number == number and part.first <= target.latent < part.first + len(part.W_read_FD):
            return Row("feature", "", position, 1.0, part=i, latent=target.latent - part.first)
    d_sae = model.dictionaries[number].config.d_sae
    raise UserError(f"latent {target.latent} is not one of the {d_sae:,} of {model.names[number]}, counted from 0")


def _text(strings: list[str], token: int) -> str:
    return strings[token] if token < len(strings) else f"token {token}"


def value_of(row: Row, model: LocalModel, x_SD: Tensor) -> float:
    """The value of a target that is no latent, given what stands at its place [S, D]."""
    assert row.vector_D is not None
    return float(torch.dot(row.vector_D, x_SD[row.position]) + row.bias)

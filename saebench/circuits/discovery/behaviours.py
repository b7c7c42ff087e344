"""Three behaviours whose circuits have been published, as examples: indirect objects, greater-than, agreement of subject and verb.

Read from the files in which they are passed around: `ioi.csv` and `greater_than.csv` (columns clean, corrupted, ...; Hanna et al. 2024) and
`sva_simple_test.jsonl`, `sva_nounpp_test.jsonl` (one object a line; Marks et al. 2024). Answers are found anew for every tokenizer:
token ids in the files belong to other models. A pair of prompts can be used where both have the same number of tokens and every answer is
one token; what cannot be used is counted, not hidden.

The metric is the logit difference, for greater-than the probability of all later years less that of all others (Hanna et al. 2023).
Shape suffixes: `B` examples, `S` positions, `V` vocabulary, `Y` the hundred years of a century.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.circuits.discovery.examples import Examples, Metric, examples_of, logit_difference
from saebench.errors import UserError
from saebench.lm import LanguageModel

FILES = {
    "ioi": "ioi.csv",
    "greater_than": "greater_than.csv",
    "sva_simple": "sva_simple_test.jsonl",
    "sva_nounpp": "sva_nounpp_test.jsonl",
}
YEARS = 100

Heads = tuple[tuple[int, int], ...]
GPT2_SMALL = {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "vocab_size": 50257}
PUBLISHED: dict[str, dict[str, Heads]] = {
    "ioi": {  # Wang et al. 2023
        "name mover": ((9, 6), (9, 9), (10, 0)),
        "backup name mover": ((9, 0), (9, 7), (10, 1), (10, 2), (10, 6), (10, 10), (11, 2), (11, 9)),
        "negative name mover": ((10, 7), (11, 10)),
        "S-inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
        "induction": ((5, 5), (5, 8), (5, 9), (6, 9)),
        "duplicate token": ((0, 1), (0, 10), (3, 0)),
        "previous token": ((2, 2), (4, 11)),
    },
    "greater_than": {  # Hanna et al. 2023, as Conmy et al. 2023 list it
        "looking at the year": ((5, 5), (6, 1), (6, 9), (7, 10), (8, 11), (9, 1)),
        "early": ((0, 1), (0, 3), (0, 5)),
    },
}


@dataclass(frozen=True)
class Pair:
    """A prompt with its answer, its counterfactual, and what the counterfactual's answer would be where there is one."""

    prompt: str
    counterfactual: str
    answer: str
    other: str | None


@dataclass(frozen=True)
class Behaviour:
    """The pairs that a model can be asked, and how many of the file it cannot, by reason."""

    name: str
    pairs: list[Pair]
    examples: Examples
    metric: Metric
    unusable: dict[str, int]


def read_pairs(directory: str | Path, name: str) -> list[Pair]:
    """All pairs of a behaviour (`ioi`, `greater_than`, `sva_simple`, `sva_nounpp`). Raises UserError for another name, a directory or file
    that is not there, and the first line that is not as it should be."""
    if name not in FILES:
        raise UserError(f"behaviour {name!r} is unknown: use {', '.join(FILES)}")
    path = Path(directory).expanduser() / FILES[name]
    if not path.is_file():
        raise UserError(f"{path} is not there: give the directory that holds {', '.join(FILES.values())}")
    pairs = [_pair(name, row, where) for row, where in (_csv(path) if path.suffix == ".csv" else _jsonl(path))]
    if not pairs:
        raise UserError(f"{path} holds no prompts: it should have one a line")
    return pairs


def behaviour(lm: LanguageModel, directory: str | Path, name: str, *, limit: int | None = None) -> Behaviour:
    """The pairs of a behaviour that a model can be asked, `limit` of them at most, spread over the file. Raises UserError as `read_pairs`,
    and where there are none."""
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} leaves no prompts: use at least 1")
    pairs = read_pairs(directory, name)
    metric = LaterYears(lm) if name == "greater_than" else logit_difference
    reasons = [_unusable(lm, pair) for pair in pairs]
    unusable = dict(Counter(reason for reason in reasons if reason))
    usable = [pair for pair, reason in zip(pairs, reasons, strict=True) if not reason]
    if not usable:
        told = ", ".join(f"{count} {reason}" for reason, count in unusable.items())
        raise UserError(
            f"model {lm.name!r} can be asked none of the {len(pairs)} prompts of {name!r} ({told}): use another model"
        )
    if limit is not None and limit < len(usable):
        usable = [usable[i * len(usable) // limit] for i in range(limit)]
    examples = examples_of(
        lm,
        [pair.prompt for pair in usable],
        [pair.answer for pair in usable],
        others=None if usable[0].other is None else [str(pair.other) for pair in usable],
        counterfactuals=[pair.counterfactual for pair in usable],
    )
    return Behaviour(name, usable, examples, metric, unusable)


class LaterYears:
    """The probability of all years after that of the prompt less that of the others, among two-digit tokens: [B]."""

    def __init__(self, lm: LanguageModel):
        """Raises UserError where a year is not one token."""
        ids = [_tokens(lm, f"{year:02d}") for year in range(YEARS)]
        if split := sum(len(own) != 1 for own in ids):
            raise UserError(
                f"model {lm.name!r} writes {split} of the {YEARS} years 00 to 99 in several tokens: greater-than is for models such as gpt2"
            )
        self.ids_Y = torch.tensor([own[0] for own in ids], device=lm.device)

    def __call__(self, logits_BSV: Tensor, examples: Examples) -> Tensor:
        rows = torch.arange(len(examples), device=logits_BSV.device)
        p_BY = logits_BSV[rows, examples.ends_B].float().softmax(-1)[:, self.ids_Y]
        later_BY = torch.arange(YEARS, device=p_BY.device) > (self.ids_Y == examples.answers_B[:, None]).int().argmax(1)[:, None]
        return (p_BY * torch.where(later_BY, 1.0, -1.0)).sum(1)


def published_heads(lm: LanguageModel, name: str) -> dict[str, Heads]:
    """Heads of the published circuit by role: of GPT-2 small, by its name and sizes, and empty for any other model and behaviour."""
    sizes = {key: getattr(lm.hf.config, key, None) for key in GPT2_SMALL}
    return PUBLISHED.get(name, {}) if sizes == GPT2_SMALL and "gpt2" in lm.name else {}


# --- files ---


def _csv(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield row, f"{path}, line {reader.line_num}"


def _jsonl(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error.msg}): every line is one object") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: {type(row).__name__} instead of an object: every line is one object")
            yield row, where


def _pair(name: str, row: dict[str, Any], where: str) -> Pair:
    def text(key: str) -> str:
        value = row.get(key)
        if not isinstance(value, str) or not value:
            raise UserError(f"{where}: {key!r} is missing or empty: it should be text")
        return value

    if name == "ioi":
        return _ioi(text("clean"), text("corrupted"), text("corrupted_hard"), where)
    if name == "greater_than":
        label = text("label")
        if len(label) > 2 or not (label.isascii() and label.isdigit()):
            raise UserError(f"{where}: label {label!r} is no year of a century: it should be a number from 0 to 99")
        return Pair(text("clean"), text("corrupted"), label.zfill(2), None)
    return Pair(text("clean_prefix"), text("patch_prefix"), text("clean_answer"), text("patch_answer"))


def _ioi(clean: str, corrupted: str, swapped: str, where: str) -> Pair:
    """The second mention of the subject is where the prompts differ; the indirect object stands there in the swapped one."""
    words = [prompt.split(" ") for prompt in (clean, corrupted, swapped)]
    if len({len(own) for own in words}) == 1:
        differ = [place for place, some in enumerate(zip(*words, strict=True)) if len(set(some)) > 1]
        if len(differ) == 1:
            subject, _, indirect = (own[differ[0]] for own in words)
            if subject != indirect:
                return Pair(clean, corrupted, f" {indirect}", f" {subject}")
    raise UserError(f"{where}: clean, corrupted and corrupted_hard should differ in one word, the second mention of a name")


def _unusable(lm: LanguageModel, pair: Pair) -> str:
    """Why a model cannot be asked a pair; empty where it can."""
    if any(len(_tokens(lm, text)) != 1 for text in (pair.answer, pair.other) if text is not None):
        return "with an answer of several tokens"
    size = len(lm.prompt_ids(pair.prompt))
    if size != len(lm.prompt_ids(pair.counterfactual)):
        return "whose counterfactual has another number of tokens"
    return "longer than the model's positions" if lm.max_context is not None and size > lm.max_context else ""


def _tokens(lm: LanguageModel, text: str) -> list[int]:
    """None where the tokenizer cannot write the text."""
    ids = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids if lm.tokenizer.decode(ids) == text else []

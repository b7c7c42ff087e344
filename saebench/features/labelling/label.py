"""What is said of one latent, wherever it comes from, and where labels are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NOTES, ENDPOINT, OFFLINE = "notes.json", "endpoint.jsonl", "labels.parquet"
"""Names of the files beside a store, behind its own: notes and own labels, labels of an endpoint, offline labels."""


@dataclass(frozen=True)
class Label:
    """What is said of one latent."""

    latent: int
    text: str
    source: str
    """`offline`, `endpoint` or `own`."""
    score: float | None = None
    """Balanced accuracy on held-out contexts: 0.5 is chance; None where it was not measured."""
    error: float | None = None
    """Its standard error."""
    precision: float | None = None
    """Of the places that the label names, the share at which the latent fires."""
    recall: float | None = None
    """Of the firings, the share that the label names."""
    recall_by_value: float | None = None
    """The share of their summed values."""
    positives: int = 0
    negatives: int = 0
    """Held-out examples with and without a firing: tokens, or snippets for an endpoint's label."""
    kind: str = ""
    """What it is about (`wording.kind`); `none` for one without a pattern."""
    rule: str = ""
    """The rule as JSON (`rules.Rule.parse`); empty for none. Where the score is no better than chance, the rule that was tried."""
    model: str = ""
    """The model that wrote it."""


def beside(store: Path, name: str) -> Path:
    """A file next to the directory of a store: RUN/features/ID.NAME."""
    return store.with_name(f"{store.name}.{name}")

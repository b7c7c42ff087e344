"""What several tests share that is no fixture."""

from saebench.dictionaries import Dictionary
from saebench.dictionaries.geometry import scale_to_unit
from saebench.lm import Document, Text

SITES = ["blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"]
SENTENCE = "def value_{0}(x):\n    return x * {0} + {1}  # the number {1} and the name {0}\n\n"


def small_text(documents: int = 40, name: str = "small") -> Text:
    """A text of short documents that repeats itself a little."""
    return Text(name, lambda: (Document(f"doc{i}", SENTENCE.format(i, i * i % 17) * 6) for i in range(documents)))


def to_unit_rows(dictionary: Dictionary) -> None:
    """Give rows that training keeps at length 1 that length, after weights were set by hand."""
    for W in dictionary.unit_rows():
        scale_to_unit(W.data.flatten(1))

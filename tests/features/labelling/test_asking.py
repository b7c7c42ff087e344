"""What a language model is asked about a latent, and how its answers are read."""

import re

import numpy as np
import planted
import pytest
from planted import CALL, EARLY, SELF

from saebench.features.labelling.asking import CLOSE, OPEN, Asker, read_label, read_numbers, spread
from saebench.features.labelling.scoring import halves


def test_snippets_fire_as_they_say(store):
    """Each by brute force: a snippet without a firing has none anywhere in it."""
    rows, _ = planted.corpus()
    codes, asker = planted.codes(rows), Asker(store)
    for latent in (SELF, CALL, EARLY):
        snippets = asker.snippets(latent)
        assert snippets.texts == asker.snippets(latent).texts
        firing = []
        for context, row in enumerate(rows):
            for at in range(1, planted.SIZE):
                first, last = max(0, at - 24), min(planted.SIZE, at + 9)
                text = "".join(row[first:last]).replace("\n", "↵")
                if text in snippets.texts:
                    firing.append((text, bool(codes[context, max(first, 1) : last, latent].any())))
        for text, fires in zip(snippets.texts, snippets.fires, strict=True):
            assert (text, fires) in firing


def test_the_strongest_firings_are_shown_first(store):
    tokens, values = store.postings(SELF)
    inside = halves(store.num_contexts, 0)[0][tokens // planted.SIZE]
    lines = re.findall(r"^strength (\d+) of 10", Asker(store).label_question(SELF)[1]["content"], re.MULTILINE)
    assert lines[0] == "10" and [int(n) for n in lines] == sorted((int(n) for n in lines), reverse=True)
    assert int(lines[7]) >= 10 * sorted(values[inside], reverse=True)[30] / values[inside].max() - 1


def test_text_cannot_mark_tokens_itself(tmp_path):
    strings = ["<s>", f"a{OPEN}b", f"{CLOSE}c\n", "plain"]
    rows = [["<s>", *(strings[1 + (context + at) % 3] for at in range(20))] for context in range(30)]
    codes = np.array([[[text == "plain"] for text in row] for row in rows], dtype=np.float32)
    store = planted.make(tmp_path / "marks", rows, ["d"] * 30, codes, strings)
    for line in re.findall(r"^strength.*$", Asker(store).label_question(0)[1]["content"], re.MULTILINE):
        assert line.count(OPEN) == line.count(CLOSE) == 1 and f"{OPEN}plain{CLOSE}" in line


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("self in methods", "self in methods"),
        (' "quoted"\n\nand more', "quoted"),
        ("**bold**", "bold"),
        ("\n\n", None),
        ('""', None),
        ("x" * 500, "x" * 200),
        ("tab\tand \x1b[31mred", "tab and �[31mred"),
    ],
)
def test_read_label(answer, label):
    assert read_label(answer) == label


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [
        ("[1, 3]", {1, 3}),
        ("[]", set()),
        ("Of [1, 2] rather\n```json\n[4,\n 5]\n```", {4, 5}),
        ("[0]", None),
        ("[21]", None),
        ("none", None),
        ("[1, 2", None),
        ("[1,,2]", None),
        ("[]]", set()),
    ],
)
def test_read_numbers(answer, numbers):
    assert read_numbers(answer, 20) == numbers


def test_spread():
    values = np.arange(100)[::-1]
    assert spread(values, 3, 4) == [0, 1, 2, 15, 39, 63, 87]
    assert spread(values[:2], 3, 4) == [0, 1]
    assert spread(values[:5], 3, 4) == [0, 1, 2, 3, 4]
    for count in range(1, 30):
        places = spread(np.ones(count), 8, 4)
        assert places == sorted(set(places)) and len(places) == min(count, 12) and max(places) < count

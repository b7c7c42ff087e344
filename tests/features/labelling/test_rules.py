"""Rules at every token of a text, against a second reading of them in plain Python; and where their places are found."""

import numpy as np
import planted
import pytest
from planted import ID, SIZE

from saebench.features.labelling.corpus import PLACE_TRAITS, POOL, Corpus
from saebench.features.labelling.rules import Among, Around, Early, Rule, Trait, find_places
from saebench.features.labelling.traits import TRAITS
from saebench.features.labelling.words import NO_WORD

CONDITIONS = [
    *(Among("token", (ID[" self"], ID["("], ID[" red"]), at) for at in (-2, -1, 0, 1)),
    Among("word", ("process", "access", "the", "(", "17")),
    Among("word", ("nowhere",)),
    Among("before", ("init", "process", "red", "import", ",")),
    Among("line", (ID["import"],)),
    Among("begin", ("pro", "gre", "soc")),
    Among("end", ("ess", "ect", "und")),
    *(Trait(name, at) for name in TRAITS for at in (-1, 0, 1)),
    *(Trait(name) for name in PLACE_TRAITS),
    *(Around(("socket", "connect", "host", "nowhere"), least, *window) for least in (1, 2, 3) for window in ((16, 0), (40, 10), (3, 2))),
    Early("context", 1),
    Early("context", 7),
    Early("document", 120),
]  # fmt: skip


@pytest.fixture(scope="module")
def text():
    return planted.corpus(40)


@pytest.fixture(scope="module")
def corpus(text, tmp_path_factory):
    rows, names = text
    return Corpus(planted.make(tmp_path_factory.mktemp("features") / "planted", rows, names, planted.codes(rows)))


@pytest.mark.parametrize("condition", CONDITIONS, ids=str)
def test_a_condition_at_every_token(condition, text, corpus):
    rows = text[0]
    rule = Rule((condition,))
    assert Rule.parse(rule.json()) == rule
    found = rule.holds(corpus.view(np.arange(len(corpus.ids_T)))).reshape(-1, SIZE)
    for context in range(len(rows)):
        for at in range(1, SIZE):
            assert found[context, at] == planted.true_at(rule.json(), rows, context, at), (context, at, rows[context])


def test_conditions_hold_together(text, corpus):
    some = (Among("token", (ID["("],)), Among("before", ("init",)), Around(("red", "green"), 1, 16, 0))
    everything = corpus.view(np.arange(len(corpus.ids_T)))
    expected = np.logical_and.reduce([Rule((condition,)).holds(everything) for condition in some])
    assert (Rule(some).holds(everything) == expected).all() and expected.any()


@pytest.mark.parametrize("condition", CONDITIONS, ids=str)
def test_places_are_those_at_which_it_holds(condition, corpus):
    """All of them in that half where there are few; an even sample, each standing for as many as it should, where there are many."""
    for half in (corpus.labelling, corpus.scoring):
        everything = half.everything
        assert len(everything) == half.num_tokens <= POOL
        holds = set(everything.places_P[condition.holds(everything)].tolist())
        places, each = find_places(condition, half, 10**9)
        assert set(places.tolist()) == holds and len(places) == len(holds)
        assert each == 1.0
        some, each = find_places(condition, half, 20)
        assert set(some.tolist()) <= holds and len(some) == len(set(some.tolist())) <= 20
        if len(holds) > 60:
            assert len(some) * each == pytest.approx(len(holds), rel=0.35)


def test_counts_of_columns(corpus):
    for half in (corpus.labelling, corpus.scoring):
        inside = np.repeat(half.contexts_C, SIZE)
        for column in ("token", "word", "before", "line", "begin", "end"):
            values = corpus.columns_T[column][inside]
            numbers = np.arange(values.max() + 5)
            assert (half.counts(column, numbers) == np.bincount(values, minlength=len(numbers))).all()
        traits = corpus.traits.matrix[corpus.ids_T[inside]]
        assert (half.trait_counts == traits.sum(0)).all()


def test_rare_words_are_not_told_apart(text, corpus):
    counts = {}
    for row in text[0]:
        for at in range(SIZE):
            first, last = planted._run(row, at)
            if first == at:
                word = "".join(row[first:last]).strip().lower()
                counts[word] = counts.get(word, 0) + 1
    kept = {word for word, count in counts.items() if count >= 3 and word}
    assert set(corpus.words[1:]) == kept and corpus.words[NO_WORD] == ""
    assert corpus.form("the") in ("the", "The", "THE") and corpus.form("process") == "process"

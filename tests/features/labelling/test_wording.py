"""Rules as a person would write them."""

import planted
import pytest
from planted import ID

from saebench.features.labelling.corpus import PLACE_TRAITS, Corpus
from saebench.features.labelling.rules import Among, Around, Early, Rule, Trait
from saebench.features.labelling.traits import TRAITS
from saebench.features.labelling.wording import kind, visible, wording


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rows, names = planted.corpus(40)
    return Corpus(planted.make(tmp_path_factory.mktemp("features") / "planted", rows, names, planted.codes(rows)))


def tokens(*texts: str, at: int = 0) -> Among:
    return Among("token", tuple(ID[text] for text in texts), at)


@pytest.mark.parametrize(
    ("conditions", "text", "about"),
    [
        ([tokens(" self")], "'self'", "token"),
        ([tokens("The", " the", " self")], "'The', 'self'", "token"),
        ([tokens(" pro")], "'pro…'", "token"),
        ([tokens("cess")], "'…cess'", "token"),
        ([tokens(*(f" {n}" for n in range(10, 18)))], "'10', '11', '12', '13', '14' …", "token"),
        ([tokens("\n")], "line end", "token"),
        ([tokens("("), tokens(" init", at=-1)], "'(' after 'init'", "phrase"),
        ([tokens("("), tokens(" init", at=-1), tokens(" red", at=-2)], "'(' after 'red init'", "phrase"),
        ([tokens(" init", at=-1)], "after 'init'", "phrase"),
        ([tokens("\n", at=-1)], "at the beginning of a line", "phrase"),
        ([tokens("<start>", at=-1)], "after the start of a text", "phrase"),
        ([tokens(" self", at=-2)], "two tokens after 'self'", "phrase"),
        ([tokens(" px", at=1), Trait("number")], "numbers before 'px'", "next"),
        ([Trait("number"), Trait("opening bracket", -1)], "numbers after an opening bracket", "class"),
        ([Trait("capitals", 1)], "before capitals", "class"),
        ([Trait("line end", -1)], "after a line end", "class"),
        ([tokens("cess"), Among("word", ("process",))], "'…cess' of 'process'", "phrase"),
        ([Among("word", ("the",)), tokens(" the", "The")], "'the'", "word"),
        (
            [tokens(" self"), Trait("token after a space"), Trait("repeated text")],
            "'self' (repeating what stood before)",
            "phrase",
        ),
        ([Among("word", ("process", "access"))], "'process', 'access'", "word"),
        ([Among("end", ("ess",))], "words ending '-ess'", "word"),
        ([Among("begin", ("pro",)), Trait("token after a space")], "words beginning 'pro-' (after a space)", "word"),
        ([Among("before", ("init",)), tokens("(")], "'(' after 'init'", "phrase"),
        ([Among("line", (ID["import"],))], "in lines that begin 'import'", "line"),
        ([Around(("socket", "host"), 2, 40, 10)], "words around: socket, host", "topic"),
        ([Around(("socket",), 1, 40, 10), tokens("(")], "'(' near: socket", "topic"),
        ([Around(("import",), 1, 16, 0)], "shortly after 'import'", "topic"),
        ([Early("context", 1)], "the first token of a context", "position"),
        ([Early("document", 8)], "the first 8 tokens of a document", "position"),
        ([Early("document", 8), tokens("(")], "'(' among the first 8 tokens of a document", "position"),
        ([Trait("repeated text")], "text that repeats what stood before", "repeat"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wording(conditions, text, about, corpus):
    rule = Rule(tuple(conditions))
    assert wording(rule, corpus).replace("\u2018", "'").replace("\u2019", "'") == text
    assert kind(rule) == about


def test_every_trait_has_words(corpus):
    for name in TRAITS:
        for at in (-1, 0, 1):
            assert len(wording(Rule((Trait(name, at),)), corpus)) > 5
    for name in PLACE_TRAITS:
        assert len(wording(Rule((Trait(name), tokens("("))), corpus)) > 5


def test_a_prediction_needs_agreement(corpus):
    rule = Rule((tokens("(", ":", at=1),))
    assert wording(rule, corpus, [ID[","], ID[":"]]).startswith("predicts ")
    assert wording(rule, corpus, [ID[","]]).startswith("before ")
    assert not wording(Rule((tokens(" self"), tokens("(", at=1))), corpus, [ID["("]]).startswith("predicts ")


def test_text_is_made_visible():
    assert visible("a\n\tb\r\x00\u202e c") == "a↵→b␍�� c"

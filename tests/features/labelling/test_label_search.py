"""Looking labels up: by latent, by words, one's own first."""

import planted
from planted import CALL, DEAD, SELF, TWO

from saebench.features.labelling.label import Label, beside
from saebench.features.labelling.labels import Labels, label_offline
from saebench.features.labelling.notes import Notes


def test_search(labels):
    assert labels.search("AFTER Init") == [CALL]
    assert labels.search("self") == [SELF, TWO]
    assert labels.search("init px") == []
    assert labels.search("  ") == []
    found = labels.search("‘")  # noqa: RUF001
    scores = [labels.of(latent).score for latent in found]
    assert len(found) > 5 and scores == sorted(scores, reverse=True)
    assert labels.search("‘", 2) == found[:2]  # noqa: RUF001


def test_ones_own_labels_come_first(fresh):
    label_offline(fresh)
    Notes.open(fresh).change(CALL, label="A call of Init")
    Notes.open(fresh).change(DEAD, label="initially dead")
    labels = Labels.open(fresh)
    assert labels.of(CALL) == Label(CALL, "A call of Init", "own")
    assert [label.source for label in labels.all_of(CALL)] == ["own", "offline"]
    assert labels.search("init") == [CALL, DEAD]
    assert labels.search("after init") == [CALL]  # the offline label is still found
    assert len(labels) == planted.LATENTS
    assert labels.texts[CALL] == "A call of Init" and labels.texts[SELF] == "‘self’"  # noqa: RUF001
    assert labels.scores[CALL] is None and labels.scores[SELF] == 1.0


def test_no_labels_yet(fresh):
    labels = Labels.open(fresh)
    assert len(labels) == 0 and labels.of(3) is None and labels.all_of(3) == [] and labels.search("x") == []
    assert beside(fresh.path, "labels.parquet").name == "planted.labels.parquet"

"""What pages open: entries that are compared, labels wherever they come from, and how often the model runs for a text."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("streamlit")

from test_pages import html_of, text_of

from saebench.features import FeatureStore
from saebench.features.labelling.label import Label
from saebench.features.labelling.labels import kept_labels, label_offline
from saebench.features.labelling.notes import Notes


@pytest.fixture
def own_run(hostile_run, tmp_path):
    """A copy of the run, for tests that change what is beside its stores."""
    shutil.copytree(hostile_run.path, tmp_path / "own")
    return tmp_path / "own"


def test_entries_are_the_same_by_run_and_name(opened, own_run):
    opened("overview", runs=[own_run])
    import opening

    (first,), (again,) = (list(opening.runs().values()) for _ in range(2))
    assert first.entries["a"] == again.entries["a"] and first.entries["a"] is not again.entries["a"]
    assert len({*first.entries.values(), *again.entries.values()}) == len(first.entries) == 3
    assert first.entries["a"] != first.entries["b"] and first.entries["a"] != "a"
    elsewhere = opening.Opened(first.name, own_run.parent)
    assert opening.Entry(elsewhere, "a") != first.entries["a"]
    assert first == again


def test_every_label_that_a_feature_shows_is_in_the_table(opened, own_run):
    """Own labels, those of an endpoint and offline ones: the same counts on both pages, also when one is added while they are open."""
    store = FeatureStore(own_run / "features" / "a")
    label_offline(store)
    opened("features", runs=[own_run], dictionary="a")
    kept = kept_labels(store)
    with kept.writing() as file:
        for latent in (5, 6):
            kept.add(file, Label(latent, f"said by an endpoint of {latent}", "endpoint", score=0.75, model="m"))
    Notes.open(store).change(6, label="said by a person of 6")
    opened("features", runs=[own_run], dictionary="a")
    import opening

    entry = next(iter(opening.runs().values())).entries["a"]
    texts, scores = opening.label_columns(entry)
    assert texts[5] == "said by an endpoint of 5" and scores[5] == 0.75
    assert texts[6] == "said by a person of 6" and scores[6] != scores[6]
    assert all(texts) and texts == [opening.labels(entry).of(latent).text for latent in range(store.d_sae)]
    for latent in (5, 6):
        assert texts[latent] in text_of(opened("feature", runs=[own_run], dictionary="a", feature=latent))
    assert "2 of 48 latents" in text_of(opened("features", runs=[own_run], dictionary="a", find="said by", dead=1))


@pytest.mark.parametrize("name", ["a", "b", "other"])
def test_a_text_costs_two_passes_of_the_model_and_one_encoding(opened, monkeypatch, name):
    opened("prompt", dictionary=name, text="the first loads model and dictionary")
    import opening

    run = next(iter(opening.runs().values()))
    kind, passes, encoded = type(opening.dictionary(run.entries[name])), [], []
    encode = kind.encode
    monkeypatch.setattr(kind, "encode", lambda self, x_BD: (encoded.append(len(x_BD)), encode(self, x_BD))[1])
    hook = opening.lm(run).hf.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        shown = html_of(opened("prompt", dictionary=name, text="return 17 + 4"))
    finally:
        hook.remove()
    assert "loss with the dictionary" in shown
    assert len(passes) == 2 and len(encoded) == 1

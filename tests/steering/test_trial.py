"""Edits tried on the text of a store: units, targets and control against counts by hand; the result as a file."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from saebench.activations import ActivationStream
from saebench.errors import UserError
from saebench.features import index
from saebench.features.prompts import read_prompt
from saebench.steering import trial
from saebench.steering.edits import ablate, add
from saebench.steering.presets import Setting
from saebench.steering.trial import Firing, Trial

QUICK = {"strengths": (1.0, 4.0), "seeds": 2, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def store(kinds, tiny_lm, contexts, tmp_path_factory):
    topk = kinds["topk"]
    stream = ActivationStream(tiny_lm, contexts[:24], list(topk.config.reads))
    return index(topk, stream, tmp_path_factory.mktemp("run") / "features" / "topk", lm=tiny_lm)


def setting(latent: int, strength: float, how: str = "add", **more) -> Setting:
    return Setting(dictionary="topk", latents=(latent,), how=how, strength=strength, **more)


def test_text_of_the_store(store, tiny_lm, contexts):
    ids_CS = trial.neutral(store, 4, 10)
    assert torch.equal(ids_CS, contexts.ids_NS[[0, 6, 12, 18], :10].long())
    expected = [tiny_lm.tokenizer.decode(contexts.ids_NS[n, 1:11].tolist(), skip_special_tokens=True) for n in range(0, 24, 3)]
    assert trial.prompts(store) == list(dict.fromkeys(expected))


def test_the_unit_is_a_tenth_of_the_mean_length(store, kinds, tiny_lm):
    (site,) = kinds["topk"].config.writes
    x_CSD = tiny_lm.read(trial.neutral(store), [site])[site][:, 1:]
    assert trial.unit(tiny_lm, kinds["topk"], store) == pytest.approx(float(x_CSD.norm(dim=-1).mean()) / 10, rel=1e-5)


@pytest.mark.parametrize("kind", ["topk", "transcoder", "crosscoder", "lorsa"])
def test_firing_counts_tokens(kinds, tiny_lm, kind):
    texts = ["return 17 + 4", "for i in range(3):", ""]
    reads = [read_prompt(tiny_lm, kinds[kind], text) for text in texts[:2]]
    latents = tuple({latent for read in reads for latent, _ in read.top_latents(2)})
    expected = [
        np.mean([any(read.by_latent(latent)[token] != 0 for latent in latents) for token in range(read.added, len(read))])
        for read in reads
    ]
    np.testing.assert_allclose(Firing(tiny_lm, kinds[kind], latents).score(texts), [*expected, 0.0])
    assert max(expected) > 0


def test_strengths_are_those_of_the_strongest(store, kinds, tiny_lm):
    asked = Trial(edits=(setting(3, -2.0), setting(5, 0.0), setting(7, 8.0)), unit_of_store=True)
    edits = asked.made(tiny_lm, kinds["topk"], store)
    assert [(edit.latents, edit.strength) for edit in edits] == [((3,), -0.25), ((7,), 1.0)]
    assert {edit.unit for edit in edits} == {trial.unit(tiny_lm, kinds["topk"], store)}
    half = Trial(edits=(setting(3, -1.0), setting(7, 4.0)), unit_of_store=True)
    other = Trial(edits=(setting(3, 1.0), setting(7, 4.0)), unit_of_store=True)
    assert half.path(store) == asked.path(store) != other.path(store)
    assert asked.path(store).parent == store.path.parent.parent / "steering" / "doses"


def test_how_far_edits_move(kinds, store, tiny_lm):
    topk, ids_CS = kinds["topk"], trial.neutral(store)
    assert trial.change(tiny_lm, [add(topk, 3, 2.0, unit=0.7)], ids_CS) == pytest.approx(1.4, rel=1e-4)
    (site,) = topk.config.reads
    x_TD = tiny_lm.read(ids_CS, [site])[site][:, 1:].flatten(0, 1)
    dense_TF = topk.encode(x_TD).to_dense()
    latent = int((dense_TF != 0).sum(0).argmax())
    expected = float(dense_TF[:, latent].abs().mean() * topk.directions[latent].norm())
    assert trial.change(tiny_lm, [ablate(topk, latent)], ids_CS) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["topk", "crosscoder", "lorsa"])
def test_random_directions_are_as_long(kinds, store, tiny_lm, kind):
    ids_CS = trial.neutral(store)
    made = trial._random(kinds[kind], 1.5, add(kinds[kind], 1).positions)
    assert len(made) == 3
    for edits in made:
        assert tuple(edit.sites[0] for edit in edits) == kinds[kind].config.writes
        assert math.sqrt(sum(edit.unit**2 for edit in edits)) == pytest.approx(1.5, rel=1e-5)
    if kind == "topk":
        assert trial.change(tiny_lm, made[0], ids_CS) == pytest.approx(1.5, rel=1e-4)


def test_measured_and_kept(kinds, store, tiny_lm, tmp_path):
    effects = trial.measure(tiny_lm, kinds["topk"], store, Trial(edits=(setting(3, 4.0),), unit_of_store=True), **QUICK)
    assert effects.methods == [trial.NAME, *(f"random direction {n}" for n in (1, 2, 3))]
    sizes = [effects.of(method)[1].size_C.mean() for method in effects.methods]
    np.testing.assert_allclose(sizes, sizes[0], rtol=1e-3)  # as long as the edit, so as large on the same text
    trial.keep(effects, tmp_path / "doses" / "x.json")
    again = trial.kept(tmp_path / "doses" / "x.json")
    assert again.rows() == effects.rows() and again.doses[1].texts == effects.doses[1].texts
    json.loads((tmp_path / "doses" / "x.json").read_text(), parse_constant=pytest.fail)
    (tmp_path / "x.json").write_text('{"target": "x"}')
    with pytest.raises(UserError, match="damaged"):
        trial.kept(tmp_path / "x.json")


def test_other_targets(kinds, store, tiny_lm):
    topk = kinds["topk"]
    pattern = Trial(edits=(setting(3, 1.0),), target="pattern", pattern="^a").aim(tiny_lm, topk, store)
    np.testing.assert_allclose(pattern.score(["a\nb", "b"]), [0.5, 0.0])
    examples = "\n\n".join(["zzz zzz"] * 8)
    likeness = Trial(edits=(setting(3, 1.0),), target="examples", examples=examples).aim(tiny_lm, topk, store)
    first, second = likeness.score(["zzz", trial.prompts(store)[0]])
    assert first > 0 > second


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"edits": (setting(3, 0.0),)}, "all strengths are 0"),
        ({"edits": (setting(3, 1.0),), "target": "pattern"}, "the pattern is empty"),
        ({"edits": (setting(3, 1.0),), "target": "pattern", "pattern": "("}, "no regular expression"),
        ({"edits": (setting(3, 1.0),), "target": "examples", "examples": "one"}, "too few"),
    ],
)
def test_refusals(kinds, store, tiny_lm, asked, told):
    with pytest.raises(UserError, match=told):
        trial.measure(tiny_lm, kinds["topk"], store, Trial(**asked), **QUICK)


def test_edits_that_change_nothing(kinds, store, tiny_lm):
    silent = int(np.flatnonzero(store.counts_F == 0)[0]) if (store.counts_F == 0).any() else None
    if silent is None:
        pytest.skip("every latent fires")
    with pytest.raises(UserError, match="change nothing"):
        trial.measure(tiny_lm, kinds["topk"], store, Trial(edits=(setting(silent, 1.0, "ablate"),)), **QUICK)

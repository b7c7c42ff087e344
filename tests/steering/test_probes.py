"""Sparse probes: planted units, chance where there is nothing, nothing learned from held-out texts, and edits on the units alone."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

from saebench.errors import UserError
from saebench.features.prompts import read_prompt, tokenise
from saebench.steering.edits import add
from saebench.steering.hooks import steer
from saebench.steering.logistic import fit_logistic
from saebench.steering.probes import (
    held_out,
    layerwise,
    length_matched,
    neuron_edit,
    probe_latents,
    probe_neurons,
    sparse_probe,
)

CODE = [f"def value_{i}(x):\n    return x * {i}" for i in range(14)]
PROSE = [f"the number {i} and the name {i * i}" for i in range(12)]
SITE = "blocks.1.mlp.hook_post"
IDS = torch.tensor([[0, 40, 50, 60, 70, 80]])


def planted(seed=0, texts=200, units=64, share=0.5):
    """Noise, but for unit 11, which is 1 for positives and 0 for negatives, and a little off."""
    rng = np.random.default_rng(seed)
    positive_U = rng.random(texts) < share
    x_UF = rng.standard_normal((texts, units)) * rng.uniform(0.1, 10, units)
    x_UF[:, 11] = positive_U + 0.1 * rng.standard_normal(texts)
    return x_UF, positive_U, rng.integers(5, 50, texts)


def by_k(probe):
    return {step.k: step for step in probe.steps}


# --- what is found ---


@pytest.mark.parametrize("share", [0.5, 0.15])
@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_one_unit_that_separates_the_classes_is_found(penalty, share):
    probe = sparse_probe(*planted(share=share), penalty=penalty)
    one = by_k(probe)[1]
    assert probe.units == (11,) and probe.signs == (1,) and probe.stability == (1.0,)
    assert probe.mean_differences[0] == pytest.approx(1, abs=0.05)
    assert one.accuracy.mean >= 0.95 and one.accuracy.low <= one.accuracy.mean <= one.accuracy.high
    assert one.noisy == pytest.approx(0.5, abs=0.08)
    assert one.random.mean == pytest.approx(0.5, abs=0.12)
    assert one.drop >= max(step.drop for step in probe.steps) - 0.02
    assert probe.length_only.mean == pytest.approx(0.5, abs=0.12)
    assert [step.k for step in probe.steps] == [1, 2, 4, 8, 16, 32, 64] and probe.among == 64


def test_noise_takes_away_what_the_distribution_of_a_normal_variable_says():
    """Classes at -1 and +1 standard deviations, noise of s of them: the share of right answers is Phi(1 / s)."""
    positive_U = np.arange(400) < 200
    x_UF = np.where(positive_U, 1.0, -1.0)[:, None] * 3 + 7
    for sigma in (0.5, 1.0, 4.0):
        step = sparse_probe(x_UF, positive_U, np.ones(400, dtype=int), sigma=sigma).steps[0]
        assert step.accuracy.mean == 1
        assert step.noisy == pytest.approx(stats.norm.cdf(1 / sigma), abs=1e-4)


def test_expected_accuracy_is_what_draws_of_noise_give():
    """Noise on the features themselves, in their own units, against its expectation."""
    rng = np.random.default_rng(3)
    x_UF = rng.standard_normal((300, 3)) * [1, 5, 0.2]
    positive_U = x_UF @ [1, 0.3, 2] + rng.standard_normal(300) > 0.8
    probe = sparse_probe(x_UF, positive_U, np.ones(300, dtype=int), sigma=1.5)
    shares = []
    for split in range(5):
        test_U = held_out(positive_U, np.random.default_rng(split))
        fitted = fit_logistic(x_UF[~test_U][:, :2], positive_U[~test_U])
        for _ in range(200):
            noisy_UF = x_UF[test_U][:, :2] + 1.5 * x_UF[~test_U][:, :2].std(0) * rng.standard_normal((test_U.sum(), 2))
            said_U, true_U = fitted.scores(noisy_UF) > 0, positive_U[test_U]
            shares.append((said_U[true_U].mean() + (~said_U)[~true_U].mean()) / 2)
    two = by_k(probe)[2]
    assert two.noisy == pytest.approx(np.mean(shares), abs=0.01) and two.noisy < two.accuracy.mean - 0.05


def test_a_signal_in_four_units_needs_four():
    """Each of four units says a quarter of what there is to say; alone they say little, together all; sixty others say nothing."""
    rng = np.random.default_rng(2)
    x_UF = rng.standard_normal((600, 64))
    positive_U = x_UF[:, [3, 9, 20, 41]].sum(1) > 0
    probe = sparse_probe(x_UF, positive_U, np.ones(600, dtype=int))
    assert set(probe.units) == {3, 9, 20, 41} and probe.signs == (1, 1, 1, 1)
    steps = by_k(probe)
    assert steps[1].accuracy.mean < 0.75 < 0.9 < steps[4].accuracy.mean
    turned = sparse_probe(-x_UF, positive_U, np.ones(600, dtype=int))
    assert set(turned.units) == set(probe.units) and turned.signs == (-1, -1, -1, -1)
    assert turned.mean_differences == pytest.approx([-probe.mean_differences[probe.units.index(u)] for u in turned.units])


def test_shuffled_labels_and_rankings_from_the_training_part_alone_give_chance():
    """With many more units than texts, units ranked on all texts would tell held-out labels that are random: with the mean difference
    of all texts, eight of 3,000 units do so here."""
    honest, leaking = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x_UF, positive_U = rng.standard_normal((60, 3000)), rng.permutation(60) < 30
        probe = sparse_probe(x_UF, positive_U, np.ones(60, dtype=int), splits=3)
        honest.append([step.accuracy.mean for step in probe.steps] + [probe.all_units.mean])
        best = np.argsort(-np.abs(x_UF[positive_U].mean(0) - x_UF[~positive_U].mean(0)))[:8]
        leaking.append(by_k(sparse_probe(x_UF[:, best], positive_U, np.ones(60, dtype=int), splits=3))[8].accuracy.mean)
    assert np.mean(honest, axis=0) == pytest.approx(0.5, abs=0.15)
    assert np.mean(honest) == pytest.approx(0.5, abs=0.07)
    assert np.mean(leaking) > 0.85


def test_held_out_texts_change_nothing_that_is_fitted(monkeypatch):
    """Spoiling the features of the texts that one split holds out leaves the ranking of that split as it was."""
    from saebench.steering import probes

    x_UF, positive_U, lengths_U = planted()
    orders = []
    ranked = probes._Fold.ranked
    monkeypatch.setattr(probes._Fold, "ranked", lambda fold: orders.append(ranked(fold)) or orders[-1])
    sparse_probe(x_UF, positive_U, lengths_U)
    test_U = held_out(positive_U, np.random.default_rng(0))
    spoilt_UF = x_UF.copy()
    spoilt_UF[test_U] = 100 * np.random.default_rng(5).standard_normal(spoilt_UF[test_U].shape)
    clean, orders[:] = list(orders), []
    sparse_probe(spoilt_UF, positive_U, lengths_U)
    assert np.array_equal(orders[0][1], clean[0][1]) and orders[0][0] < clean[0][0]
    assert not np.array_equal(orders[1][1], clean[1][1])  # which held out others


def test_a_fifth_of_each_class_is_held_out():
    positive_U = np.arange(130) < 30
    first, again, other = (held_out(positive_U, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert (first[:30].sum(), first[30:].sum()) == (6, 20)
    assert (first == again).all() and (first != other).any()
    assert held_out(np.arange(10) < 2, np.random.default_rng(0))[:2].sum() == 1


def test_sparse_features_and_dense_ones_give_the_same():
    x_UF, positive_U, lengths_U = planted(units=20)
    x_UF[np.random.default_rng(1).random(x_UF.shape) < 0.6] = 0
    x_UF[:, 4] = 0
    dense, sparse = (sparse_probe(x, positive_U, lengths_U) for x in (x_UF, sp.csr_array(x_UF)))
    assert sparse.units == dense.units and sparse.weights == pytest.approx(dense.weights, abs=1e-3)
    assert [step.accuracy.mean for step in sparse.steps] == pytest.approx([step.accuracy.mean for step in dense.steps], abs=0.01)
    assert dense.steps[-1].k == 16  # of 19 that vary


def test_length_shows_up_as_length():
    x_UF, positive_U, lengths_U = planted()
    assert sparse_probe(x_UF, positive_U, lengths_U + 60 * positive_U).length_only.mean > 0.95


# --- on a model ---


def test_features_are_means_over_tokens(tiny_lm, kinds, monkeypatch):
    monkeypatch.setattr("saebench.features.prompts.PIECES_AT_ONCE", 3)
    texts, seen = [*CODE, *PROSE[:-1], PROSE[0] * 12], {}
    from saebench.steering import probes

    def keep(x_UF, positive_U, lengths_U, **options):
        seen[len(seen)] = (x_UF, positive_U, lengths_U)
        return sparse_probe(*planted(texts=20, units=12))

    monkeypatch.setattr(probes, "sparse_probe", keep)
    layerwise(tiny_lm, [SITE, "blocks.0.hook_resid_post"], [*CODE, CODE[0]], texts[14:])
    probe_latents(tiny_lm, kinds["topk"], CODE, texts[14:])
    for number, text in enumerate(texts):
        ids = tokenise(tiny_lm, text)[0]
        parts = [[0, *ids[start : start + 63]] for start in range(1, len(ids), 63)]  # 64 positions
        for place, site in enumerate((SITE, "blocks.0.hook_resid_post")):
            x_TD = torch.cat([tiny_lm.read(torch.tensor([part]), [site])[site][0, 1:] for part in parts])
            assert seen[place][0][number] == pytest.approx(x_TD.double().mean(0).numpy(), abs=1e-4)
            assert seen[place][2][number] == len(ids) - 1
    codes = read_prompt(tiny_lm, kinds["topk"], texts[5])
    expected = np.bincount(codes.latents, weights=codes.values, minlength=64) / (len(codes) - 1)
    assert seen[2][0][[5]].toarray()[0] == pytest.approx(expected, abs=1e-6)
    assert all(positive_U.tolist() == [True] * 14 + [False] * 12 for _, positive_U, _ in seen.values())
    assert len(seen[1][0]) == 26


def test_code_and_prose_are_told_apart_by_neurons_and_by_latents(tiny_lm, kinds):
    curve = layerwise(tiny_lm, [SITE, "blocks.2.hook_resid_post"], CODE, PROSE)
    assert list(curve) == [SITE, "blocks.2.hook_resid_post"]
    latents = probe_latents(tiny_lm, kinds["topk"], CODE, PROSE)
    for probe in (*curve.values(), latents):
        assert probe.all_units.mean > 0.9
    assert curve[SITE] == probe_neurons(tiny_lm, SITE, CODE, PROSE)
    assert (curve[SITE].of, curve[SITE].among, latents.among) == (SITE, tiny_lm.width(SITE), 64)


def test_an_edit_moves_the_units_alone_by_the_mean_difference(tiny_lm, kinds):
    probe = replace(probe_neurons(tiny_lm, SITE, CODE, PROSE), units=(5, 2), mean_differences=(0.5, -2.0))
    seen = []
    for strength, unit in ((0.0, None), (1.5, None), (2.0, 3.0)):
        with steer(tiny_lm, neuron_edit(probe, strength, unit=unit)):
            seen.append(tiny_lm.read(IDS, [SITE])[SITE].clone())
    moved = torch.zeros(tiny_lm.width(SITE))
    moved[5], moved[2] = 0.5, -2.0
    for after, expected in ((seen[1], 1.5 * moved), (seen[2], 6 * moved / moved.norm())):
        assert torch.equal(after[:, 0], seen[0][:, 0])
        assert after[:, 1:] - seen[0][:, 1:] == pytest.approx(expected.expand(1, 5, -1).numpy(), abs=1e-5)
    assert str(neuron_edit(probe, positions="last").positions) == "last"


def test_latents_are_moved_by_what_they_write(tiny_lm, kinds):
    dictionary = kinds["topk"]
    probe = replace(
        probe_latents(tiny_lm, dictionary, CODE, PROSE), units=(5, 2), mean_differences=(0.5, -2.0), weights=(1.0, -3.0)
    )
    site = dictionary.config.writes[0]
    chosen = probe.chosen()
    assert (chosen.latents, chosen.scores, chosen.weights) == ((5, 2), (1.0, 3.0), (0.5, -2.0))
    clean = tiny_lm.read(IDS, [site])[site].clone()
    added = 0.5 * dictionary.directions[5] - 2.0 * dictionary.directions[2]
    with steer(tiny_lm, neuron_edit(probe, 2.0)):
        assert tiny_lm.read(IDS, [site])[site][:, 1:] - clean[:, 1:] == pytest.approx(
            2 * added.expand(1, 5, -1).numpy(), abs=1e-4
        )
    with steer(tiny_lm, add(dictionary, chosen.latents, 2 * float(added.norm()), weights=chosen.weights)):
        assert tiny_lm.read(IDS, [site])[site][:, 1:] - clean[:, 1:] == pytest.approx(
            2 * added.expand(1, 5, -1).numpy(), abs=1e-4
        )


def test_texts_of_matched_length(tiny_lm):
    positives, long = [*CODE, *PROSE[:4], "x"], [f"{text} and {text}" for text in PROSE]
    negatives = [*long, *PROSE[4:], *(f"def value_{i}(x):\n    return x * {i}" for i in range(14, 20))]
    kept = length_matched(tiny_lm, positives, negatives)
    assert len(positives) > len(kept[0]) == len(kept[1]) > 5
    assert set(kept[0]) <= set(positives[:-1]) and set(kept[1]) <= set(negatives) - set(long[:6])
    sizes = [sorted(len(tokenise(tiny_lm, text)[0]) - 1 for text in side) for side in kept]
    assert all(max(a, b) / min(a, b) < 1.2 for a, b in zip(*sizes, strict=True)) and len(set(sizes[0])) > 1
    assert length_matched(tiny_lm, positives, negatives) == kept
    assert length_matched(tiny_lm, ["x"], long) == ([], [])


@pytest.mark.parametrize(
    ("positives", "negatives", "options", "message"),
    [
        (CODE[:4], PROSE, {}, "4 different positives are too few to hold some out: give at least 5"),
        (CODE, PROSE[:3] * 4, {}, "3 different negatives are too few"),
        (CODE, [*PROSE, CODE[2]], {}, "1 texts are on both sides"),
        (CODE, [*PROSE, ""], {}, "text '' has no tokens: leave it out"),
        (CODE, PROSE, {"penalty": "l3"}, "penalty 'l3' is unknown"),
        (CODE, PROSE, {"sigma": 0}, "sigma=0: use two splits or more"),
        (CODE, PROSE, {"splits": 1}, "splits=1"),
    ],
)
def test_what_cannot_be_probed_is_named(positives, negatives, options, message, tiny_lm, kinds):
    with pytest.raises(UserError, match=message):
        probe_neurons(tiny_lm, SITE, positives, negatives, **options)
    with pytest.raises(UserError, match=message):
        probe_latents(tiny_lm, kinds["topk"], positives, negatives, **options)


def test_other_misuse_is_named(tiny_lm, builtin_lm, kinds):
    with pytest.raises(UserError, match="unknown site"):
        layerwise(tiny_lm, ["blocks.9.hook_resid_post"], CODE, PROSE)
    with pytest.raises(UserError, match="wrong model"):
        probe_latents(builtin_lm, kinds["topk"], CODE, PROSE)
    with pytest.raises(UserError, match="no unit differs"):
        sparse_probe(np.ones((20, 3)), np.arange(20) < 10, np.ones(20, dtype=int))
    probe = sparse_probe(*planted())
    with pytest.raises(UserError, match="of no model's units"):
        neuron_edit(probe)
    with pytest.raises(UserError, match="steer with neuron_edit"):
        replace(probe, of=SITE).chosen()

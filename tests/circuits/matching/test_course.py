"""SAE Match on dictionaries whose matching is known: permuted copies, chains of them, chance; and by brute force."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import saebench as sb
from saebench.circuits.matching.assignment import NONE
from saebench.circuits.matching.course import chance_costs, composition, course, fold, match_layers, mean_where_active
from saebench.codes import SparseCodes
from saebench.dictionaries import parse_dictionary
from saebench.errors import UserError

D = 24


def jumprelu(d_sae: int = 80, seed: int = 0, layer: int = 0) -> sb.Dictionary:
    """Finished, with random weights and thresholds."""
    config = {"architecture": "jumprelu", "d_sae": d_sae, "target_l0": 6, "site": f"blocks.{layer}.hook_resid_post", "d_in": D}
    made = parse_dictionary(config, "made").build().requires_grad_(False)
    made.drop_training()
    made.folded = True
    generator = torch.Generator().manual_seed(seed)
    for weight in (made.W_enc_FD, made.W_dec, made.b_enc, made.b_dec):
        weight.copy_(torch.randn(weight.shape, generator=generator))
    made.W_dec /= made.W_dec.norm(dim=1, keepdim=True)
    made.threshold.copy_(torch.rand(d_sae, generator=generator) + 0.3)
    return made


def permuted(source: sb.Dictionary, order: torch.Tensor, layer: int, noise: float = 0.0, seed: int = 0) -> sb.Dictionary:
    """Latent i of the source is latent order[i], a little moved."""
    made = jumprelu(len(order), seed, layer)
    generator = torch.Generator().manual_seed(seed)
    for name in ("W_enc_FD", "W_dec", "b_enc", "threshold"):
        weight = getattr(source, name)
        scale = noise * weight.std()
        getattr(made, name)[order] = weight + scale * torch.randn(weight.shape, generator=generator)
    return made


def test_folding_leaves_the_output_as_it_is():
    made = jumprelu().double()
    folded, x_BD = fold(made), torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    z_BF = x_BD @ folded.W_enc_FD.T + folded.b_enc_F
    y_BD = (z_BF * (z_BF > 1)) @ folded.W_dec_FD + made.b_dec
    torch.testing.assert_close(y_BD.double(), made(x_BD.double()), rtol=1e-5, atol=1e-5)
    assert (z_BF > 1).any() and torch.equal(folded.scale_F, made.threshold.float())


def test_means_take_the_place_of_thresholds():
    codes = SparseCodes.from_dense(torch.tensor([[1.0, 0, 0], [3.0, 2.0, 0]]))
    assert mean_where_active(codes).tolist() == [2.0, 2.0, 0.0]
    made = sb.TopK(d_sae=3, k=2, d_in=4, site="a").build().requires_grad_(False)
    made.W_dec.copy_(torch.eye(3, 4))
    made.folded = True
    folded = fold(made, mean_where_active(codes))
    assert folded.alive_F.tolist() == [True, True, False]
    assert torch.equal(folded.W_dec_FD, 2 * torch.eye(3, 4))
    with pytest.raises(UserError, match="'topk' has no thresholds to fold: give mean_F"):
        fold(made)
    with pytest.raises(UserError, match="are not of the 3 latents"):
        fold(made, torch.ones(4))
    bad = jumprelu()
    bad.threshold[7] = 0
    with pytest.raises(UserError, match="latent 7 has threshold 0"):
        fold(bad)


@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("exact_up_to", [10, 1000])
def test_a_permuted_noisy_copy_is_recovered(encoder, exact_up_to):
    source, order = jumprelu(), torch.randperm(80, generator=torch.Generator().manual_seed(2))
    step = match_layers(
        fold(source), fold(permuted(source, order, 1, 0.05)), encoder=encoder, exact_up_to=exact_up_to, candidates=5
    )
    assert np.array_equal(step.partner_F, order.numpy())
    assert np.array_equal(step.believed(), order.numpy())


@pytest.mark.parametrize("encoder", [False, True])
def test_costs_are_those_of_the_definition(encoder):
    a, b = fold(jumprelu(60, 1)), fold(jumprelu(60, 2))
    rows = [x.W_dec_FD if not encoder else torch.cat([x.W_dec_FD, x.W_enc_FD, x.b_enc_F[:, None]], 1) for x in (a, b)]
    cost_FF = np.square(rows[0].double().numpy()[:, None] - rows[1].double().numpy()).sum(2)
    best = cost_FF[linear_sum_assignment(cost_FF)].sum()
    step = match_layers(a, b, encoder=encoder)
    np.testing.assert_allclose(step.cost_F, cost_FF[np.arange(60), step.partner_F], rtol=1e-4)
    assert step.cost_F.sum() == pytest.approx(best, rel=1e-5) and step.cost_F.sum() <= np.trace(cost_FF)
    assert step.mse == pytest.approx(best / rows[0].numel(), rel=1e-5)


def test_chance_matches_are_not_believed():
    steps = [match_layers(fold(jumprelu(200, seed)), fold(jumprelu(200, seed + 50, 1))) for seed in range(5)]
    assert np.mean([(step.believed(0.05) != NONE).mean() for step in steps]) < 0.07


def test_a_direction_that_all_rows_share_makes_no_match():
    a, b = (fold(jumprelu(200, seed)) for seed in (1, 2))
    common_D = torch.randn(D, generator=torch.Generator().manual_seed(9))
    for folded in (a, b):
        folded.W_dec_FD.add_(0.5 * common_D)
    assert (match_layers(a, b).believed(0.05) != NONE).mean() < 0.2
    low = float(chance_costs(a.W_dec_FD, b.W_dec_FD).mean())
    assert low < float(chance_costs(*(fold(jumprelu(200, seed)).W_dec_FD for seed in (1, 2))).mean())


def chain():
    """Layers 0 to 3: copies in other orders, but that ten latents of layer 2 are new and five of layer 1 are dead."""
    layers = [jumprelu(80, 5)]
    orders = [torch.randperm(80, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for layer, order in enumerate(orders, 1):
        layers.append(permuted(layers[-1], order, layer, 0.03, seed=layer))
        if layer == 2:
            for name in ("W_enc_FD", "W_dec"):
                getattr(layers[2], name)[:10] = getattr(jumprelu(80, 77), name)[:10]
    return layers, orders


def test_courses_follow_features_and_end_where_they_do():
    layers, orders = chain()
    found = course(layers)
    assert found.names == tuple(f"blocks.{i}.hook_resid_post" for i in range(4))
    # by hand: where each latent of layer 0 goes
    new_at_2 = set(range(10))
    for latent in range(80):
        at_1 = int(orders[0][latent])
        at_2 = int(orders[1][at_1])
        expected = {found.names[0]: latent, found.names[1]: at_1}
        if at_2 not in new_at_2:
            expected |= {found.names[2]: at_2, found.names[3]: int(orders[2][at_2])}
        assert found.of(0, latent) == expected
        for layer, name in enumerate(expected):
            assert found.of(layer, expected[name]) == expected
    for latent in new_at_2:
        assert found.of(2, latent) == {found.names[2]: latent, found.names[3]: int(orders[2][latent])}
    paths = found.paths_PL
    assert len(paths) == 90 and sorted(found.lengths_P.tolist()) == [2] * 20 + [4] * 70
    for layer in range(4):
        assert sorted(paths[paths[:, layer] != NONE, layer].tolist()) == list(range(80))
    assert [row["continued"] for row in found.figures()] == [1.0, 70 / 80, 1.0]
    with pytest.raises(UserError, match="no latent 80 at layer number 0"):
        found.of(0, 80)


def test_steps_compose():
    layers, orders = chain()
    exact = [layers[0]]
    for layer, order in enumerate(orders, 1):
        exact.append(permuted(exact[-1], order, layer))
    found = course(exact)
    assert np.array_equal(found.composed(0, 3), orders[2][orders[1][orders[0]]].numpy())
    whole = composition(found)
    assert whole.agreement == whole.agreement_on_courses == 1 and whole.mse == composition(found, 0, 2).direct_mse == 0
    partly = composition(course(layers))  # ten of 80 courses end, so that only 70 are sure to agree
    assert partly.agreement_on_courses == 1 and partly.agreement >= 70 / 80
    loose = composition(course([jumprelu(60, i, i) for i in range(3)]))
    assert loose.agreement < 0.5 and loose.mse > loose.direct_mse


def test_dead_latents_have_no_course():
    layers, orders = chain()
    means = [layer.threshold.clone() for layer in layers[:2]]
    means[0][3] = means[1][int(orders[0][4])] = 0
    found = course(layers[:2], means)
    assert found.of(0, 3) == {} and found.of(0, 4) == {found.names[0]: 4} and len(found.of(0, 5)) == 2
    (step,) = found.steps
    assert step.partner_F[3] == NONE and int(orders[0][4]) not in step.partner_F and np.isnan(step.cost_F[3])
    with pytest.raises(UserError, match="no latent of one of the layers is alive"):
        course(layers[:2], [means[0], torch.zeros(80)])


def test_layers_that_do_not_fit_are_refused():
    wide = sb.TopK(d_sae=8, k=2, d_in=D + 1, site="a").build()
    with pytest.raises(UserError, match="widths 24 and 25"):
        course([jumprelu(), wide], [None, torch.ones(8)])
    with pytest.raises(UserError, match="1 dictionary has no course"):
        course([jumprelu()])

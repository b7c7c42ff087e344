"""Crosscoders: sources that are the same, absent, permuted; what decoders' lengths say of them, in the units of training."""

import pytest
import torch

import saebench as sb
from saebench.dictionaries import Crosscoder, Scaling, TrainingBatch
from saebench.dictionaries.crosscoder import belonging, decoder_cosines, relative_norms, site_scales, source_norms
from saebench.errors import UserError
from saebench.evaluation import reconstruction
from saebench.kernels import use_implementation

A, B = "a/resid", "b/resid"
SITES = (A, B)


def random_normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sparse_data(tokens=4000, width=12, atoms=24, active=2, seed=0):
    """Sums of few of some unit vectors: [tokens, width]."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(atoms, width, generator=generator), dim=1)
    chosen = torch.rand(tokens, atoms, generator=generator).topk(active, dim=1).indices
    coefficients = torch.zeros(tokens, atoms).scatter_(1, chosen, torch.rand(tokens, active, generator=generator) + 0.5)
    return coefficients @ directions


def crosscoder(widths=(5, 7), d_sae=30, k=4, **options):
    """Untrained, with biases."""
    built = Crosscoder(d_sae=d_sae, k=k, site=SITES, d_in=sum(widths), widths_in=widths, **options).build()
    x = random_normal(200, sum(widths)) + 1
    built.initialise(x, x, torch.Generator().manual_seed(1))
    with torch.no_grad():
        built.b_enc += 0.1 * random_normal(d_sae, seed=2)
        built.W_dec *= 1 + 0.5 * random_normal(d_sae, 1, seed=3).tanh()
    return built


def loss_of(built, x):
    return built.losses(TrainingBatch(x, x, torch.zeros(built.config.d_sae, dtype=torch.bool)))


TRAINING = {"num_tokens": 80_000, "batch_size": 256}


@pytest.mark.parametrize(
    "make",
    [
        lambda **s: Crosscoder(k=3, **s),
        lambda **s: sb.ReLU(target_l0=None, coefficient=0.3, decoder="free", subtract_b_dec=False, **s),
    ],
    ids=["batchtopk", "l1 of norms"],
)
def test_identical_sources_are_shared_alike(make):
    """One scaled by 7: rho is measured in normalised units, so that it does not notice."""
    x = sparse_data()
    source = sb.TensorSource({A: x, B: 7 * x})
    trained = sb.train(make(d_sae=32, site=SITES, lr=5e-3), source, sb.TrainConfig(**TRAINING))
    figures = reconstruction(trained, source)
    assert figures["fvu"] < 0.2
    assert figures["fvu_by_site"][A] == pytest.approx(figures["fvu_by_site"][B], abs=0.005)
    firing = trained.encode(torch.cat([x, 7 * x], 1)).firings() > 20
    rho = relative_norms(trained)[firing]
    assert firing.sum() > 20
    assert rho.min() > 0.48 and rho.max() < 0.52
    assert decoder_cosines(trained)[firing].min() > 0.95
    assert belonging(rho)["shared"].all()
    raw = trained.W_dec[firing].split([12, 12], 1)
    assert float((raw[1].norm(dim=1) / raw[0].norm(dim=1)).mean()) == pytest.approx(7, rel=0.05)


def test_a_silent_source_owns_nothing():
    x = sparse_data(tokens=2000)
    noise = 1e-6 * random_normal(2000, 12)  # normalise = "none" keeps it silent
    source = sb.TensorSource({A: x, B: noise})
    config = Crosscoder(d_sae=32, k=3, site=SITES, lr=5e-3, normalise="none")
    trained = sb.train(config, source, sb.TrainConfig(**TRAINING))
    firing = trained.encode(torch.cat([x, noise], 1)).firings() > 10
    assert relative_norms(trained)[firing].max() < 0.05
    assert belonging(relative_norms(trained))["first_only"][firing].all()


def test_sources_with_concepts_of_their_own_tell_them_apart():
    """24 atoms: 8 in the first source alone, 8 in the second alone, 8 in both."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(2, 24, 16, generator=generator), dim=2)
    directions[0, 16:], directions[1, :8] = 0, 0
    chosen = torch.rand(6000, 24, generator=generator).topk(3, dim=1).indices
    coefficients = torch.zeros(6000, 24).scatter_(1, chosen, torch.rand(6000, 3, generator=generator) + 0.5)
    source = sb.TensorSource({A: coefficients @ directions[0], B: coefficients @ directions[1]})
    trained = sb.train(Crosscoder(d_sae=24, k=3, site=SITES, lr=1e-2), source, sb.TrainConfig(num_tokens=120_000, batch_size=256))
    kinds = belonging(relative_norms(trained))
    truth = torch.nn.functional.normalize(torch.cat([directions[0], directions[1]], 1), dim=1)
    scales = torch.tensor(site_scales(trained)).repeat_interleave(16)
    cosines = torch.nn.functional.normalize(trained.W_dec * scales, dim=1) @ truth.T
    best = cosines.max(1)
    found = best.values > 0.9
    assert found.sum() >= 18
    for latent in found.nonzero()[:, 0].tolist():
        atom = int(best.indices[latent])
        name = "first_only" if atom < 8 else "shared" if atom < 16 else "second_only"
        assert kinds[name][latent], (latent, atom)


@pytest.mark.parametrize("rule", ["relu", "topk"])
def test_one_source_is_the_rule_s_autoencoder(rule):
    """H = 1: the sum of norms is the norm, codes and losses are those of the free autoencoder."""
    make = {"relu": lambda **s: sb.ReLU(target_l0=3, **s), "topk": lambda **s: sb.TopK(k=4, **s)}[rule]
    x = random_normal(50, 6) + 1
    one, two = (
        make(d_sae=20, d_in=6, decoder="free", subtract_b_dec=False, **names).build() for names in ({"site": (A,)}, {"site": A})
    )
    one.initialise(x, x, torch.Generator().manual_seed(0))
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        for each in (one, two):
            each.W_dec *= 3
    assert torch.equal(loss_of(one, x).total, loss_of(two, x).total)
    assert torch.equal(one.weights().norm_F, one.W_dec.norm(dim=1))


def test_latents_are_ranked_by_the_sum_of_their_decoders_lengths():
    """Not by the root of the sum of squares: 3 + 4 against 6 + 0."""
    built = Crosscoder(d_sae=2, k=1, site=SITES, d_in=4, widths_in=(2, 2), inference="batch").build()
    with torch.no_grad():
        built.W_enc_FD.copy_(torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0]]))
        built.W_dec.copy_(torch.tensor([[3.0, 0, 4, 0], [6.0, 0, 0, 0]]))
    codes = built.encode(torch.tensor([[1.0, 0, 0, 0]]))
    torch.testing.assert_close(codes.to_dense(), torch.tensor([[7.0, 0]]))
    torch.testing.assert_close(built.decode(codes), torch.tensor([[3.0, 0, 4, 0]]))


def test_permuting_sources_permutes_outputs():
    built = crosscoder()
    order = torch.cat([torch.arange(5, 12), torch.arange(5)])
    other = Crosscoder(d_sae=30, k=4, site=(B, A), d_in=12, widths_in=(7, 5)).build()
    with torch.no_grad():
        for name in ("W_enc_FD", "W_dec", "b_dec"):
            getattr(other, name).copy_(getattr(built, name)[..., order])
        other.b_enc.copy_(built.b_enc)
    x = random_normal(40, 12, seed=4)
    torch.testing.assert_close(other(x[:, order]), built(x)[:, order])
    torch.testing.assert_close(relative_norms(other), 1 - relative_norms(built))
    torch.testing.assert_close(relative_norms(other, A, B), relative_norms(built))


def test_a_latent_without_a_decoder_in_a_source_changes_only_that_source():
    built = crosscoder(decoder="unit")  # free decoders rank by length, so the selection would change too
    x = random_normal(40, 12, seed=4)
    latent = int(built.encode(x).firings().argmax())
    before = built(x).detach()
    with torch.no_grad():
        built.W_dec[latent, 5:] = 0
    changed = (built(x).detach() - before).abs().amax(0) > 1e-6
    assert not changed[:5].any()
    assert changed[5:].all()


def test_folding_keeps_raw_reconstructions_and_the_units_of_training():
    built = crosscoder()
    shift, scales = random_normal(12, seed=5), torch.tensor([0.3] * 5 + [4.0] * 7)
    scaling = Scaling(shift, scales)
    x = random_normal(40, 12, seed=6) * 2
    expected, codes = built(scaling(x)) / scales + shift, built.encode(scaling(x))
    rho = relative_norms(built)
    built.fold(scaling, scaling)
    torch.testing.assert_close(built(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(built.encode(x).indices, codes.indices)
    built.trained_on = {"scales": {A: 0.3, B: 4.0}}
    torch.testing.assert_close(relative_norms(built), rho)
    built.trained_on = {}
    assert (relative_norms(built) - rho).abs().max() > 0.1  # raw units tell another story


def test_trained_scales_are_kept_with_the_dictionary(tmp_path):
    x = sparse_data(tokens=500)
    source = sb.TensorSource({A: x, B: 7 * x[:, :8]})
    trained = sb.train(Crosscoder(d_sae=32, k=3, site=SITES), source, sb.TrainConfig(num_tokens=2000, batch_size=200))
    scales = site_scales(trained)
    for site, scale in zip(SITES, scales, strict=True):
        statistics = source.statistics(site)
        assert scale == pytest.approx(source.widths[site] ** 0.5 / statistics.mean_norm, rel=1e-5) or trained.config.centre
    trained.save(tmp_path / "crosscoder")
    loaded = sb.load(tmp_path / "crosscoder")
    probe = torch.cat([x, 7 * x[:, :8]], 1)
    assert torch.equal(loaded.encode(probe).to_dense(), trained.encode(probe).to_dense())
    assert torch.equal(relative_norms(loaded), relative_norms(trained))
    norms = torch.stack([trained.W_dec[:, :12].norm(dim=1) * scales[0], trained.W_dec[:, 12:].norm(dim=1) * scales[1]], 1)
    torch.testing.assert_close(source_norms(loaded), norms)
    with pytest.raises(UserError, match="12 and 8 numbers have no cosine"):
        decoder_cosines(loaded)


@pytest.mark.parametrize("decoder", ["free", "unit"])
def test_gradients_equal_those_of_dense_autograd(decoder):
    built = crosscoder(decoder=decoder).double()
    x = random_normal(20, 12, dtype=torch.float64) + 1
    gradients = []
    for implementation in ("stock", "reference"):
        with use_implementation(implementation):
            batch = TrainingBatch(x, x, torch.arange(30) >= 20)
            gradients.append(torch.autograd.grad(built.losses(batch).total, list(built.parameters())))
    for sparse, dense in zip(*gradients, strict=True):
        assert dense.abs().sum() > 0
        torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-12)


def test_biases_begin_by_taking_the_mean_away():
    x = random_normal(300, 12) + 5
    built = Crosscoder(d_sae=30, k=4, site=SITES, d_in=12, widths_in=(5, 7)).build()
    built.initialise(x, x, torch.Generator().manual_seed(1))
    z = built.b_dec @ built.W_enc + built.b_enc
    torch.testing.assert_close(z, torch.zeros(30), atol=1e-4, rtol=0)
    tied = Crosscoder(d_sae=30, k=4, site=SITES, d_in=12, widths_in=(5, 7), subtract_b_dec=True).build()
    tied.initialise(x, x, torch.Generator().manual_seed(1))
    torch.testing.assert_close(tied(x), built(x), rtol=0.1, atol=0.1)  # other probes, nearly the same scale
    assert tied.b_enc.abs().max() == 0


def test_some_sites_can_be_read_and_others_written():
    """Weakly causal: reads the first, writes both."""
    x = sparse_data(tokens=3000)
    sites = {A: x, "mid": x.flip(1), B: 2 * x}
    config = Crosscoder(d_sae=32, k=3, site=(A, "mid"), target=("mid", B), lr=5e-3)
    trained = sb.train(config, sb.TensorSource(sites), sb.TrainConfig(num_tokens=40_000, batch_size=256))
    assert reconstruction(trained, sb.TensorSource(sites))["fvu"] < 0.3
    assert relative_norms(trained).shape == (32,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give site as a list of two or more, such as"),
        ({"site": A}, "give site as a list of two or more"),
        ({"site": (A, A)}, "repeat: name each once"),
        ({"site": SITES, "k": 9}, "k=9 exceeds d_sae=8"),
    ],
)
def test_wrong_configurations_say_what_to_give(settings, message):
    with pytest.raises(UserError, match=message):
        Crosscoder(**{"d_sae": 8, "k": 2, **settings})


def test_unknown_sources_are_named():
    built = crosscoder()
    with pytest.raises(UserError, match="are not two of the sites that the dictionary writes: a/resid, b/resid"):
        relative_norms(built, A, "c")
    assert relative_norms(built, B, A).shape == (30,)

"""Transcoders against closed forms: a linear map by the bypass alone, a ReLU MLP reproduced exactly, normalisation folded."""

import pytest
import torch

import saebench as sb
from saebench.dictionaries import Scaling, TrainingBatch, Transcoder
from saebench.dictionaries.transcoder import skip_only
from saebench.errors import UserError
from saebench.evaluation import reconstruction
from saebench.kernels import use_implementation
from saebench.trainer.member import Member

IN, OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
PLACES = {"site": IN, "target": OUT}


def random_normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def transcoder(d_sae=30, k=4, d_in=7, d_out=5, seed=0, **options):
    """Initialised on an affine map of random inputs."""
    built = Transcoder(d_sae=d_sae, k=k, d_in=d_in, d_out=d_out, **PLACES, **options).build()
    x = random_normal(300, d_in, seed=seed) + 1
    built.initialise(x, x @ random_normal(d_in, d_out, seed=9) - 2, torch.Generator().manual_seed(seed))
    return built


def relu_mlp(width=6, hidden=20, out=5, tokens=400):
    """Inputs, outputs and weights of y = ReLU(x A + a) B + b."""
    A, a, B, b = (random_normal(*shape, seed=s) for s, shape in enumerate([(width, hidden), (hidden,), (hidden, out), (out,)]))
    x = random_normal(tokens, width, seed=5) * 2 + 1
    return x, (x @ A + a).relu() @ B + b, (A, a, B, b)


def fvu(prediction, y):
    return float((prediction.detach() - y).square().sum() / (y - y.mean(0)).square().sum())


def test_a_linear_target_is_the_bypass():
    x, A, c = random_normal(200, 7), random_normal(7, 5, seed=1), random_normal(5, seed=2)
    y = x @ A + c
    built = Transcoder(d_sae=8, k=2, d_in=7, d_out=5, **PLACES, skip=True).build()
    with torch.no_grad():
        built.W_skip.copy_(A)
        built.b_dec.copy_(c)
        built.W_enc_FD.copy_(random_normal(8, 7))  # latents fire and write nothing
    assert fvu(built(x), y) < 1e-12
    assert fvu(skip_only(built, x), y) < 1e-12


def test_without_weights_the_prediction_is_the_mean():
    x, y, _ = relu_mlp()
    built = Transcoder(d_sae=8, k=2, d_in=6, d_out=5, **PLACES, skip=True).build()
    with torch.no_grad():
        built.b_dec.copy_(y.mean(0))
    torch.testing.assert_close(built(x), y.mean(0).expand(400, -1))
    assert fvu(built(x), y) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "make", [lambda **s: Transcoder(k=20, **s), lambda **s: sb.ReLU(target_l0=5, **s)], ids=["topk of all", "relu"]
)
def test_a_relu_mlp_is_reproduced_exactly(make):
    """By every rule whose latents are ReLU(z): y = ReLU(x A + a) B + b with W_enc = A, b_enc = a, W_dec = B, b_out = b."""
    x, y, (A, a, B, b) = relu_mlp()
    built = make(d_sae=20, d_in=6, d_out=5, **PLACES, decoder="free").build()
    with torch.no_grad():
        built.W_enc_FD.copy_(A.T)
        built.b_enc.copy_(a)
        built.W_dec.copy_(B)
        built.b_dec.copy_(b)
    torch.testing.assert_close(built(x), y, rtol=1e-5, atol=1e-4)
    losses = built.losses(TrainingBatch(x, y, torch.zeros(20, dtype=torch.bool)))
    assert float(losses.squared_error_B.mean()) < 1e-8


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("decoder", ["unit", "free"])
def test_folding_input_and_output_scales_keeps_raw_predictions(skip, decoder):
    built = transcoder(skip=skip, decoder=decoder)
    with torch.no_grad():
        built.b_enc += random_normal(30)
        if skip:
            built.W_skip.copy_(random_normal(7, 5))
    read = Scaling(random_normal(7, seed=3), torch.full((7,), 0.4))
    write = Scaling(random_normal(5, seed=4), torch.full((5,), 2.5))
    x = random_normal(60, 7, seed=6) * 3
    expected = built(read(x)) / write.scale_D + write.shift_D
    before = built.encode(read(x))
    if skip:
        bypass = skip_only(built, read(x)) / write.scale_D + write.shift_D
    built.fold(read, write)
    torch.testing.assert_close(built(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(built.encode(x).indices, before.indices)
    if skip:
        torch.testing.assert_close(skip_only(built, x), bypass, rtol=1e-5, atol=1e-5)


def test_the_bypass_is_the_prediction_with_all_latents_off():
    built = transcoder(skip=True)
    with torch.no_grad():
        built.W_skip.copy_(random_normal(7, 5))
    x = random_normal(40, 7)
    codes = built.encode(x)
    torch.testing.assert_close(skip_only(built, x) + built.decode(codes) - built.b_dec, built(x))
    off = codes.replaced(torch.zeros_like(codes.values))
    torch.testing.assert_close(skip_only(built, x), built.reconstruct(x, off))
    plain = transcoder()
    torch.testing.assert_close(skip_only(plain, x), plain.b_dec.expand(40, -1))


@pytest.mark.parametrize("options", [{"skip": True}, {"decoder": "free"}])
def test_gradients_equal_those_of_dense_autograd(options):
    built = transcoder(**options).double()
    x, y = random_normal(20, 7, dtype=torch.float64) + 1, random_normal(20, 5, seed=1, dtype=torch.float64)
    batch = TrainingBatch(x, y, torch.arange(30) >= 20)
    gradients = []
    for implementation in ("stock", "reference"):
        with use_implementation(implementation):
            gradients.append(torch.autograd.grad(built.losses(batch).total, list(built.parameters())))
    for sparse, dense in zip(*gradients, strict=True):
        assert dense.abs().sum() > 0
        torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-12)


def test_save_and_load_give_identical_codes(tmp_path):
    built = transcoder(skip=True)
    built.save(tmp_path / "transcoder")
    loaded = sb.load(tmp_path / "transcoder")
    x = random_normal(30, 7)
    assert loaded.config == built.config
    assert torch.equal(loaded.encode(x).to_dense(), built.encode(x).to_dense())
    assert torch.equal(loaded(x), built(x))


def test_training_learns_an_mlp_and_the_bypass_takes_the_linear_part():
    x, y, _ = relu_mlp(width=12, out=12, tokens=6000)
    y = y + 3 * x @ random_normal(12, 12, seed=8)  # a part that few latents cannot write
    source = sb.TensorSource({IN: x, OUT: y})
    settings = {"d_sae": 32, "k": 3, **PLACES, "lr": 5e-3}
    training = sb.TrainConfig(num_tokens=100_000, batch_size=256)
    plain, skipping = sb.train([Transcoder(**settings), Transcoder(**settings, skip=True)], source, training)
    found = {name: reconstruction(d, source) for name, d in (("plain", plain), ("skip", skipping))}
    assert found["plain"]["fvu"] == pytest.approx(fvu(plain(x), y), rel=1e-6)
    assert found["plain"]["fvu"] < 0.3
    assert found["skip"]["fvu"] < 0.5 * found["plain"]["fvu"]
    assert 2 * found["skip"]["fvu"] < found["skip"]["fvu_skip_only"] < 1
    assert found["skip"]["fvu_skip_only"] == pytest.approx(fvu(skip_only(skipping, x), y), rel=1e-6)
    assert "fvu_skip_only" not in found["plain"]


def test_ids_say_which_kind():
    assert Transcoder(d_sae=64, k=4, **PLACES).default_id == "transcoder-64-k4"
    assert Transcoder(d_sae=64, k=4, **PLACES, skip=True).default_id == "skip-transcoder-64-k4"


# --- a decoder that starts from the module ---


@pytest.fixture(scope="module")
def mlp_sample(tiny_lm, contexts):
    return {site: x[:, 1:].flatten(0, 1).clone() for site, x in tiny_lm.read(contexts.ids_NS[:40], [IN, OUT]).items()}


def started(config, sample, lm):
    return Member.create(config, sb.TrainConfig(), sample, lm=lm)


@pytest.mark.parametrize("centre", [False, True])
def test_the_mlp_s_own_answers_are_where_decoders_start(tiny_lm, mlp_sample, centre):
    """Against the module called on raw inputs: the normalisation is undone, and a unit of input is the mean centred norm."""
    config = Transcoder(d_sae=64, k=4, **PLACES, initial_decoder="mlp", centre=centre)
    built = started(config, mlp_sample, tiny_lm).dictionary
    x = mlp_sample[IN]
    steps = (x - x.mean(0)).norm(dim=1).mean() * built.W_enc_FD
    with torch.no_grad():
        answers = tiny_lm.hf.transformer.h[1].mlp(x.mean(0) + steps)
    expected = torch.nn.functional.normalize(answers - answers.mean(0), dim=1)
    torch.testing.assert_close(built.W_dec.detach(), expected, rtol=1e-3, atol=1e-4)
    other = started(config.model_copy(update={"initial_decoder": "linear_map"}), mlp_sample, tiny_lm).dictionary
    assert torch.equal(other.W_enc_FD, built.W_enc_FD)
    assert (other.W_dec - built.W_dec).norm() > 1


def test_sites_that_are_no_module_s_ends_are_refused(tiny_lm, contexts, mlp_sample):
    before = "blocks.1.hook_resid_mid"
    sample = {**mlp_sample, before: tiny_lm.read(contexts.ids_NS[:40], [before])[before][:, 1:].flatten(0, 1).clone()}
    config = Transcoder(d_sae=64, k=4, site=before, target=OUT, initial_decoder="mlp")
    with pytest.raises(UserError, match=r"blocks.1.hook_mlp_out is not what a module makes of blocks.1.hook_resid_mid"):
        started(config, sample, tiny_lm)
    with pytest.raises(UserError, match="train with lm="):
        started(Transcoder(d_sae=64, k=4, **PLACES, initial_decoder="mlp"), sample, None)
    normed = config.model_copy(update={"site": "blocks.1.ln2.hook_out"})
    started(normed, {**sample, "blocks.1.ln2.hook_out": mlp_sample[IN]}, tiny_lm)  # the same activations under another name


def test_train_asks_for_the_model():
    source = sb.TensorSource({IN: random_normal(64, 4), OUT: random_normal(64, 4, seed=1)})
    with pytest.raises(UserError, match="starts from the model's weights: pass lm="):
        sb.train(Transcoder(d_sae=8, k=2, **PLACES, initial_decoder="mlp"), source, sb.TrainConfig(num_tokens=64, batch_size=32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, 'give site and target, such as site = "blocks.2.mlp.hook_in"'),
        ({"site": IN}, "reads one place and writes another"),
        ({"target": OUT}, "reads one place and writes another"),
        ({"site": IN, "target": IN}, "reads one place and writes another"),
        ({**PLACES, "k": 9}, "k=9 exceeds d_sae=8"),
        ({"site": (IN, OUT), "target": OUT, "initial_decoder": "mlp"}, "give one site and one target"),
    ],
)
def test_wrong_configurations_say_what_to_give(settings, message):
    with pytest.raises(UserError, match=message):
        Transcoder(**{"d_sae": 8, "k": 2, **settings})

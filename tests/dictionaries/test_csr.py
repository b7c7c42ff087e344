"""CSR: the contrastive term against closed forms and dense autograd, tied weights, both sparsities, retrieval with sparse codes."""

import math

import pytest
import torch
from test_matching_pursuit import normal, planted, unit_rows

import saebench as sb
from saebench.codes import SparseCodes
from saebench.dictionaries import Scaling, TrainingBatch
from saebench.errors import UserError
from saebench.kernels import use_implementation
from saebench.kernels.code_dots import code_dots, self_contrast
from saebench.trainer import TrainConfig
from saebench.trainer.member import Member


def built(d_sae=40, d_in=8, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    dictionary = sb.CSR(d_sae=d_sae, d_in=d_in, **{"k": 4, **options}).build()
    x = torch.randn(400, d_in, generator=generator) + 3
    dictionary.initialise(x, x, generator)
    return dictionary


def random_codes(tokens=23, d_sae=50, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(tokens, d_sae, generator=generator).argsort(1)[:, :k]
    return SparseCodes(indices, torch.rand(tokens, k, generator=generator, dtype=torch.float64), d_sae)


def batch_of(x, dead=None, d_sae=40):
    return TrainingBatch(x, x, torch.zeros(d_sae, dtype=torch.bool) if dead is None else dead)


def test_contrast_of_orthogonal_and_of_equal_codes():
    orthogonal = SparseCodes(torch.arange(12)[:, None], torch.rand(12, 1, dtype=torch.float64) + 0.1, 12)
    assert float(self_contrast(orthogonal, 0.2)) == pytest.approx(math.log(1 + 11 * math.exp(-5)), rel=1e-6)
    equal = SparseCodes(torch.tensor([[1, 4]] * 12), torch.tensor([[0.3, 2]] * 12, dtype=torch.float64), 12)
    assert float(self_contrast(equal, 0.2)) == pytest.approx(math.log(12), rel=1e-9)
    empty = SparseCodes(torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2, requires_grad=True), 12)
    loss = self_contrast(empty, 0.2)
    assert loss.item() == pytest.approx(math.log(5))
    assert torch.autograd.grad(loss, empty.values)[0].isfinite().all()


@pytest.mark.parametrize("d_sae", [50, 3000])  # dense blocks, gathered rows
def test_contrast_equals_dense_autograd(d_sae, monkeypatch):
    monkeypatch.setattr("saebench.codes.BLOCK_BYTES", 7 * d_sae * 8)  # blocks of seven tokens
    codes = random_codes(d_sae=d_sae)
    codes.indices[:12] = codes.indices[0]  # so that codes overlap
    results = []
    for implementation in ("stock", "reference"):
        with use_implementation(implementation):
            values = codes.values.clone().requires_grad_()
            loss = self_contrast(codes.replaced(values), 0.2)
            results.append((loss, torch.autograd.grad(loss, values)[0]))
    for ours, reference in zip(*results, strict=True):
        assert (ours - reference).abs().max() < 1e-12
    dense = torch.nn.functional.normalize(codes.to_dense())
    expected = torch.nn.functional.cross_entropy(dense @ dense.T / 0.2, torch.arange(23))
    assert results[0][0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_sparse_and_dense_dot_products_agree():
    a, b = random_codes(seed=1), random_codes(tokens=31, k=6, seed=2)
    torch.testing.assert_close(code_dots(a, b), a.to_dense() @ b.to_dense().T)
    with use_implementation("reference"):
        torch.testing.assert_close(code_dots(a, b), a.to_dense() @ b.to_dense().T)


def test_k_of_all_without_the_other_terms_is_a_tied_autoencoder():
    dictionary = built(k=40, wide_coefficient=0, contrast_coefficient=0, aux_coefficient=0)
    x, W = normal(30, 8) + 3, dictionary.W_dec
    losses = dictionary.losses(batch_of(x))
    f = ((x - dictionary.b_dec) @ W.T).relu()
    torch.testing.assert_close(dictionary(x), f @ W + dictionary.b_dec)
    expected = (f @ W + dictionary.b_dec - x).square().mean() / dictionary.variance
    torch.testing.assert_close(losses.total, expected)
    (ours,), (theirs,) = torch.autograd.grad(losses.total, [W]), torch.autograd.grad(expected, [W])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("decoder", ["unit", "free"])
def test_the_loss_is_the_sum_of_its_terms(decoder):
    dictionary, x = built(d_sae=60, k=4, decoder=decoder).double(), normal(30, 8, dtype=torch.float64) + 3
    with torch.no_grad():
        dictionary.b_enc.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    losses = dictionary.losses(batch_of(x, torch.arange(60) >= 50))
    missed = {k: (dictionary.decode(dictionary.encode(x, k=k)) - x).square().mean() / dictionary.variance for k in (4, 16)}
    contrast = self_contrast(dictionary.encode(x), 0.2)
    expected = missed[4] + missed[16] / 8 + 0.1 * contrast + losses.parts["auxk"] / 32
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-9)
    assert losses.parts["wide"].item() == pytest.approx(missed[16].item(), rel=1e-9)


@pytest.mark.parametrize("decoder", ["unit", "free"])
def test_gradients_equal_dense_autograd(decoder):
    dictionary, x = built(d_sae=60, decoder=decoder).double(), normal(30, 8, dtype=torch.float64) + 3
    results = []
    for implementation in ("stock", "reference"):
        with use_implementation(implementation):
            total = dictionary.losses(batch_of(x, torch.arange(60) >= 50)).total
            results.append((total, *torch.autograd.grad(total, [dictionary.W_dec, dictionary.b_enc, dictionary.b_dec])))
    for ours, reference in zip(*results, strict=True):
        assert (ours - reference).abs().max() < 1e-10
        assert ours.abs().max() > 0


def test_only_latents_among_the_k_count_as_fired():
    dictionary, x = built(), normal(5, 8) + 3
    losses = dictionary.losses(batch_of(x))
    assert torch.equal(losses.codes.firings(), dictionary.encode(x).firings())
    assert (dictionary.encode(x, k=16).firings() > 0).sum() > (losses.codes.firings() > 0).sum()


def test_every_weight_changes_the_loss():
    x = normal(30, 8) + 3
    plain = built().losses(batch_of(x)).total.item()
    for options in ({"wide_coefficient": 1.0}, {"contrast_coefficient": 0.0}, {"temperature": 0.5}, {"decoder": "unit"}):
        assert abs(built(**options).losses(batch_of(x)).total.item() - plain) > 1e-3


def test_encoder_and_decoder_stay_tied_while_training():
    x, _ = planted(500)
    for decoder in ("free", "unit"):
        config = sb.CSR(d_sae=24, k=2, decoder=decoder).for_sites({"a": 16})
        member = Member.create(config, TrainConfig(num_tokens=64 * 20, batch_size=64, lr=1e-2), x)
        for step in range(20):
            member.step(x[:64], step)
        dictionary = member.dictionary
        assert torch.equal(dictionary.W_enc_FD, dictionary.W_dec)
        lengths = dictionary.W_dec.norm(dim=1)
        assert (lengths.std() > 1e-3) == (decoder == "free")
        finished = member.finished()
        torch.testing.assert_close(finished.W_dec.norm(dim=1), torch.ones(24))
        normal_x = member.read(x)
        torch.testing.assert_close(finished(x) * member.read.uniform, dictionary(normal_x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(finished.encode(x).to_dense() * member.read.uniform, dictionary.encode(normal_x).to_dense())


def test_resampling_keeps_the_weights_tied():
    for decoder in ("free", "unit"):
        dictionary, x = built(decoder=decoder), normal(64, 8) + 3
        dead = torch.arange(40) % 4 == 0
        rows = dictionary.resample(batch_of(x, dead))
        assert set(rows) == {"W_dec", "b_enc"}
        assert torch.equal(dictionary.W_enc_FD, dictionary.W_dec)
        length = 1.0 if decoder == "unit" else 0.2 * float(dictionary.W_dec[~dead].detach().norm(dim=1).mean())
        torch.testing.assert_close(dictionary.W_dec[dead].norm(dim=1), torch.full((10,), length))


@pytest.mark.parametrize("decoder", ["unit", "free"])
def test_folding_changes_nothing_but_the_units(decoder):
    dictionary, x = built(decoder=decoder), normal(60, 8, seed=6) * 5 + 2
    shift, scale = normal(8, seed=7), 0.37
    before, x_hat = dictionary.encode((x - shift) * scale), dictionary((x - shift) * scale) / scale + shift
    scaling = Scaling(shift, torch.full((8,), scale))
    dictionary.fold(scaling, scaling)
    torch.testing.assert_close(dictionary(x), x_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dictionary.encode(x).to_dense(), before.to_dense() / scale, rtol=1e-4, atol=1e-4)


def clusters(count=20, each=40, width=32, noise=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = unit_rows(count, width, seed) * 3
    labels = torch.arange(count).repeat(each)
    return centres[labels] + noise * torch.randn(len(labels), width, generator=generator), labels


def nearest_label_accuracy(codes, labels):
    lengths = codes.values.norm(dim=1, keepdim=True) + 1e-8
    unit = codes.replaced(codes.values / lengths)
    return float((labels[code_dots(unit, unit).fill_diagonal_(-1).argmax(1)] == labels).double().mean())


def test_training_lowers_the_error_and_the_codes_retrieve(tmp_path):
    x, labels = clusters()
    source = sb.TensorSource({"embedding": x})
    config = sb.CSR(d_sae=64, k=4)
    untrained = Member.create(config.for_sites({"embedding": 32}), TrainConfig(), x).finished()
    trained = sb.train(config, source, TrainConfig(num_tokens=160 * 250, batch_size=160, lr=3e-3, dead_after=3000))
    fvu = [((d(x) - x).square().sum() / (x - x.mean(0)).square().sum()).item() for d in (untrained, trained)]
    assert fvu[1] < 0.7 * fvu[0]
    codes = trained.encode(x)
    assert codes.l0().max() <= 4
    assert nearest_label_accuracy(codes, labels) > 0.95
    assert nearest_label_accuracy(trained.encode(x, k=16), labels) > 0.95
    wide = trained.decode(trained.encode(x, k=16))
    assert (wide - x).square().sum() < (trained(x) - x).square().sum()
    trained.save(tmp_path / "it")
    assert torch.equal(sb.load(tmp_path / "it").encode(x).to_dense(), codes.to_dense())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_sae": 8, "k": 9}, "k=9 exceeds d_sae=8"),
        ({"d_sae": 8, "k": 2, "temperature": 0}, "temperature=0"),
        ({"d_sae": 8, "k": 2, "site": "a", "target": "b"}, "leave target and skip out"),
        ({"d_sae": 8, "k": 2, "skip": True}, "leave target and skip out"),
    ],
)
def test_wrong_configurations_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        sb.CSR(**settings)


def test_a_wrong_k_at_inference_is_refused():
    with pytest.raises(UserError, match="k=41 is not between 1 and d_sae=40"):
        built().encode(normal(3, 8), k=41)

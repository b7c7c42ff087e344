"""The OrtSAE penalty against the worked example, brute force over chunks, finite differences, and its effect on a trained decoder."""

import json
from functools import cache

import pytest
import torch

import saebench as sb
from saebench.activations import TensorSource
from saebench.dictionaries import TrainingBatch, orthogonality
from saebench.dictionaries.orthogonality import nearest_rows, orthogonality_penalty
from saebench.errors import UserError
from saebench.evaluation.metrics import max_decoder_cosine
from saebench.synthetic import PlantedDictionary

D = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0.6, 0.8], [0, 0, 0, -1.0]])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(count, width, seed=0, dtype=torch.float64):
    return torch.randn(count, width, generator=generator(seed), dtype=dtype)


def brute_force(W, chunk, seed):
    """The definition, with the whole matrix of cosines of each chunk, by autograd."""
    chunks = torch.randperm(len(W), generator=generator(seed)).tensor_split(-(-len(W) // chunk))
    total = 0.0
    for members in chunks:
        if len(members) > 1:
            unit = torch.nn.functional.normalize(W[members])
            cosines = unit @ unit.T - torch.diag(torch.full((len(members),), torch.inf, dtype=W.dtype))
            total = total + cosines.amax(1).square().mean()
    return total / len(chunks)


def test_worked_example():
    assert float(orthogonality_penalty(D, 8192, generator())) == pytest.approx(0.393333, abs=1e-6)
    assert float(orthogonality_penalty(D * torch.tensor([[3.0], [1], [7], [0.1], [2], [5]]), 6, generator())) == pytest.approx(
        0.393333, abs=1e-6
    )
    # with absolute values row 6 would have 0.8 and row 5 the same
    cosines = (D @ D.T).abs().fill_diagonal_(0)
    assert float(cosines.amax(1).square().mean()) == pytest.approx(0.546667, abs=1e-6)


def test_closed_forms():
    assert float(orthogonality_penalty(torch.eye(7), 3, generator())) == 0
    assert float(orthogonality_penalty(D[[2, 2]], 2, generator())) == pytest.approx(1)
    assert float(orthogonality_penalty(D[:1], 2, generator())) == 0
    opposite = torch.tensor([[1.0, 0], [-1.0, 0]])  # the row itself, at 0, must not win over a negative cosine
    assert float(orthogonality_penalty(opposite, 2, generator())) == pytest.approx(1)


@pytest.mark.parametrize(("count", "chunk"), [(6, 100), (50, 50), (50, 7), (3, 2), (41, 40)])
@pytest.mark.parametrize("block", [512, 4])
def test_value_and_gradient_equal_brute_force(count, chunk, block, monkeypatch):
    monkeypatch.setattr(orthogonality, "CPU_BLOCK", block)
    W = rows(count, 5).requires_grad_()
    fast, slow = orthogonality_penalty(W, chunk, generator(3)), brute_force(W, chunk, 3)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(value, W)[0] for value in (fast, slow)))


def test_gradient_equals_finite_differences():
    W = rows(30, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: orthogonality_penalty(w, 11, generator(1)), W, eps=1e-7, atol=1e-6)


def test_gradient_is_orthogonal_to_the_rows_and_reaches_both_of_a_pair():
    W = rows(30, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(orthogonality_penalty(W, 30, generator()), W)
    torch.testing.assert_close((gradient * W).sum(1), torch.zeros(30, dtype=torch.float64))
    pair = torch.tensor([[1.0, 0], [0.8, 0.6]], requires_grad=True)
    (gradient,) = torch.autograd.grad(orthogonality_penalty(pair, 2, generator()), pair)
    assert (gradient.norm(dim=1) > 0.1).all()


def test_chunks_are_drawn_anew_and_see_less_than_the_whole():
    W = rows(64, 8)
    values = [float(orthogonality_penalty(W, 8, generator(seed))) for seed in range(50)]
    whole = float(orthogonality_penalty(W, 64, generator()))
    assert len(set(values)) > 40
    assert sum(values) / 50 < whole
    assert float(orthogonality_penalty(W, 8, generator(3))) == values[3]


def test_no_matrix_of_a_chunk_is_kept(monkeypatch):
    monkeypatch.setattr(orthogonality, "CPU_BLOCK", 32)
    kept = []
    W = rows(512, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        orthogonality_penalty(W, 512, generator())
    assert max(kept) <= W.numel()


def test_nearest_rows_do_not_name_themselves():
    unit = torch.nn.functional.normalize(torch.ones(2050, 3))
    assert (nearest_rows(unit) != torch.arange(2050)).all()


@cache
def planted():
    return PlantedDictionary(num_features=48, width=16, l0=4).sample(8000)[0]


def trained(configs, steps=150):
    x = planted()
    return x, sb.train(configs, TensorSource({"x": x}), sb.TrainConfig(num_tokens=128 * steps, batch_size=128))


def test_decoder_rows_move_apart_at_equal_l0():
    x, saes = trained([sb.BatchTopK(d_sae=96, k=5, orthogonality=gamma) for gamma in (0.0, 0.25, 2.0)])
    similar = [float(max_decoder_cosine(sae.W_dec).mean()) for sae in saes]
    l0 = [float(sae.encode(x).l0().double().mean()) for sae in saes]
    assert similar[0] > similar[1] + 0.02 > similar[2] + 0.04
    assert l0 == pytest.approx([5, 5, 5], rel=0.05)


def losses_of(config, step=0, seed=0):
    x = torch.randn(40, 6, generator=generator(1))
    sae = config(d_in=6).build() if callable(config) else config
    sae.initialise(x, x, generator())
    return sae, sae.losses(TrainingBatch(x, x, torch.zeros(sae.config.d_sae, dtype=torch.bool), step, 10, seed))


@pytest.mark.parametrize("architecture", [sb.TopK, sb.BatchTopK, sb.Matryoshka])
def test_every_member_of_the_family_has_it(architecture):
    make = lambda **options: lambda d_in: architecture(d_sae=32, k=4, d_in=d_in, **options)  # noqa: E731
    _, without = losses_of(make())
    sae, losses = losses_of(make(orthogonality=0.5, orthogonality_chunk=10))
    alike = orthogonality_penalty(sae.W_dec, 10, torch.Generator().manual_seed(1))
    assert losses.parts["orthogonality"] == pytest.approx(alike.item())
    assert losses.total.item() == pytest.approx(without.total.item() + 0.5 * alike.item(), rel=1e-6)
    assert "orthogonality" not in without.parts


def test_every_fifth_step_weighs_five_times():
    make = lambda **options: lambda d_in: sb.TopK(d_sae=32, k=4, d_in=d_in, orthogonality=0.5, **options)  # noqa: E731
    _, base = losses_of(make(), step=5)
    _, fifth = losses_of(make(orthogonality_every=5), step=5)
    _, other = losses_of(make(orthogonality_every=5), step=6)
    assert fifth.parts["orthogonality"] == pytest.approx(5 * base.parts["orthogonality"].item())
    assert fifth.total.item() - other.total.item() == pytest.approx(2.5 * base.parts["orthogonality"].item(), rel=1e-4)
    assert "orthogonality" not in other.parts


def test_chunk_size_changes_the_penalty():
    make = lambda chunk: lambda d_in: sb.TopK(d_sae=32, k=4, d_in=d_in, orthogonality=1.0, orthogonality_chunk=chunk)  # noqa: E731
    assert losses_of(make(4))[1].parts["orthogonality"] < losses_of(make(32))[1].parts["orthogonality"]


def test_the_preset_is_batchtopk_with_the_published_weight(tmp_path):
    assert sb.OrtSAE(d_sae=64).orthogonality == 0.25
    x = planted()
    training = sb.TrainConfig(num_tokens=128 * 60, batch_size=128, log_every=20)
    configs = {"preset": sb.OrtSAE(d_sae=32, k=4), "spelled": sb.BatchTopK(d_sae=32, k=4, orthogonality=0.25)}
    preset, spelled = sb.train(configs, TensorSource({"x": x}), training, out=tmp_path)
    assert torch.equal(preset.W_dec, spelled.W_dec)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 < rows[0]["orthogonality"] < 1
    assert sb.load(tmp_path / "dictionaries" / "preset").config.architecture == "ortsae"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"orthogonality": -1}, "orthogonality=-1"), ({"orthogonality_chunk": 1}, "orthogonality_chunk=1")],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        sb.OrtSAE(d_sae=8, k=2, **settings)

"""Cross-layer transcoders against single transcoders, dense algebra, and each other (methods.md T12)."""

import pytest
import torch
from helpers import to_unit_rows

import saebench as sb
from saebench.activations import TensorSource
from saebench.codes import SparseCodes
from saebench.dictionaries import Scaling, TrainingBatch, parse_dictionary
from saebench.errors import UserError
from saebench.kernels import use_implementation
from saebench.trainer import TrainConfig

READS, WRITES = ["in.0", "in.1", "in.2"], ["out.0", "out.1", "out.2"]
RULES = {
    "per layer": (sb.CLT, {"k": 3}),
    "joint": (sb.CLT, {"k": 5, "joint": True}),
    "free": (sb.CLT, {"k": 3, "decoder": "free"}),
    "jumprelu": (sb.CLTJumpReLU, {"target_l0": 6}),
    "jumprelu, free": (sb.CLTJumpReLU, {"target_l0": 6, "decoder": "free"}),
}


def random_clt(rule="per layer", layers=3, width=4, out=5, per_layer=8, seed=0, **options):
    """A cross-layer transcoder in training whose parameters are all random."""
    cls, settings = RULES[rule]
    config = cls(
        d_sae=layers * per_layer, site=READS[:layers], target=WRITES[:layers], d_in=layers * width, d_out=layers * out,
        widths_in=(width,) * layers, widths_out=(out,) * layers, **{**settings, **options},
    )  # fmt: skip
    clt = config.build()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
        clt.variance.fill_(1.3)
        if rule.startswith("jump"):
            clt.slow_log_threshold.mul_(0.1).sub_(0.1)
            clt.sparsity.start(0.2)
    to_unit_rows(clt)
    return clt


def batch_for(clt, tokens=20, seed=1, dead=None):
    generator = torch.Generator().manual_seed(seed)
    dtype = clt.b_enc.dtype
    x = torch.randn(tokens, clt.config.d_in, generator=generator).to(dtype)
    y = torch.randn(tokens, clt.config.d_out, generator=generator).to(dtype)
    return TrainingBatch(x, y, torch.zeros(clt.config.d_sae, dtype=torch.bool) if dead is None else dead, step=3, steps=10)


def gradients(dictionary, batch):
    dictionary.zero_grad()
    losses = dictionary.losses(batch)
    losses.total.backward()
    return losses, {name: p.grad.clone() for name, p in dictionary.named_parameters()}


def test_one_layer_is_the_transcoder():
    clt = random_clt(layers=1, per_layer=20, aux_coefficient=0.2, k_aux=3)
    transcoder = sb.TopK(
        d_sae=20, k=3, site="in.0", target="out.0", d_in=4, d_out=5, aux_coefficient=0.2, k_aux=3
    ).build()  # fmt: skip
    with torch.no_grad():
        for name in ("W_enc_FD", "b_enc", "b_dec", "variance"):
            getattr(transcoder, name).copy_(getattr(clt, name))
        transcoder.W_dec.copy_(clt.W_dec[0][:, 0])
    batch = batch_for(clt, dead=torch.arange(20) > 12)
    (ours, our_gradients), (theirs, their_gradients) = gradients(clt, batch), gradients(transcoder, batch)
    torch.testing.assert_close(ours.total, theirs.total)
    torch.testing.assert_close(our_gradients.pop("W_dec.0")[:, 0], their_gradients.pop("W_dec"))
    torch.testing.assert_close(our_gradients, their_gradients)
    torch.testing.assert_close(clt.encode(batch.x).to_dense(), transcoder.encode(batch.x).to_dense())
    torch.testing.assert_close(clt(batch.x), transcoder(batch.x))


def test_one_layer_trains_as_the_transcoder():
    source = planted()
    training = TrainConfig(num_tokens=128 * 20, batch_size=128, lr=3e-3)
    clt, transcoder = sb.train(
        [
            sb.CLT(d_sae=32, k=4, site="in.1", target="out.1"),
            sb.Transcoder(d_sae=32, k=4, site="in.1", target="out.1", centre=False),
        ],
        source,
        training,
    )
    torch.testing.assert_close(clt.W_dec[0][:, 0], transcoder.W_dec, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clt.W_enc, transcoder.W_enc, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slope", [1.0, 4.0])
def test_one_layer_of_jumprelu_is_the_tanh_form_of_jumprelu(slope):
    clt = random_clt("jumprelu, free", layers=1, per_layer=20, slope=slope)
    transcoder = sb.JumpReLU(d_sae=20, site="in.0", target="out.0", d_in=4, d_out=5, penalty="tanh", target_l0=6).build()
    with torch.no_grad():
        for name in ("W_enc_FD", "b_enc", "b_dec", "variance", "slow_log_threshold"):
            getattr(transcoder, name).copy_(getattr(clt, name))
        transcoder.W_dec.copy_(clt.W_dec[0][:, 0])
        transcoder.sparsity.start(0.2)
    batch = batch_for(clt)
    (ours, our_gradients), (theirs, their_gradients) = gradients(clt, batch), gradients(transcoder, batch)
    our_gradients["W_dec"] = our_gradients.pop("W_dec.0")[:, 0]
    equal = all(torch.allclose(our_gradients[name], their_gradients[name], atol=1e-6) for name in their_gradients)
    assert equal == (slope == 4.0)  # the slope that the tanh form has
    assert torch.allclose(ours.total, theirs.total) == (slope == 4.0)


@pytest.mark.parametrize("rule", ["per layer", "free"])
def test_without_cross_layer_decoders_it_is_as_many_transcoders(rule):
    clt = random_clt(rule, aux_coefficient=0)
    with torch.no_grad():
        for W in clt.W_dec:
            W[:, 1:] = 0
    to_unit_rows(clt)
    batch = batch_for(clt)
    _, ours = gradients(clt, batch)
    for layer in range(3):
        single = sb.TopK(
            d_sae=8, k=3, site="a", target="b", d_in=4, d_out=5, aux_coefficient=0, decoder=clt.config.decoder
        ).build()  # fmt: skip
        latents = slice(8 * layer, 8 * layer + 8)
        with torch.no_grad():
            single.W_enc_FD.copy_(clt.W_enc_FD[latents])
            single.b_enc.copy_(clt.b_enc[latents])
            single.W_dec.copy_(clt.W_dec[layer][:, 0])
            single.b_dec.copy_(clt.b_dec[5 * layer : 5 * layer + 5])
            single.variance.copy_(clt.variance * 3)  # the loss is divided by the width of all targets
        x, y = batch.x[:, 4 * layer :][:, :4], batch.y[:, 5 * layer :][:, :5]
        torch.testing.assert_close(clt(batch.x)[:, 5 * layer :][:, :5], single(x))
        _, theirs = gradients(single, TrainingBatch(x, y, batch.dead_F[latents], step=3, steps=10))
        torch.testing.assert_close(ours["W_enc_FD"][latents], theirs["W_enc_FD"])
        torch.testing.assert_close(ours["b_enc"][latents], theirs["b_enc"])
        torch.testing.assert_close(ours[f"W_dec.{layer}"][:, 0], theirs["W_dec"])
        torch.testing.assert_close(ours["b_dec"][5 * layer : 5 * layer + 5], theirs["b_dec"])


@pytest.mark.parametrize("rule", RULES)
def test_scatter_by_source_is_gather_by_target(rule):
    clt = random_clt(rule)
    x = batch_for(clt).x
    codes = clt.encode(x)
    dense = codes.to_dense()
    weights = [layer.folded() for layer in clt.weights()]
    gathered = []
    for target in range(3):
        total = clt.b_dec[5 * target : 5 * target + 5]
        for source in range(target + 1):
            W = weights[source].W_dec_FD.view(8, 3 - source, 5)[:, target - source]
            total = total + dense[:, 8 * source : 8 * source + 8] @ W
        gathered.append(total)
    torch.testing.assert_close(clt.decode(codes), torch.cat(gathered, 1))
    torch.testing.assert_close(clt(x), torch.cat(gathered, 1))


def test_a_decoder_is_stored_at_the_distance_of_its_layers():
    clt = random_clt()
    assert [tuple(clt.public_tensors()[f"W_dec.{n}"].shape) for n in range(3)] == [(8, 3, 5), (8, 2, 5), (8, 1, 5)]
    for source in range(3):
        for target in range(source, 3):
            with torch.no_grad():
                for parameter in (*clt.W_dec, clt.b_dec):
                    parameter.zero_()
                clt.W_dec[source][:, target - source] = 1
            assert (clt.decoder(source, target) == 1).all()
            latent = 8 * source + 3
            one = SparseCodes(torch.tensor([[latent]]), torch.tensor([[2.0]]), 24)
            expected = torch.zeros(1, 15)
            expected[:, 5 * target : 5 * target + 5] = 2
            torch.testing.assert_close(clt.decode(one), expected)


def test_latents_of_all_layers_compete_for_a_joint_k():
    clt = random_clt("joint", k=7)
    x = batch_for(clt, tokens=50).x
    z = torch.cat([x[:, 4 * n : 4 * n + 4] @ clt.W_enc_FD[8 * n : 8 * n + 8].T for n in range(3)], 1) + clt.b_enc
    expected = torch.zeros_like(z).scatter(1, z.topk(7).indices, z.topk(7).values.relu())
    torch.testing.assert_close(clt.encode(x).to_dense(), expected)
    assert not torch.equal(clt.encode(x).to_dense(), random_clt(k=7).encode(x).to_dense())
    counts = [clt.encode(x).split([8, 8, 8])[n].l0() for n in range(3)]
    assert any(len(set(count.tolist())) > 3 for count in counts)  # from token to token layers get more or fewer


def test_of_equal_scores_the_lowest_number_wins_across_layers():
    clt = random_clt("joint", k=3)
    with torch.no_grad():
        clt.W_enc_FD.zero_()
        clt.b_enc.fill_(0.5)
        clt.b_enc[[9, 20]] = 1.0
    codes = clt.encode(torch.zeros(2, 12))
    assert codes.nonzero()[1].tolist() == [0, 9, 20] * 2


@pytest.mark.parametrize("rule", RULES)
def test_gradients_equal_those_of_dense_algebra(rule):
    clt = random_clt(rule, aux_coefficient=0.3, k_aux=2).double()
    batch = batch_for(clt, dead=torch.arange(24) % 5 == 0)
    losses, ours = gradients(clt, batch)
    with use_implementation("reference"):
        dense_losses, dense = gradients(clt, batch)
    if rule.startswith("jump"):  # the search for the coefficient has moved on by a step
        assert losses.total.item() == pytest.approx(dense_losses.total.item(), rel=0.2)
        clt = random_clt(rule, aux_coefficient=0.3, k_aux=2).double()
        with use_implementation("reference"):
            dense_losses, dense = gradients(clt, batch)
    torch.testing.assert_close(losses.total, dense_losses.total)
    torch.testing.assert_close(ours, dense)
    assert all(gradient.abs().sum() > 0 for gradient in ours.values())


@pytest.mark.parametrize("rule", ["per layer", "free"])
def test_gradients_of_the_loss_equal_finite_differences(rule):
    clt = random_clt(rule, aux_coefficient=0).double()
    batch = batch_for(clt)
    _, ours = gradients(clt, batch)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in clt.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        ends = []
        for step in (1e-6, -2e-6):
            parameter.data += step * direction
            ends.append(clt.losses(batch).total.item())
        parameter.data += 1e-6 * direction
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float((ours[name] * direction).sum()), rel=1e-5)


def test_the_loss_of_jumprelu_is_the_formula():
    clt = random_clt("jumprelu, free", slope=0.7, pull=0.1, bandwidth=0.5).double()
    batch = batch_for(clt)
    total = clt.losses(batch).total
    unit = clt.variance.sqrt()
    norms = torch.cat([W.flatten(1).norm(dim=1) for W in clt.W_dec])
    z = torch.cat([batch.x[:, 4 * n : 4 * n + 4] @ clt.W_enc_FD[8 * n : 8 * n + 8].T for n in range(3)], 1) + clt.b_enc
    theta = (4 * clt.slow_log_threshold).exp()
    a = z * (z > theta)
    written = [a[:, 8 * n : 8 * n + 8] @ clt.W_dec[n].flatten(1) for n in range(3)]
    y_hat = clt.b_dec + sum(torch.nn.functional.pad(w, (5 * n, 0)) for n, w in enumerate(written))
    sparsity = (0.7 / unit * a * norms).tanh().sum(1).mean()
    pull = ((theta - z).relu() * norms).sum(1).mean()
    expected = (y_hat - batch.y).square().sum(1).mean() + clt.sparsity.coefficient(batch) * sparsity + 0.1 * unit * pull
    torch.testing.assert_close(total, expected / (15 * clt.variance))


def test_auxk_is_that_of_dense_algebra():
    clt = random_clt(k_aux=2)
    batch = batch_for(clt)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[[1, 4, 6, 17]] = True  # none in the middle layer
    residual = batch.y - clt(batch.x)
    z = torch.cat([batch.x[:, 4 * n : 4 * n + 4] @ clt.W_enc_FD[8 * n : 8 * n + 8].T for n in range(3)], 1) + clt.b_enc
    z = z.masked_fill(~dead, -torch.inf)
    best = [z[:, 8 * n : 8 * n + 8].topk(2) for n in range(3)]
    f = torch.cat([torch.zeros(20, 8).scatter(1, b.indices, b.values.clamp_min(0)) for b in best], 1)
    without_bias = clt.decode(SparseCodes.from_dense(f)) - clt.b_dec
    expected = (residual - without_bias).square().sum() / (residual - residual.mean(0)).square().sum()
    torch.testing.assert_close(clt.auxk(batch.x, -residual, clt.weights(), dead), expected)
    assert float(clt.auxk(batch.x, -residual, clt.weights(), dead & False)) == 0


@pytest.mark.parametrize("rule", RULES)
def test_folding_changes_nothing_but_the_units(rule):
    generator = torch.Generator().manual_seed(4)
    for uneven in (False, True):
        clt = random_clt(rule)
        batch = batch_for(clt)
        spread = torch.rand(2, 3, generator=generator) + 0.5 if uneven else torch.tensor([[0.4] * 3, [2.5] * 3])
        read, write = (
            Scaling(torch.randn(3 * width, generator=generator), scale.repeat_interleave(width))
            for width, scale in zip((4, 5), spread, strict=True)
        )
        raw = batch.x / read.scale_D + read.shift_D
        before = clt.encode(batch.x)
        expected = clt(batch.x) / write.scale_D + write.shift_D
        clt.fold(read, write)
        torch.testing.assert_close(clt(raw), expected, rtol=1e-4, atol=1e-4)
        after = clt.encode(raw)
        assert torch.equal(after.to_dense() > 0, before.to_dense() > 0)
        torch.testing.assert_close(clt.decode(after), expected, rtol=1e-4, atol=1e-4)
        if not uneven:
            for W in clt.W_dec:
                torch.testing.assert_close(W.flatten(1).norm(dim=1), torch.ones(8))


@pytest.mark.parametrize("rule", RULES)
def test_save_and_load_give_identical_codes(rule, tmp_path):
    clt = random_clt(rule)
    clt.fold(Scaling.identity(12), Scaling.identity(15))
    clt.save(tmp_path / "clt")
    loaded = sb.load(tmp_path / "clt")
    x = batch_for(clt).x
    assert torch.equal(loaded.encode(x).to_dense(), clt.encode(x).to_dense())
    assert torch.equal(loaded(x), clt(x))
    assert loaded.config == clt.config
    tensors = loaded.public_tensors()
    assert tensors["W_enc"].shape == (4, 24) and tensors["W_dec.1"].shape == (8, 2, 5)
    assert ("threshold" in tensors) == rule.startswith("jump")


@pytest.mark.parametrize("rule", RULES)
def test_one_site_at_a_time_is_all_at_once(rule):
    clt = random_clt(rule)
    x_CSW = torch.randn(3, 6, 12, generator=torch.Generator().manual_seed(7))
    reads = list(x_CSW.split(4, dim=2))
    _, expected = clt.reconstruct_contexts(x_CSW, 2)
    for write in range(3):
        needed = clt.depends_on(write)
        assert list(needed) == ([0, 1, 2] if rule == "joint" else list(range(write + 1)))
        one = clt.write_one([reads[n] for n in needed], write, 2)
        torch.testing.assert_close(one, expected[:, 5 * write : 5 * write + 5])


def test_within_a_pass_each_layer_is_encoded_once_and_never_after():
    clt = random_clt()
    encoded = []
    select = clt.select_layer
    clt.select_layer = lambda layer, *rest: encoded.append(layer) or select(layer, *rest)
    with torch.inference_mode():
        for _ in range(2):
            reads = list(torch.randn(3, 2, 4, 4))
            results = [clt.write_one(reads[: write + 1], write) for write in range(3)]
            expected = clt(torch.cat([x[:, 1:].flatten(0, 1) for x in reads], 1))
            torch.testing.assert_close(torch.cat(results, 1), expected)
        assert encoded == [0, 1, 2, 0, 1, 2] * 2
        first, second = clt.write_one(reads[:1], 0), clt.write_one([reads[0] + 1], 0)
        assert not torch.equal(first, second)


def test_a_free_decoder_ranks_by_all_that_a_latent_writes():
    clt = random_clt("free", aux_coefficient=0)
    x = batch_for(clt).x
    before, codes = clt(x), clt.encode(x)
    with torch.no_grad():
        factor = torch.rand(24, generator=torch.Generator().manual_seed(2)) * 3 + 0.3
        clt.W_enc_FD *= factor[:, None]
        clt.b_enc *= factor
        for n in range(3):
            clt.W_dec[n] /= factor[8 * n : 8 * n + 8, None, None]
    torch.testing.assert_close(clt(x), before)
    torch.testing.assert_close(clt.encode(x).to_dense(), codes.to_dense())


def planted(tokens=4000, sites=3, seed=0):
    """Each layer's input holds features of its own, which it and all later layers write."""
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = {}, {f"out.{n}": torch.zeros(tokens, 10) for n in range(sites)}
    for layer in range(sites):
        features = (torch.rand(tokens, 10, generator=generator) < 0.1) * torch.rand(tokens, 10, generator=generator)
        inputs[f"in.{layer}"] = features @ torch.nn.functional.normalize(torch.randn(10, 12, generator=generator), dim=1) + 0.3
        for later in range(layer, sites):
            outputs[f"out.{later}"] += features @ torch.nn.functional.normalize(torch.randn(10, 10, generator=generator), dim=1)
    return TensorSource({**inputs, **{site: y - 0.2 for site, y in outputs.items()}})


def fvu(dictionary, source):
    reads, writes = (
        torch.cat([source.fetch(torch.arange(source.num_contexts), [site])[site].values[:, 0] for site in sites], 1)
        for sites in (dictionary.config.reads, dictionary.config.writes)
    )
    return float((dictionary(reads) - writes).square().sum() / (writes - writes.mean(0)).square().sum())


@pytest.mark.parametrize("rule", RULES)
def test_training_learns_what_is_written_across_layers(rule):
    cls, _ = RULES[rule]
    settings = {"joint": {"k": 6, "joint": True}, "per layer": {"k": 2}, "free": {"k": 2, "decoder": "free"}}.get(
        rule, {"target_l0": 4, "decoder": "free" if "free" in rule else "unit"}
    )
    source = planted()
    training = TrainConfig(num_tokens=64 * 150, batch_size=64, lr=2e-2)
    clt = sb.train(cls(d_sae=48, site=READS, target=WRITES, **settings), source, training)
    assert fvu(clt, source) < 0.2
    assert clt.trained_on["writes"] == WRITES
    if rule == "per layer":
        alone = sb.train(sb.CLT(d_sae=16, k=2, site=READS[2], target=WRITES[2]), source, training)
        assert fvu(alone, source) > 0.5  # two thirds of what layer 2 writes comes from earlier layers
        for W in clt.W_dec:
            torch.testing.assert_close(W[:, 0].norm(dim=1) > 0, torch.ones(16, dtype=torch.bool))
    if rule.startswith("jump"):
        l0 = clt.encode(torch.cat([source.fetch(torch.arange(2000), [s])[s].values[:, 0] for s in READS], 1)).l0()
        assert float(l0.float().mean()) == pytest.approx(4, rel=0.2)


def test_every_setting_changes_something():
    batch = batch_for(random_clt(), dead=torch.arange(24) % 3 == 0)
    base = random_clt(aux_coefficient=0.1, k_aux=2).losses(batch).total
    for options in ({"aux_coefficient": 0.2}, {"k_aux": 1}, {"k": 2}, {"joint": True}, {"decoder": "free"}):
        assert random_clt(**{"aux_coefficient": 0.1, "k_aux": 2, **options}).losses(batch).total != base
    plain = random_clt("jumprelu").losses(batch).total
    for options in ({"slope": 2.0}, {"pull": 0.1}):
        assert random_clt("jumprelu", **options).losses(batch).total != plain
    narrow, wide = (gradients(random_clt("jumprelu", bandwidth=b), batch)[1]["slow_log_threshold"] for b in (0.2, 2.0))
    assert not torch.equal(narrow, wide)
    fixed = [random_clt("jumprelu", target_l0=None, coefficient=1.0, coefficient_warmup=w) for w in (0.0, 0.9)]
    assert fixed[0].losses(batch).total > fixed[1].losses(batch).total
    assert sb.CLTJumpReLU(d_sae=24, site=READS, target=WRITES, coefficient=1.0).coefficient_warmup == 1.0
    x, y = batch.x, batch.y
    starts = []
    for options in ({}, {"initial_threshold": 0.03}, {"target_l0": 12}):
        clt = random_clt("jumprelu", **options)
        clt.initialise(x, y, torch.Generator().manual_seed(0))
        starts.append(clt.encode(x).l0().float().mean().item())
    assert starts[0] == pytest.approx(6, rel=0.2) and starts[2] == pytest.approx(12, rel=0.2) and starts[1] not in (6, 12)
    assert parse_dictionary({"architecture": "clt_jumprelu", "d_sae": 300, "site": READS, "target": WRITES}, "x").centre


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": READS, "target": WRITES[:2]}, "site lists 3 layers and target 2"),
        ({"site": READS}, "reads and writes every layer: give site = "),
        ({"target": WRITES}, "reads and writes every layer: give site = "),
        ({"site": READS, "target": WRITES, "d_sae": 100}, "d_sae=100 is not divisible by the 3 layers: use 99 or 102"),
        ({"site": READS, "target": WRITES, "k": 11}, "k=11 exceeds the 10 latents of each layer"),
        ({"site": READS, "target": WRITES, "k": 31, "joint": True}, "k=31 exceeds d_sae=30"),
        ({"site": READS, "target": WRITES, "k": 3, "skip": True}, "unknown key skip"),
        ({"site": READS, "target": WRITES, "widths_in": [4, 4, 5], "k": 2}, "sites of site are 4, 4, 5 wide"),
    ],
)
def test_bad_input_is_told_in_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        sb.CLT(**{"d_sae": 30, **settings})


def test_sites_that_are_missing_or_unequal_are_told():
    source = planted(200)
    with pytest.raises(UserError, match=r"'in\.3' is not among the activations"):
        sb.train(sb.CLT(d_sae=30, k=2, site=[*READS[:2], "in.3"], target=WRITES), source)
    with pytest.raises(UserError, match="sites of target are 10, 10, 12 wide: layers must be of equal width"):
        sb.train(sb.CLT(d_sae=30, k=2, site=READS, target=[*WRITES[:2], "in.0"]), source)

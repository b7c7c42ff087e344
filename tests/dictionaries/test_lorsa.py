"""Lorsa against the attention layers it can express exactly, and against the transcoder it is on contexts of one token."""

import pytest
import torch

import saebench as sb
from saebench.activations import ActivationStream, TensorSource
from saebench.dictionaries import Scaling, TrainingBatch
from saebench.dictionaries.lorsa import Lorsa, frequencies
from saebench.errors import UserError
from saebench.features import index
from saebench.lm import LanguageModel
from saebench.lm.attention import attention_input, attention_weights
from saebench.trainer import Member, TrainConfig

READ, WRITE = "blocks.1.attn.hook_in", "blocks.1.hook_attn_out"
PLACES = {"site": READ, "target": WRITE}


@pytest.fixture(scope="module")
def llama(tiny_lm) -> LanguageModel:
    """A tiny Llama with random weights: rotary positions, two heads to a key."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.config._name_or_path = "llama"
    return LanguageModel("llama", model, tiny_lm.tokenizer, "llama")


@pytest.fixture(scope="module")
def stream(tiny_lm, contexts):
    return ActivationStream(tiny_lm, contexts, [READ, WRITE])


def random_lorsa(d_sae=12, k=4, d_in=6, seed=0, **options):
    """Untrained, with all biases and scores different from 0."""
    options = {"d_qk": 4, "num_qk": 3, "rotary_dim": 0, "initial": "random", "initial_directions": "random", **options}
    lorsa = Lorsa(d_sae=d_sae, k=k, d_in=d_in, d_out=5, **PLACES, **options).build()
    generator = torch.Generator().manual_seed(seed)
    x, y = random_data(generator=generator)
    lorsa.initialise(x, y, generator)
    with torch.no_grad():
        for bias in (lorsa.b_Q, lorsa.b_K, lorsa.b_V, lorsa.b_dec):
            bias.normal_(generator=generator)
    return lorsa


def random_data(contexts=6, size=9, d_in=6, generator=None):
    generator = generator or torch.Generator().manual_seed(7)
    return torch.randn(contexts, size, d_in, generator=generator) + 0.5, torch.randn(contexts, size, 5, generator=generator) - 0.3


def exact_lorsa(lm, layer):
    """The layer's own weights: one group per head, one Lorsa head per coordinate of its values, all of them active."""
    host = attention_weights(lm, layer)
    d_sae, width = host.num_heads * host.d_head, host.W_V_HDE.shape[1]
    sites = {"site": attention_input(layer), "target": f"blocks.{layer}.hook_attn_out"}
    config = Lorsa(d_sae=d_sae, k=d_sae, score="abs", num_qk=host.num_heads, d_in=width, d_out=width, **sites).for_lm(lm)
    lorsa = config.build()
    lengths_F = host.W_O_HED.flatten(0, 1).norm(dim=1)
    with torch.no_grad():
        for name in ("W_Q", "b_Q", "W_K", "b_K"):
            getattr(lorsa, name).copy_(getattr(host, name + ("_HDE" if name[0] == "W" else "_HE")))
        lorsa.W_V_FD.copy_(host.W_V_HDE.transpose(1, 2).flatten(0, 1) * lengths_F[:, None])
        lorsa.b_V.copy_(host.b_V_HE.flatten() * lengths_F)
        lorsa.W_dec.copy_(host.W_O_HED.flatten(0, 1) / lengths_F[:, None])
        lorsa.b_dec.copy_(host.b_O_D)
    return lorsa.requires_grad_(False)


@pytest.mark.parametrize("name", ["tiny_lm", "llama"])
def test_the_layers_own_weights_give_the_layers_output(name, request):
    lm = request.getfixturevalue(name)
    lorsa = exact_lorsa(lm, 1)
    ids = torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(2))
    x, y = lm.read(ids, [READ, WRITE]).values()
    torch.testing.assert_close(lorsa(x).view(y.shape), y, rtol=0, atol=1e-5)
    skipped, y_hat = lorsa.reconstruct_contexts(x)
    assert len(skipped) == 3 * 19
    torch.testing.assert_close(y_hat, y[:, 1:].flatten(0, 1), rtol=0, atol=1e-5)
    pattern = lorsa.attention_pattern(x, range(0, 32, 8))
    torch.testing.assert_close(pattern, attention_weights(lm, 1).pattern(x))


@pytest.mark.parametrize("name", ["tiny_lm", "llama"])
def test_splicing_in_the_layers_own_weights_costs_nothing(name, request, contexts):
    figures = sb.evaluate(exact_lorsa(request.getfixturevalue(name), 1), request.getfixturevalue(name), contexts[:8])
    assert figures["fvu"] == pytest.approx(0, abs=1e-9)
    assert figures["ce_increase"] == pytest.approx(0, abs=1e-5)
    assert figures["l0"] == 32


@pytest.mark.parametrize("name", ["tiny_lm", "llama"])
@pytest.mark.parametrize("centre", [False, True])
def test_queries_and_keys_start_as_the_models_in_normalised_space(name, centre, request, contexts):
    lm = request.getfixturevalue(name)
    source = ActivationStream(lm, contexts, [READ, WRITE])
    sample = {site: encoded.decode() for site, encoded in source.fetch(torch.arange(8), [READ, WRITE]).items()}
    config = Lorsa(d_sae=64, k=8, num_qk=8, centre=centre, **PLACES)
    lorsa = Member.create(config, TrainConfig(), sample, lm=lm).finished()
    assert (lorsa.config.d_qk, lorsa.group_size, lorsa.config.rotary_dim) == (8, 8, 8 if name == "llama" else 0)
    expected = attention_weights(lm, 1).pattern(sample[READ]).repeat_interleave(2, 1)
    torch.testing.assert_close(lorsa.attention_pattern(sample[READ], range(0, 64, 8)), expected, rtol=1e-4, atol=1e-5)


def test_on_one_token_it_is_a_transcoder():
    lorsa = random_lorsa()
    x = random_data()[0][:, :1]
    transcoder = sb.TopK(d_sae=12, k=4, d_in=6, d_out=5, **PLACES).build()
    with torch.no_grad():
        transcoder.W_enc_FD.copy_(lorsa.W_V_FD)
        transcoder.b_enc.copy_(lorsa.b_V)
        transcoder.W_dec.copy_(lorsa.W_dec)
        transcoder.b_dec.copy_(lorsa.b_dec)
    torch.testing.assert_close(lorsa.encode(x).to_dense(), transcoder.encode(x[:, 0]).to_dense())
    torch.testing.assert_close(lorsa(x), transcoder(x[:, 0]))


def test_contributions_of_sources_add_up_to_the_activation():
    lorsa = random_lorsa(k=12, score="abs")
    x = random_data()[0][:1]
    codes = lorsa.encode(x).to_dense()
    for head in (0, 5, 11):
        pattern = lorsa.z_pattern(x[0], head)
        torch.testing.assert_close(pattern.sum(1), codes[:, head], rtol=1e-5, atol=1e-6)
        assert (pattern.triu(1) == 0).all()
        v = x[0] @ lorsa.W_V_FD[head] + lorsa.b_V[head]
        torch.testing.assert_close(pattern[0, 0], v[0])


@pytest.mark.parametrize("score", ["relu", "abs"])
def test_folding_changes_nothing_but_the_units(score):
    lorsa = random_lorsa(score=score)
    generator = torch.Generator().manual_seed(3)
    x = random_data()[0] * 3
    read = Scaling(torch.randn(6, generator=generator), torch.full((6,), 0.4))
    write = Scaling(torch.randn(5, generator=generator), torch.full((5,), 2.5))
    before, y_hat = lorsa.encode(read(x)), lorsa(read(x)) / write.scale_D + write.shift_D
    lorsa.fold(read, write)
    after = lorsa.encode(x)
    torch.testing.assert_close(lorsa(x), y_hat, rtol=1e-5, atol=1e-5)
    assert torch.equal(after.indices, before.indices)
    torch.testing.assert_close(after.values, before.values / 2.5, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lorsa.W_dec.norm(dim=1), torch.ones(12))


def test_save_and_load_give_identical_codes(tmp_path, llama, contexts):
    lorsa = exact_lorsa(llama, 1)
    lorsa.save(tmp_path / "lorsa")
    loaded = sb.load(tmp_path / "lorsa")
    x = llama.read(contexts.ids_NS[:4], [READ])[READ]
    assert torch.equal(loaded.encode(x).to_dense(), lorsa.encode(x).to_dense())
    assert torch.equal(loaded(x), lorsa(x))
    assert loaded.config == lorsa.config
    assert torch.equal(loaded.rotary_frequencies, lorsa.rotary_frequencies)


def test_gradients_of_the_whole_loss_equal_finite_differences():
    lorsa = random_lorsa(aux_coefficient=0.5, k_aux=2).double()
    x, y = (t.double() for t in random_data(3, 5))
    batch = TrainingBatch(x, y, torch.arange(12) % 3 == 0)
    names = [name for name, _ in lorsa.named_parameters()]
    main = lambda: (lorsa.reconstruct_contexts(x)[1] - y[:, 1:].flatten(0, 1)).square().mean() / lorsa.variance  # noqa: E731
    losses = lorsa.losses(batch)
    assert float(losses.parts["reconstruction"]) == pytest.approx(main().item(), rel=1e-12)
    assert len(losses.codes) == len(losses.target_BD) == len(losses.squared_error_B) == 3 * 4
    lorsa.config = lorsa.config.model_copy(update={"aux_coefficient": 0.0})
    gradients = torch.autograd.grad(lorsa.losses(batch).total, list(lorsa.parameters()))
    generator = torch.Generator().manual_seed(2)
    for name, parameter, gradient in zip(names, lorsa.parameters(), gradients, strict=True):
        start = parameter.detach().clone()
        direction = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            parameter.data = start + sign * 1e-6 * direction
            ends.append(main().item())
        parameter.data = start
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=1e-8), name


def test_auxk_teaches_dead_heads_alone():
    lorsa = random_lorsa(aux_coefficient=1.0, k_aux=3)
    x, y = random_data()
    dead = torch.arange(12) >= 8
    with_aux = lorsa.losses(TrainingBatch(x, y, dead))
    without = lorsa.losses(TrainingBatch(x, y, torch.zeros(12, dtype=torch.bool)))
    assert "auxk" in with_aux.parts and "auxk" not in without.parts
    gradient = torch.autograd.grad(with_aux.total, lorsa.W_dec)[0] - torch.autograd.grad(without.total, lorsa.W_dec)[0]
    assert gradient[:8].abs().max() < 1e-6 < gradient[8:].abs().max()


def test_position_0_is_read_but_not_predicted():
    lorsa = random_lorsa()
    x, y = random_data()
    other_x, other_y = x.clone(), y.clone()
    other_x[:, 0] += 1
    other_y[:, 0] += 1
    dead = torch.zeros(12, dtype=torch.bool)
    losses = lorsa.losses(TrainingBatch(x, y, dead))
    assert torch.equal(losses.total, lorsa.losses(TrainingBatch(x, other_y, dead)).total)
    assert not torch.equal(losses.total, lorsa.losses(TrainingBatch(other_x, y, dead)).total)
    torch.testing.assert_close(losses.codes.to_dense(), lorsa.encode(x).to_dense().view(6, 9, 12)[:, 1:].flatten(0, 1))
    torch.testing.assert_close(
        lorsa.encode_contexts(x, 3).to_dense(), lorsa.encode(x).to_dense().view(6, 9, 12)[:, 3:].flatten(0, 1)
    )


@pytest.mark.parametrize("changed", [{"scale": 2.0}, {"soft_cap": 0.2}, {"window": 2}, {"rotary_dim": 4, "rotary_base": 30.0}])
def test_the_way_positions_attend_matters(changed):
    x = random_data()[0]
    pattern = random_lorsa().attention_pattern(x, [0, 4])
    other = random_lorsa(**changed).attention_pattern(x, [0, 4])
    assert not torch.allclose(pattern, other, atol=1e-2)
    if "window" in changed:
        assert (other.tril(-2) == 0).all()


def test_training_on_a_models_stream_beats_the_mean_and_depends_on_the_start(stream, tiny_lm, tmp_path):
    training = sb.TrainConfig(num_tokens=20_000, batch_size=256, lr=5e-3)
    small = {"d_sae": 64, "k": 8, **PLACES}
    configs = [Lorsa(**small), Lorsa(**small, initial="random"), Lorsa(**small, initial_directions="random", d_qk=8, num_qk=8)]
    configs.append(Lorsa(**small, active_share=0.3))
    trained = sb.train(configs, stream, training)
    fvus = [sb.evaluate(lorsa, tiny_lm, stream.contexts[-20:])["fvu"] for lorsa in trained]
    assert fvus[0] < 0.35 and max(fvus) < 0.75, fvus
    assert len({round(fvu, 6) for fvu in fvus}) == 4
    assert trained[0].trained_on["writes"] == [WRITE]
    store = index(trained[0], stream, tmp_path / "features", limit=8)
    codes = trained[0].encode_contexts(stream.fetch(torch.arange(8) * stream.num_contexts // 8, [READ])[READ].decode())
    assert store.counts_F.tolist() == codes.firings().tolist()


def test_where_directions_start(stream, tiny_lm):
    sample = {site: encoded.decode() for site, encoded in stream.fetch(torch.arange(16), [READ, WRITE]).items()}
    member = Member.create(Lorsa(d_sae=32, k=8, **PLACES), TrainConfig(), sample, lm=tiny_lm)
    host = attention_weights(tiny_lm, 1)
    for head in range(4):
        rows = member.dictionary.W_dec[8 * head : 8 * head + 8].detach()
        basis = torch.linalg.qr(host.W_O_HED[head].T).Q
        torch.testing.assert_close(rows @ basis @ basis.T, rows, rtol=0, atol=1e-5)
    torch.testing.assert_close(member.dictionary.W_dec.norm(dim=1), torch.ones(32))
    for initial_directions in ("random", "active_subspace"):
        config = Lorsa(d_sae=32, k=8, initial_directions=initial_directions, **PLACES)
        member = Member.create(config, TrainConfig(), sample, lm=tiny_lm)
        y = member.write(sample[WRITE])[:, 1:].flatten(0, 1)
        codes, y_hat = member.dictionary.reconstruct_contexts(member.read(sample[READ]))
        error, written = (y - y_hat).detach(), (y_hat - y.mean(0)).detach()
        assert abs(float((error * written).sum() / written.square().sum())) < 1e-3  # no other scale would miss the target less
        assert float(error.square().sum()) < 0.95 * float((y - y.mean(0)).square().sum())
        assert float((codes.firings() > 0).float().mean()) == 1


def test_short_runs_do_not_raise_the_learning_rate(stream, tiny_lm):
    sample = {site: encoded.decode() for site, encoded in stream.fetch(torch.arange(4), [READ, WRITE]).items()}
    short = TrainConfig(num_tokens=100_000)
    assert Member.create(Lorsa(d_sae=256, k=8, **PLACES), short, sample, lm=tiny_lm).lr == pytest.approx(8 * 2e-4)
    assert short.lr_for(256) == pytest.approx(80 * 2e-4)


def test_resuming_is_exact(stream, tmp_path, monkeypatch):
    config = Lorsa(d_sae=32, k=4, aux_coefficient=0.1, **PLACES)
    training = sb.TrainConfig(num_tokens=2560, batch_size=256, checkpoint_every=4, dead_after=256)
    whole = sb.train(config, stream, training, out=tmp_path / "whole")
    step = Member.step

    def stopping(self, activations, number):
        if number == 6:
            raise KeyboardInterrupt
        step(self, activations, number)

    monkeypatch.setattr(Member, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        sb.train(config, stream, training, out=tmp_path / "parts")
    monkeypatch.setattr(Member, "step", step)
    parts = sb.train(config, stream, training, out=tmp_path / "parts")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], tensor), name


def test_ordered_tensors_without_a_model_train_too():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 12, 8, generator=generator)
    y = x.cumsum(1) / torch.arange(1, 13)[:, None]  # what uniform attention writes
    config = Lorsa(d_sae=16, k=16, score="abs", d_qk=4, rotary_dim=0, initial="random", initial_directions="random", **PLACES)
    lorsa = sb.train(
        config, TensorSource({READ: x, WRITE: y}, skip=1), sb.TrainConfig(num_tokens=300 * 192, batch_size=192, lr=5e-3)
    )
    y_hat = lorsa.reconstruct_contexts(x)[1]
    fvu = (y_hat - y[:, 1:].flatten(0, 1)).square().sum() / (y[:, 1:] - y[:, 1:].mean((0, 1))).square().sum()
    assert lorsa.group_size == 4 and float(fvu) < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 65}, "k=65 exceeds d_sae=64"),
        ({"num_qk": 7}, "num_qk=7 does not divide d_sae=64"),
        ({"target": None}, "lorsa reads one site and writes another: give site and target, such as"),
        ({"site": ("a", "b")}, "lorsa reads one site"),
        ({"target": READ}, "lorsa reads one site"),
        ({"d_qk": 4, "rotary_dim": 6}, "rotary_dim=6 exceeds d_qk=4"),
        ({"rotary_dim": 6}, "rotary_dim=6 needs rotary_base"),
    ],
)
def test_wrong_configurations_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Lorsa(**{"d_sae": 64, "k": 8, **PLACES, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": "blocks.1.hook_resid_pre"}, "is not what layer 1's attention reads: use blocks.1.attn.hook_in"),
        ({"target": "ln_final.hook_out"}, "is not of one layer"),
        ({"d_qk": 16}, "d_qk=16 is not the 8 of the model's heads"),
        ({"num_qk": 2}, "num_qk is not a multiple of the model's 4 heads"),
        ({"d_sae": 63}, "d_sae is not a multiple of the model's 4 heads"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(settings, message, tiny_lm, contexts):
    source = ActivationStream(tiny_lm, contexts, [READ, WRITE, "blocks.1.hook_resid_pre", "ln_final.hook_out"])
    with pytest.raises(UserError, match=message):
        sb.train(Lorsa(**{"d_sae": 64, "k": 8, **PLACES, **settings}), source)


def test_data_without_order_or_model_are_refused():
    rows = TensorSource({READ: torch.randn(100, 8), WRITE: torch.randn(100, 8)})
    contexts = TensorSource({READ: torch.randn(10, 10, 8), WRITE: torch.randn(10, 10, 8)})
    with pytest.raises(UserError, match="lorsa reads sequences and these activations are shuffled rows without an order"):
        sb.train(Lorsa(d_sae=16, k=4, **PLACES), rows)
    for settings in ({}, {"initial": "random", "initial_directions": "random", "d_qk": 4}):
        with pytest.raises(UserError, match="starts from the model's weights: pass lm="):
            sb.train(Lorsa(d_sae=16, k=4, **PLACES, **settings), contexts)
    with pytest.raises(UserError, match="d_qk is not known"):
        Lorsa(d_sae=16, k=4, d_in=8, d_out=8, **PLACES).build()
    with pytest.raises(ValueError, match=r"reads whole contexts \[C, S, D\], not \(5, 6\)"):
        random_lorsa().encode(torch.zeros(5, 6))


def test_frequencies_are_those_of_the_model(llama, tmp_path):
    rule = attention_weights(llama, 0).rule
    torch.testing.assert_close(frequencies(4, 10_000.0), rule.frequencies_R)
    config = Lorsa(d_sae=32, k=4, d_in=32, d_out=32, **PLACES).for_lm(llama)
    assert (config.rotary_dim, config.rotary_base, config.rotary_frequencies) == (8, 10_000.0, None)
    assert config.for_lm(llama) == config
    rotary = llama.hf.model.rotary_emb
    before, rotary.inv_freq = rotary.inv_freq, rotary.inv_freq * torch.tensor([1.0, 1.0, 0.5, 0.1])  # as long-context models have
    try:
        scaled = Lorsa(d_sae=32, k=4, d_in=32, d_out=32, **PLACES).for_lm(llama)
    finally:
        rotary.inv_freq = before
    assert scaled.rotary_base is None
    scaled.build().save(tmp_path / "lorsa")
    frequencies_R = sb.load(tmp_path / "lorsa").rotary_frequencies
    torch.testing.assert_close(frequencies_R, rule.frequencies_R * torch.tensor([1.0, 1.0, 0.5, 0.1]))

"""One dictionary for several layers against plain ones (methods.md T16)."""

import pytest
import torch

import saebench as sb
from saebench.activations import TensorSource
from saebench.dictionaries import Scaling, TrainingBatch, parse_dictionary
from saebench.dictionaries.base import CONFIGS
from saebench.dictionaries.layer_group import parse_base
from saebench.errors import UserError
from saebench.evaluation import evaluate
from saebench.kernels import use_implementation
from saebench.trainer import Member, TrainConfig

SITES = ["a", "b", "c"]
SCALES = {"a": 1.0, "b": 7.0, "c": 0.2}
SETTINGS = {
    "topk": {"k": 4},
    "jumprelu tanh": {"target_l0": 6, "penalty": "tanh"},
    "topk free": {"k": 4, "decoder": "free", "skip": True},
}


def settings_of(base):
    if base in SETTINGS:
        return SETTINGS[base]
    fields = CONFIGS[base].model_fields
    return {name: value for name, value in {"k": 4, "target_l0": 6, "steps": 4}.items() if name in fields}


def sharable(architecture):
    """Whether it maps the activations of one site at a token to themselves, by its own account."""
    try:
        parse_base({"architecture": architecture, **settings_of(architecture)}, {"d_sae": 48, "site": "a"})
    except UserError:
        return False
    return True


BASES = [*SETTINGS, *(name for name in CONFIGS if name not in SETTINGS and sharable(name))]


def planted(tokens=3000, sites=SITES):
    """The same 24 directions in every layer, at another scale and about another point."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(24, 12, generator=generator), dim=1)
    tensors = {}
    for number, site in enumerate(sites):
        features = (torch.rand(tokens, 24, generator=generator) < 0.12) * torch.rand(tokens, 24, generator=generator)
        tensors[site] = SCALES[site] * (features @ directions + 0.3 * number)
    return TensorSource(tensors)


def group(base="topk", sites=SITES, **options):
    architecture = base.split()[0]
    return sb.LayerGroup(**{"d_sae": 48, "site": sites, "base": {"architecture": architecture, **settings_of(base)}, **options})


def values_of(source, site):
    return source.fetch(torch.arange(source.num_contexts), [site])[site].values[:, 0]


def fvu(dictionary, x):
    return float((dictionary(x) - x).square().sum() / (x - x.mean(0)).square().sum())


TRAINING = TrainConfig(num_tokens=64 * 30, batch_size=64, lr=5e-3)


def test_most_architectures_can_be_shared():
    assert {"topk", "batchtopk", "matryoshka", "relu", "jumprelu"} <= set(BASES)
    assert not {"clt", "transcoder", "lorsa", "layer_group"} & set(BASES)


@pytest.fixture(scope="module")
def trained():
    """A group of each base, trained a little."""
    return dict(zip(BASES, sb.train({name: group(name, centre=True) for name in BASES}, planted(), TRAINING), strict=True))


def test_a_group_of_one_layer_is_the_plain_dictionary(tmp_path):
    source = planted()
    for base in ("topk", "jumprelu", "matryoshka"):
        plain_config = parse_dictionary({"architecture": base, "d_sae": 48, "site": "b", **settings_of(base)}, "x")
        one, plain = sb.train({"one": group(base, ["b"]), "plain": plain_config}, source, TRAINING)
        ours, theirs = one.at("b").public_tensors(), plain.public_tensors()
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
        assert one.at("b").config == plain.config
        assert one.config.betas == plain.config.betas
        assert one.at("b").trained_on == plain.trained_on


def test_one_group_learns_all_its_layers():
    source = planted()
    training = TrainConfig(num_tokens=64 * 400, batch_size=64, lr=5e-3)
    shared = sb.train(group(centre=True), source, training)
    assert list(shared.parts()) == SITES
    for site, dictionary in shared.parts().items():
        assert fvu(dictionary, values_of(source, site)) < 0.25
        assert dictionary.config.reads == dictionary.config.writes == (site,)
        assert dictionary.trained_on["reads"] == [site] and list(dictionary.trained_on["gamma"]) == [site]


def test_without_normalising_each_layer_the_largest_takes_it_all():
    source = planted()
    training = TrainConfig(num_tokens=64 * 200, batch_size=64, lr=5e-3)
    per_layer, raw = sb.train([group(centre=True), group(normalise="none", centre=True)], source, training)
    x = values_of(source, "c")
    assert fvu(raw.at("c"), x) > 2 * fvu(per_layer.at("c"), x)


@pytest.mark.parametrize("base", BASES)
def test_a_layer_alone_is_the_shared_dictionary_on_its_normalised_activations(base, trained):
    shared, source = trained[base], planted()
    for layer, site in enumerate(SITES):
        x = values_of(source, site)[:200]
        shift, scale = shared.shift_LD[layer], shared.scale_L[layer]
        torch.testing.assert_close(shift, values_of(source, site).mean(0), rtol=1e-4, atol=1e-5)
        normal = (x - shift) * scale
        single = shared.at(site)
        assert type(single) is type(shared.base)
        ours, theirs = single.encode(x).to_dense(), shared.base.encode(normal).to_dense()
        same_B = ((ours > 0) == (theirs > 0)).all(1)  # scaled otherwise, a score at the border may fall on the other side
        assert same_B.float().mean() > 0.95
        wanted = shared.base(normal) / scale + shift
        torch.testing.assert_close(single(x)[same_B], wanted[same_B], rtol=1e-3, atol=1e-3 * float(x.std()))
        torch.testing.assert_close(single.decode(single.encode(x)).shape, x.shape)


@pytest.mark.parametrize("base", BASES)
def test_save_and_load_give_identical_codes(base, trained, tmp_path):
    shared = trained[base]
    shared.save(tmp_path / "group")
    loaded = sb.load(tmp_path / "group")
    x = torch.cat([values_of(planted(), site) for site in SITES], 1)[:50]
    assert torch.equal(loaded.encode(x).values, shared.encode(x).values)
    assert torch.equal(loaded(x), shared(x))
    assert loaded.config == shared.config
    for site, part in shared.parts().items():
        assert torch.equal(loaded.at(site)(x[:, :12]), part(x[:, :12]))
    tensors = loaded.public_tensors()
    assert tensors["shift"].shape == (3, 12) and tensors["scale"].shape == (3,) and tensors["base.W_dec"].shape == (48, 12)
    with pytest.raises(UserError, match="tensor 'scale' is missing or of another shape"):
        loaded.load_public({name: t for name, t in tensors.items() if name != "scale"})
    with pytest.raises(UserError, match="tensor 'nonsense' is unknown"):
        loaded.load_public({**tensors, "nonsense": torch.ones(1)})


def test_layers_side_by_side_are_the_layers_alone(trained):
    shared = trained["topk free"]
    x = torch.cat([values_of(planted(), site) for site in SITES], 1)[:40]
    expected = torch.cat([shared.at(site)(x[:, 12 * n : 12 * n + 12]) for n, site in enumerate(SITES)], 1)
    torch.testing.assert_close(shared(x), expected, rtol=1e-4, atol=1e-4)
    codes = shared.encode(x)
    assert len(codes) == 120
    row = codes[3 * 7 + 2 : 3 * 7 + 3]  # token 7, layer 2
    own = shared.at("c").encode(x[7:8, 24:])
    assert torch.equal(row.indices, own.indices)
    x_CSW = x.view(4, 10, 36)
    _, y_hat = shared.reconstruct_contexts(x_CSW, 2)
    for write in range(3):
        assert list(shared.depends_on(write)) == [write]
        one = shared.write_one([x_CSW[..., 12 * write : 12 * write + 12]], write, 2)
        torch.testing.assert_close(one, y_hat[:, 12 * write : 12 * write + 12], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="index .at"):
        shared.encode_contexts(x_CSW)


def test_each_token_comes_from_one_layer_drawn_uniformly():
    config = group().for_sites(dict.fromkeys(SITES, 12))
    shared = config.build()
    x = torch.arange(3).repeat_interleave(12).expand(6000, 36) + 10 * torch.arange(6000)[:, None].float()
    batch = TrainingBatch(x, x, torch.zeros(48, dtype=torch.bool), step=4, seed=1)
    drawn = shared.share(batch).x
    assert drawn.shape == (6000, 12) and shared.share(batch).y is not None
    layer_BD = drawn - 10 * torch.arange(6000)[:, None]
    assert torch.equal(layer_BD, layer_BD[:, :1].expand(-1, 12))
    counts = torch.bincount(layer_BD[:, 0].long(), minlength=3)
    assert (counts - 2000).abs().max() < 150
    assert torch.equal(shared.share(batch).x, drawn)
    later = TrainingBatch(x, x, batch.dead_F, step=5, seed=1)
    assert not torch.equal(shared.share(later).x, drawn)


def test_tokens_are_shared_not_multiplied():
    """A step of the group is one of the plain dictionary, on as many rows as the batch has tokens."""
    source = planted()
    sample = {site: values_of(source, site) for site in SITES}
    member = Member.create(group(), TRAINING, sample)
    seen = []
    losses = member.dictionary.base.losses
    member.dictionary.base.losses = lambda batch: seen.append(batch) or losses(batch)
    member.step({site: x[:64] for site, x in sample.items()}, 0)
    assert [batch.x.shape for batch in seen] == [(64, 12)]
    assert seen[0].y is seen[0].x
    metrics = member.read_metrics()
    assert metrics["l0"] <= 4 and 0 < metrics["fvu"] < 2
    assert int(member.silent_F.max()) == 64


def test_the_logged_error_is_that_of_all_layers(trained):
    source, shared = planted(), trained["topk"]
    x = torch.cat([values_of(source, site) for site in SITES], 1)
    normal = torch.cat([(values_of(source, s) - shared.shift_LD[n]) * shared.scale_L[n] for n, s in enumerate(SITES)], 1)
    everything = float((shared.base(normal.view(-1, 12)).view_as(x) - normal).square().sum(1).mean())
    training = group(centre=True).for_sites(dict.fromkeys(SITES, 12)).build()
    training.base = shared.base
    losses = training.losses(TrainingBatch(normal, normal, torch.zeros(48, dtype=torch.bool)))
    assert losses.target_BD is normal
    assert float(losses.squared_error_B.mean()) == pytest.approx(everything, rel=0.05)


def test_gradients_equal_those_of_dense_algebra():
    torch.manual_seed(0)
    shared = group(base="topk").for_sites(dict.fromkeys(SITES, 12)).build().double()
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter.normal_()
    x = torch.randn(30, 36, dtype=torch.float64)
    batch = TrainingBatch(x, x, torch.arange(48) > 30, step=2, steps=9)
    found = []
    for name in ("stock", "reference"):
        with use_implementation(name):
            shared.zero_grad()
            shared.losses(batch).total.backward()
            found.append({key: p.grad.clone() for key, p in shared.named_parameters()})
    torch.testing.assert_close(found[0], found[1])


def test_folding_twice_composes():
    shared = group().for_sites(dict.fromkeys(SITES, 12)).build()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 36, generator=generator)
    shared.initialise(x, x, generator)
    expected = shared(x)
    for _ in range(2):
        scaling = Scaling(torch.randn(36, generator=generator), (torch.rand(3, generator=generator) + 0.5).repeat_interleave(12))
        x = x / scaling.scale_D + scaling.shift_D
        expected = expected / scaling.scale_D + scaling.shift_D
        shared.fold(scaling, scaling)
        torch.testing.assert_close(shared(x), expected, rtol=1e-4, atol=1e-4)
    for n, site in enumerate(SITES):
        columns = slice(12 * n, 12 * n + 12)
        torch.testing.assert_close(shared.at(site)(x[:, columns]), expected[:, columns], rtol=1e-4, atol=1e-4)


def test_dead_latents_start_anew_at_drawn_activations():
    shared = group("relu").for_sites(dict.fromkeys(SITES, 12)).build()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(90, 36, generator=generator)
    shared.initialise(x, x, generator)
    before = shared.base.W_dec.detach().clone()
    dead = torch.arange(48) % 3 == 0
    rows = shared.resample(TrainingBatch(x, x, dead, step=2))
    parameters = dict(shared.named_parameters())
    assert set(rows) == {"base.W_enc_FD", "base.W_dec", "base.b_enc"} and set(rows) <= set(parameters)
    changed = (shared.base.W_dec != before).any(1)
    assert torch.equal(changed, dead) and torch.equal(rows["base.W_dec"], dead.nonzero()[:, 0])
    directions = torch.nn.functional.normalize(x.view(-1, 12) - shared.base.b_dec, dim=1)
    assert ((shared.base.W_dec[dead] @ directions.T).amax(1) > 1 - 1e-5).all()


def test_the_group_takes_normalisation_from_its_base_unless_told():
    assert group("jumprelu").centre and not group("topk").centre
    assert not group("jumprelu", centre=False).centre
    assert group("topk", normalise="unit_ms").base_for("a").normalise == "unit_ms"
    assert group("topk").default_id == "layer_group-topk-48-k4"
    names = list(sb.train({"x": group(lr=1e-9)}, planted(300), TRAINING)[0].parts())
    assert names == SITES


@pytest.mark.parametrize("base", BASES)
def test_the_group_trains_at_the_pace_of_its_base(base):
    config, alone = group(base), CONFIGS[base.split()[0]]
    assert config.betas == alone.betas and config.largest_lr_rise == alone.largest_lr_rise


def test_settings_of_the_group_reach_training():
    source = planted(500)
    weights = {
        name: sb.train(group(**options), source, TRAINING).base.W_dec
        for name, options in {"plain": {}, "lr": {"lr": 1e-4}, "seed": {"seed": 9}, "norm": {"normalise": "unit_ms"}}.items()
    }
    for name in ("lr", "seed", "norm"):
        assert not torch.equal(weights[name], weights["plain"])


def test_every_layer_is_measured_in_the_model(tiny_lm, contexts):
    sites = [f"blocks.{n}.hook_resid_post" for n in range(3)]
    stream = sb.ActivationStream(tiny_lm, contexts[:60], sites)
    shared = sb.train(group(sites=sites), stream, TrainConfig(num_tokens=64 * 100, batch_size=64, lr=5e-3))
    fvus = []
    for site, part in shared.parts().items():
        figures = evaluate(part, tiny_lm, contexts[60:70])
        fvus.append(figures["fvu"])
        assert figures["site"] == site and figures["fvu"] < 1 and figures["l0"] <= 4
    together = evaluate(shared, tiny_lm, contexts[60:70])
    assert together["writes"] == sites
    assert sum(together["fvu_by_site"].values()) == pytest.approx(sum(fvus), rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": None}, "names its layers: give site = "),
        ({"site": ["a", "b", "a"]}, "lists a layer twice: a, b, a"),
        ({"target": ["d"]}, "leave target out"),
        ({"base": {"architecture": "topk", "k": 49}}, r"k=49 exceeds d_sae=48.*base"),
        ({"base": {"architecture": "topk", "kk": 3}}, r"unknown key here\.base\.kk: did you mean 'k'"),
        ({"base": {"architecture": "topp"}}, "base.architecture='topp' is unknown"),
        ({"base": {"k": 3}}, "missing key base.architecture"),
        ({"base": {"architecture": "topk", "d_sae": 30}}, "base.d_sae stands in the wrong place"),
        ({"base": {"architecture": "layer_group"}}, "is a group itself"),
        ({"base": {"architecture": "transcoder"}}, "base"),
        ({"base": "topk"}, "base='topk'"),
        ({"d_sae": "many"}, "d_sae='many'"),
        ({"skip": True}, r"unknown key here\.skip"),
    ],
)
def test_bad_input_is_told_in_one_line(settings, message):
    values = {"architecture": "layer_group", "d_sae": 48, "site": SITES, **settings}
    with pytest.raises(UserError, match=message) as caught:
        parse_dictionary(values, "here")
    assert "\n" not in str(caught.value)


def test_sites_that_are_missing_or_unequal_are_told(trained):
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="the sites are 4, 8 wide"):
        sb.train(sb.LayerGroup(d_sae=48, site=["a", "b"]), TensorSource({"a": x, "b": torch.cat([x, x], 1)}))
    with pytest.raises(UserError, match="'z' is not among the activations"):
        sb.train(sb.LayerGroup(d_sae=48, site=["a", "z"]), planted(100))
    with pytest.raises(UserError, match="'z' is not in this group: it has a, b, c"):
        trained["topk"].at("z")

"""What holds for every registered architecture: trained among others as alone, resumed bit for bit, saved and loaded, told in the docs."""

import re
from pathlib import Path

import pytest
import torch

import saebench as sb
from saebench.activations import ActivationStream
from saebench.dictionaries import base, parse_dictionary
from saebench.errors import UserError
from saebench.evaluation import evaluate
from saebench.features import index
from saebench.trainer import TrainConfig
from saebench.trainer.member import join

RESID, ATTN_IN, ATTN_OUT = "blocks.1.hook_resid_post", "blocks.1.ln1.hook_out", "blocks.1.hook_attn_out"
MLP_IN, MLP_OUT = [f"blocks.{n}.ln2.hook_out" for n in (0, 1)], [f"blocks.{n}.hook_mlp_out" for n in (0, 1)]
SITES = [RESID, "blocks.0.hook_resid_post", ATTN_IN, ATTN_OUT, *MLP_IN, *MLP_OUT]
SMALL = {
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "matryoshka": {"k": 4},
    "ortsae": {"k": 4},
    "topafa": {},
    "relu": {"target_l0": 6},
    "gated": {"target_l0": 6},
    "jumprelu": {"target_l0": 6},
    "threshold": {"target_l0": 6},
    "structured": {"target_l0": 6},
    "matching_pursuit": {"steps": 4},
    "ista": {},
    "iht": {"k": 4},
    "csr": {"k": 4},
    "discrete": {},
    "transcoder": {"k": 4, "site": MLP_IN[1], "target": MLP_OUT[1]},
    "crosscoder": {"k": 4, "site": [RESID, "blocks.0.hook_resid_post"]},
    "clt": {"k": 4, "site": MLP_IN, "target": MLP_OUT},
    "clt_jumprelu": {"target_l0": 6, "site": MLP_IN, "target": MLP_OUT},
    "lorsa": {"k": 4, "site": ATTN_IN, "target": ATTN_OUT},
    "layer_group": {"site": [RESID, "blocks.0.hook_resid_post"], "base": {"architecture": "topk", "k": 4}},
}
TRAINING = TrainConfig(num_tokens=32 * 30, batch_size=32, lr=5e-3, log_every=10, checkpoint_every=10)


def config_of(architecture):
    values = {"architecture": architecture, "d_sae": 64, "site": RESID, **SMALL[architecture]}
    return parse_dictionary(values, architecture)


@pytest.fixture(scope="module")
def stream(tiny_lm, contexts):
    return ActivationStream(tiny_lm, contexts[:24], SITES)


@pytest.fixture(scope="module")
def together(stream):
    """All architectures from one pass over the data."""
    return dict(zip(SMALL, sb.train({name: config_of(name) for name in SMALL}, stream, TRAINING), strict=True))


def bytes_of(dictionary):
    return {name: tensor.clone() for name, tensor in dictionary.public_tensors().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_architecture_is_here():
    assert set(SMALL) == set(base.CONFIGS)


@pytest.mark.parametrize("architecture", SMALL)
def test_alone_and_resumed_it_ends_with_the_same_bits(architecture, stream, together, tmp_path, monkeypatch):
    from saebench.trainer.member import Member

    step, calls = Member.step, []

    def failing(self, activations, number):
        calls.append(number)
        if len(calls) == 17:
            raise SystemExit
        step(self, activations, number)

    monkeypatch.setattr(Member, "step", failing)
    with pytest.raises(SystemExit):
        sb.train({"it": config_of(architecture)}, stream, TRAINING, out=tmp_path)
    (alone,) = sb.train({"it": config_of(architecture)}, stream, TRAINING, out=tmp_path)
    assert calls[17] == 10  # went on behind the checkpoint of step 10
    assert same(bytes_of(alone), bytes_of(together[architecture]))


@pytest.mark.parametrize("architecture", SMALL)
def test_saved_and_loaded_it_gives_the_same_codes(architecture, stream, together, tmp_path):
    dictionary = together[architecture]
    dictionary.save(tmp_path / "it")
    loaded = sb.load(tmp_path / "it")
    assert loaded.config == dictionary.config and loaded.trained_on == dictionary.trained_on
    for name, part in dictionary.parts().items():
        fetched = stream.fetch(torch.arange(3), list(part.config.reads))
        x_CSD = torch.cat([fetched[site].values for site in part.config.reads], -1)
        one, two = (d.encode_contexts(x_CSD) for d in (part, loaded.parts()[name]))
        assert torch.equal(one.indices, two.indices) and torch.equal(one.values, two.values)
        assert one.indices.numel() <= len(one) * 64


@pytest.mark.parametrize("architecture", [name for name in SMALL if name not in ("lorsa", "layer_group")])
def test_saved_before_it_is_finished_it_gives_the_same_codes(architecture, stream, tmp_path):
    config = config_of(architecture)
    sample = {site: encoded.values[:, 1:].flatten(0, 1) for site, encoded in stream.fetch(torch.arange(6), SITES).items()}
    x_BD, y_BD = join(sample, config := config.for_sites({site: x.shape[1] for site, x in sample.items()}))
    unfinished = config.build()
    unfinished.initialise(x_BD, y_BD, torch.Generator().manual_seed(0))
    unfinished.save(tmp_path / "it")
    loaded = sb.load(tmp_path / "it")
    if architecture != "threshold":  # finished latents are in other units there
        torch.testing.assert_close(loaded.encode(x_BD).to_dense(), unfinished.encode(x_BD).to_dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded(x_BD), unfinished(x_BD), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", [name for name in SMALL if name != "lorsa"])
def test_activations_of_another_shape_are_one_line(architecture, together):
    dictionary = together[architecture]
    width = dictionary.config.d_in
    for shape in ((5, width + 1), (2, 5, width), (width,)):
        with pytest.raises(UserError, match=rf"activations have shape \({shape[0]},.*encodes rows \[tokens, {width}\]"):
            dictionary.encode(torch.zeros(shape))


@pytest.mark.parametrize("architecture", [name for name in SMALL if name not in ("csr",)])
def test_it_is_spliced_in_and_indexed(architecture, stream, together, tiny_lm, contexts, tmp_path):
    for name, part in together[architecture].parts().items():
        figures = evaluate(part, tiny_lm, contexts[24:32])
        assert 0 <= figures["fvu"] < 2 and figures["l0"] >= 0 and figures["ce_spliced"] > 0
        store = index(part, stream, tmp_path / f"features{name}", lm=tiny_lm)
        x_CSD = torch.cat([x.decode() for x in stream.fetch(torch.arange(24), list(part.config.reads)).values()], -1)
        firings_F = part.encode_contexts(x_CSD).firings()
        assert store.counts_F.tolist() == firings_F.tolist()
        assert all(len(store.details(latent).histogram) for latent in range(part.config.d_sae))


@pytest.mark.parametrize("architecture", SMALL)
def test_nan_and_unknown_keys_are_one_line(architecture, tiny_lm, contexts):
    with pytest.raises(UserError, match=r"unknown key here\.nonsense"):
        parse_dictionary(
            {**config_of(architecture).model_dump(exclude_unset=True), "architecture": architecture, "nonsense": 1}, "here"
        )
    bad = ActivationStream(tiny_lm, contexts[:24], SITES)
    fetch = bad.fetch

    def poisoned(contexts_N, sites, out=None):
        fetched = fetch(contexts_N, sites, out)
        for encoded in fetched.values():
            encoded.values[:, 5] = float("nan")
        return fetched

    bad.fetch = poisoned
    with pytest.raises(UserError, match="NaN or Inf in the activations of site"):
        sb.train(config_of(architecture), bad, TRAINING)


def test_the_docs_have_a_row_for_each():
    page = (Path(__file__).parent.parent.parent / "docs" / "architectures.md").read_text()
    told = set(re.findall(r"^\| `(\w+)`", page, re.M))
    assert told == set(base.CONFIGS)


@pytest.mark.parametrize("architecture", [name for name in SMALL if name not in ("lorsa", "layer_group", "threshold")])
def test_first_directions_may_lie_in_the_active_subspace(architecture):
    """Whatever reads activations of which two directions in eight vary starts from directions in their plane. (Lorsa: test_lorsa.py; a
    layer group starts as its base; atoms start in a whitened space.)"""
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q[:2]
    config = config_of(architecture).model_copy(update={"initial_directions": "active_subspace"})
    sites = dict.fromkeys([*config.reads, *config.writes], 8)
    config = config.for_sites(sites)
    sample = {site: torch.randn(500, 2, generator=generator) @ plane + 1 for site in sites}
    x_BD, y_BD = join(sample, config)
    dictionary = config.build()
    dictionary.initialise(x_BD, y_BD, generator)
    rows = dictionary.W_enc_FD if hasattr(dictionary, "W_enc_FD") else dictionary.W_dec
    rows = rows.detach().unflatten(1, (-1, 8)).flatten(0, 1)
    torch.testing.assert_close(rows @ plane.T @ plane, rows, rtol=0, atol=1e-4 * float(rows.norm(dim=1).max()))

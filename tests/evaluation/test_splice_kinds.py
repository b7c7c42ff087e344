"""What `evaluate` makes of dictionaries that are no autoencoders of one site, against exact constructions and ablations."""

import copy

import pytest
import torch

import saebench as sb
from saebench.dictionaries import Crosscoder, Transcoder
from saebench.dictionaries.transcoder import skip_only
from saebench.evaluation import evaluate
from saebench.lm import LanguageModel

LAYER = 1
IN, OUT = f"blocks.{LAYER}.mlp.hook_in", f"blocks.{LAYER}.hook_mlp_out"
SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


@pytest.fixture(scope="module")
def relu_lm(tiny_lm) -> LanguageModel:
    """The tiny model with ReLU in place of its MLPs' activation function."""
    hf = copy.deepcopy(tiny_lm.hf)
    for block in hf.transformer.h:
        block.mlp.act = torch.nn.ReLU()
    return LanguageModel(tiny_lm.name, hf, tiny_lm.tokenizer, "relu")


def exact_transcoder(lm, **options):
    """The MLP's own weights as a transcoder."""
    mlp = lm.hf.transformer.h[LAYER].mlp
    d_sae = mlp.c_fc.weight.shape[1]
    built = Transcoder(d_sae=d_sae, k=d_sae, d_in=32, d_out=32, site=IN, target=OUT, decoder="free", **options).build()
    with torch.no_grad():
        built.W_enc_FD.copy_(mlp.c_fc.weight.T)
        built.b_enc.copy_(mlp.c_fc.bias)
        built.W_dec.copy_(mlp.c_proj.weight)
        built.b_dec.copy_(mlp.c_proj.bias)
    return built


def exact_crosscoder(sites=SITES, width=32):
    """[x, -x] of every site through ReLU."""
    d_in = width * len(sites)
    config = Crosscoder(d_sae=2 * d_in, k=2 * d_in, site=sites, d_in=d_in, widths_in=(width,) * len(sites), decoder="unit")
    built = config.build()
    with torch.no_grad():
        eye = torch.eye(d_in)
        built.W_enc_FD.copy_(torch.cat([eye, -eye]))
        built.W_dec.copy_(torch.cat([eye, -eye]))
    return built


def test_an_exact_transcoder_in_place_of_the_mlp_costs_nothing(relu_lm, contexts):
    figures = evaluate(exact_transcoder(relu_lm), relu_lm, contexts[:20])
    assert figures["fvu"] == pytest.approx(0, abs=1e-9)
    assert figures["ce_increase"] == pytest.approx(0, abs=1e-5)
    assert figures["ce_recovered_zero"] == pytest.approx(1, abs=1e-3)
    assert figures["kl_spliced"] == pytest.approx(0, abs=1e-5)
    assert figures["site"] == f"{IN} -> {OUT}"
    assert "fvu_skip_only" not in figures


def test_a_transcoder_is_measured_by_what_it_writes(relu_lm, tiny_lm, contexts):
    """Exact for ReLU, so that under the other activation function its error is the difference of the two MLPs."""
    built = exact_transcoder(relu_lm)
    figures = evaluate(built, tiny_lm, contexts[:20])
    read = {site: x[:, 1:].flatten(0, 1) for site, x in tiny_lm.read(contexts.ids_NS[:20], [IN, OUT]).items()}
    with torch.no_grad():
        error = (built(read[IN]) - read[OUT]).square().sum() / (read[OUT] - read[OUT].mean(0)).square().sum()
    assert 0 < figures["fvu"] == pytest.approx(float(error), rel=1e-5)
    assert figures["ce_spliced"] != figures["ce_clean"]


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_a_transcoder_without_latents_is_an_ablation(tiny_lm, contexts, ablation):
    built = exact_transcoder(tiny_lm)
    held_out = contexts[:20]
    with torch.no_grad():
        built.W_dec.zero_()
        y = tiny_lm.read(held_out.ids_NS, [OUT])[OUT][:, 1:]
        built.b_dec.copy_(y.flatten(0, 1).mean(0) if ablation == "mean" else torch.zeros(32))
    figures = evaluate(built, tiny_lm, held_out)
    assert figures["ce_spliced"] == pytest.approx(figures[f"ce_{ablation}"], rel=1e-6)
    assert figures[f"ce_recovered_{ablation}"] == pytest.approx(0, abs=1e-5)


def test_the_bypass_alone_is_reported_beside_the_whole(tiny_lm, contexts):
    built = exact_transcoder(tiny_lm, skip=True)
    held_out = contexts[:20]
    read = {site: x[:, 1:].flatten(0, 1) for site, x in tiny_lm.read(held_out.ids_NS, [IN, OUT]).items()}
    x, y = read[IN], read[OUT]
    with torch.no_grad():
        built.W_skip.copy_(torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution)
        built.b_dec.copy_(y.mean(0) - x.mean(0) @ built.W_skip)
        built.W_dec.mul_(0.1)
        error = (skip_only(built, x) - y).square().sum() / (y - y.mean(0)).square().sum()
    figures = evaluate(built, tiny_lm, held_out)
    assert figures["fvu_skip_only"] == pytest.approx(float(error), rel=1e-5)
    assert figures["fvu_skip_only"] < 1
    assert figures["fvu"] != pytest.approx(figures["fvu_skip_only"], rel=1e-3)


def test_an_exact_crosscoder_costs_nothing(tiny_lm, contexts):
    figures = evaluate(exact_crosscoder(), tiny_lm, contexts[:20])
    assert figures["fvu_by_site"] == pytest.approx(dict.fromkeys(SITES, 0), abs=1e-9)
    assert figures["ce_increase"] == pytest.approx(0, abs=1e-5)
    assert figures["ce_recovered_zero"] == pytest.approx(1, abs=1e-3)


def test_the_order_of_sites_does_not_matter(tiny_lm, contexts):
    """The same crosscoder, untrained, with its sites listed either way."""
    x = torch.cat([v.flatten(0, 1) for v in tiny_lm.read(contexts.ids_NS[:20], list(SITES)).values()], 1)
    figures = []
    one = Crosscoder(d_sae=64, k=8, site=SITES, d_in=64, widths_in=(32, 32), inference="batch").build()
    one.initialise(x, x, torch.Generator().manual_seed(0))
    other = Crosscoder(d_sae=64, k=8, site=SITES[::-1], d_in=64, widths_in=(32, 32), inference="batch").build()
    swapped = torch.cat([torch.arange(32, 64), torch.arange(32)])
    with torch.no_grad():
        for name in ("W_enc_FD", "W_dec", "b_dec"):
            getattr(other, name).copy_(getattr(one, name)[..., swapped])
        other.b_enc.copy_(one.b_enc)
    figures = [evaluate(built, tiny_lm, contexts[:20]) for built in (one, other)]
    assert 0.01 < figures[0]["fvu"] < 1
    for name in ("fvu", "l0", "ce_spliced", "ce_zero", "ce_mean", "kl_spliced"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=1e-5), name
    for site in SITES:
        assert figures[1]["fvu_by_site"][site] == pytest.approx(figures[0]["fvu_by_site"][site], rel=1e-5)


def test_an_attention_output_dictionary_is_spliced_before_heads_are_mixed(tiny_lm, contexts):
    site = "blocks.1.attn.hook_z"
    built = sb.TopK(d_sae=64, k=64, d_in=32, site=site).build()
    with torch.no_grad():
        eye = torch.eye(32)
        built.W_enc_FD.copy_(torch.cat([eye, -eye]))
        built.W_dec.copy_(torch.cat([eye, -eye]))
    assert evaluate(built, tiny_lm, contexts[:20])["ce_increase"] == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        built.W_dec.zero_()
    figures = evaluate(built, tiny_lm, contexts[:20])
    assert figures["ce_spliced"] == pytest.approx(figures["ce_zero"], rel=1e-6)

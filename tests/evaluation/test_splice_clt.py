"""A cross-layer transcoder in place of all MLPs of one running pass (methods.md T12)."""

import pytest
import torch

import saebench as sb
from saebench.activations import ActivationStream
from saebench.evaluation import evaluate
from saebench.evaluation.splice import splice
from saebench.lm import LanguageModel
from saebench.trainer import TrainConfig

LAYERS = 3
READS = [f"blocks.{n}.mlp.hook_in" for n in range(LAYERS)]
WRITES = [f"blocks.{n}.hook_mlp_out" for n in range(LAYERS)]


@pytest.fixture(scope="module")
def relu_lm(tiny_lm_directory, tmp_path_factory) -> LanguageModel:
    """The tiny model with ReLU MLPs."""
    import json
    import shutil

    directory = tmp_path_factory.mktemp("models") / "relu"
    shutil.copytree(tiny_lm_directory, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "activation_function": "relu"}))
    return sb.load_lm(directory)


def exact_clt(lm, **options):
    """The MLPs themselves: every neuron is a latent that writes to its own layer only."""
    mlps = [block.mlp for block in lm.hf.transformer.h]
    width, hidden = mlps[0].c_fc.weight.shape
    clt = sb.CLT(
        d_sae=LAYERS * hidden, k=hidden, site=READS, target=WRITES, d_in=LAYERS * width, d_out=LAYERS * width,
        widths_in=[width] * LAYERS, widths_out=[width] * LAYERS, **options,
    ).build()  # fmt: skip
    with torch.no_grad():
        clt.W_enc_FD.copy_(torch.cat([mlp.c_fc.weight.T for mlp in mlps]))
        clt.b_enc.copy_(torch.cat([mlp.c_fc.bias for mlp in mlps]))
        clt.b_dec.copy_(torch.cat([mlp.c_proj.bias for mlp in mlps]))
        for W_dec, mlp in zip(clt.W_dec, mlps, strict=True):
            W_dec[:, 0] = mlp.c_proj.weight
    return clt


def clean(lm, sites, ids):
    found = lm.read(ids, sites)
    return {site: found[site] for site in sorted(sites, key=lambda s: (s.split(".")[1], s in WRITES))}


@pytest.mark.parametrize("options", [{}, {"decoder": "free"}, {"joint": True}])
def test_the_exact_construction_leaves_the_logits_unchanged(relu_lm, contexts, options):
    clt = exact_clt(relu_lm, **options)
    if options.get("joint"):
        clt.config = clt.config.model_copy(update={"k": clt.config.d_sae})
    ids = contexts.ids_NS[:6].long()
    expected = relu_lm.logits(ids)
    with torch.inference_mode(), relu_lm.edit(splice(clt, clean(relu_lm, READS + WRITES, ids))):
        torch.testing.assert_close(relu_lm.logits(ids), expected, rtol=1e-4, atol=1e-4)
    figures = evaluate(clt, relu_lm, contexts[:12])
    assert figures["fvu"] == pytest.approx(0, abs=1e-9)
    assert figures["kl_spliced"] == pytest.approx(0, abs=1e-5)
    assert list(figures["fvu_by_site"]) == WRITES


@pytest.mark.parametrize("joint", [False, True])
def test_layers_read_the_running_pass_unless_they_compete(relu_lm, contexts, joint):
    """With a wrong first layer, later inputs differ from the clean ones; what is written must follow from them, or, with a joint k,
    from the clean ones."""
    clt = exact_clt(relu_lm, joint=joint)
    with torch.no_grad():
        clt.b_dec[:32] += torch.randn(32, generator=torch.Generator().manual_seed(0))
        clt.W_dec[0][:, 2] = clt.W_dec[2][:, 0]
    ids = contexts.ids_NS[:4].long()
    before = clean(relu_lm, READS + WRITES, ids)
    seen = {}
    with torch.inference_mode(), relu_lm.edit(splice(clt, before)):
        for site in READS + WRITES:
            seen[site] = []
        with relu_lm.edit({site: lambda value, site=site: seen[site].append(value.clone()) for site in READS + WRITES}):
            relu_lm.logits(ids)
    after = {site: values[-1] for site, values in seen.items()}
    assert not torch.allclose(after[READS[1]], before[READS[1]], atol=1e-3)
    for read_from, expected in ((after, not joint), (before, joint)):
        y_hat = clt(torch.cat([read_from[site][:, 1:].flatten(0, 1) for site in READS], 1))
        for site, y in zip(WRITES[1:], y_hat.split(32, dim=1)[1:], strict=True):
            assert torch.allclose(after[site][:, 1:].flatten(0, 1), y, atol=1e-4) == expected


def test_a_trained_one_is_measured_in_one_call(relu_lm, contexts):
    stream = ActivationStream(relu_lm, contexts[:60], READS + WRITES)
    clt = sb.train(
        sb.CLT(d_sae=192, k=16, site=READS, target=WRITES), stream, TrainConfig(num_tokens=64 * 150, batch_size=64, lr=5e-3)
    )
    figures = evaluate(clt, relu_lm, contexts[60:80])
    assert figures["writes"] == WRITES and figures["fvu"] < 0.9
    assert figures["ce_recovered_zero"] > 0
    assert figures["l0"] <= 48
    assert set(figures["fvu_by_site"]) == set(WRITES)

"""One text with and without a dictionary, against the evaluation of the same context and against dense arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

import saebench as sb
from saebench.activations import ActivationStream
from saebench.dictionaries import parse_dictionary
from saebench.errors import UserError
from saebench.evaluation import evaluate
from saebench.evaluation.spliced_text import read_spliced, shares
from saebench.lm import Contexts

RESID, MLP_IN, MLP_OUT = "blocks.1.hook_resid_post", "blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out"
LAYERS = [f"blocks.{i}.ln2.hook_out" for i in range(3)], [f"blocks.{i}.hook_mlp_out" for i in range(3)]
KINDS = {
    "topk": {"architecture": "topk", "k": 5, "site": RESID},
    "jumprelu": {"architecture": "jumprelu", "target_l0": 6, "site": RESID},
    "transcoder": {"architecture": "transcoder", "k": 5, "site": MLP_IN, "target": MLP_OUT, "skip": True},
    "lorsa": {"architecture": "lorsa", "k": 5, "site": "blocks.1.ln1.hook_out", "target": "blocks.1.hook_attn_out"},
    "clt": {"architecture": "clt", "k": 3, "site": LAYERS[0], "target": LAYERS[1]},
}
TEXT = "def value_3(x):\n    return x * 3 + 9  # the number"


@pytest.fixture(scope="module", params=KINDS)
def dictionary(request, tiny_lm, contexts):
    config = parse_dictionary({"d_sae": 60, **KINDS[request.param]}, request.param)
    stream = ActivationStream(tiny_lm, contexts[:60], list(config.sites))
    (trained,) = sb.train([config], stream, sb.TrainConfig(num_tokens=32 * 30, batch_size=32, lr=5e-3))
    return trained


def test_figures_are_those_of_the_evaluation_of_this_context(dictionary, tiny_lm):
    read = read_spliced(tiny_lm, dictionary, TEXT)
    ids_CS = torch.tensor([read.codes.ids], dtype=torch.int32)
    expected = evaluate(dictionary, tiny_lm, Contexts(ids_CS, torch.zeros_like(ids_CS), torch.zeros_like(ids_CS), ["it"]))
    assert read.loss_T[2:].mean() == pytest.approx(expected["ce_clean"], abs=1e-5)  # evaluation leaves out what BOS predicts
    assert read.spliced_loss_T[2:].mean() == pytest.approx(expected["ce_spliced"], abs=1e-5)
    assert read.spliced_loss_T[1] == pytest.approx(read.loss_T[1], abs=1e-5)
    assert np.isnan([read.loss_T[0], read.spliced_loss_T[0], read.error_T[0]]).all()
    figures = read.figures()
    assert figures["fvu"] == pytest.approx(expected["fvu"], rel=1e-4)
    assert figures["l0"] == pytest.approx(expected["l0"]) == pytest.approx(read.active_T[1:].mean())
    assert figures["loss_difference"] == pytest.approx(np.nanmean(read.spliced_loss_T - read.loss_T))


def test_the_loss_is_that_of_the_plain_model(dictionary, tiny_lm):
    read = read_spliced(tiny_lm, dictionary, TEXT)
    ids_S = torch.tensor(read.codes.ids)
    with torch.no_grad():
        logits_SV = tiny_lm.hf(ids_S[None]).logits[0]
    for token in range(1, len(ids_S)):
        expected = functional.cross_entropy(logits_SV[token - 1], ids_S[token])
        assert read.loss_T[token] == pytest.approx(float(expected), abs=1e-5)


def test_shares_are_parts_of_what_the_latents_write_together(dictionary, tiny_lm):
    read = read_spliced(tiny_lm, dictionary, TEXT)
    fired = np.flatnonzero(read.active_T)
    assert len(fired)
    for token in fired.tolist():
        found = shares(dictionary, read.codes, token)
        assert found.sum() == pytest.approx(1, abs=1e-5)
        if dictionary.directions is None:
            continue
        latents, values = zip(*read.codes.strongest(token, 1000), strict=True)
        added_ND = torch.tensor(values)[:, None].double() * dictionary.directions[list(latents)].double()
        whole_D = added_ND.sum(0)
        expected = [float(row_D @ whole_D / (whole_D @ whole_D)) for row_D in added_ND]
        assert found == pytest.approx(expected, abs=1e-4)


def test_short_texts_and_texts_that_cannot_be_read(tiny_lm):
    sae = sb.TopK(d_sae=8, k=2, d_in=32, site=RESID).build().requires_grad_(False)
    sae.folded = True
    one = read_spliced(tiny_lm, sae, "x")
    assert len(one.codes) == 2 and np.isnan(one.figures()["fvu"]) and np.isfinite(one.figures()["loss"])
    with pytest.raises(UserError, match="the text has no tokens"):
        read_spliced(tiny_lm, sae, "")
    with pytest.raises(UserError, match="wrong model"):
        read_spliced(tiny_lm, sb.TopK(d_sae=8, k=2, d_in=16, site=RESID).build(), "x")

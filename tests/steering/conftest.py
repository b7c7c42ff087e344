"""Small dictionaries of every kind that steers in its own way."""

import pytest

import saebench as sb
from saebench.activations import ActivationStream
from saebench.dictionaries import parse_dictionary
from saebench.trainer import TrainConfig

RESID = ["blocks.1.hook_resid_post", "blocks.0.hook_resid_post"]
ATTN_IN, ATTN_OUT = "blocks.1.ln1.hook_out", "blocks.1.hook_attn_out"
MLP_IN, MLP_OUT = [f"blocks.{n}.ln2.hook_out" for n in (0, 1)], [f"blocks.{n}.hook_mlp_out" for n in (0, 1)]
KINDS = {
    "topk": {"architecture": "topk", "k": 4, "site": RESID[0]},
    "jumprelu": {"architecture": "jumprelu", "target_l0": 6, "site": RESID[0]},
    "transcoder": {"architecture": "transcoder", "k": 4, "site": MLP_IN[1], "target": MLP_OUT[1]},
    "skip": {"architecture": "transcoder", "k": 4, "site": MLP_IN[1], "target": MLP_OUT[1], "skip": True},
    "crosscoder": {"architecture": "crosscoder", "k": 4, "site": [RESID[1], RESID[0]]},
    "clt": {"architecture": "clt", "k": 4, "site": MLP_IN, "target": MLP_OUT},
    "lorsa": {"architecture": "lorsa", "k": 4, "site": ATTN_IN, "target": ATTN_OUT},
}


@pytest.fixture(scope="session")
def kinds(tiny_lm, contexts):
    """A dictionary of 64 latents of each kind, trained for thirty steps."""
    sites = [*RESID, ATTN_IN, ATTN_OUT, *MLP_IN, *MLP_OUT]
    configs = {name: parse_dictionary({"d_sae": 64, **values}, name) for name, values in KINDS.items()}
    training = TrainConfig(num_tokens=32 * 30, batch_size=32, lr=5e-3)
    return dict(zip(KINDS, sb.train(configs, ActivationStream(tiny_lm, contexts[:24], sites), training, lm=tiny_lm), strict=True))

import pytest
import torch
from mixes import TEXT, lorsa, make, transcoder

from saebench.circuits.graphs.holding import holding, same_prompt
from saebench.circuits.graphs.interventions import Interventions
from saebench.circuits.graphs.replacement import LocalModel
from saebench.circuits.graphs.tracing import trace

SITES = ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.2.hook_resid_post", "ln_final.hook_out"]


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma"])
def model(request, models):
    lm = models[request.param]
    return LocalModel(lm, make(lm, [transcoder(0)]), TEXT)


@pytest.mark.parametrize("held", ["free", "patterns", "all"])
def test_with_nothing_added_the_model_is_as_it_is(model, held):
    clean = model.lm.read(torch.tensor([model.ids]), SITES)
    with holding(model, held, {}):
        found = model.lm.read(same_prompt(model, 2), SITES)
    for site in SITES:
        for row in found[site]:
            torch.testing.assert_close(row, clean[site][0], atol=1e-4, rtol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.lm.hf.modules())


def by_hand(hf, ids, patterns, scales, added, position):
    """GPT-2 written out, `added` to what the first MLP writes; patterns and scales of norms by the stream, or those given. Returns the last
    stream, and the patterns and scales that were used."""
    x = hf.transformer.wte.weight[ids] + hf.transformer.wpe.weight[: len(ids)]
    used_patterns, used_scales = [], []

    def norm(module, x):
        centred = x - x.mean(-1, keepdim=True)
        scale = 1 / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
        used_scales.append(scale if scales is None else scales[len(used_scales)])
        return centred * used_scales[-1] * module.weight + module.bias

    for number, block in enumerate(hf.transformer.h):
        heads = block.attn.num_heads
        projected = norm(block.ln_1, x) @ block.attn.c_attn.weight + block.attn.c_attn.bias
        q, k, v = (part.view(len(ids), heads, -1).transpose(0, 1) for part in projected.chunk(3, dim=-1))
        seen = torch.ones(len(ids), len(ids)).tril().bool()
        pattern = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        used_patterns.append(pattern if patterns is None else patterns[number])
        z = (used_patterns[-1] @ v).transpose(0, 1).flatten(1)
        x = x + z @ block.attn.c_proj.weight + block.attn.c_proj.bias
        x = x + block.mlp(norm(block.ln_2, x))
        if number == 0:
            x = x.index_add(0, torch.tensor([position]), added[None])
    return x, used_patterns, used_scales


@pytest.mark.parametrize("held", ["free", "patterns", "all"])
def test_what_is_held_stays_and_what_is_not_responds(models, held):
    lm = models["gpt2"]
    model = LocalModel(lm, make(lm, [transcoder(0)]), TEXT)
    ids, position = torch.tensor(model.ids), 4
    added = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    clean, patterns, scales = by_hand(lm.hf, ids, None, None, torch.zeros(32), position)
    given = {"free": (None, None), "patterns": (patterns, None), "all": (patterns, scales)}
    both = torch.zeros(2, len(ids), 32)
    both[:, position] = added
    with holding(model, held, {"blocks.0.hook_mlp_out": both}):
        found = lm.read(same_prompt(model, 2), ["blocks.2.hook_resid_post"])["blocks.2.hook_resid_post"]
    for row in range(2):
        expected, *_ = by_hand(lm.hf, ids, *given[held], added[row], position)
        torch.testing.assert_close(found[row], expected, atol=1e-3, rtol=1e-3)
        for other in given.values():  # and the three differ
            differs = (by_hand(lm.hf, ids, *other, added[row], position)[0] - expected).norm() / (expected - clean).norm()
            assert other is given[held] or differs > 0.02


def test_many_at_once_are_as_one_by_one_and_patterns_of_lorsa_are_held(models):
    lm = models["gpt2"]
    graph = trace(lm, make(lm, [transcoder(n) for n in range(3)] + [lorsa(n) for n in range(3)]), TEXT, keep=1.0, max_features=60)
    runs = Interventions(graph.origin, graph)
    nodes = [n for n in range(len(graph)) if runs.can(n)][::9]
    for run in runs.many(nodes, 0.0):
        alone = runs.of(run.node, 0.0)
        for name in ("edge_N", "total_N", "held_N", "frozen_N", "measured_N", "free_N"):
            torch.testing.assert_close(torch.tensor(getattr(run, name)), torch.tensor(getattr(alone, name)), atol=1e-4, rtol=1e-3)
    part = next(part for part in graph.origin.parts if part.pattern_GSS is not None)
    x_SD = torch.randn(graph.origin.size, 32, generator=torch.Generator().manual_seed(1))
    at = (part.positions_N[:3], part.latents_N[:3])
    expected = [
        sum(
            part.pattern_GSS[i // part.group_size, t, s] * (part.W_read_FD[i] @ x_SD[s] + part.b_read_F[i])
            for s in range(len(x_SD))
        )
        for t, i in zip(*(column.tolist() for column in at), strict=True)
    ]
    torch.testing.assert_close(part.pre_activations(x_SD, *at), torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert (part.pre_activations(x_SD, *at, held=False) - torch.stack(expected)).abs().max() > 1e-3

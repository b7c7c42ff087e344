"""Head selection in attention against a dense twin that loops over heads and positions, forward and backward."""

import math

import pytest
import torch

from saebench.kernels import lorsa_attention as kernel
from saebench.kernels import use_implementation
from saebench.kernels.lorsa_attention import AttentionRule, Heads, head_outputs, rotate, select_heads

PLAIN = AttentionRule(0.5, torch.zeros(0))


def random_heads(groups=3, size=4, width=5, d_qk=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    shapes = [
        (groups, width, d_qk),
        (groups, d_qk),
        (groups, width, d_qk),
        (groups, d_qk),
        (groups * size, width),
        (groups * size,),
    ]
    return Heads(*(draw(*shape) for shape in shapes))


def random_input(contexts=2, size=7, width=5, seed=1):
    return torch.randn(contexts, size, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(x_CSD, heads, rule):
    """z one number at a time."""
    contexts, size, _ = x_CSD.shape
    per_group = len(heads.W_V_FD) // len(heads.W_Q_GDE)
    z = torch.zeros(contexts, size, len(heads.W_V_FD), dtype=torch.float64)
    for c in range(contexts):
        for head in range(len(heads.W_V_FD)):
            g = head // per_group
            for t in range(size):
                first = 0 if rule.window is None else max(0, t - rule.window + 1)
                weights = []
                for s in range(first, t + 1):
                    score = float(
                        (x_CSD[c, t] @ heads.W_Q_GDE[g] + heads.b_Q_GE[g]) @ (x_CSD[c, s] @ heads.W_K_GDE[g] + heads.b_K_GE[g])
                    )
                    score *= rule.scale
                    weights.append(math.exp(score if rule.soft_cap is None else rule.soft_cap * math.tanh(score / rule.soft_cap)))
                for s, weight in zip(range(first, t + 1), weights, strict=True):
                    z[c, t, head] += weight / sum(weights) * float(x_CSD[c, s] @ heads.W_V_FD[head] + heads.b_V_F[head])
    return z


@pytest.mark.parametrize("options", [{}, {"soft_cap": 1.5}, {"window": 3}, {"soft_cap": 0.7, "window": 2}])
def test_head_outputs_equal_the_definition(options):
    heads, x, rule = random_heads(), random_input(), AttentionRule(0.3, torch.zeros(0), **options)
    expected = by_hand(x, heads, rule)
    for name in ("stock", "reference"):
        with use_implementation(name):
            torch.testing.assert_close(head_outputs(x, heads, rule), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1, 7, 64, 129])
@pytest.mark.parametrize("signed", [False, True])
def test_codes_and_gradients_equal_the_dense_twin(size, signed, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 8 * size * 12 * 2)  # two contexts and a part of the groups at once
    heads, x = random_heads(), random_input(3, size)
    rule = AttentionRule(0.4, torch.tensor([1.0, 0.1], dtype=torch.float64))
    skip = 0 if size == 1 else 1
    results = []
    for name in ("stock", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, *heads.tensors())]
        with use_implementation(name):
            codes = select_heads(leaves[0], Heads(*leaves[1:]), rule, 3, signed=signed, skip=skip)
            weights = torch.randn(codes.values.shape[0], 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            (codes.to_dense() * weights).sum().backward()
        assert len(codes) == 3 * (size - skip)
        results.append((codes.to_dense().detach(), *(leaf.grad for leaf in leaves)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert ((results[0][0] < 0).any() == signed) and (results[0][0] > 0).any()


def test_gradients_equal_finite_differences():
    heads, x = random_heads(groups=2, size=3), random_input(2, 5)
    rule = AttentionRule(0.4, torch.tensor([0.7], dtype=torch.float64), soft_cap=3.0)
    leaves = [t.clone().requires_grad_() for t in (x, *heads.tensors())]
    values = lambda *t: select_heads(t[0], Heads(*t[1:]), rule, 4, signed=True, skip=1).values  # noqa: E731
    assert torch.autograd.gradcheck(values, leaves)


def test_heads_that_are_never_chosen_get_no_gradient():
    heads, x = random_heads(), random_input()
    leaves = [t.clone().requires_grad_() for t in heads.tensors()]
    among = torch.arange(12) >= 8  # the first two groups not at all
    codes = select_heads(x, Heads(*leaves), PLAIN, 2, among_F=among)
    assert (codes.indices[codes.values > 0] >= 8).all() and (codes.values > 0).any()
    codes.values.square().sum().backward()
    for leaf in leaves[:4]:
        assert (leaf.grad[:2] == 0).all()
    assert (leaves[0].grad[2] != 0).any()
    chosen = codes.indices[codes.values > 0].unique()
    others = torch.ones(12, dtype=torch.bool).index_fill(0, chosen.long(), False)
    for leaf in leaves[4:]:
        assert (leaf.grad[others] == 0).all() and (leaf.grad[chosen] != 0).any()


def test_groups_are_repeated_queries_and_keys():
    heads, x = random_heads(), random_input()
    apart = Heads(*(t.repeat_interleave(4, 0) for t in heads.tensors()[:4]), heads.W_V_FD, heads.b_V_F)
    torch.testing.assert_close(head_outputs(x, heads, PLAIN), head_outputs(x, apart, PLAIN))


def test_the_most_attentive_heads_win_and_padding_is_zero():
    heads, x = random_heads(), random_input()
    z = head_outputs(x, heads, PLAIN).flatten(0, 1)
    codes = select_heads(x, heads, PLAIN, 12)
    torch.testing.assert_close(codes.to_dense(), z.relu())
    signed = select_heads(x, heads, PLAIN, 12, signed=True)
    torch.testing.assert_close(signed.to_dense(), z)
    assert torch.equal(select_heads(x, heads, PLAIN, 1, signed=True).indices[:, 0], z.abs().argmax(1))


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 6, generator=generator, dtype=torch.float64).expand(1, 1, 9, 6) for _ in range(2))
    rule = torch.tensor([1.0, 0.2], dtype=torch.float64)
    turned_q, turned_k = rotate(q, rule), rotate(k, rule)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(turned_q[..., 4:], q[..., 4:])
    scores = (turned_q @ turned_k.mT)[0, 0]
    for distance in range(4):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand(len(diagonal)))
    assert abs(float(scores[3, 0] - scores[0, 0])) > 1e-3

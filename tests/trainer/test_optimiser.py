"""The optimiser beside torch's own Adam and clipping, on gradients that autograd made as matrices."""

import copy

import pytest
import torch

import saebench as sb
from saebench.dictionaries import TrainingBatch
from saebench.kernels import use_implementation
from saebench.trainer import Member, TrainConfig

CONFIGS = {
    "unit rows": sb.TopK(d_sae=300, k=6, decoder="unit"),
    "free rows": sb.TopK(d_sae=300, k=6),
    "jumprelu": sb.JumpReLU(d_sae=300, target_l0=6, decoder="free", straight_through=True),
    "gated": sb.Gated(d_sae=300, target_l0=6),
    "matryoshka": sb.Matryoshka(d_sae=300, k=6),
    "orthogonal": sb.OrtSAE(d_sae=300, k=6, orthogonality=0.5),
}
STEPS = 12


def tokens(number):
    return torch.randn(128, 24, generator=torch.Generator().manual_seed(number)) + 0.5


def members(config, clip):
    # an epsilon above the rounding of gradients, which Adam would make as large as anything else
    kept = {"lr": 3e-3, "eps": 1e-6, "dead_after": 128, "momentum": "float32"}
    training = TrainConfig(num_tokens=128 * STEPS, batch_size=128, clip=clip, **kept)
    member = Member.create(config, training, tokens(1000))
    return member, copy.deepcopy(member.dictionary)


@pytest.mark.parametrize("clip", [1e-3, 1.0, 1e6])  # always, where a bound does not decide, never
@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_those_of_torchs_adam_on_dense_gradients(name, clip):
    member, dictionary = members(CONFIGS[name], clip)
    for step in range(STEPS):
        member.step(tokens(step), step)
    adam = torch.optim.Adam(dictionary.parameters(), lr=3e-3, betas=CONFIGS[name].betas, eps=member.training.eps)
    silent = torch.zeros(300, dtype=torch.int64)
    with use_implementation("reference"):
        for step in range(STEPS):
            x = member.read(tokens(step))
            losses = dictionary.losses(TrainingBatch(x, x, silent >= 128, step, STEPS, member.seed))
            adam.zero_grad()
            losses.total.backward()
            for W in dictionary.unit_rows():
                W.grad -= (W.grad * W.data).sum(1, keepdim=True) * W.data
            torch.nn.utils.clip_grad_norm_(dictionary.parameters(), clip)
            for group in adam.param_groups:
                group["lr"] = member.rate_at(step)
            adam.step()
            for W in dictionary.unit_rows():
                W.data /= W.data.norm(dim=1, keepdim=True)
            dictionary.constrain(member.rate_at(step))
            silent = torch.where(losses.codes.firings() > 0, 0, silent + 128)
    ours, theirs = member.dictionary.state_dict(), dictionary.state_dict()
    for key in ("W_enc_FD", "W_dec", "b_enc", "b_dec"):
        far = (ours[key] - theirs[key]).abs() > 2e-4 * theirs[key].abs().max()
        assert far.float().mean() < 0.002, key


def test_the_type_of_the_momentum_is_kept_and_changes_little():
    found = {}
    for momentum in ("bfloat16", "float32"):
        training = TrainConfig(num_tokens=128 * STEPS, batch_size=128, lr=3e-3, momentum=momentum)
        member = Member.create(CONFIGS["free rows"], training, tokens(1000))
        for step in range(STEPS):
            member.step(tokens(step), step)
        assert str(member.state()["optimiser.0.exp_avg"].dtype) == f"torch.{momentum}"
        assert member.state()["optimiser.0.exp_avg_sq"].dtype == torch.float32
        found[momentum] = member.dictionary.W_dec.detach()
    assert not torch.equal(found["bfloat16"], found["float32"])
    distance = (found["bfloat16"] - found["float32"]).norm() / found["float32"].norm()
    assert float(distance) < 0.01


def test_gradients_as_large_as_the_weights_are_not_made():
    member, _ = members(CONFIGS["free rows"], 1.0)
    batch = member.read(tokens(0))
    member.dictionary.losses(TrainingBatch(batch, batch, torch.zeros(300, dtype=torch.bool))).total.backward()
    assert member.dictionary.W_enc_FD.grad is None
    assert member.dictionary.W_dec.grad is None

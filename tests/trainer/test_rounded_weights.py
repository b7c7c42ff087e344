"""Training with matrices that kernels read in bfloat16: the steps, what keeps float32, checkpoints, and how little it changes."""

import copy
import warnings

import pytest
import torch

import saebench as sb
from saebench.dictionaries import TrainingBatch
from saebench.dictionaries.csr import CSR
from saebench.errors import UserError
from saebench.kernels import use_implementation
from saebench.trainer import Member, TrainConfig
from saebench.trainer import member as member_module

pytestmark = pytest.mark.filterwarnings("ignore:weights=bfloat16 is for a GPU")
ROUNDED = ("W_enc_FD", "W_dec")
STEPS = 8


def tokens(number, count=128):
    """Sums of a few of 60 directions in 24 dimensions, on a grid that bfloat16 holds exactly."""
    directions = torch.randn(60, 24, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(number)
    amounts = (torch.rand(count, 60, generator=generator) < 0.07) * torch.rand(count, 60, generator=generator)
    return (amounts @ directions * 16).round() / 16


def training(**settings):
    return TrainConfig(**{"num_tokens": 128 * STEPS, "batch_size": 128, "lr": 3e-3, "weights": "bfloat16", **settings})


def rounded(tensor):
    return tensor.bfloat16().float()


class RoundedGradient(torch.autograd.Function):
    """The number itself; its gradient is rounded."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return rounded(grad)


def dense_loss(masters, b_enc, b_dec, x, k, variance):
    """The squared error of a TopK dictionary with unit rows, by dense algebra at the rounded weights, which pass gradients on to the
    masters. What kernels round on the way is rounded: tokens that are encoded, and rows whose sums are gradients of matrices."""
    W_enc, W_dec = (W + (rounded(W) - W).detach() for W in masters)
    centred = x - b_dec
    near = centred + (rounded(centred) - centred).detach()
    z = near @ W_enc.T + b_enc
    f = z * torch.zeros_like(z).scatter(1, z.topk(k, dim=1).indices, 1.0) * (z > 0)
    through_rows, through_codes = RoundedGradient.apply(f.detach() @ W_dec), f @ W_dec.detach()
    error = through_rows + through_codes - through_codes.detach() + b_dec - x
    return error.square().sum(1).mean() / (x.shape[1] * variance)


@pytest.mark.parametrize("clip", [1e-3, 1e6])
def test_steps_are_those_of_torchs_adam_on_float32_masters_with_gradients_at_the_rounded_weights(clip):
    config = sb.TopK(d_sae=300, k=6, decoder="unit", aux_coefficient=0, normalise="none")
    # an epsilon above the rounding of gradients, which Adam would make as large as anything else
    member = Member.create(config, training(clip=clip, eps=1e-6, momentum="float32"), tokens(1000))
    names = (*ROUNDED, "b_enc", "b_dec")
    start = {name: getattr(member.dictionary, name).detach().clone() for name in names}
    masters = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    adam = torch.optim.Adam(list(masters.values()), betas=config.betas, eps=1e-6)
    for step in range(STEPS):
        member.step(tokens(step), step)
        adam.param_groups[0]["lr"] = member.rate_at(step)
        adam.zero_grad()
        pair = [masters[name] for name in ROUNDED]
        dense_loss(pair, masters["b_enc"], masters["b_dec"], tokens(step), 6, member.dictionary.variance).backward()
        W_dec = masters["W_dec"]
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            torch.nn.utils.clip_grad_norm_(list(masters.values()), clip)
            adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
    moved = far = 0
    for name in names:
        ours, theirs = getattr(member.dictionary, name).detach(), masters[name].detach()
        assert ours.dtype == torch.float32
        away = (theirs - start[name]).abs()
        far += int(((ours - theirs).abs() > 0.02 * away.max()).sum())
        moved += int((away > 0).sum())
    assert far < 0.002 * moved


FAMILY = {
    "unit rows": sb.TopK(d_sae=96, k=6, decoder="unit"),
    "free rows": sb.TopK(d_sae=96, k=6),
    "groups": sb.TopK(d_sae=96, k=6, group_penalty=0.1),
    "skip": sb.TopK(d_sae=96, k=6, skip=True),
    "batchtopk": sb.BatchTopK(d_sae=96, k=6),
    "ortsae": sb.OrtSAE(d_sae=96, k=6),
    "matryoshka": sb.Matryoshka(d_sae=96, k=6),
    "jumprelu": sb.JumpReLU(d_sae=96, target_l0=6),
    "tanh": sb.JumpReLU(d_sae=96, target_l0=6, penalty="tanh"),
    "gated": sb.Gated(d_sae=96, target_l0=6),
    "relu": sb.ReLU(d_sae=96, target_l0=6),
    "csr": CSR(d_sae=96, k=6),
}


def watched(member):
    """Checks, whenever losses are computed, that kernels read the rounded masters. Returns the list of checks."""
    losses, checks = member.dictionary.losses, []
    masters = {name: getattr(member.dictionary, name).data for name in ROUNDED}  # the memory that whoever changes weights changes

    def checking(batch):
        for name in ROUNDED:
            seen = getattr(member.dictionary, name)
            assert seen.dtype == torch.bfloat16
            assert torch.equal(seen.data, masters[name].bfloat16()), name
        checks.append(batch.step)
        return losses(batch)

    member.dictionary.losses = checking
    return checks


@pytest.mark.parametrize("name", FAMILY)
def test_kernels_read_rounded_masters_whoever_changed_these(name):
    member = Member.create(FAMILY[name], training(dead_after=128, resample_every=256, warmup=0, decay=0), tokens(1000, 2048))
    checks = watched(member)
    for step in range(STEPS):
        member.step(tokens(step), step)
        for parameter in ROUNDED:
            assert getattr(member.dictionary, parameter).dtype == torch.float32
        if step == 4:
            with torch.no_grad():
                member.dictionary.W_dec[3] *= 2  # by somebody else
    assert checks == list(range(STEPS))
    expected = member.dictionary.state_dict()
    assert all(expected[parameter].dtype == torch.float32 for parameter in ROUNDED)
    assert not torch.equal(expected["W_enc_FD"], rounded(expected["W_enc_FD"]))  # masters are finer than what is read


def test_resampled_rows_reach_what_kernels_read():
    member = Member.create(FAMILY["free rows"], training(dead_after=128, resample_every=128, warmup=0, decay=0), tokens(1000))
    with torch.no_grad():
        member.dictionary.W_enc_FD[:40] *= 1e-4
    member.step(tokens(0), 0)
    assert float(member.dictionary.W_enc_FD.detach()[:40].norm(dim=1).min()) > 1e-3  # all of them got a new start
    watched(member)
    member.step(tokens(1), 1)


@pytest.mark.parametrize("name", ["unit rows", "groups", "csr", "jumprelu"])
def test_going_on_from_a_checkpoint_gives_the_same_bits(name):
    settings = training(dead_after=128, resample_every=512, warmup=0, decay=0)
    whole, first, second = (Member.create(FAMILY[name], settings, tokens(1000, 2048)) for _ in range(3))
    for step in range(STEPS):
        whole.step(tokens(step), step)
    for step in range(5):
        first.step(tokens(step), step)
    second.load_state({key: tensor.clone() for key, tensor in first.state().items()})
    for step in range(5, STEPS):
        second.step(tokens(step), step)
    for key, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[key]), key
    saved = first.state()
    assert all(saved[f"dictionary.{parameter}"].dtype == torch.float32 for parameter in ROUNDED)


def test_the_finished_dictionary_is_made_of_the_masters():
    member = Member.create(FAMILY["unit rows"], training(), tokens(1000))
    for step in range(STEPS):
        member.step(tokens(step), step)
    finished = member.finished()
    assert {p.dtype for p in finished.parameters()} == {torch.float32}
    torch.testing.assert_close(finished.W_dec.norm(dim=1), torch.ones(96), rtol=0, atol=1e-6)  # rounded rows are not that exact
    assert torch.equal(finished.W_dec, member.dictionary.W_dec)


def test_training_ends_within_the_noise_of_float32():
    held_out = tokens(999, 4096)
    fvu = {}
    for weights in ("float32", "bfloat16"):
        for seed in (0, 1, 2):
            settings = training(num_tokens=128 * 150, weights=weights, seed=seed)
            member = Member.create(FAMILY["free rows"], settings, tokens(1000, 2048))
            for step in range(settings.steps):
                member.step(tokens(2000 + step), step)
            missed = member.finished()(held_out) - held_out
            fvu[weights, seed] = float(missed.square().sum() / (held_out - held_out.mean(0)).square().sum())
    plain, rounding = ([fvu[weights, seed] for seed in (0, 1, 2)] for weights in ("float32", "bfloat16"))
    noise = max(plain) - min(plain)
    assert all(0.05 < value < 0.5 for value in plain), plain
    assert plain != rounding
    assert abs(sum(rounding) - sum(plain)) / 3 < max(noise, 0.01 * plain[0]), (plain, rounding)


def test_gradients_as_large_as_the_weights_are_not_made():
    member = Member.create(FAMILY["free rows"], training(), tokens(1000))
    batch = member.read(tokens(0))
    with member.optimiser.rounded():
        member.dictionary.losses(TrainingBatch(batch, batch, torch.zeros(96, dtype=torch.bool))).total.backward()
    assert member.dictionary.W_enc_FD.grad is None
    assert member.dictionary.W_dec.grad is None


def test_an_error_inside_of_a_step_leaves_the_masters_in_place():
    member = Member.create(FAMILY["free rows"], training(), tokens(1000))
    before = copy.deepcopy(member.dictionary.state_dict())
    with pytest.raises(ZeroDivisionError), member.optimiser.rounded():
        assert member.dictionary.W_dec.dtype == torch.bfloat16
        raise ZeroDivisionError
    assert member.dictionary.W_dec.dtype == torch.float32
    for key, tensor in member.dictionary.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("config", [sb.MatchingPursuit(d_sae=40), sb.Structured(d_sae=40)], ids=lambda c: c.architecture)
def test_architectures_that_read_their_matrices_otherwise_are_refused(config):
    with pytest.raises(
        UserError, match=f"weights=bfloat16 is not for architecture '{config.architecture}'.*leave out training.weights"
    ):
        Member.create(config, training(), tokens(1000))


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_kernels_that_serve_float32_alone_are_refused_by_order(kernels):
    with (
        use_implementation(kernels),
        pytest.raises(UserError, match=f"weights=bfloat16 does not work with the {kernels} kernels"),
    ):
        Member.create(FAMILY["free rows"], training(), tokens(1000))


@pytest.mark.filterwarnings("default:weights=bfloat16 is for a GPU")
def test_in_memory_it_is_warned_of_once():
    member_module._warn_slow.cache_clear()
    with pytest.warns(RuntimeWarning, match="weights=bfloat16 is for a GPU"):
        Member.create(FAMILY["free rows"], training(), tokens(1000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Member.create(FAMILY["free rows"], training(), tokens(1000))

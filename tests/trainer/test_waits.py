"""How often a step asks the device for a number, which on a GPU waits until all work before is done.

Without a GPU, what would wait is counted by name, with stock torch operations and everything that depends on the kind of device set as for
a GPU. Two operations of stock.py are left out, for which a GPU has Triton's that never wait: ties of `topk` across its border, and counting
in `by_latent`; `above` stands for Triton's, which waits once as well.
"""

import sys
import traceback
import warnings
from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import saebench as sb
from saebench.dictionaries import orthogonality
from saebench.dictionaries.auxk import auxk_loss
from saebench.dictionaries.csr import CSR
from saebench.dictionaries.topafa import TopAFA
from saebench.kernels import encode_batch_topk, use_implementation
from saebench.kernels.encode_batch_topk import largest
from saebench.trainer import Member, TrainConfig
from saebench.trainer import member as member_module
from saebench.trainer import optimiser as optimiser_module

ATEN = torch.ops.aten
ASKING = {
    getattr(ATEN, name)
    for name in ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2", "unique_consecutive")
}
INDEXING = {getattr(ATEN, name) for name in ("index", "index_put", "index_put_", "_index_put_impl_")}
COPYING = {"cpu", "tolist", "numpy"}
TRITONS_OWN = {"stock.select_topk", "stock.by_latent"}


def place():
    """The function of the package that the present call comes from, as file.function."""
    frames = (frame for frame in reversed(traceback.extract_stack()) if "/saebench/" in frame.filename)
    frame = next(frames)
    return f"{frame.filename.rsplit('/', 1)[1].removesuffix('.py')}.{frame.name}"


class Operations(TorchDispatchMode):
    def __init__(self, places):
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        by_mask = packet in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        unsized = packet is ATEN.repeat_interleave and not (kwargs or {}).get("output_size")
        if packet in ASKING or by_mask or unsized:
            self.places.append(place())
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    def __init__(self, places):
        super().__init__()
        self.places = places

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        to = [*args[1:], *(kwargs or {}).values()] if name in ("to", "tensor", "as_tensor") else []
        if name in COPYING or any(isinstance(each, (str, torch.device)) for each in to):
            self.places.append(place())
        return func(*args, **(kwargs or {}))


def waits_of(work):
    """Where it would wait, with how often."""
    places = []
    with use_implementation("stock"), Operations(places), Copies(places):
        work()
    return dict(Counter(where for where in places if where not in TRITONS_OWN))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in (member_module, optimiser_module):
        monkeypatch.setattr(module, "asking_waits", lambda device: True)
    monkeypatch.setattr(orthogonality, "CPU_BLOCK", orthogonality.BLOCK)
    selection = sys.modules["saebench.kernels.encode_batch_topk"]  # a function of the same name hides it
    monkeypatch.setattr(selection, "positions", lambda kept, count: torch.nonzero_static(kept, size=count)[:, 0])


def tokens(number, count=64):
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(number))


def trained(config, dead=0, **settings):
    """After some steps, so that what is asked in the first one alone was asked; perhaps with latents that have been silent for long."""
    settings = {"num_tokens": 64 * 1000, "batch_size": 64, "lr": 1e-3, "dead_after": 64 * 500, **settings}
    member = Member.create(config, TrainConfig(**settings), tokens(1000, 512))
    with torch.no_grad():
        member.dictionary.W_enc_FD[:dead] *= 1e-3
        member.silent_F[:dead] = 1 << 40
    with use_implementation("stock"):
        for step in range(3):
            member.step(tokens(step), step)
    return member


ABOVE = {"stock.above": 1}
CASES = {
    "topk": (sb.TopK(d_sae=2000, k=4), {}),
    "topk, unit rows": (sb.TopK(d_sae=2000, k=4, decoder="unit"), {}),
    "topk, skip": (sb.TopK(d_sae=2000, k=4, skip=True), {}),
    "csr": (CSR(d_sae=2000, k=4), {}),
    "matryoshka by topk": (sb.Matryoshka(d_sae=2000, k=4, rule="topk"), {}),
    "batchtopk": (sb.BatchTopK(d_sae=2000, k=4), ABOVE),
    "matryoshka": (sb.Matryoshka(d_sae=2000, k=4), ABOVE),
    "jumprelu": (sb.JumpReLU(d_sae=2000, target_l0=4, bandwidth=0.02), ABOVE),
    "tanh": (sb.JumpReLU(d_sae=2000, target_l0=4, bandwidth=0.02, penalty="tanh"), ABOVE),
    "gated": (sb.Gated(d_sae=2000, target_l0=4), ABOVE),
    "relu": (sb.ReLU(d_sae=2000, target_l0=4), ABOVE),
    # chunks of latents are drawn on the CPU, and rows that have a nearer one are looked up
    "ortsae": (sb.OrtSAE(d_sae=2000, k=4), ABOVE | {"orthogonality.take": 1, "orthogonality.orthogonality_penalty": 1}),
    "topafa": (TopAFA(d_sae=2000), {"topafa._to_length": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_waits_of_a_step(name, as_on_a_gpu):
    config, expected = CASES[name]
    member = trained(config)
    assert waits_of(lambda: member.step(tokens(9), 3)) == expected


@pytest.mark.parametrize("name", ["topk", "topk, unit rows", "csr", "matryoshka by topk", "batchtopk", "matryoshka"])
def test_waits_of_a_step_with_dead_latents(name, as_on_a_gpu):
    config, expected = CASES[name]
    member = trained(config, dead=100)
    assert member.dead_F.any()
    seen = waits_of(lambda: member.step(tokens(9), 3))
    assert seen == expected
    assert member.read_metrics()["auxk"] > 0


def test_rounded_weights_wait_for_nothing_either(as_on_a_gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        member = trained(CASES["topk"][0], weights="bfloat16")
    assert waits_of(lambda: member.step(tokens(9), 3)) == {}


def test_the_device_is_asked_for_the_number_of_dead_latents_now_and_then(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(member_module, "FORESIGHT", 10)
    member = Member.create(CASES["topk"][0], TrainConfig(num_tokens=64 * 1000, batch_size=64), tokens(1000, 512))
    asked = []
    for step in range(35):
        if "member.dead_at_most" in waits_of(lambda step=step: member.step(tokens(step), step)):
            asked.append(step)
    assert asked == [0, 11, 22, 33]
    monkeypatch.setattr(member_module, "FORESIGHT_SHARE", 1 / 20)  # 320 of the 6400 tokens after which a latent is dead
    asked.clear()
    member._foreseen = -1
    for step in range(35, 48):
        if "member.dead_at_most" in waits_of(lambda step=step: member.step(tokens(step), step)):
            asked.append(step)
    assert asked == [35, 41, 47]


@pytest.mark.parametrize("foresight", [0, 1, 7])
@pytest.mark.parametrize(
    "config",
    [sb.TopK(d_sae=96, k=4, k_aux=8), sb.BatchTopK(d_sae=96, k=4), sb.MatchingPursuit(d_sae=96, steps=2)],
    ids=lambda config: config.architecture,
)
def test_a_foreseen_number_of_dead_latents_changes_nothing(config, foresight, monkeypatch):
    monkeypatch.setattr(member_module, "FORESIGHT", foresight)
    monkeypatch.setattr(member_module, "FORESIGHT_SHARE", 10)
    found, dead = [], []
    for waiting in (False, True):
        monkeypatch.setattr(member_module, "asking_waits", lambda device, waiting=waiting: waiting)
        member = Member.create(config, TrainConfig(num_tokens=64 * 40, batch_size=64, lr=3e-3, dead_after=128), tokens(1000, 512))
        if config.architecture != "matching_pursuit":
            with torch.no_grad():
                member.dictionary.W_enc_FD[:40] *= 0.2
        for step in range(40):
            dead.append(int(member.dead_F.sum()))
            member.step(tokens(step), step)
        found.append(member.dictionary.state_dict())
    assert dead[:40] == dead[40:]
    assert len(set(dead)) > 3  # they come and go
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [0, 1, 13, 100])
def test_auxk_by_a_bound_is_auxk_by_the_number(more):
    generator = torch.Generator().manual_seed(0)
    sae = sb.TopK(d_sae=60, k=4, d_in=16).build().double()
    x = tokens(0).double()
    sae.initialise(x, x, generator)
    with torch.no_grad():
        sae.W_enc_FD[20:] *= 10  # living latents would win
    dead = torch.zeros(60, dtype=torch.bool)
    dead[torch.randperm(60, generator=generator)[:9]] = True
    residual = (sae(x) - x).detach()
    results = []
    for most in (None, min(60, 9 + more)):
        loss = auxk_loss(x, residual, sae.weights(), sae.b_dec, dead, 12, most)
        results.append((loss.detach(), *torch.autograd.grad(loss, [sae.W_enc_FD, sae.W_dec, sae.b_enc, sae.b_dec])))
    assert results[0][0] > 0
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    nothing = torch.zeros(60, dtype=torch.bool)
    loss = auxk_loss(x, residual, sae.weights(), sae.b_dec, nothing, 12, 5)
    assert float(loss.detach()) == 0
    for gradient in torch.autograd.grad(loss, [sae.W_enc_FD, sae.W_dec, sae.b_enc]):
        assert gradient.abs().max() == 0


def test_the_bound_is_part_of_a_checkpoint(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(member_module, "FORESIGHT", 4)
    monkeypatch.setattr(member_module, "FORESIGHT_SHARE", 1)
    settings = TrainConfig(num_tokens=64 * 40, batch_size=64, lr=1e-3, dead_after=256)
    whole, first, second = (Member.create(sb.TopK(d_sae=96, k=4), settings, tokens(1000, 512)) for _ in range(3))
    for step in range(12):
        whole.step(tokens(step), step)
    for step in range(7):
        first.step(tokens(step), step)
    second.load_state({key: tensor.clone() for key, tensor in first.state().items()})
    for step in range(7, 12):
        second.step(tokens(step), step)
    for key, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[key]), key


@pytest.mark.parametrize("guess", ["number", "tensor", "too high"])
def test_a_guess_may_lie_on_the_device(guess):
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(shape, generator=generator) for shape in ((20, 8), (50, 8), (50,)))
    with use_implementation("reference"):
        expected = encode_batch_topk(x, W, b, None, 60).to_dense()
    value = {"number": 0.5, "tensor": torch.tensor(0.5), "too high": torch.tensor(99.0)}[guess]
    found = encode_batch_topk(x, W, b, None, 60, value).to_dense()
    torch.testing.assert_close(found, expected)


def test_largest_takes_the_first_of_equal_values(as_on_a_gpu):
    values = torch.randint(0, 6, (200,), generator=torch.Generator().manual_seed(0)).float()
    for count in (1, 7, 100, 199, 200, 300):
        expected = torch.sort(values, descending=True, stable=True).indices[:count].sort().values
        assert torch.equal(largest(values, count), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_torch_itself_sees_no_wait_in_a_step_of_topk():
    member = Member.create(CASES["topk"][0], TrainConfig(num_tokens=64 * 1000, batch_size=64), tokens(1000, 512).cuda())
    x = [tokens(step).cuda() for step in range(6)]
    for step in range(3):
        member.step(x[step], step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 6):
            member.step(x[step], step)
    finally:
        torch.cuda.set_sync_debug_mode("default")

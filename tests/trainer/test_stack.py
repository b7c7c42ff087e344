"""Members in a stack beside the same members one by one: weights, counters, metrics, files, errors; and who is stacked with whom."""

import json

import pytest
import torch

import saebench as sb
from saebench.activations import Batches
from saebench.activations.encoding import Encoded
from saebench.activations.statistics import SiteStatistics
from saebench.errors import Interrupted, UserError
from saebench.kernels import use_implementation
from saebench.trainer import Member, TrainConfig
from saebench.trainer import member as member_module
from saebench.trainer import stack as stack_module
from saebench.trainer.loop import sample_tokens
from saebench.trainer.stack import Diverged, Stack, stacks
from saebench.trainer.stacked_topk import StackedTopK

SETTINGS = dict(num_tokens=64 * 40, batch_size=64, lr=5e-3, log_every=10, checkpoint_every=15, dead_after=300)
PAIR = [
    {"site": "a", "target": "b", "seed": 1, "normalise": "unit_ms"},
    {"site": "a", "target": "b", "seed": 2, "k": 1},
]
SWEEPS = {
    "rates, seeds and k": (sb.TopK, [{"lr": 1e-2, "k": 2}, {"lr": 2e-3, "k": 1}, {"seed": 5, "k": 3, "k_aux": 2}]),
    "other scalings": (sb.TopK, [{}, {"normalise": "unit_ms"}, {"centre": True, "seed": 3}]),
    "unit decoder": (sb.TopK, [{"decoder": "unit", "seed": 1}, {"decoder": "unit", "lr": 1e-3, "k": 1}]),
    "nothing subtracted": (sb.TopK, [{"subtract_b_dec": False, "seed": 1}, {"subtract_b_dec": False}]),
    "no AuxK": (sb.TopK, [{"aux_coefficient": 0, "seed": 1}, {"aux_coefficient": 0, "initial_bias": "mean"}]),
    "group lasso in one": (sb.TopK, [{"group_penalty": 1.0}, {"seed": 4}]),
    "transcoders": (sb.Transcoder, PAIR),
    "transcoders by TopK": (sb.TopK, PAIR),
}


class Planted:
    """A source of activations in memory at two sites: sums of a few of 24 directions in 16 dimensions, and a turned copy."""

    skip, ordered, competes, identity = 1, True, False, "planted"

    def __init__(self, num_contexts=40, context_size=33):
        generator = torch.Generator().manual_seed(11)
        directions = torch.randn(24, 16, generator=generator)
        picked = torch.rand(num_contexts, context_size, 24, generator=generator) < 0.12
        x = (picked * torch.rand(picked.shape, generator=generator)) @ directions + 0.5
        self.x = {"a": x, "b": 3 * x.flip(-1) + 1}
        self.num_contexts, self.context_size, self.num_tokens = num_contexts, context_size, num_contexts * context_size
        self.widths = {"a": 16, "b": 16}

    def verify(self):
        pass

    def check_sites(self, sites):
        assert set(sites) <= set(self.x)

    def fetch(self, contexts_N, sites, out=None):
        return {site: Encoded(self.x[site][contexts_N]) for site in sites}

    def statistics(self, site):
        statistics = SiteStatistics.empty(16)
        statistics.update(self.x[site][:, 1:].flatten(0, 1))
        return statistics


def members(configs, source, **settings):
    training = TrainConfig(**SETTINGS | settings)
    sample = sample_tokens(source, ["a", "b"], 0)
    made = {}
    for number, config in enumerate(configs):
        fitted = config.for_sites(source.widths)
        sites = {site: sample[site] for site in fitted.sites}
        made[f"sae-{number}"] = Member.create(fitted, training, sites, {site: source.statistics(site) for site in sites})
    return made


def configs_of(sweep):
    make, settings = SWEEPS[sweep]
    return [make(**{"d_sae": 96, "k": 2, "site": "a", **each}) for each in settings]


def batches(source, steps):
    drawn = Batches(source, ["a", "b"], 64, seed=0, end=steps)
    try:
        return [{site: x.clone() for site, x in next(drawn).items()} for _ in range(steps)]
    finally:
        drawn.close()


@pytest.mark.parametrize("kernels", ["auto", "stock"])
@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_stack_trains_as_its_members_do_one_by_one(sweep, kernels):
    source, configs = Planted(), configs_of(sweep)
    alone, together = members(configs, source), members(configs, source)
    with use_implementation(kernels):
        (stack,) = stacks(together)
        saw_dead = False
        for step, x in enumerate(batches(source, 40)):
            for member in alone.values():
                member.step({site: x[site] for site in member.dictionary.config.sites}, step)
            stack.step(x, step)
            saw_dead |= any(bool(member.dead_F.any()) for member in alone.values())
    assert saw_dead
    for one, other in zip(alone.values(), together.values(), strict=True):
        assert torch.equal(one.silent_F, other.silent_F)
        first, second = one.state(), other.state()
        assert list(first) == list(second)
        for name in first:
            torch.testing.assert_close(
                second[name], first[name], rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
        assert one.read_metrics() == pytest.approx(other.read_metrics(), rel=1e-4)


def test_where_asking_the_device_waits_a_stack_has_the_bounds_of_its_members(monkeypatch):
    monkeypatch.setattr(member_module, "asking_waits", lambda device: True)
    source, configs = Planted(), configs_of("rates, seeds and k")
    alone, together = members(configs, source), members(configs, source)
    (stack,) = stacks(together)
    for step, x in enumerate(batches(source, 30)):
        for member in alone.values():
            member.step(x["a"], step)
        stack.step(x, step)
    for one, other in zip(alone.values(), together.values(), strict=True):
        assert one.dead_F.any()
        assert torch.equal(one.state()["foreseen"], other.state()["foreseen"])
        torch.testing.assert_close(other.dictionary.W_enc_FD, one.dictionary.W_enc_FD, rtol=1e-3, atol=2e-4)


def test_only_the_member_whose_gradient_is_too_long_is_clipped():
    source = Planted()
    configs = [sb.TopK(d_sae=96, k=2, site="a", initial_norm=length) for length in (0.1, 2.0)]
    x = batches(source, 1)[0]
    norms = []
    for member in members(configs, source, clip=1e9).values():
        member.step(x["a"], 0)
        norms.append(member.read_metrics()["gradient_norm"])
    clip = sum(norms) / 2
    assert min(norms) < 0.5 * clip < 1.5 * clip < max(norms)
    alone, together, free = (members(configs, source, clip=c, eps=1.0) for c in (clip, clip, 1e9))  # eps: Adam sees lengths
    (stack,) = stacks(together)
    stack.step(x, 0)
    for made in (alone, free):
        for member in made.values():
            member.step(x["a"], 0)
    for number, (one, other, unclipped) in enumerate(zip(alone.values(), together.values(), free.values(), strict=True)):
        torch.testing.assert_close(other.dictionary.W_enc_FD, one.dictionary.W_enc_FD, rtol=1e-5, atol=1e-7)
        changed = not torch.equal(one.dictionary.W_enc_FD, unclipped.dictionary.W_enc_FD)
        assert changed == (norms[number] == max(norms))
        assert other.read_metrics()["gradient_norm"] == pytest.approx(norms[number], rel=1e-5)


def test_resampling_in_a_stack_is_that_of_its_members():
    source, configs = Planted(), [sb.TopK(d_sae=96, k=2, site="a", seed=seed, aux_coefficient=0) for seed in (1, 2)]
    settings = dict(resample_every=640, dead_after=128, resample_warmup=5)
    alone, together = members(configs, source, **settings), members(configs, source, **settings)
    (stack,) = stacks(together)
    before = [member.dictionary.W_dec.clone() for member in alone.values()]
    for step, x in enumerate(batches(source, 25)):
        for member in alone.values():
            member.step(x["a"], step)
        stack.step(x, step)
    for one, other, W_dec in zip(alone.values(), together.values(), before, strict=True):
        assert one.rate_at(25) == other.rate_at(25)
        assert not torch.allclose(one.dictionary.W_dec, W_dec)
        torch.testing.assert_close(other.dictionary.W_dec, one.dictionary.W_dec, rtol=1e-4, atol=1e-5)


def files(directory):
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(directory.rglob("*.safetensors"))}


MIXED = {
    "first": sb.TopK(d_sae=64, k=2, site="a"),
    "jump": sb.JumpReLU(d_sae=64, site="a"),
    "second": sb.TopK(d_sae=64, k=1, site="a", lr=1e-3, seed=9),
    "wide": sb.TopK(d_sae=128, k=2, site="a"),
}


def test_a_mixed_run_writes_the_same_files_either_way(tmp_path, monkeypatch):
    made = []
    create = StackedTopK.__init__
    monkeypatch.setattr(StackedTopK, "__init__", lambda self, parts: (made.append(len(parts)), create(self, parts))[1])
    for stack in (False, True):
        sb.train(MIXED, Planted(), TrainConfig(**SETTINGS, stack=stack), out=tmp_path / str(stack))
        assert made == ([2] if stack else [])
    plain, stacked = (files(tmp_path / name) for name in ("False", "True"))
    assert list(plain) == list(stacked)
    for name in plain:
        if "jump" in name or "wide" in name:
            assert plain[name] == stacked[name], name
    for name in MIXED:
        one, other = (sb.load(tmp_path / stack / "dictionaries" / name).public_tensors() for stack in ("False", "True"))
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-3, atol=1e-4)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("False", "True")
    ]
    assert [(line["step"], line["dictionary"], line["lr"]) for line in logs[0]] == [
        (line["step"], line["dictionary"], line["lr"]) for line in logs[1]
    ]
    for one, other in zip(*logs, strict=True):
        numbers = [{key: value for key, value in line.items() if isinstance(value, float)} for line in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("stop_at", [1, 14, 15, 37])
def test_stopping_a_stack_and_going_on_gives_the_same_bytes(tmp_path, monkeypatch, stop_at):
    source, training = Planted(), TrainConfig(**SETTINGS, stack=True)
    sb.train(MIXED, source, training, out=tmp_path / "whole")
    step, calls = Stack.step, []

    def stopping(self, x, number):
        if "first" in self.members:
            calls.append(1)
            if len(calls) == stop_at:
                import signal

                signal.raise_signal(signal.SIGINT)
        step(self, x, number)

    monkeypatch.setattr(Stack, "step", stopping)
    with pytest.raises(Interrupted, match=f"stopped at step {stop_at} of 40"):
        sb.train(MIXED, source, training, out=tmp_path / "parts")
    monkeypatch.setattr(Stack, "step", step)
    sb.train(MIXED, source, training, out=tmp_path / "parts")
    assert files(tmp_path / "parts" / "dictionaries") == files(tmp_path / "whole" / "dictionaries")
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_without_stacks_training_is_members_stepping_in_turn():
    source, training = Planted(), TrainConfig(**SETTINGS, stack=False)
    configs = [MIXED["first"], MIXED["second"]]
    trained = sb.train(configs, source, training)
    by_hand = []
    for config in configs:
        fitted = config.for_sites(source.widths)
        member = Member.create(fitted, training, sample_tokens(source, ["a"], 0), {"a": source.statistics("a")})
        drawn = Batches(source, ["a"], 64, seed=0, end=40)
        for step in range(40):
            member.step(next(drawn), step)
        drawn.close()
        by_hand.append(member.finished())
    for one, other in zip(trained, by_hand, strict=True):
        for name, tensor in one.public_tensors().items():
            assert torch.equal(tensor, other.public_tensors()[name]), name


def test_the_member_that_diverges_is_named(tmp_path):
    source = Planted()
    named = {"good": sb.TopK(d_sae=64, k=2, site="a"), "bad": sb.TopK(d_sae=64, k=2, site="a", lr=1e30)}
    with pytest.raises(UserError, match=r"training of 'bad' diverged before step (2|10): lower its learning rate .* now 1e\+30"):
        sb.train(named, source, TrainConfig(**SETTINGS, stack=True))


def test_kernels_that_refuse_a_member_name_it():
    source = Planted()
    made = members([sb.TopK(d_sae=64, k=2, site="a", seed=seed) for seed in range(3)], source)
    (stack,) = stacks(made)
    with torch.no_grad():
        made["sae-1"].dictionary.W_enc_FD[3, 4] = float("nan")
    x = batches(source, 1)[0]
    try:
        made["sae-1"].dictionary.encode(x["a"])
    except UserError:
        with pytest.raises(Diverged, match="^sae-1$"):
            stack.step(x, 0)
    else:
        pytest.skip("these kernels leave NaN to the metrics")


def test_who_is_stacked_with_whom(monkeypatch):
    source = Planted()
    same = {"d_sae": 96, "k": 2, "site": "a"}
    configs = [
        sb.TopK(**same),
        sb.TopK(**same, seed=3, lr=1e-4, initial_norm=0.3, centre=True),
        sb.TopK(**same | {"d_sae": 97}),
        sb.TopK(**same | {"k": 30}),
        sb.TopK(**same, decoder="unit"),
        sb.TopK(**same, aux_coefficient=0.1),
        sb.TopK(**same, orthogonality=0.1),
        sb.TopK(**same | {"site": "b"}),
        sb.BatchTopK(**same),
        sb.TopK(**same | {"k": 4}),
    ]
    groups = lambda made: [[int(name[4:]) for name in stack.members] for stack in stacks(made)]  # noqa: E731
    assert groups(members(configs, source)) == [[0, 1, 9], [2], [3], [4], [5], [6], [7], [8]]
    monkeypatch.setattr(stack_module, "LARGEST", 2 * 64 * 16)
    assert groups(members(configs, source)) == [[0, 1], [2], [3], [4], [5], [6], [7], [8], [9]]
    monkeypatch.setattr(stack_module, "LARGEST", 64 * 16)
    assert groups(members(configs[:2], source)) == [[0], [1]]
    monkeypatch.undo()
    with use_implementation("reference"):
        assert groups(members(configs[:2], source)) == [[0], [1]]

"""The loop: equal results alone and in company, exact resume, dead counting, schedules, metrics."""

import json

import pytest
import torch

import saebench as sb
from saebench.activations.encoding import Encoded
from saebench.activations.statistics import SiteStatistics
from saebench.errors import Interrupted, UserError
from saebench.trainer import Member, TrainConfig
from saebench.trainer import loop as loop_module


class Planted:
    """A source of activations in memory: sums of a few of 24 directions in 12 dimensions."""

    skip, ordered, competes = 1, True, False

    def __init__(self, num_contexts=40, context_size=33, sites=("a",)):
        generator = torch.Generator().manual_seed(11)
        directions = torch.randn(24, 12, generator=generator)
        picked = torch.rand(num_contexts, context_size, 24, generator=generator) < 0.12
        self.x = (picked * torch.rand(picked.shape, generator=generator)) @ directions + 0.5
        self.num_contexts, self.context_size = num_contexts, context_size
        self.widths = dict.fromkeys(sites, 12)
        self.identity, self.num_tokens = "planted", num_contexts * context_size

    def verify(self):
        assert self.x.isfinite().all()

    def check_sites(self, sites):
        for site in sites:
            if site not in self.widths:
                raise UserError(f"no {site}")

    def fetch(self, contexts_N, sites, out=None):
        return {site: Encoded(self.x[contexts_N] * (1 + list(self.widths).index(site))) for site in sites}

    def statistics(self, site):
        statistics = SiteStatistics.empty(12)
        statistics.update(self.fetch(torch.arange(self.num_contexts), [site])[site].values[:, 1:].flatten(0, 1))
        return statistics


SETTINGS = dict(num_tokens=64 * 40, batch_size=64, lr=5e-3, log_every=10, checkpoint_every=15)


def weights(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted((directory / "dictionaries").rglob("*.safetensors"))
    }


def test_training_lowers_the_error_and_folds_the_scale(tmp_path):
    source = Planted()
    sae = sb.train(sb.TopK(d_sae=32, k=4), source, TrainConfig(**SETTINGS | {"num_tokens": 64 * 300}), out=tmp_path)
    x = source.x[:, 1:].flatten(0, 1)
    fvu = float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert fvu < 0.2
    assert rows[-1]["fvu"] == pytest.approx(fvu, rel=0.3)
    assert rows[0]["fvu"] > 2 * rows[-1]["fvu"]
    assert [row["step"] for row in rows] == list(range(10, 301, 10))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    assert torch.equal(sb.load(tmp_path / "dictionaries" / "topk-32-k4")(x), sae(x))


def test_many_at_once_equal_each_alone(tmp_path):
    source = Planted(sites=("a", "b"))
    configs = [
        sb.TopK(d_sae=32, k=4, site="a"),
        sb.TopK(d_sae=16, k=2, site="b"),
        sb.TopK(d_sae=32, k=4, site="a", aux_coefficient=0),
    ]
    together = sb.train(configs, source, TrainConfig(**SETTINGS))
    for config, dictionary in zip(configs, together, strict=True):
        alone = sb.train(config, source, TrainConfig(**SETTINGS))
        for name, tensor in alone.public_tensors().items():
            assert torch.equal(tensor, dictionary.public_tensors()[name]), name


@pytest.mark.parametrize("stop_at", [1, 14, 15, 16, 37])
def test_stopping_and_going_on_gives_the_same_bytes(tmp_path, monkeypatch, stop_at):
    source, config = Planted(), {"sae": sb.TopK(d_sae=32, k=4)}
    training = TrainConfig(**SETTINGS, dead_after=300)
    sb.train(config, source, training, out=tmp_path / "whole")

    step, calls = Member.step, []

    def stopping(self, x, number):
        calls.append(1)
        if len(calls) == stop_at:
            import signal

            signal.raise_signal(signal.SIGINT)
        step(self, x, number)

    monkeypatch.setattr(Member, "step", stopping)
    with pytest.raises(Interrupted, match=f"stopped at step {stop_at} of 40; run the same command again"):
        sb.train(config, source, training, out=tmp_path / "parts")
    monkeypatch.setattr(Member, "step", step)
    assert not (tmp_path / "parts" / "dictionaries").exists()
    sb.train(config, source, training, out=tmp_path / "parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("crash_in", ["write_tensors", "write_manifest"])
def test_a_crash_inside_a_checkpoint_write_loses_only_that_checkpoint(tmp_path, monkeypatch, crash_in):
    source, config, training = Planted(), {"sae": sb.TopK(d_sae=32, k=4)}, TrainConfig(**SETTINGS)
    sb.train(config, source, training, out=tmp_path / "whole")
    from saebench.trainer import checkpoint

    write, calls = getattr(checkpoint, crash_in), []

    def crashing(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise SystemExit
        write(*arguments, **options)

    monkeypatch.setattr(checkpoint, crash_in, crashing)
    with pytest.raises(SystemExit):
        sb.train(config, source, training, out=tmp_path / "parts")
    monkeypatch.setattr(checkpoint, crash_in, write)
    assert [p.name for p in (tmp_path / "parts" / "checkpoint").iterdir()] == ["step-00000015"]
    sb.train(config, source, training, out=tmp_path / "parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_another_run_does_not_touch_a_checkpoint(tmp_path):
    source, training = Planted(), TrainConfig(**SETTINGS)
    sb.train({"sae": sb.TopK(d_sae=32, k=4)}, source, training, out=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = Planted()
    other.identity = "other"
    for configs, activations, settings, message in (
        ({"sae": sb.TopK(d_sae=64, k=4)}, source, training, r"dictionaries\.sae\.d_sae: 32 there, 64 here"),
        ({"mine": sb.TopK(d_sae=32, k=4)}, source, training, r"dictionaries\.sae"),
        ({"sae": sb.TopK(d_sae=32, k=4)}, source, TrainConfig(**SETTINGS | {"lr": 1}), r"training\.lr: 0\.005 there, 1\.0 here"),
        ({"sae": sb.TopK(d_sae=32, k=4)}, other, training, "activations: 'planted' there, 'other' here"),
    ):
        with pytest.raises(UserError, match=message):
            sb.train(configs, activations, settings, out=tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    source, config, training = Planted(), {"sae": sb.TopK(d_sae=32, k=4)}, TrainConfig(**SETTINGS)
    sb.train(config, source, training, out=tmp_path)
    expected = weights(tmp_path)
    checkpoints = sorted((tmp_path / "checkpoint").iterdir())
    assert [p.name for p in checkpoints] == ["step-00000015", "step-00000030"]
    newest = checkpoints[1] / "sae.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    (tmp_path / "checkpoint" / ".step-00000029.partial").mkdir()
    sb.train(config, source, training, out=tmp_path)
    assert "step-00000030 is damaged" in capsys.readouterr().err
    assert weights(tmp_path) == expected
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == ["step-00000015", "step-00000030"]
    assert newest.read_bytes() != content  # the damaged one was written anew
    for path in (tmp_path / "checkpoint").glob("*/sae.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint in .* is intact"):
        sb.train(config, source, training, out=tmp_path)


def test_silent_latents_are_counted_in_tokens():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    member = Member.create(
        sb.TopK(d_sae=8, k=1, aux_coefficient=0), TrainConfig(num_tokens=1000, batch_size=10, lr=1e-9, dead_after=30), x
    )
    expected = torch.zeros(8, dtype=torch.int64)
    for number, batch in enumerate(x.split(10)[:8]):
        codes = member.dictionary.encode(member.read(batch))
        fired = codes.to_dense().gt(0).any(0)
        expected = torch.where(fired, 0, expected + 10)
        member.step(batch, number)
        assert torch.equal(member.silent_F, expected)
    assert torch.equal(member.dead_F, expected >= 30)


def test_auxk_revives_dead_latents():
    source = Planted()
    x = source.x[:, 1:].flatten(0, 1)
    dead, learned = [], []
    for coefficient in (0.0, 1 / 32):
        generator = torch.Generator().manual_seed(0)
        training = TrainConfig(num_tokens=64 * 300, batch_size=64, lr=5e-3, dead_after=640)
        member = Member.create(sb.TopK(d_sae=32, k=4, aux_coefficient=coefficient), training, x, source.statistics("a"))
        with torch.no_grad():
            member.dictionary.W_enc_FD[:16] *= 1e-3  # too weak ever to be among the four strongest
        for number in range(training.steps):
            member.step(x[torch.randint(0, len(x), (64,), generator=generator)], number)
        dead.append(float(member.dead_F.float().mean()))
        learned.append(float(member.dictionary.W_enc_FD[:16].detach().norm(dim=1).mean()))
    assert dead[0] > 0.3
    assert dead[1] < dead[0] / 2
    assert learned[1] > 5 * learned[0]


def test_schedule_rises_holds_and_falls_to_zero():
    training = TrainConfig(num_tokens=1000, batch_size=10, warmup=0.1, decay=0.2)
    rates = [training.rate_at(step) for step in range(training.steps + 1)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == [1.0] * 72
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == 0
    assert TrainConfig(lr=None).lr_for(16384) == pytest.approx(4 * TrainConfig(lr=None).lr_for(16384 * 16))
    assert TrainConfig(lr=0.5).lr_for(7) == 0.5


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("betas", (0.5, 0.9)),
        ("eps", 1.0),
        ("clip", 1e-3),
        ("warmup", 0.5),
        ("decay", 0.9),
        ("lr", 1e-4),
        ("seed", 1),
        ("dead_after", 64),
    ],
)
def test_every_setting_changes_the_result(setting, value):
    source, config = Planted(), sb.TopK(d_sae=64, k=2)
    base = {**SETTINGS, "num_tokens": 64 * 12}
    results = [sb.train(config, source, TrainConfig(**settings)).W_dec for settings in (base, {**base, setting: value})]
    assert not torch.equal(*results)


@pytest.mark.parametrize("normalise", ["sqrt_d", "unit_ms", "none"])
def test_input_normalisation_has_the_stated_scale(normalise):
    source = Planted()
    x = source.x[:, 1:].flatten(0, 1)
    member = Member.create(sb.TopK(d_sae=8, k=2, normalise=normalise), TrainConfig(), x, source.statistics("a"))
    scaled = member.read(x)
    value = {
        "sqrt_d": scaled.norm(dim=1).mean() / 12**0.5,
        "unit_ms": scaled.square().sum(1).mean(),
        "none": scaled.norm() / x.norm(),
    }
    assert float(value[normalise]) == pytest.approx(1, rel=1e-4)


def test_diverging_training_is_named(monkeypatch):
    monkeypatch.setattr(loop_module, "sample_tokens", lambda *_: {"a": Planted().x[:, 1:].flatten(0, 1)})
    with pytest.raises(UserError, match=r"training of 'topk-32-k4' diverged before step (2|10): lower its learning rate"):
        sb.train(sb.TopK(d_sae=32, k=4), Planted(), TrainConfig(**SETTINGS | {"lr": 1e30}))


def test_configurations_that_do_not_fit_the_source_are_named(tmp_path):
    two = Planted(sites=("a", "b"))
    for config, source, message in (
        (sb.TopK(d_sae=8, k=2), two, "no site is named and the activations have several"),
        (sb.TopK(d_sae=8, k=2, site="c"), two, "'c' is not among the activations"),
        (sb.TopK(d_sae=8, k=2, d_in=13), Planted(), "d_in=13 does not match site 'a', which is 12 wide"),
        ([], Planted(), "no dictionaries"),
    ):
        with pytest.raises(UserError, match=message):
            sb.train(config, source, TrainConfig(**SETTINGS), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for settings, message in (
        ({"num_tokens": 5, "batch_size": 10}, "less than one batch"),
        ({"warmup": 0.6, "decay": 0.6}, "more than the whole run"),
        ({"lr": -1}, "lr=-1"),
        ({"loggers": ["mlflow"]}, "loggers"),
        ({"learning_rate": 1}, "unknown key learning_rate"),
    ):
        with pytest.raises(UserError, match=message):
            TrainConfig(**settings)


def test_nan_in_the_activations_stops_training_with_a_name():
    source = Planted()
    source.x[7, 3, 2] = float("nan")
    with pytest.raises(UserError, match=r"NaN or Inf in the activations of site 'a', batch \d+"):
        sb.train(sb.TopK(d_sae=8, k=2), source, TrainConfig(**SETTINGS))


def test_tensorboard_receives_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    sb.train(sb.TopK(d_sae=8, k=2), Planted(), TrainConfig(**SETTINGS | {"loggers": ["tensorboard"]}), out=tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("topk-8-k2/fvu")] == [10, 20, 30, 40]


@pytest.mark.slow
def test_recovers_planted_atoms():
    """Sums of 3 of 64 random unit vectors in 32 dimensions (methods.md T2): mean best cosine above 0.93."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)

    def draw(count):
        picked = torch.rand(count, 64, generator=generator).argsort(1)[:, :3]
        weights = torch.rand(count, 3, generator=generator) + 0.5
        return (weights[..., None] * atoms[picked]).sum(1)

    training = TrainConfig(num_tokens=512 * 6000, batch_size=512, lr=1e-3, seed=5)
    member = Member.create(sb.TopK(d_sae=64, k=3, normalise="none"), training, draw(8192))
    for step in range(training.steps):
        member.step(draw(512), step)
    cosines = atoms @ member.finished().W_dec.T
    assert float(cosines.amax(1).mean()) > 0.93


def test_wandb_receives_the_metrics_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    calls, begin = [], wandb.init

    def recording(**options):
        calls.append(options)
        run = begin(**options)
        log = run.log
        run.log = lambda values, step: (calls.append((step, values)), log(values, step=step))
        return run

    monkeypatch.setattr(wandb, "init", recording)
    training = TrainConfig(**SETTINGS | {"loggers": ["wandb"]})
    for _ in range(2):
        sb.train(sb.TopK(d_sae=8, k=2), Planted(), training, out=tmp_path)
    begun = [call for call in calls if isinstance(call, dict)]
    assert len({options["id"] for options in begun}) == 1
    logged = [call for call in calls if isinstance(call, tuple)]
    assert [step for step, _ in logged][:4] == [10, 20, 30, 40]
    assert 0 < logged[0][1]["topk-8-k2/fvu"] < 2

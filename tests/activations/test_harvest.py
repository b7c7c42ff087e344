import json

import pytest
import torch
from helpers import SITES

from saebench.activations import ActivationStore, harvest
from saebench.activations.encoding import encode
from saebench.errors import UserError
from saebench.files import MANIFEST


def bytes_of(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_store_holds_what_the_model_computes(make_store, tiny_lm, contexts):
    store = make_store()
    direct = tiny_lm.read(contexts.ids_NS, SITES)
    for site in SITES:
        torch.testing.assert_close(store.read(site), direct[site], rtol=1e-5, atol=1e-5)
    assert torch.equal(store.contexts.ids_NS, contexts.ids_NS)
    assert store.contexts.names == contexts.names
    assert len(list(store.path.glob("shard-*"))) > 3
    store.verify()


def test_statistics_equal_those_of_the_whole_matrix(make_store):
    store = make_store()
    x = store.read(SITES[0])[:, 1:].flatten(0, 1).double()
    statistics = store.statistics(SITES[0])
    torch.testing.assert_close(statistics.mean_D, x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.covariance_DD, torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-5)
    assert statistics.mean_norm == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-5)
    assert statistics.variance == pytest.approx(float((x - x.mean(0)).square().sum(1).mean()), rel=1e-5)


@pytest.mark.parametrize(("storage", "largest"), [("float32", 0.0), ("float16", 1e-6), ("bfloat16", 1e-4), ("int8", 1e-3)])
def test_storage_error_is_measured_and_stated(make_store, storage, largest):
    exact, store = make_store("exact"), make_store(storage, storage)
    for site in SITES:
        x, y = (s.read(site)[:, 1:].flatten(0, 1).double() for s in (exact, store))
        fvu = float((x - y).square().sum() / (x - x.mean(0)).square().sum())
        assert store.manifest["storage_fvu"][site] == pytest.approx(fvu, rel=1e-3, abs=1e-15)
        assert fvu <= largest


def test_int8_error_is_within_half_a_step():
    x = torch.randn(50, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    x[7] = 0
    encoded = encode(x, "int8")
    steps = x.abs().amax(1, keepdim=True) / 127
    assert ((encoded.decode() - x).abs() <= steps / 2 * 1.0001).all()


@pytest.mark.parametrize("stop_after", [0, 1, 3, 5])
def test_a_stopped_harvest_goes_on_to_the_same_bytes(make_store, tiny_lm, monkeypatch, stop_after):
    whole = make_store("whole")
    read, calls = type(tiny_lm).read, []

    def stopping(self, *arguments):
        calls.append(1)
        if len(calls) == 2 * stop_after + 2:
            raise KeyboardInterrupt
        return read(self, *arguments)

    monkeypatch.setattr(type(tiny_lm), "read", stopping)
    with pytest.raises(KeyboardInterrupt):
        make_store("stopped")
    monkeypatch.setattr(type(tiny_lm), "read", read)
    if stop_after > 1:
        with pytest.raises(UserError, match="incomplete"):
            ActivationStore(whole.path.parent / "stopped")
    resumed = make_store("stopped")
    assert bytes_of(resumed.path) == bytes_of(whole.path)


@pytest.mark.parametrize("entered", [False, True])
def test_killed_before_or_after_entering_a_shard(make_store, monkeypatch, entered):
    whole = make_store("whole")
    from saebench.activations.harvesting import _Writer

    enter, calls = _Writer._enter, []

    def failing(self, **arguments):
        calls.append(1)
        stop = len(calls) in (1, 4)
        if entered or not stop:
            enter(self, **arguments)
        if stop:
            raise SystemExit

    for _ in range(2):
        monkeypatch.setattr(_Writer, "_enter", failing)
        with pytest.raises(SystemExit):
            make_store("killed")
    monkeypatch.setattr(_Writer, "_enter", enter)
    assert bytes_of(make_store("killed").path) == bytes_of(whole.path)


def test_a_finished_store_is_opened_as_it_is(make_store, tiny_lm, monkeypatch):
    store = make_store()
    before = {path: path.stat().st_mtime_ns for path in store.path.iterdir()}
    make_store()
    assert before == {path: path.stat().st_mtime_ns for path in store.path.iterdir()}


def test_another_harvest_is_not_touched(make_store, tiny_lm, contexts, tmp_path):
    store = make_store()
    before = bytes_of(store.path)
    with pytest.raises(UserError, match="holds another harvest .sites"):
        harvest(tiny_lm, contexts, SITES[:1], store.path, storage="float32", batch_size=8)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty and holds no store"):
        make_store("thesis")
    assert bytes_of(store.path) == before


def test_damage_is_named_by_shard(make_store):
    store = make_store()
    shard = store.path / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="shard-00002.safetensors is damaged"):
        ActivationStore(store.path).verify()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match="shard-00002.safetensors is truncated"):
        ActivationStore(store.path)
    shard.unlink()
    with pytest.raises(UserError, match="shard-00002.safetensors is missing"):
        ActivationStore(store.path)


def test_another_version_is_refused(make_store):
    store = make_store()
    manifest = json.loads((store.path / MANIFEST).read_text())
    (store.path / MANIFEST).write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(UserError, match="version 99; this saebench reads version 1"):
        ActivationStore(store.path)
    with pytest.raises(UserError, match="not a saebench-activations"):
        ActivationStore(store.path.parent)


def test_bad_requests_write_nothing(tiny_lm, contexts, tmp_path):
    out = tmp_path / "out"
    for sites, options, message in (
        (["blocks.9.hook_resid_post"], {}, "unknown site"),
        ([], {}, "no sites"),
        (SITES, {"storage": "int4"}, "unknown storage type 'int4'"),
    ):
        with pytest.raises(UserError, match=message):
            harvest(tiny_lm, contexts, sites, out, **options)
    with (
        tiny_lm.edit({SITES[1]: lambda x: x * float("nan")}),
        pytest.raises(UserError, match="NaN or Inf in the activations of site 'blocks.0.hook_mlp_out', contexts 0"),
    ):
        harvest(tiny_lm, contexts, SITES[1:], out)
    with tiny_lm.edit({SITES[1]: lambda x: x * 1e6}), pytest.raises(UserError, match="exceed the range of float16"):
        harvest(tiny_lm, contexts, SITES[1:], out)
    assert not out.exists()

"""Sources of two models as one: the same values, order and statistics as apart, and refused where tokens differ."""

import copy

import pytest
import torch

import saebench as sb
from saebench.activations import ActivationStore, ActivationStream, Batches, ContextBatches, JoinedSource
from saebench.dictionaries import Crosscoder
from saebench.dictionaries.crosscoder import relative_norms
from saebench.errors import UserError
from saebench.evaluation import reconstruction
from saebench.lm import LanguageModel

SITE = "blocks.1.hook_resid_post"


@pytest.fixture
def other_lm(tiny_lm) -> LanguageModel:
    """The same model with one layer's weights changed."""
    hf = copy.deepcopy(tiny_lm.hf)
    with torch.no_grad():
        hf.transformer.h[1].mlp.c_proj.weight.mul_(-1.5)
    return LanguageModel(tiny_lm.name, hf, tiny_lm.tokenizer, "changed")


@pytest.fixture
def streams(tiny_lm, other_lm, contexts):
    return {name: ActivationStream(lm, contexts[:40], [SITE]) for name, lm in (("base", tiny_lm), ("chat", other_lm))}


def test_joined_activations_are_those_of_each_source(streams):
    joined = JoinedSource(streams)
    assert joined.widths == {f"base/{SITE}": 32, f"chat/{SITE}": 32}
    assert (joined.num_contexts, joined.context_size, joined.num_tokens) == (40, 16, 640)
    assert joined.skip == 1 and joined.ordered
    assert joined.contexts.identity == streams["base"].contexts.identity
    which = torch.tensor([7, 0, 31])
    fetched = joined.fetch(which, [f"chat/{SITE}", f"base/{SITE}"])
    assert list(fetched) == [f"chat/{SITE}", f"base/{SITE}"]
    for name, stream in streams.items():
        assert torch.equal(fetched[f"{name}/{SITE}"].values, stream.fetch(which, [SITE])[SITE].values)
        assert torch.equal(joined.statistics(f"{name}/{SITE}").total_D, stream.statistics(SITE).total_D)
    assert not torch.equal(fetched[f"base/{SITE}"].values, fetched[f"chat/{SITE}"].values)


@pytest.mark.parametrize("kind", [Batches, ContextBatches])
def test_batches_of_the_whole_are_batches_of_the_parts(streams, kind):
    joined = JoinedSource(streams)
    together = kind(joined, list(joined.widths), 24, seed=3)
    alone = {name: kind(stream, [SITE], 24, seed=3) for name, stream in streams.items()}
    for _ in range(60 if kind is Batches else 5):  # several epochs, so that memory is used again
        batch = next(together)
        for name, batches in alone.items():
            assert torch.equal(batch[f"{name}/{SITE}"], next(batches)[SITE])
    for batches in (together, *alone.values()):
        batches.close()


def test_stores_are_read_into_memory_that_is_used_again(make_store):
    stores = {"a": make_store("a", storage="int8"), "b": make_store("b", storage="float32")}
    joined = JoinedSource(stores)
    sites = [f"a/{SITE}", f"b/{SITE}"]
    first = joined.fetch(torch.tensor([1, 2]), sites)
    second = joined.fetch(torch.tensor([5, 4]), sites, first)
    for site in sites:
        assert second[site].values is first[site].values
        name, _, own = site.partition("/")
        torch.testing.assert_close(second[site].decode(), stores[name].fetch(torch.tensor([5, 4]), [own])[own].decode())
    assert joined.identity != JoinedSource({"a": stores["a"], "c": stores["b"]}).identity
    joined.verify()
    weights = next(path for path in stores["b"].path.glob("shard-*"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="is damaged"):
        JoinedSource({"a": stores["a"], "b": ActivationStore(stores["b"].path)}).verify()


def test_other_tokens_are_refused(tiny_lm, other_lm, contexts, streams):
    for others in (contexts[10:50], contexts[:30]):
        with pytest.raises(UserError, match="'base' and 'chat' are not over the same tokens .*: harvest both from one text"):
            JoinedSource({"base": streams["base"], "chat": ActivationStream(other_lm, others, [SITE])})
    late = ActivationStream(other_lm, contexts[:40], [SITE])
    late.skip = 2
    with pytest.raises(UserError, match="skip 1 and 2 positions"):
        JoinedSource({"base": streams["base"], "chat": late})
    with pytest.raises(UserError, match="source name 'a/b'"):
        JoinedSource({"a/b": streams["base"]})
    with pytest.raises(UserError, match="nothing to join"):
        JoinedSource({})
    with pytest.raises(UserError, match=f"site '{SITE}' is not among the joined activations: they hold base/"):
        JoinedSource(streams).fetch(torch.tensor([0]), [SITE])


def test_a_crosscoder_over_two_models(tiny_lm, streams, contexts):
    joined = JoinedSource(streams)
    sites = tuple(joined.widths)
    config = Crosscoder(d_sae=64, k=4, site=sites, lr=5e-3)
    trained = sb.train(config, joined, sb.TrainConfig(num_tokens=30_000, batch_size=128))
    figures = reconstruction(trained, joined)
    assert set(figures["fvu_by_site"]) == set(sites)
    assert figures["tokens"] == 40 * 15
    assert max(figures["fvu_by_site"].values()) < 0.8
    x = joined.fetch(torch.arange(40), list(sites))
    y = torch.cat([x[site].values[:, 1:].flatten(0, 1) for site in sites], 1)
    error = (trained(y) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert figures["fvu"] == pytest.approx(float(error), rel=1e-5)
    part = reconstruction(trained, joined, start=30)
    assert part["tokens"] == 10 * 15 and part["fvu"] != figures["fvu"]
    assert relative_norms(trained).isfinite().all()
    with pytest.raises(UserError, match=r"reads several models .*saebench.evaluation.reconstruction"):
        sb.evaluate(trained, tiny_lm, contexts[:4])

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SITES

from saebench.activations import ActivationStream, Batches, sequences
from saebench.activations.encoding import Encoded
from saebench.errors import UserError


class Numbered:
    """A source whose every activation tells its context and position."""

    skip, ordered, competes = 1, True, False

    def __init__(self, num_contexts=23, context_size=7, bad=None):
        self.num_contexts, self.context_size, self.widths = num_contexts, context_size, {"a": 2}
        self.bad = bad

    def check_sites(self, sites):
        assert set(sites) <= {"a"}

    def fetch(self, contexts_N, sites, out=None):
        position = torch.arange(self.context_size).expand(len(contexts_N), -1)
        values = torch.stack([contexts_N[:, None].expand_as(position), position], -1).float()
        if self.bad is not None:
            values[contexts_N == self.bad] = float("nan")
        return {"a": Encoded(values)}


def rows(batches, count):
    return torch.cat([next(batches)["a"] for _ in range(count)])


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr("saebench.activations.batches.GROUP_TOKENS", 5 * 7)


def test_every_token_once_an_epoch_except_the_first_of_each_context():
    batches = Batches(Numbered(), ["a"], 6, seed=1)
    assert batches.tokens_per_epoch == 23 * 6
    for _ in range(3):
        epoch = {tuple(row) for row in rows(batches, 23).tolist()}
        assert epoch == {(float(c), float(p)) for c in range(23) for p in range(1, 7)}


def test_order_is_a_function_of_the_seed():
    draw = lambda seed: rows(Batches(Numbered(), ["a"], 10, seed=seed), 12)  # noqa: E731
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_epochs_differ_and_batches_mix_documents():
    batches = Batches(Numbered(), ["a"], 138, seed=0)
    first, second = next(batches)["a"], next(batches)["a"]
    assert not torch.equal(first, second)
    small = Batches(Numbered(), ["a"], 12, seed=0)
    assert len(next(small)["a"][:, 0].unique()) > 3


@pytest.mark.parametrize("batch_size", [1, 5, 29, 31, 200])
def test_any_position_can_be_resumed(batch_size):
    whole = Batches(Numbered(), ["a"], batch_size, seed=2)
    expected = [next(whole)["a"] for _ in range(9)]
    for position in (1, 4, 8):
        resumed = Batches(Numbered(), ["a"], batch_size, seed=2, position=position)
        assert torch.equal(next(resumed)["a"], expected[position])


class Counting(Numbered):
    """Remembers how often it was read."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def fetch(self, contexts_N, sites, out=None):
        self.reads += 1
        return super().fetch(contexts_N, sites, out)


@pytest.mark.parametrize(("end", "position"), [(1, 0), (5, 0), (23, 0), (23, 20)])
def test_nothing_is_read_beyond_the_end(end, position):
    source = Counting()
    batches = Batches(source, ["a"], 7, seed=3, position=position, end=end)
    plain = Batches(Numbered(), ["a"], 7, seed=3, position=position)
    assert torch.equal(rows(batches, end - position), rows(plain, end - position))
    batches.close()
    first, last = (batches._place(token)[0] for token in (7 * position, 7 * end - 1))
    assert source.reads == last - first + 1


def test_a_source_that_competes_is_read_when_it_is_needed_by_the_thread_that_needs_it():
    class Competing(Counting):
        competes = True

        def fetch(self, contexts_N, sites, out=None):
            assert threading.current_thread() is threading.main_thread()
            return super().fetch(contexts_N, sites, out)

    source = Competing()
    batches = Batches(source, ["a"], 7, seed=3)
    plain = Batches(Numbered(), ["a"], 7, seed=3)
    for number in range(30):
        assert torch.equal(next(batches)["a"], next(plain)["a"])
        assert source.reads == batches._place(7 * number + 6)[0] + 1


@pytest.mark.skipif(not Path("/proc/self/task").is_dir() or torch.get_num_threads() == 1, reason="counts threads of Linux")
def test_reading_ahead_raises_one_thread_and_no_team_of_them(monkeypatch):
    class ByNumpy(Numbered):
        def fetch(self, contexts_N, sites, out=None):
            values = np.repeat(contexts_N.numpy().astype("float32"), 7 * 2).reshape(-1, 7, 2)
            return {"a": Encoded(torch.from_numpy(values))}

    monkeypatch.setattr("saebench.activations.batches.GROUP_TOKENS", 1 << 18)  # more than one of torch's threads takes
    torch.ones(1 << 20).sum()  # so that the team of this thread is there
    before = len(list(Path("/proc/self/task").iterdir()))
    batches = Batches(ByNumpy(1 << 16), ["a"], 1 << 16)
    rows(batches, 6)
    assert len(list(Path("/proc/self/task").iterdir())) <= before + 1
    batches.close()


def test_ranks_share_an_epoch_without_overlap():
    parts = []
    for rank in range(3):
        batches = Batches(Numbered(24), ["a"], 48, seed=5, rank=rank, world=3)
        parts.append({tuple(row) for row in rows(batches, 1).tolist()})
    assert len(set.union(*parts)) == sum(map(len, parts)) == 24 * 6


def test_nan_is_named_with_site_and_batch():
    batches = Batches(Numbered(bad=11), ["a"], 6, seed=0)
    with pytest.raises(UserError, match=r"NaN or Inf in the activations of site 'a', batch \d+"):
        rows(batches, 23)


def test_too_few_contexts_and_wrong_ranks_are_refused():
    with pytest.raises(UserError, match="too few for 4 ranks"):
        Batches(Numbered(3), ["a"], 6, world=4)
    with pytest.raises(UserError, match="rank=2"):
        Batches(Numbered(), ["a"], 6, rank=2, world=2)


def test_stream_and_store_give_the_same_batches(make_store, tiny_lm, contexts):
    store, stream = make_store(), ActivationStream(tiny_lm, contexts, SITES, batch_size=8)
    pair = [Batches(source, SITES, 50, seed=7) for source in (store, stream)]
    for _ in range(6):
        stored, computed = map(next, pair)
        for site in SITES:
            torch.testing.assert_close(stored[site], computed[site], rtol=1e-4, atol=1e-5)
    assert stream.num_tokens == store.num_tokens
    sampled, whole = stream.statistics(SITES[0]), store.statistics(SITES[0])
    assert sampled.mean_norm == pytest.approx(whole.mean_norm, rel=0.05)  # a sample of 128 of the contexts


def test_sites_that_are_not_there_are_named(make_store, tiny_lm, contexts):
    for source in (make_store(), ActivationStream(tiny_lm, contexts, SITES)):
        with pytest.raises(UserError, match="'blocks.2.hook_resid_post' is not in"):
            Batches(source, ["blocks.2.hook_resid_post"], 5)


def test_sequences_come_in_order_from_store_and_stream(make_store, tiny_lm, contexts):
    direct = tiny_lm.read(contexts.ids_NS, SITES)
    for source in (make_store(), ActivationStream(tiny_lm, contexts, SITES)):
        for world in (1, 3):
            parts = [
                part for rank in range(world) for part in sequences(source, SITES, 10, start=5, stop=80, rank=rank, world=world)
            ]
            assert parts[0][0] == 5
            for site in SITES:
                torch.testing.assert_close(torch.cat([read[site] for _, read in parts]), direct[site][5:80], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="rank=1"):
        next(sequences(source, SITES, rank=1, world=1))

"""Statistics of postings, compiled and in numpy, beside dense arithmetic on what the corpus holds, at data that kernels trip over."""

import ctypes
import math
import platform
from collections import Counter
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import pytest
import torch

from saebench.errors import UserError
from saebench.kernels import arrays, cpu, stock, use_implementation
from saebench.kernels.cpu import build
from saebench.kernels.implementations import primitives_for
from saebench.kernels.posting_statistics import Coactivation, coactivation, merge_runs, moments, top_tokens

BUILT = primitives_for(torch.zeros(1)) is cpu
IMPLEMENTATIONS = ["cpu", "reference"] if BUILT else ["reference"]
KINDS = ["ordinary", "one latent per token", "hard", "crowded", "one latent", "nothing", "no tokens"]
CONTEXT = 7
EXTREMES = np.array([65504, -65504, 6e-8, -6e-8, 6.1e-5, 0, -0.0, 1, -3, 2.5, 2.5], np.float16)


@dataclass
class Chunk:
    first_token: int
    starts: np.ndarray
    latents: np.ndarray


@dataclass
class Run:
    starts_F1: np.ndarray
    tokens: np.ndarray
    values: np.ndarray


@dataclass
class Corpus:
    """Which latents fire on which tokens, and how strongly, as matrices: [T, G]."""

    fires_TG: np.ndarray
    values_TG: np.ndarray

    def postings(self, first=0, last=None):
        latents, tokens = np.nonzero(self.fires_TG.T[first:last])
        starts = np.searchsorted(latents, np.arange(self.fires_TG[:, first:last].shape[1] + 1))
        return starts, tokens.astype(np.int32), self.values_TG[tokens, latents + first]

    def chunks(self, *bounds):
        bounds = [0, *bounds, len(self.fires_TG)]
        for first, last in pairwise(bounds):
            tokens, latents = np.nonzero(self.fires_TG[first:last])
            yield Chunk(first, np.searchsorted(tokens, np.arange(last - first + 1)), latents.astype(np.int32))

    def runs(self, *bounds):
        for first, last in pairwise([0, *bounds, len(self.fires_TG)]):
            starts, tokens, values = Corpus(self.fires_TG[first:last], self.values_TG[first:last]).postings()
            yield Run(starts, (tokens + first).astype(np.int32), values)

    @property
    def counts_G(self):
        return self.fires_TG.sum(0)


def corpus(kind):
    generator = np.random.default_rng(KINDS.index(kind))
    tokens, latents, density = {
        "ordinary": (300, 200, 0.05),
        "crowded": (2000, 90, 0.3),
        "one latent": (50, 1, 0.4),
        "nothing": (40, 5, 0.0),
        "no tokens": (0, 5, 0.0),
    }.get(kind, (150, 60, 0.1))
    fires = generator.random((tokens, latents)) < density
    values = generator.exponential(size=fires.shape).astype(np.float16)
    if kind == "one latent per token":
        fires = np.arange(latents) == generator.integers(0, latents, tokens)[:, None]
    if kind == "hard":
        fires[:, 10:20], fires[:, 3], fires[:, -1] = False, True, False
        fires[30:40], fires[50] = False, True  # rows without a latent, and with all of them
        fires[30:40, 3] = True  # this one fires everywhere
        fires[:, 25] = fires[:, 24]
        values = generator.choice(EXTREMES, fires.shape)
        values[:, 5:8] = [0, -2, 7]  # histograms without width
    return Corpus(fires, values)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with use_implementation(request.param):
        yield request.param


@pytest.fixture(params=KINDS)
def made(request):
    return corpus(request.param)


def assert_same(ours, theirs):
    for field in fields(ours):
        one, two = getattr(ours, field.name), getattr(theirs, field.name)
        assert one.dtype == two.dtype, field.name
        np.testing.assert_array_equal(one, two, err_msg=field.name)


def each_latent(made, first, last):
    for latent in range(first, last):
        tokens = np.flatnonzero(made.fires_TG[:, latent])
        yield latent - first, tokens, made.values_TG[tokens, latent].astype(np.float64)


@pytest.mark.parametrize("bins, position_bins", [(50, 16), (1, 1), (3, 5)])
def test_moments(made, implementation, bins, position_bins):
    found = moments(*made.postings(), CONTEXT, bins, position_bins)
    for f, tokens, values in each_latent(made, 0, made.fires_TG.shape[1]):
        for power, sums in enumerate((found.sum, found.square, found.cube, found.fourth), 1):
            exact, size = math.fsum(values**power), math.fsum(abs(values) ** power)
            assert sums[f] == pytest.approx(exact, rel=0, abs=1e-12 * size)
        assert found.low[f] == min(values, default=0)
        assert found.high[f] == max(values, default=0)
        assert found.contexts[f] == len({token // CONTEXT for token in tokens})
        low = min(0.0, found.low[f])
        edges = [float(low) + b * ((float(found.high[f]) - float(low)) / bins) for b in range(bins)]
        above = [int((values >= edge).sum()) for edge in edges] + [0]
        assert found.histogram[f].tolist() == [above[b] - above[b + 1] for b in range(bins)]
        places = Counter(token % CONTEXT * position_bins // CONTEXT for token in tokens.tolist())
        assert found.positions[f].tolist() == [places[b] for b in range(position_bins)]
    kinds = [found.sum, found.low, found.high, found.contexts, found.histogram, found.positions]
    assert [each.dtype for each in kinds] == [np.float64, np.float32, np.float32, np.int64, np.int64, np.int64]


@pytest.mark.parametrize("vocabulary, count", [(1, 3), (9, 4), (9, 20), (500, 10)])
def test_top_tokens(made, implementation, vocabulary, count):
    ids = np.random.default_rng(1).integers(0, vocabulary, len(made.fires_TG), dtype=np.int32)
    found = top_tokens(*made.postings(), ids, vocabulary, count)
    for f, tokens, values in each_latent(made, 0, made.fires_TG.shape[1]):
        sums = {}
        for token, value in zip(tokens, values, strict=True):
            sums[int(ids[token])] = sums.get(int(ids[token]), 0.0) + value
        best = sorted(sums, key=lambda each: (-sums[each], each))[:count]
        padding = [0] * (count - len(best))
        assert found.ids[f].tolist() == best + [-1] * len(padding)
        assert found.counts[f].tolist() == [int((ids[tokens] == each).sum()) for each in best] + padding
        assert found.sums[f].tolist() == [sums[each] for each in best] + padding
        assert found.distinct[f] == len(sums)
    assert [getattr(found, field.name).dtype for field in fields(found)] == [np.int32, np.int64, np.float64, np.int64]


@pytest.mark.parametrize("bounds", [(), (20, 20, 37)])  # the second of four chunks is empty
@pytest.mark.parametrize("count", [1, 4, 250])
def test_coactivation(made, implementation, bounds, count):
    num_tokens, num = made.fires_TG.shape
    bounds = bounds if num_tokens else (0, 0)
    first, last = num // 3, num  # a range that does not begin with the first latent
    starts, tokens, _ = made.postings(first, last)
    found = coactivation(starts, tokens, list(made.chunks(*bounds)), made.counts_G, num_tokens, first, count)
    both = made.fires_TG.T.astype(np.int64) @ made.fires_TG
    n = made.counts_G.tolist()
    for f in range(first, last):
        phi = {}
        for g in np.flatnonzero(both[f]).tolist():
            roots = math.sqrt(n[f] * (num_tokens - n[f])) * math.sqrt(n[g] * (num_tokens - n[g]))
            phi[g] = (int(both[f, g]) * num_tokens - n[f] * n[g]) / roots if roots else 0.0
        phi.pop(f, None)
        best = sorted(phi, key=lambda g: (-phi[g], -both[f, g], g))[:count]
        padding = [0] * (count - len(best))
        assert found.latents[f - first].tolist() == best + [-1] * len(padding)
        assert found.together[f - first].tolist() == [both[f, g] for g in best] + padding
        assert found.phi[f - first].tolist() == [phi[g] for g in best] + padding
        union = [int((made.fires_TG[:, f] | made.fires_TG[:, g]).sum()) for g in best]
        assert found.either[f - first].tolist() == union + padding
        for place, g in enumerate(best[:3]):
            one, two = made.fires_TG[:, f], made.fires_TG[:, g]
            assert found.jaccard[f - first, place] == (one & two).sum() / union[place]
            if not (one.all() or two.all()):
                assert found.phi[f - first, place] == pytest.approx(np.corrcoef(one, two)[0, 1], abs=1e-12)
    kinds = [found.latents, found.together, found.either, found.phi, found.jaccard]
    assert [each.dtype for each in kinds] == [np.int32, np.int64, np.int64, np.float64, np.float64]


def test_phi_and_jaccard_of_a_table(implementation):
    """8 tokens with both, 2 and 4 with one, 86 with none."""
    fires = np.zeros((100, 2), bool)
    fires[:10, 0], fires[2:14, 1] = True, True
    made = Corpus(fires, fires.astype(np.float16))
    found = coactivation(*made.postings()[:2], list(made.chunks()), made.counts_G, 100, 0, 1)
    assert found.phi[0, 0] == pytest.approx(0.697518, abs=5e-7)
    assert found.jaccard[1, 0] == pytest.approx(0.571429, abs=5e-7)


def test_ties_of_phi_go_to_what_is_more_often_together(implementation):
    """Of two latents with the same phi, later than others and far from each other, the one that fires on four times as many tokens."""
    fires = np.zeros((100, 300), bool)
    fires[:50, 0], fires[:, 299] = True, True
    for latent, inside, outside in ((150, 15, 5), (250, 45, 35), (20, 3, 2), (280, 15, 5)):
        fires[:inside, latent] = fires[50 : 50 + outside, latent] = True
    made = Corpus(fires, fires.astype(np.float16))
    found = coactivation(*made.postings(0, 1)[:2], list(made.chunks()), made.counts_G, 100, 0, 5)
    assert found.latents.tolist() == [[250, 150, 280, 20, 299]]
    assert found.phi[0, 0] == found.phi[0, 2]
    for count in (1, 2, 3):
        assert_same(
            coactivation(*made.postings(0, 1)[:2], list(made.chunks()), made.counts_G, 100, 0, count),
            Coactivation(*(getattr(found, field.name)[:, :count] for field in fields(found))),
        )


def test_tokens_without_codes(implementation):
    """Where no chunk has a token, nothing fires there with what does; and there may be more tokens than chunks have."""
    made = corpus("ordinary")
    starts, tokens, _ = made.postings()
    chunks = [chunk for chunk in made.chunks(20, 100, 130, 280) if chunk.first_token not in (0, 100, 280)]
    without = Corpus(made.fires_TG.copy(), made.values_TG)
    without.fires_TG[:20] = without.fires_TG[100:130] = without.fires_TG[280:] = False
    for num_tokens in (300, 5000):
        found = [coactivation(starts, tokens, each, made.counts_G, num_tokens, 0) for each in (chunks, list(without.chunks()))]
        assert_same(*found)
    assert (coactivation(starts, tokens, [], made.counts_G, 300, 0).latents == -1).all()


@pytest.mark.parametrize("bounds", [(), (20, 20, 37)])
def test_merged_runs_are_the_postings(made, implementation, bounds):
    bounds, num = bounds if len(made.fires_TG) else (0, 0), made.fires_TG.shape[1]
    for first, last in ((0, num), (num // 4, num - num // 4), (num, num)):
        for ours, theirs in zip(merge_runs(list(made.runs(*bounds)), first, last), made.postings(first, last), strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.tobytes() == theirs.tobytes()
    starts, tokens, values = merge_runs([], 2, 5)
    assert starts.tolist() == [0] * 4
    assert len(tokens) == len(values) == 0


def test_a_part_of_longer_arrays_and_of_files(tmp_path, implementation):
    made = corpus("hard")
    starts, tokens, values = made.postings()
    files = []
    for number, array in enumerate((tokens, values)):
        array.tofile(tmp_path / str(number))
        files.append(np.memmap(tmp_path / str(number), array.dtype, "r"))
    ids = (np.arange(len(made.fires_TG)) % 11).astype(np.int32)
    part = made.postings(20, 45)
    assert_same(moments(starts[20:46], *files, CONTEXT), moments(*part, CONTEXT))
    assert_same(top_tokens(starts[20:46], *files, ids, 11), top_tokens(*part, ids, 11))
    ours, theirs = (
        coactivation(*each, list(made.chunks()), made.counts_G, len(ids), 20) for each in ((starts[20:46], files[0]), part[:2])
    )
    assert_same(ours, theirs)
    for ours, theirs in zip(merge_runs([Run(starts, *files)], 20, 45), part, strict=True):
        assert ours.tobytes() == theirs.tobytes()


def everything(made, bounds=(700, 1500)):
    ids = (np.random.default_rng(2).zipf(1.3, len(made.fires_TG)) % 900).astype(np.int32)
    postings = merge_runs(list(made.runs(*bounds)), 0, made.fires_TG.shape[1])
    return (
        moments(*postings, 64),
        top_tokens(*postings, ids, 900),
        coactivation(*postings[:2], list(made.chunks(*bounds)), made.counts_G, len(made.fires_TG), 0),
    )


def larger():
    """Latents that fire on from none to all of 2,500 tokens; two thirds of all are rare."""
    generator = np.random.default_rng(3)
    density = np.concatenate([[0, 1], generator.random(298) ** 3, 0.002 * generator.random(600)])
    fires = generator.random((2500, 900)) < density
    return Corpus(fires, generator.normal(0.5, 1, fires.shape).astype(np.float16))


@pytest.mark.skipif(not BUILT, reason="no C++ compiler here")
def test_the_same_bits_from_any_number_of_threads_and_from_numpy():
    made, before, found = larger(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(everything(made))
    finally:
        torch.set_num_threads(before)
    with use_implementation("reference"):
        found.append(everything(made))
    for again in found[1:]:
        for ours, theirs in zip(found[0], again, strict=True):
            assert_same(ours, theirs)


def all_halves():
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return values[np.isfinite(values)]


def test_every_finite_value_is_read(implementation):
    values = all_halves()
    found = moments(np.arange(len(values) + 1), np.zeros(len(values), np.int32), values, 1, 1, 1)
    for name in ("sum", "low", "high"):
        np.testing.assert_array_equal(getattr(found, name), values)
    np.testing.assert_array_equal(found.fourth, values.astype(np.float64) ** 4)


def test_without_a_compiler_numpy_serves(monkeypatch):
    made = corpus("hard")
    with use_implementation("reference"):
        expected = everything(made, (70,))
    monkeypatch.setattr(arrays, "primitives_for", lambda tensor: stock)
    monkeypatch.setattr("saebench.kernels.cpu.postings.library", lambda: pytest.fail("compiled kernels were asked for"))
    for ours, theirs in zip(everything(made, (70,)), expected, strict=True):
        assert_same(ours, theirs)

    def refuse(tensor):
        raise UserError("there is no C++ compiler")

    monkeypatch.setattr(arrays, "primitives_for", refuse)
    with use_implementation("cpu"), pytest.raises(UserError, match="no C\\+\\+ compiler"):
        everything(made, (70,))


def test_what_cannot_be_meant_is_refused(implementation):
    starts, tokens, values = corpus("ordinary").postings()
    ids = np.zeros(300, np.int32)
    with pytest.raises(ValueError, match="values_N is float32: it must be float16"):
        moments(starts, tokens, values.astype(np.float32), CONTEXT)
    with pytest.raises(ValueError, match="count=0"):
        top_tokens(starts, tokens, values, ids, 5, 0)
    with pytest.raises(ValueError, match=r"ids of 200 tokens, and a latent fires on token \d+"):
        top_tokens(starts, tokens, values, ids[:200], 5)
    for wrong in (-1, 5):
        ids[tokens[0]] = wrong
        with pytest.raises(ValueError, match="ids outside a vocabulary of 5"):
            top_tokens(starts, tokens, values, ids, 5)


@pytest.mark.slow
@pytest.mark.skipif(not BUILT or platform.machine() != "x86_64", reason="the names of these processors are Intel's and AMD's")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_older_processors_compute_the_same(processor, tmp_path, monkeypatch):
    """The first of them reads float16 by shifting bits."""
    expected = everything(larger())
    build.compile_to(tmp_path / "kernels.so", build.find_compiler(), [*build.FLAGS, f"-march={processor}"])
    older = ctypes.CDLL(str(tmp_path / "kernels.so"))
    monkeypatch.setattr("saebench.kernels.cpu.postings.library", lambda: older)
    for ours, theirs in zip(everything(larger()), expected, strict=True):
        assert_same(ours, theirs)
    test_every_finite_value_is_read("cpu")

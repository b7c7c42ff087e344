"""Examples against brute force on dense codes."""

import dataclasses

import numpy as np
import pytest

from saebench.errors import UserError
from saebench.features.examples import (
    _Ranks,
    cofiring_examples,
    common,
    quantile_groups,
    strongest,
    top_examples,
    window,
)

SIZE = 16


def test_the_store_holds_the_dense_codes(small):
    """What the other tests compare with."""
    for latent in range(small.store.d_sae):
        tokens, values = small.store.postings(latent)
        assert tokens.tolist() == np.flatnonzero(small.dense_TF[:, latent]).tolist()
        assert values.tolist() == small.dense_TF[tokens, latent].tolist()
    assert (small.dense_TF < 0).any() == (small.kind == "lorsa")


def best_by_context(values_T, kept_T=None):
    """The strongest firing of each context by going through all tokens, strongest first."""
    best = {}
    for token, value in enumerate(values_T.tolist()):
        context = token // SIZE
        if value and (kept_T is None or kept_T[token]) and (context not in best or value > best[context][0]):
            best[context] = (value, token)
    return [token for value, token in sorted(best.values(), key=lambda pair: (-pair[0], pair[1]))]


def check_example(small, example, latent, before, after):
    """Everything an example says follows from its token."""
    contexts, context = small.store.contexts, example.token // SIZE
    first = max(example.token - before, context * SIZE)
    last = min(example.token + after, context * SIZE + SIZE - 1)
    assert (example.first, example.context) == (first, context)
    assert example.ids == small.ids_T[first : last + 1].tolist()
    assert example.values == small.dense_TF[first : last + 1, latent].tolist()
    assert first + example.focus == example.token
    document = int(contexts.documents_NS[context, example.token % SIZE])
    assert example.document == (contexts.names[document] if document >= 0 else "")


@pytest.mark.parametrize(("count", "offset"), [(0, 0), (1, 0), (7, 0), (5, 3), (1000, 0), (4, 1000)])
def test_top_examples_are_the_strongest_of_each_context_in_order(small, count, offset):
    for latent in range(small.store.d_sae):
        found = top_examples(small.store, latent, count, before=5, after=3, offset=offset)
        expected = best_by_context(small.dense_TF[:, latent])
        assert [example.token for example in found] == expected[offset : offset + count]
        for example in found:
            check_example(small, example, latent, 5, 3)


def test_top_examples_of_one_token_and_without_the_start_of_contexts(small):
    latent = max(small.alive, key=lambda f: np.count_nonzero(small.dense_TF[:, f]))
    firing_T = small.dense_TF[:, latent] != 0
    ids, counts = np.unique(small.ids_T[firing_T], return_counts=True)
    token_id = int(ids[counts.argmax()])
    found = top_examples(small.store, latent, 1000, token_id=token_id)
    assert [e.token for e in found] == best_by_context(small.dense_TF[:, latent], small.ids_T == token_id)
    assert {e.ids[e.focus] for e in found} == {token_id}
    found = top_examples(small.store, latent, 1000, skip=6)
    assert [e.token for e in found] == best_by_context(small.dense_TF[:, latent], np.arange(len(small.ids_T)) % SIZE >= 6)
    assert top_examples(small.store, latent, 5, token_id=int(small.ids_T.max()) + 1) == []


def test_a_window_is_cut_at_its_context(small):
    latent = small.alive[0]
    for token in (0, 1, SIZE - 1, 5 * SIZE + 4):
        example = window(small.store, latent, token, 24, 12)
        assert example.token == token
        check_example(small, example, latent, 24, 12)
    size = len(small.ids_T)
    with pytest.raises(UserError, match=f"token {size} is not one of the {size:,}"):
        window(small.store, latent, size)
    with pytest.raises(UserError, match="latent 48 is not one of the 48"):
        window(small.store, 48, 0)


@pytest.mark.parametrize("groups", [1, 4, 5])
def test_quantile_groups_are_equal_parts_of_all_firings(small, groups):
    for latent in small.alive:
        values_T = small.dense_TF[:, latent]
        tokens = np.flatnonzero(values_T)
        ascending = tokens[np.argsort(values_T[tokens], kind="stable")]
        expected = [set(part.tolist()) for part in np.split(ascending, [len(tokens) * g // groups for g in range(1, groups)])]
        expected = [part for part in expected if part]
        found = quantile_groups(small.store, latent, groups, 3, before=2, after=2)
        if len(tokens) < groups:
            assert [group.firings for group in found] == [1] * len(tokens)
            continue
        for group, part in zip(found, expected[::-1], strict=True):
            assert group.firings == len(part)
            assert group.low == min(values_T[list(part)])
            assert group.high == max(values_T[list(part)])
            assert {example.token for example in group.examples} <= part
            contexts = [example.context for example in group.examples]
            assert len(set(contexts)) == len(contexts) == min(3, len({token // SIZE for token in part}))
            shown = [example.values[example.focus] for example in group.examples]
            assert shown == sorted(shown, reverse=True)
            for example in group.examples:
                check_example(small, example, latent, 2, 2)


def test_quantile_samples_are_uniform_and_a_seed_gives_the_same_again(small):
    latent = max(small.alive, key=lambda f: np.count_nonzero(small.dense_TF[:, f]))
    assert quantile_groups(small.store, latent, 3, 4, seed=1) == quantile_groups(small.store, latent, 3, 4, seed=1)
    drawn, trials = {}, 600
    for seed in range(trials):
        for number, group in enumerate(quantile_groups(small.store, latent, 2, 1, seed=seed, before=0, after=0)):
            token = group.examples[0].token
            drawn.setdefault(number, []).append(token)
    for number, tokens in drawn.items():
        size = quantile_groups(small.store, latent, 2, 1)[number].firings
        _, counts = np.unique(tokens, return_counts=True)
        counts = np.concatenate([counts, np.zeros(size - len(counts))])
        chi_square = ((counts - trials / size) ** 2 / (trials / size)).sum()
        assert abs(chi_square - (size - 1)) < 5 * np.sqrt(2 * (size - 1))


def test_a_silent_latent_has_no_examples(small):
    silent = sorted(set(range(small.store.d_sae)) - set(small.alive))
    assert silent or small.kind != "topk"
    for latent in silent:
        assert top_examples(small.store, latent) == []
        assert quantile_groups(small.store, latent) == []
        assert cofiring_examples(small.store, latent, small.alive[0]) == []


def test_cofiring_examples_by_the_product_of_relative_values(small):
    shares_TF = small.dense_TF / np.abs(small.dense_TF).max(0).clip(1e-30)
    checked = 0
    for latent, other in [(a, b) for a in small.alive[:12] for b in small.alive[:12] if a != b]:
        both_T = (small.dense_TF[:, latent] != 0) & (small.dense_TF[:, other] != 0)
        expected = best_by_context(np.where(both_T, shares_TF[:, latent] * shares_TF[:, other], 0))
        found = cofiring_examples(small.store, latent, other, 6, before=4, after=4)
        assert [example.token for example in found] == expected[:6]
        for example in found:
            check_example(small, example, latent, 4, 4)
        checked += bool(expected)
    assert checked > 10


@pytest.mark.parametrize("size", [50, 6000, 200_000])
def test_strongest_among_many_and_among_equals(size):
    rng = np.random.default_rng(size)
    tokens = np.sort(rng.choice(4 * size, size, replace=False)).astype(np.int32)
    for strengths in (rng.random(size), rng.integers(0, 3, size), np.zeros(size), -(rng.random(size) ** 8)):
        strengths = strengths.astype(np.float32)
        order = np.lexsort((tokens, -strengths))
        contexts = tokens[order] // 64
        _, first = np.unique(contexts, return_index=True)
        expected = order[np.sort(first)]
        for count in (1, 20, 300):
            assert strongest(tokens, strengths, 64, count).tolist() == expected[:count].tolist()


@pytest.mark.parametrize("sizes", [(0, 5), (3, 200), (3000, 40), (4000, 5000), (5000, 5000)])
def test_common_places(sizes):
    rng = np.random.default_rng(sum(sizes))
    first, second = (np.sort(rng.choice(10_000, size, replace=False)).astype(np.int32) for size in sizes)
    for num_tokens in (10_000, 10**9):  # marked, and looked up one by one
        if num_tokens == 10**9 and min(sizes) * 64 > num_tokens:
            continue
        in_first, in_second = common(first, second, num_tokens)
        expected = sorted(set(first.tolist()) & set(second.tolist()))
        assert first[in_first].tolist() == second[in_second].tolist() == expected


@pytest.mark.parametrize("kind", ["spread", "equal", "signed", "few"])
def test_ranks_are_those_of_a_stable_sort(kind):
    rng = np.random.default_rng(1)
    values = {
        "spread": rng.random(5000) ** 4 * 1e4,
        "equal": np.full(5000, 2.5),
        "signed": rng.normal(size=5000),
        "few": rng.integers(1, 4, 5000) / 4,
    }[kind]
    values = (values.astype(np.float16).astype(np.float32)) * np.float32(4)
    rank = np.empty(5000, dtype=int)
    rank[np.argsort(values, kind="stable")] = np.arange(5000)
    for groups in (1, 3, 7):
        ranks = _Ranks(values, 4.0, groups)
        edges = [5000 * g // groups for g in range(groups + 1)]
        expected = np.digitize(rank, edges) - 1
        assert ranks.of(np.arange(5000)).tolist() == expected.tolist()
        for group in range(groups):
            part = values[expected == group]
            assert ranks.extent(group) == (part.min(), part.max(), len(part))


def test_examples_are_given_by_name():
    from saebench.features.examples import Example

    example = Example(ids=[1], values=[0.5], focus=0, document="typed")
    assert (example.token, example.first, example.context) == (-1, -1, -1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        example.focus = 1

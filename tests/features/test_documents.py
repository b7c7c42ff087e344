"""What the pages say of a corpus, against brute force on dense codes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from saebench.errors import UserError
from saebench.features.contrast import contrast, document_sets
from saebench.features.documents import (
    common_parts,
    contexts_of,
    count_units,
    examples_in,
    interval,
    names_in,
    paragraphs,
    strongest_in,
    tokens_by_document,
    values_in,
)  # fmt: skip


def test_what_stands_out_in_a_stretch(small):
    store, dense_TF = small.store, np.abs(small.dense_TF)
    largest_F = dense_TF.max(0)
    contexts_F = (dense_TF.reshape(store.num_contexts, store.context_size, -1) > 0).any(1).sum(0)
    for first, last in ((0, 16), (35, 70), (160, 161)):
        found = strongest_in(store, first, last, 1000)
        part_TF = dense_TF[first:last]
        assert {one.latent for one in found} == set(np.flatnonzero(part_TF.any(0)).tolist())
        for one in found:
            column_T = part_TF[:, one.latent]
            assert abs(one.value) == pytest.approx(column_T.max()) and one.token == first + column_T.argmax()
            assert one.value == pytest.approx(small.dense_TF[one.token, one.latent])
            assert one.firings == (column_T > 0).sum()
            assert one.share_of_largest == pytest.approx(column_T.max() / largest_F[one.latent])
            idf = np.log(store.num_contexts / contexts_F[one.latent])
            assert one.weight == pytest.approx(abs(one.value) * idf, abs=1e-6)
        weights = [one.weight for one in found]
        assert weights == sorted(weights, reverse=True)
        assert strongest_in(store, first, last, 3) == found[:3]


def test_how_much_of_some_latents_fires_on_each_token(small):
    wanted = [(latent, 0.5 + latent / 10) for latent in small.alive[:5]]
    relative_TF = np.abs(small.dense_TF) / np.maximum(np.abs(small.dense_TF).max(0), 1e-30)
    expected_S = sum(weight * relative_TF[48:80, latent] for latent, weight in wanted)
    assert values_in(small.store, 48, 80, wanted) == pytest.approx(expected_S, abs=1e-6)


def test_documents_and_contexts(small):
    store = small.store
    documents_NS, names = store.contexts.documents_NS.numpy(), store.contexts.names
    assert tokens_by_document(store).tolist() == [(documents_NS == number).sum() for number in range(len(names))]
    for number in (0, 7, len(names) - 1):
        assert contexts_of(store, number).tolist() == [c for c in range(store.num_contexts) if number in documents_NS[c]]
    for context in (0, 11, store.num_contexts - 1):
        assert set(names_in(store, context)) == {names[number] for number in set(documents_NS[context].tolist()) if number >= 0}
    with pytest.raises(UserError, match="document 40 is not one of the 40"):
        contexts_of(store, 40)
    with pytest.raises(UserError, match="context -1 is not one of the"):
        names_in(store, -1)


def test_units_are_counted_as_the_contrast_counts_them(small):
    store = small.store
    mask = document_sets(store, "doc1*")
    documents_NS = store.contexts.documents_NS.numpy()
    inner = [[number for number in row[1:] if number >= 0 and mask[number]] for row in documents_NS.tolist()]
    assert count_units(store, mask, "document") == len({number for row in inner for number in row}) == mask.sum()
    assert count_units(store, mask, "context") == sum(len(dict.fromkeys(row)) for row in inner)


def test_intervals_hold_zero_just_where_the_difference_is_not_significant(small):
    store = small.store
    mask = document_sets(store, "doc1*")
    units = min(count_units(store, mask, "document"), count_units(store, ~mask, "document"))
    found = contrast(store, mask, ~mask, store.d_sae)
    assert found
    for one in found:
        low, high = interval(one, units)
        if one.z:
            assert (low > 0 or high < 0) == (one.p < 0.05)
            assert (low + high) / 2 == pytest.approx(one.rate_a - one.rate_b)
            error = abs((one.rate_a - one.rate_b) / one.z)
            assert high - low == pytest.approx(2 * stats.t.ppf(0.975, units - 1) * error)


def test_examples_of_chosen_documents_are_their_strongest(small):
    store = small.store
    mask = document_sets(store, "doc2*")
    documents_T = store.contexts.documents_NS.flatten().numpy()
    for latent in small.alive[:10]:
        values_T = np.where((documents_T >= 0) & mask[documents_T], np.abs(small.dense_TF[:, latent]), 0)
        best_N = np.sort(values_T.reshape(store.num_contexts, -1).max(1))[::-1]
        found = examples_in(store, latent, mask, 4)
        assert [abs(example.values[example.focus]) for example in found] == pytest.approx(best_N[: len(found)])
        assert len(found) == min(4, int((best_N > 0).sum()))
        assert all(example.document.startswith("doc2") for example in found)


def test_parts_of_names_tell_some_documents_apart():
    names = ["asyncio/events.py", "asyncio/tasks.py", "json/decoder.py", "json/encoder.py", "os.py"]
    assert common_parts(names) == [("asyncio", 2), ("json", 2)]
    assert common_parts(["a"]) == []
    assert common_parts(["old/part one", "old/part two", "new", "else"]) == [("old", 2)]


def test_paragraphs_are_what_stands_between_empty_lines():
    assert paragraphs("one\nline\n\n  two\n \t\n\n\nthree\n") == ["one\nline", "  two", "three"]
    assert paragraphs(" \n\n ") == []

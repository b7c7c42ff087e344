"""What fires on a typed text: the same as in a store of that text, by token and by latent."""

import copy

import numpy as np
import pytest
import torch
from helpers import small_text

import saebench as sb
from saebench.errors import UserError
from saebench.features.prompts import feature_on_text, read_prompt

TEXT = "def value_7(x):\n    return x * 7 + 15  # the number"


def dense_of(codes, d_sae):
    """The codes token by token as a matrix."""
    dense_TF = np.zeros((len(codes), d_sae), dtype=np.float32)
    for token in range(len(codes)):
        for latent, value in codes.strongest(token, 10**6):
            assert dense_TF[token, latent] == 0
            dense_TF[token, latent] = value
    return dense_TF


def test_the_codes_are_those_of_the_dictionary(small, tiny_lm):
    codes = read_prompt(tiny_lm, small.dictionary, TEXT)
    ids = [tiny_lm.tokenizer.bos_token_id, *tiny_lm.tokenizer(TEXT)["input_ids"]]
    assert codes.ids == ids
    assert (codes.added, codes.left_out) == (1, 0)
    assert "".join(codes.tokens[1:]) == TEXT
    reads = small.dictionary.config.reads
    x_CSD = tiny_lm.read(torch.tensor([ids]), reads)[reads[0]]
    expected = small.dictionary.encode_contexts(x_CSD).to_dense().numpy()
    dense_TF = dense_of(codes, 48)
    assert not dense_TF[0].any()
    np.testing.assert_array_equal(dense_TF[1:], expected)
    for token in range(1, len(ids)):
        found = codes.strongest(token, 4)
        order = np.argsort(-np.abs(dense_TF[token]), kind="stable")
        assert [value for _, value in found] == dense_TF[token][order][: len(found)].tolist()
        assert len(found) == min(4, np.count_nonzero(dense_TF[token]))


def test_the_same_text_has_the_same_codes_in_a_store(small, tiny_lm):
    context, size = 3, 16
    ids = small.ids_T[context * size : (context + 1) * size]
    text = tiny_lm.tokenizer.decode(ids[1:])
    if "<|endoftext|>" in text or tiny_lm.tokenizer(text)["input_ids"] != ids[1:].tolist():
        pytest.fail("choose another context")
    dense_TF = dense_of(read_prompt(tiny_lm, small.dictionary, text), 48)
    np.testing.assert_allclose(dense_TF, small.dense_TF[context * size : (context + 1) * size], rtol=2e-3, atol=1e-5)


def test_by_latent(small, tiny_lm):
    codes = read_prompt(tiny_lm, small.dictionary, TEXT)
    dense_TF = dense_of(codes, 48)
    for latent in range(48):
        assert codes.by_latent(latent).tolist() == dense_TF[:, latent].tolist()
    firing = np.flatnonzero(dense_TF.any(0))
    largest_F = dense_TF[np.abs(dense_TF).argmax(0), np.arange(48)]
    sums_F = dense_TF.sum(0)
    by_max, by_sum = codes.top_latents(100), codes.top_latents(5, by="sum")
    assert sorted(latent for latent, _ in by_max) == firing.tolist()
    for found, figures_F in ((by_max, largest_F), (by_sum, sums_F)):
        assert [abs(x) for _, x in found] == pytest.approx(
            sorted(np.abs(figures_F[firing]), reverse=True)[: len(found)], rel=1e-5
        )
        assert all(figures_F[latent] == pytest.approx(x, rel=1e-5) for latent, x in found)
    example = codes.example(by_max[0][0])
    assert example.values[example.focus] == by_max[0][1]
    assert example == feature_on_text(tiny_lm, small.dictionary, by_max[0][0], TEXT)
    assert (example.ids, example.token, example.document) == (codes.ids, -1, "")


def test_long_texts_are_cut_and_empty_ones_refused(small, tiny_lm):
    text = next(iter(small_text())).text
    codes = read_prompt(tiny_lm, small.dictionary, text, max_tokens=20)
    total = 1 + len(tiny_lm.tokenizer(text)["input_ids"])
    assert (len(codes), codes.left_out) == (20, total - 20)
    assert len(read_prompt(tiny_lm, small.dictionary, text)) == 64 == tiny_lm.max_context
    with pytest.raises(UserError, match="the text has no tokens: type something"):
        read_prompt(tiny_lm, small.dictionary, "")
    with pytest.raises(UserError, match="latent 48 is not one of the 48, counted from 0"):
        feature_on_text(tiny_lm, small.dictionary, 48, TEXT)


class Bare:
    """A tokenizer without BOS, and with the end token given."""

    bos_token_id = None

    def __init__(self, tokenizer, end):
        self.tokenizer, self.eos_token_id = tokenizer, end

    def __call__(self, text, **options):
        return self.tokenizer(text, **options)


@pytest.mark.parametrize("end", [5, None])
def test_the_end_token_stands_before_a_text_where_there_is_no_bos(small, tiny_lm, end):
    assert tiny_lm.sites() and tiny_lm.token_strings  # made with the tokenizer as it is
    lm = copy.copy(tiny_lm)
    lm.tokenizer = Bare(tiny_lm.tokenizer, end)
    codes = read_prompt(lm, small.dictionary, TEXT)
    ids = tiny_lm.tokenizer(TEXT)["input_ids"]
    assert (codes.ids, codes.added) == ((ids, 0) if end is None else ([end, *ids], 1))
    assert codes.strongest(0) == []
    assert any(codes.strongest(token) for token in range(1, len(codes)))


def test_sites_may_be_named(tiny_lm):
    nameless = sb.TopK(d_sae=8, k=2, d_in=32).build()
    x = tiny_lm.read(torch.arange(1, 30)[None], ["blocks.0.hook_mlp_out"])["blocks.0.hook_mlp_out"][0].clone()
    nameless.initialise(x, x, torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="names no site"):
        read_prompt(tiny_lm, nameless, TEXT)
    codes = read_prompt(tiny_lm, nameless, TEXT, sites=["blocks.0.hook_mlp_out"])
    ids = torch.tensor([codes.ids])
    expected = nameless.encode(tiny_lm.read(ids, ["blocks.0.hook_mlp_out"])["blocks.0.hook_mlp_out"][0, 1:]).to_dense()
    np.testing.assert_array_equal(dense_of(codes, 8)[1:], expected.detach().numpy())

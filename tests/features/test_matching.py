"""Matching of two dictionaries against brute force on dense cosines and dense correlations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import saebench as sb
from saebench.activations import ActivationStream
from saebench.dictionaries import parse_dictionary
from saebench.errors import UserError
from saebench.features import index, matching
from saebench.features.matching import NONE, match_directions, match_firings

SITE, D_IN = "blocks.1.hook_resid_post", 32


def dictionary(d_sae: int, seed: int, k: int = 5, site: str = SITE) -> sb.Dictionary:
    made = sb.TopK(d_sae=d_sae, k=k, d_in=D_IN, site=site, decoder="unit").build().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    rows_FD = torch.nn.functional.normalize(torch.randn(d_sae, D_IN, generator=generator), dim=1)
    made.W_enc_FD.copy_(rows_FD)
    made.W_dec.copy_(rows_FD)
    made.folded = True
    return made


@pytest.fixture(scope="module")
def dictionaries():
    """Two of which a third of the latents are the same, in another order and a little moved."""
    a, b = dictionary(60, 0), dictionary(50, 1, k=7)
    moved = torch.Generator().manual_seed(2)
    for latent in range(20):
        row_D = torch.nn.functional.normalize(
            a.W_dec[latent] + 0.02 * latent * torch.randn(D_IN, generator=moved) / D_IN**0.5, dim=0
        )
        b.W_dec[49 - latent] = row_D
        b.W_enc_FD[49 - latent] = row_D
    a.W_enc_FD[59] = 0  # never fires
    return a, b


@pytest.fixture(scope="module")
def stream(tiny_lm, contexts):
    return ActivationStream(tiny_lm, contexts[:60], [SITE])


@pytest.fixture(scope="module")
def stores(dictionaries, stream, tmp_path_factory):
    path = tmp_path_factory.mktemp("matching")
    return tuple(index(made, stream, path / name) for name, made in zip("ab", dictionaries, strict=True))


def brute(similarity_AB: np.ndarray, alive_a: np.ndarray, alive_b: np.ndarray) -> tuple[dict, dict, set]:
    """Nearest of each by either side, and mutual pairs."""
    allowed_AB = np.where(alive_a[:, None] & alive_b & (similarity_AB > 0), similarity_AB, -1)
    sides = []
    for table in (allowed_AB, allowed_AB.T):
        best = table.argmax(1)
        sides.append({i: (int(j), table[i, j]) if table[i, j] > 0 else (NONE, 0.0) for i, j in enumerate(best)})
    mutual = {(i, j) for i, (j, _) in sides[0].items() if j != NONE and sides[1][j][0] == i and alive_a[i]}
    return sides[0], sides[1], mutual


def agrees(found, similarity_AB: np.ndarray, alive_a: np.ndarray, alive_b: np.ndarray) -> None:
    nearest_a, nearest_b, mutual = brute(similarity_AB, alive_a, alive_b)
    for side, expected, alive in ((found.a, nearest_a, alive_a), (found.b, nearest_b, alive_b)):
        assert side.alive == alive.sum() and set(side.latents_M) <= set(np.flatnonzero(alive))
        for latent, partner, similarity in zip(side.latents_M, side.nearest_M, side.similarity_M, strict=True):
            assert partner == expected[latent][0]
            assert similarity == pytest.approx(expected[latent][1], abs=1e-6)
    drawn = set(found.a.latents_M.tolist())
    assert {(a, b) for a, b, _ in zip(*(part.tolist() for part in found.pairs()), strict=True)} == {
        (a, b) for a, b in mutual if a in drawn
    }
    assert set(found.b.latents_M[found.b.mutual_M].tolist()) == {b for _, b in mutual if b in set(found.b.latents_M.tolist())}


def cosines(a, b) -> np.ndarray:
    unit = [torch.nn.functional.normalize(d.W_dec.double(), dim=1) for d in (a, b)]
    return (unit[0] @ unit[1].T).numpy()


def dense(store) -> np.ndarray:
    fires_TF = np.zeros((store.num_contexts * store.context_size, store.d_sae))
    starts, latents, _ = store.codes(0, len(fires_TF))
    fires_TF[np.repeat(np.arange(len(fires_TF)), np.diff(starts)), latents] = 1
    return fires_TF


def correlations(a, b) -> np.ndarray:
    """Of firing, over all tokens but first ones, by numpy."""
    fires_a, fires_b = (
        dense(store).reshape(-1, store.context_size, store.d_sae)[:, 1:].reshape(-1, store.d_sae) for store in (a, b)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        both = np.corrcoef(fires_a.T, fires_b.T)
    return np.nan_to_num(both[: fires_a.shape[1], fires_a.shape[1] :])


@pytest.mark.parametrize("rows", [7, 1024])
def test_cosines_equal_brute_force(dictionaries, monkeypatch, rows):
    monkeypatch.setattr(matching, "ROWS", rows)
    a, b = dictionaries
    found = match_directions(a, b)
    assert found.complete
    agrees(found, cosines(a, b), np.ones(60, dtype=bool), np.ones(50, dtype=bool))
    first, second, similarity = found.pairs(0.95)
    assert {(i, 49 - i) for i in range(10)} <= set(zip(first.tolist(), second.tolist(), strict=True))
    assert (np.diff(similarity) <= 0).all() and (similarity >= 0.95).all()


def test_only_latents_that_are_alive_take_part(dictionaries):
    a, b = dictionaries
    alive_a, alive_b = np.arange(60) % 3 > 0, np.arange(50) % 4 > 0
    agrees(match_directions(a, b, alive_a, alive_b), cosines(a, b), alive_a, alive_b)
    none = match_directions(a, b, alive_a, np.zeros(50, dtype=bool))
    assert (none.a.nearest_M == NONE).all() and not none.a.mutual_M.any() and none.b.alive == 0
    assert none.a.unmatched(0.1).all() and len(none.pairs()[0]) == 0


def test_drawn_latents_have_the_figures_of_a_whole_comparison(dictionaries, stores):
    a, b = dictionaries
    found = match_directions(a, b, budget=20 * 50 * D_IN)
    assert len(found.a.latents_M) == 20 and not found.complete
    agrees(found, cosines(a, b), np.ones(60, dtype=bool), np.ones(50, dtype=bool))
    assert not np.array_equal(found.a.latents_M, match_directions(a, b, budget=20 * 50 * D_IN, seed=9).a.latents_M)
    entries = [store.num_entries for store in stores]
    alive = [store.counts_F > 0 for store in stores]
    found = match_firings(*stores, budget=entries[0] * entries[1] / stores[1].num_tokens / 3)
    assert len(found.a.latents_M) == alive[0].sum() // 3 and not found.complete
    agrees(found, correlations(*stores), *alive)


@pytest.mark.parametrize("entries", [500, 1 << 20])
def test_correlations_equal_brute_force(stores, monkeypatch, entries):
    monkeypatch.setattr("saebench.features.scanning.BLOCK_ENTRIES", entries)
    found = match_firings(*stores)
    alive = [store.counts_F > 0 for store in stores]
    assert found.complete and found.a.alive < 60
    agrees(found, correlations(*stores), *alive)


def test_a_dictionary_matches_itself(dictionaries, stores):
    a, _ = dictionaries
    for found in (match_directions(a, a), match_firings(stores[0], stores[0])):
        assert np.array_equal(found.a.latents_M, found.a.nearest_M)
        assert found.a.similarity_M == pytest.approx(1, abs=1e-6) and found.a.matched(0.999).all()


def test_two_latents_of_different_stores(dictionaries, stores):
    cosines_AB, correlations_AB = cosines(*dictionaries), correlations(*stores)
    fires = [dense(store).astype(bool) for store in stores]
    for a, b in ((0, 49), (3, 46), (20, 5), (59, 0)):
        assert matching.cosine(dictionaries[0], a, dictionaries[1], b) == pytest.approx(cosines_AB[a, b], abs=1e-6)
        found = matching.fire_together(stores[0], a, stores[1], b)
        both, either = fires[0][:, a] & fires[1][:, b], fires[0][:, a] | fires[1][:, b]
        assert found.tokens == both.sum() and found.jaccard == pytest.approx(both.sum() / max(1, either.sum()))
        assert found.phi == pytest.approx(correlations_AB[a, b], abs=1e-9)


def test_every_latent_is_matched_or_near_another_pair_or_unmatched(dictionaries):
    found = match_directions(*dictionaries)
    for side in (found.a, found.b):
        for least in (0.2, 0.5, 0.9):
            kinds = np.stack([side.matched(least), side.shared(least), side.unmatched(least)])
            assert (kinds.sum(0) == 1).all()
            assert (side.similarity_M[kinds[2]] < least).all()


def test_what_cannot_be_compared_says_why(dictionaries, stores, stream, tmp_path):
    a, _ = dictionaries
    with pytest.raises(UserError, match="they write different sites, blocks.1.hook_resid_post and blocks.0.hook_mlp_out"):
        match_directions(a, dictionary(10, 0, site="blocks.0.hook_mlp_out"))
    wide = sb.TopK(d_sae=8, k=2, d_in=16, site=SITE).build()
    with pytest.raises(UserError, match="they write different widths, 32 and 16"):
        match_directions(a, wide)
    layers = [f"blocks.{i}.mlp.hook_in" for i in range(2)], [f"blocks.{i}.hook_mlp_out" for i in range(2)]
    clt = parse_dictionary(
        {"architecture": "clt", "d_sae": 8, "k": 2, "site": layers[0], "target": layers[1], "d_in": 64, "d_out": 64}, "it"
    )
    with pytest.raises(UserError, match="'clt' does not write one vector for each latent"):
        match_directions(a, clt.build())
    part = index(a, stream, tmp_path / "part", limit=7)
    with pytest.raises(UserError, match=r"over different tokens \(7 contexts of 16, 60 of 16\)"):
        match_firings(part, stores[1])

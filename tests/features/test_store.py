"""The feature store against brute force on dense codes, table by table; and what happens when building it is stopped, or files are
damaged."""

import json
import shutil

import numpy as np
import pytest
import torch

import saebench as sb
from saebench.activations import ActivationStream
from saebench.dictionaries import parse_dictionary
from saebench.errors import UserError
from saebench.features import FeatureStore, building, index, layout
from saebench.features.building import ranges_of, scale_for
from saebench.files import MANIFEST, locked

RESID, MLP_IN, MLP_OUT = "blocks.1.hook_resid_post", "blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out"
ATTN_IN, ATTN_OUT, Z = "blocks.1.ln1.hook_out", "blocks.1.hook_attn_out", "blocks.1.attn.hook_z"
D_SAE = 60
KINDS = {
    "topk": {"architecture": "topk", "k": 5, "site": RESID},
    "jumprelu": {"architecture": "jumprelu", "target_l0": 6, "site": RESID},
    "transcoder": {"architecture": "transcoder", "k": 5, "site": MLP_IN, "target": MLP_OUT},
    "lorsa": {"architecture": "lorsa", "k": 5, "site": ATTN_IN, "target": ATTN_OUT},
    "crosscoder": {"architecture": "crosscoder", "k": 5, "site": [RESID, "blocks.0.hook_resid_post"]},
    "attention": {"architecture": "topk", "k": 5, "site": Z},
}
SITES = [RESID, "blocks.0.hook_resid_post", MLP_IN, MLP_OUT, ATTN_IN, ATTN_OUT, Z]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several chunks, several ranges, several row groups."""
    monkeypatch.setattr(building, "CHUNK_TOKENS", 16 * 9)
    monkeypatch.setattr(building, "RANGE_ENTRIES", 700)
    monkeypatch.setattr(layout, "POSTINGS_GROUP", 64)
    monkeypatch.setattr(layout, "DETAILS_GROUP", 7)


@pytest.fixture(scope="module")
def stream(tiny_lm, contexts):
    return ActivationStream(tiny_lm, contexts[:50], SITES)


@pytest.fixture(scope="module")
def dictionaries(stream):
    training = sb.TrainConfig(num_tokens=32 * 40, batch_size=32, lr=5e-3)
    configs = {name: parse_dictionary({"d_sae": D_SAE, **values}, name) for name, values in KINDS.items()}
    return dict(zip(KINDS, sb.train(configs, stream, training), strict=True))


def dense_codes(dictionary, stream):
    """The codes of all tokens [T, F] as they are stored, nothing on first tokens."""
    fetched = stream.fetch(torch.arange(stream.num_contexts), list(dictionary.config.reads))
    x_CSD = torch.cat([encoded.decode() for encoded in fetched.values()], -1)
    inner = dictionary.encode_contexts(x_CSD).to_dense().half().double()
    codes_CSF = torch.zeros(stream.num_contexts, stream.context_size, D_SAE, dtype=torch.float64)
    codes_CSF[:, 1:] = inner.view(stream.num_contexts, -1, D_SAE)
    return codes_CSF.flatten(0, 1).numpy()


@pytest.fixture(scope="module", params=KINDS)
def built(request, dictionaries, stream, tiny_lm, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "CHUNK_TOKENS", 16 * 9)
        patch.setattr(building, "RANGE_ENTRIES", 700)
        patch.setattr(layout, "POSTINGS_GROUP", 64)
        patch.setattr(layout, "DETAILS_GROUP", 7)
        store = index(dictionaries[request.param], stream, tmp_path_factory.mktemp("store") / "it", lm=tiny_lm)
    return store, dictionaries[request.param], dense_codes(dictionaries[request.param], stream)


def test_every_firing_is_there_by_latent_and_by_token(built):
    store, _, codes_TF = built
    assert len(store.manifest["ranges"]) > 2 and len(store.chunks) > 2
    for latent in range(D_SAE):
        tokens, values = store.postings(latent)
        assert np.array_equal(tokens, np.flatnonzero(codes_TF[:, latent]))
        assert np.array_equal(values, codes_TF[tokens, latent])
    for first, last in ((0, len(codes_TF)), (130, 400), (16, 17), (5, 5), (790, 2000)):
        starts, latents, values = store.codes(first, last)
        dense = np.zeros((min(last, len(codes_TF)) - first, D_SAE))
        dense[np.repeat(np.arange(len(starts) - 1), np.diff(starts)), latents] = values
        assert np.array_equal(dense, codes_TF[first:last])
    store.verify()


def test_figures_of_every_latent(built, stream):
    store, _, codes_TF = built
    ids_T, size = stream.contexts.ids_NS.flatten().numpy(), stream.context_size
    inner = stream.num_contexts * (size - 1)
    for row in store.latents.to_pylist():
        firing = codes_TF[:, row["latent"]]
        places = np.flatnonzero(firing)
        values = firing[places]
        assert row["count"] == len(places) and row["density"] == pytest.approx(len(places) / inner)
        assert row["contexts"] == len(np.unique(places // size)) and row["distinct_tokens"] == len(np.unique(ids_T[places]))
        if len(places) == 0:
            assert row["top_token"] is None and row["max"] == row["mean"] == 0
            continue
        assert row["mean"] == pytest.approx(values.mean()) and row["std"] == pytest.approx(values.std(), abs=1e-7)
        assert row["max"] == values.max() and row["min"] == values.min()
        if row["skew"] is not None:
            apart = (values - values.mean()) / values.std()
            assert row["skew"] == pytest.approx((apart**3).mean(), abs=1e-5)
            assert row["kurtosis"] == pytest.approx((apart**4).mean(), rel=1e-5)
        sums = np.bincount(ids_T[places], values)
        assert sums[row["top_token"]] == pytest.approx(sums.max())
        assert row["top_token_share"] == pytest.approx(sums.max() / abs(values.sum()))


def test_what_is_listed_of_every_latent(built, stream):
    store, _, codes_TF = built
    fires_TF = (codes_TF != 0).astype(float)
    counts_F, inner = fires_TF.sum(0), stream.num_contexts * (stream.context_size - 1)
    together_FF = fires_TF.T @ fires_TF
    spread_F = np.sqrt(counts_F * (inner - counts_F))
    with np.errstate(invalid="ignore", divide="ignore"):
        phi_FF = np.nan_to_num((together_FF * inner - np.outer(counts_F, counts_F)) / np.outer(spread_F, spread_F))
    ids_T = stream.contexts.ids_NS.flatten().numpy()
    for latent in range(D_SAE):
        details, values, places = store.details(latent), codes_TF[:, latent], np.flatnonzero(codes_TF[:, latent])
        low, high = min(0, values[places].min(initial=0)), values[places].max(initial=0)
        if len(places) and high > low:
            expected, edges = np.histogram(values[places], bins=layout.BINS, range=(low, high))
            assert details.histogram.sum() == len(places) and np.abs(details.histogram - expected).sum() <= 2  # values on an edge
            assert np.allclose(details.edges, edges)
        positions = (places % stream.context_size) * layout.POSITION_BINS // stream.context_size
        assert details.positions.tolist() == np.bincount(positions, minlength=layout.POSITION_BINS).tolist()
        for token, count, total in details.tokens:
            on = ids_T[places] == token
            assert count == on.sum() and total == pytest.approx(values[places][on].sum())
        ranked = sorted((g for g in range(D_SAE) if g != latent and together_FF[latent, g]), key=lambda g: -phi_FF[latent, g])
        assert len(details.coactive) == min(layout.COACTIVE, len(ranked))
        for (other, both, phi, jaccard), best in zip(details.coactive, ranked, strict=False):
            assert both == together_FF[latent, other]
            assert phi == pytest.approx(phi_FF[latent, other], abs=1e-9) == pytest.approx(phi_FF[latent, best], abs=1e-9)
            assert jaccard == pytest.approx(both / (counts_F[latent] + counts_F[other] - both))


def test_neighbours_and_logit_effects_follow_from_the_weights(built, tiny_lm):
    store, dictionary, _ = built
    rows_FD = dictionary.directions.double()
    unit_FD = rows_FD / rows_FD.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosines_FF = (unit_FD @ unit_FD.T).fill_diagonal_(-1).numpy()
    hf, width = tiny_lm.hf, 32
    norm = hf.transformer.ln_f
    if dictionary.config.writes == (Z,):
        projection = hf.transformer.h[1].attn.c_proj
        residual_FD = rows_FD @ projection.weight.double()
    else:
        residual_FD = sum(rows_FD.split(width, dim=1))
    centred_FD = residual_FD - residual_FD.mean(1, keepdim=True)
    logits_FV = (centred_FD * norm.weight.double()) @ hf.lm_head.weight.double().T
    logits_FV = (logits_FV - logits_FV.mean(1, keepdim=True)).detach().numpy()
    for latent in range(0, D_SAE, 7):
        details = store.details(latent)
        best = np.sort(cosines_FF[latent])[::-1]
        found = [cosine for _, cosine in details.neighbours]
        assert len(found) == min(layout.NEIGHBOURS, int((best > 0).sum()))
        assert found == pytest.approx(best[: len(found)], abs=1e-5)
        assert all(cosines_FF[latent, other] == pytest.approx(cosine, abs=1e-5) for other, cosine in details.neighbours)
        for listed, sign in ((details.promoted, 1), (details.suppressed, -1)):
            assert len(listed) == layout.LOGITS
            assert [sign * logit for _, logit in listed] == pytest.approx(
                np.sort(sign * logits_FV[latent])[::-1][: layout.LOGITS], abs=2e-4
            )
            assert all(logits_FV[latent, token] == pytest.approx(logit, abs=2e-4) for token, logit in listed)


def test_the_corpus_is_there_without_model_or_activations(built, stream, tiny_lm):
    store = FeatureStore(built[0].path)
    for name in ("ids_NS", "documents_NS", "positions_NS"):
        assert torch.equal(getattr(store.contexts, name), getattr(stream.contexts, name))
    assert store.contexts.names == stream.contexts.names and store.token_strings == tiny_lm.token_strings
    assert store.token_counts.tolist() == np.bincount(store.ids_T, minlength=len(store.token_strings)).tolist()
    assert 0 < store.rounding_error < 2**-11


def test_other_tools_read_the_tables(built):
    duckdb, polars = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    store, _, codes_TF = built
    strongest = codes_TF.max(0)
    files = f"{store.path}/postings-*.parquet"
    found = duckdb.sql(f"select latent, max(value) from '{files}' group by latent").fetchall()
    assert {latent: value for latent, value in found} == {f: v for f, v in enumerate(strongest) if v}
    assert polars.read_parquet(files).height == store.num_entries


@pytest.fixture
def topk(dictionaries):
    return dictionaries["topk"]


def files_of(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != ".lock"}


@pytest.mark.parametrize("stop_at", range(1, 14, 2))
def test_a_build_stopped_anywhere_ends_with_the_same_bytes(topk, stream, tiny_lm, tmp_path, monkeypatch, stop_at):
    whole = files_of(index(topk, stream, tmp_path / "whole", lm=tiny_lm).path)
    enter, calls = building._Builder.enter, []

    def stopping(self, *arguments, **options):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        enter(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(building._Builder, "enter", stopping)
        with pytest.raises(KeyboardInterrupt):
            index(topk, stream, tmp_path / "stopped", lm=tiny_lm)
    assert not (tmp_path / "stopped").exists()
    assert files_of(index(topk, stream, tmp_path / "stopped", lm=tiny_lm).path) == whole
    assert not list(tmp_path.glob(".stopped*"))


def test_a_build_stopped_while_it_takes_its_place_is_finished(topk, stream, tiny_lm, tmp_path, monkeypatch):
    whole = files_of(index(topk, stream, tmp_path / "whole", lm=tiny_lm).path)
    with monkeypatch.context() as patch:
        patch.setattr(building.Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            index(topk, stream, tmp_path / "stopped", lm=tiny_lm)
    assert not list((tmp_path / ".stopped.building").glob(".run-*"))
    assert files_of(index(topk, stream, tmp_path / "stopped", lm=tiny_lm).path) == whole


def test_what_an_unfinished_build_of_another_dictionary_left_is_thrown_away(
    topk, dictionaries, stream, tiny_lm, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(building._Builder, "sort", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            index(dictionaries["jumprelu"], stream, tmp_path / "it", lm=tiny_lm)
    assert files_of(index(topk, stream, tmp_path / "it", lm=tiny_lm).path) == files_of(
        index(topk, stream, tmp_path / "other", lm=tiny_lm).path
    )


def test_an_open_store_outlives_its_replacement(topk, dictionaries, stream, tiny_lm, tmp_path):
    old = index(topk, stream, tmp_path / "it", lm=tiny_lm)
    before = [old.postings(latent) for latent in range(3)]
    with pytest.raises(UserError, match="overwrite it, or name another place"):
        index(dictionaries["jumprelu"], stream, tmp_path / "it", lm=tiny_lm)
    again = index(topk, stream, tmp_path / "it", lm=tiny_lm)
    assert again.identity == old.identity
    new = index(dictionaries["jumprelu"], stream, tmp_path / "it", lm=tiny_lm, overwrite=True)
    assert new.identity != old.identity
    assert all(np.array_equal(a, b) for latent in range(3) for a, b in zip(old.postings(latent), before[latent], strict=True))


def test_to_grow_is_to_replace_one_of_fewer_contexts(topk, dictionaries, stream, tmp_path):
    small = index(topk, stream, tmp_path / "it", limit=7)
    for again in ({}, {"dictionary": dictionaries["jumprelu"], "grow": True}):
        with pytest.raises(UserError, match="over 7 contexts .* over 20 contexts .* overwrite it"):
            index(**{"dictionary": topk, "source": stream, "out": tmp_path / "it", "limit": 20} | again)
    assert FeatureStore(tmp_path / "it").identity == small.identity
    assert index(topk, stream, tmp_path / "it", limit=20, grow=True).num_contexts == 20
    assert index(topk, stream, tmp_path / "it", limit=20, grow=True).num_contexts == 20
    with pytest.raises(UserError, match="over 20 contexts .* over 7 contexts .* overwrite it"):
        index(topk, stream, tmp_path / "it", limit=7, grow=True)


def test_two_at_once_are_refused(topk, stream, tmp_path):
    (tmp_path / ".it.building").mkdir()
    with locked(tmp_path / ".it.building" / ".lock"), pytest.raises(UserError, match="another process is building"):
        index(topk, stream, tmp_path / "it")


def test_damage_is_named(topk, stream, tmp_path):
    path = index(topk, stream, tmp_path / "it").path
    shutil.copytree(path, tmp_path / "copy")

    def broken(change):
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "copy", path)
        change()
        with pytest.raises(UserError) as error:
            FeatureStore(path).verify()
        return str(error.value)

    assert "postings-00000.parquet is missing" in broken(lambda: (path / "postings-00000.parquet").unlink())
    assert "latents-00001.parquet has 5 bytes instead of" in broken(
        lambda: (path / "latents-00001.parquet").write_bytes(b"12345")
    )
    size = (path / "details-00000.parquet").stat().st_size
    assert "does not match its recorded hash" in broken(lambda: (path / "details-00000.parquet").write_bytes(b"x" * size))
    manifest = json.loads((path / MANIFEST).read_text())
    assert "version 9" in broken(lambda: (path / MANIFEST).write_text(json.dumps(manifest | {"version": 9})))
    assert "not finished" in broken(lambda: (path / MANIFEST).write_text(json.dumps(manifest | {"complete": False})))
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "copy", path)
    (path / "postings-00000.parquet").write_bytes(b"x" * (path / "postings-00000.parquet").stat().st_size)
    with pytest.raises(UserError, match=r"postings-00000.parquet is damaged"):
        FeatureStore(path).postings(0)
    with pytest.raises(UserError, match="latent 60 is not one of the 60"):
        FeatureStore(path).details(60)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_values_beyond_16_bits_are_scaled_by_a_power_of_two(topk, stream, tmp_path, factor):
    scaled = sb.TopK(d_sae=D_SAE, k=5, d_in=32, site=RESID, decoder="unit").build().requires_grad_(False)
    scaled.load_public(topk.public_tensors())
    scaled.W_enc_FD *= factor
    scaled.b_enc *= factor
    plain, store = index(topk, stream, tmp_path / "plain"), index(scaled, stream, tmp_path / "scaled")
    assert plain.value_scale == 1 and store.value_scale == 2.0 ** round(np.log2(store.value_scale)) != 1
    for latent in range(0, D_SAE, 9):
        assert np.allclose(store.postings(latent)[1], plain.postings(latent)[1] * factor, rtol=2e-3)
    assert np.allclose(store.latents["mean"].to_numpy(), plain.latents["mean"].to_numpy() * factor, rtol=2e-3)
    assert store.rounding_error < 2**-11


def test_a_later_value_too_large_begins_again_with_a_scale(topk, stream, tmp_path):
    class Later:
        def __getattr__(self, name):
            return getattr(stream, name)

        def fetch(self, contexts_N, sites, out=None):
            fetched = stream.fetch(contexts_N, sites)
            for place in (contexts_N >= 40).nonzero()[:, 0]:
                fetched[RESID].values[place] *= 1e5
            return fetched

    store = index(topk, Later(), tmp_path / "it")
    assert store.value_scale > 1
    top = max(float(store.latents["max"][latent].as_py()) for latent in range(D_SAE))
    assert top > 65504 and np.isfinite(top)


def test_an_empty_dictionary_and_a_part_of_the_corpus(topk, stream, tmp_path):
    silent = sb.TopK(d_sae=D_SAE, k=5, d_in=32, site=RESID, decoder="unit").build().requires_grad_(False)
    silent.b_enc -= 1.0
    store = index(silent, stream, tmp_path / "silent", limit=7)
    assert store.num_entries == 0 and store.num_contexts == 7 and store.rounding_error == 0
    assert store.postings(3)[0].shape == (0,) and store.details(3).coactive == []
    part = index(topk, stream, tmp_path / "part", limit=7)
    numbers = torch.arange(7) * 50 // 7
    assert torch.equal(part.contexts.ids_NS, stream.contexts.ids_NS[numbers])


def test_ranges_hold_what_they_may():
    counts = np.random.default_rng(0).integers(0, 300, 500)
    found = ranges_of(counts)
    assert [first for first, _ in found] == [0, *(last for _, last in found[:-1])] and found[-1][1] == 500
    assert all(counts[first:last].sum() <= 700 for first, last in found)
    assert scale_for(2048.0 * 8) == 8 and scale_for(2048.0 / 4) == 0.25

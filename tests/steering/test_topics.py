"""Topic scores against hand-computed ones, and selection anew against dense algebra."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import saebench as sb
from saebench.dictionaries import parse_dictionary
from saebench.errors import UserError
from saebench.features.building import fingerprint
from saebench.steering.reselection import reselect
from saebench.steering.similarity import WordVectors, sentence_encoder, squared_distances, unit_rows, with_nearest, words_of
from saebench.steering.topics import Reference, TopicAligner, topic_scores

IDS = torch.tensor([[0, 40, 50, 60, 70, 80, 45, 55], [0, 41, 51, 60, 71, 81, 46, 56]])
SITE = "blocks.1.hook_resid_post"
TEXTS = ["def alpha(x): return x", "the number 12 and the name 7", "import beta as gamma", "value * value + value"]
FAMILY = ("topk", "jumprelu", "transcoder", "skip", "crosscoder")


def read(lm, site=SITE, ids=IDS):
    return lm.read(ids, [site])[site].clone()


def hooks_of(lm):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.hf.modules())


def factors(seed=0, count=64):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def by_number(texts):
    """An encoder by which no two of TEXTS are alike."""
    return np.eye(len(TEXTS))[[TEXTS.index(text) for text in texts]]


# --- scores ---


def test_three_prompts_by_hand():
    distances_U = np.array([0.0, 1.0, 2.0])
    shares_UF = sp.csr_array(np.array([[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.2, 0.0], [0.0, 0.5, 0.6, 0.0]]))
    # scores 0, 1 and (0.2 + 1.2) / 0.8 = 1.75; the last latent never fires
    assert topic_scores(distances_U, shares_UF) == pytest.approx([1, 1 - 1 / 1.75, 0, 0])


def test_the_same_through_an_encoder(kinds):
    rows = {"here": (3, 0), "aside": (0.5, 3**0.5 / 2), "away": (0, 1), "topic": (1, 0)}  # 0, 1 and 2 from the topic, squared
    shares_UF = np.zeros((3, 64))
    shares_UF[:, :3] = [[1.0, 0.5, 0.0], [0.0, 0.0, 0.2], [0.0, 0.5, 0.6]]

    def embed(texts):
        return np.array([rows[text] for text in texts], dtype=float)

    vectors_UE = unit_rows(embed(["here", "aside", "away"]))
    reference = Reference(sp.csr_array(shares_UF), vectors_UE, embed, fingerprint(kinds["topk"]), 0.0)
    aligner = TopicAligner(kinds["topk"], "topic", reference)
    assert aligner.s_F[:3] == pytest.approx([1, 1 - 1 / 1.75, 0], abs=1e-9)
    assert not aligner.s_F[3:].any() and aligner.seconds > 0
    chosen = aligner.chosen(10)
    assert chosen.latents == (0, 1) and chosen.scores == pytest.approx((1, 1 - 1 / 1.75))
    nearest = TopicAligner(kinds["topk"], ["topic", "away"], reference)  # now 0, 2 - 3 ** 0.5 and 0
    assert nearest.s_F[:3] == pytest.approx([1, 1, 0], abs=1e-9)


def test_a_prompt_as_topic_brings_its_latents(tiny_lm, kinds):
    dictionary = kinds["topk"]
    reference = Reference.of_texts(tiny_lm, dictionary, TEXTS, by_number)
    sums_UF = []
    for text in TEXTS:
        ids = torch.tensor([[0, *tiny_lm.tokenizer(text)["input_ids"]]])
        f_TF = dictionary.encode(read(tiny_lm, ids=ids)[0, 1:]).to_dense()
        sums_UF.append(f_TF.sum(0) / f_TF.sum())
    shares_UF = torch.stack(sums_UF).double().numpy()
    for number, text in enumerate(TEXTS):
        aligner = TopicAligner(dictionary, text, reference)
        assert aligner.s_F.min() >= 0 and aligner.s_F.max() <= 1
        with np.errstate(invalid="ignore"):
            own_F = shares_UF[number] / shares_UF.sum(0)  # other prompts are at distance 2: only this share counts
        fires_F = np.isfinite(own_F)
        expected_F = (own_F[fires_F] - own_F[fires_F].min()) / (own_F[fires_F].max() - own_F[fires_F].min())
        assert aligner.s_F[fires_F] == pytest.approx(expected_F, abs=1e-5)
        assert aligner.s_F[np.nanargmax(own_F)] == pytest.approx(1, abs=1e-6)
        assert not aligner.s_F[~fires_F].any()


def test_words_find_the_prompt(tiny_lm, kinds):
    reference = Reference.of_texts(tiny_lm, kinds["topk"], TEXTS)
    own_F = TopicAligner(kinds["topk"], TEXTS[2], reference).s_F
    shares_UF = reference.shares_UF.toarray()
    only_F = (shares_UF[2] > 0) & (np.delete(shares_UF, 2, 0) == 0).all(0)
    assert only_F.any() and own_F[only_F] == pytest.approx(1)


def test_reference_of_a_store(tiny_lm, kinds, make_store, contexts, tmp_path):
    source = make_store()
    store = sb.index(kinds["topk"], source, tmp_path / "features", lm=tiny_lm, limit=20)
    reference = Reference.of_store(store, limit=10)
    ids_US = store.contexts.ids_NS[::2].long()
    f_TF = kinds["topk"].encode(read(tiny_lm, ids=ids_US)[:, 1:].flatten(0, 1)).to_dense()
    sums_UF = f_TF.view(10, -1, 64).sum(1)
    assert reference.shares_UF.toarray() == pytest.approx((sums_UF / sums_UF.sum(1, keepdim=True)).numpy(), abs=2e-3)
    assert TopicAligner(kinds["topk"], "a number and a name", reference).chosen(3).latents
    with pytest.raises(UserError, match="another dictionary"):
        TopicAligner(kinds["jumprelu"], "number", reference)


# --- texts as vectors ---


def test_words_and_their_weights():
    assert words_of("parseHTTPHeader of my_value2, x = Größe") == ["parse", "http", "header", "value", "größe"]
    vectors = WordVectors(["one two two", "two three"])
    row = dict(zip(vectors.places, vectors(["two two one four"]).toarray()[0].tolist(), strict=True))
    expected = {"one": np.log(3 / 1), "two": (1 + np.log(2)) * np.log(3 / 2), "three": 0}
    assert row == pytest.approx(expected)


def test_distances_and_nearest_prompts():
    rows_UE = unit_rows(np.array([[2.0, 0, 0], [0, 1, 0], [0, 0, 0], [1, 1, 0]]))
    topic_PE = unit_rows(np.array([[1.0, 0, 0], [0, 0, 5]]))
    assert squared_distances(rows_UE, topic_PE) == pytest.approx([0, 2, 2, 2 - 2**0.5])
    near_PE = with_nearest(topic_PE[:1], rows_UE, 2).toarray()  # the nearest two: itself and the diagonal
    direction = np.array([1 + 0.5**0.5, 0.5**0.5, 0])
    expected = np.array([1, 0, 0]) + direction / np.linalg.norm(direction)
    assert near_PE[0] == pytest.approx(expected / np.linalg.norm(expected))


def test_a_sentence_encoder_is_local_and_optional(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not a directory"):
        sentence_encoder(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match="pip install sentence-transformers"):
        sentence_encoder(tmp_path)

    class Model:
        def __init__(self, path, local_files_only):
            assert path == str(tmp_path) and local_files_only

        def encode(self, texts, **options):
            return np.array([[len(text), 1.0] for text in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model))
    assert sentence_encoder(tmp_path)(["a", "abc"]).tolist() == [[1, 1], [3, 1]]


# --- selection anew ---


def test_factors_of_one_change_no_bit(tiny_lm, kinds):
    clean = tiny_lm.logits(IDS)
    for name in FAMILY:
        for mode in ("weight", "swap"):
            with reselect(tiny_lm, kinds[name], torch.ones(64), mode):
                assert torch.equal(tiny_lm.logits(IDS), clean), (name, mode)


@pytest.mark.parametrize("mode", ["weight", "swap"])
@pytest.mark.parametrize("name", ["topk", "jumprelu"])
def test_against_dense_algebra(tiny_lm, kinds, name, mode):
    dictionary, s_F, x = kinds[name], factors(), read(tiny_lm)
    z = (x if dictionary.b_in is None else x - dictionary.b_in) @ dictionary.W_enc_FD.T + dictionary.b_enc
    zs = z * s_F

    def rule(scores):
        if name == "jumprelu":
            return scores > dictionary.threshold
        return (scores >= scores.topk(4, -1).values[..., -1:]) & (scores > 0)

    f, f_new = z * rule(z), (zs if mode == "weight" else z) * rule(zs)
    assert not torch.equal(rule(z), rule(zs))
    expected = x + 0.5 * (f_new - f) @ dictionary.W_dec
    before = hooks_of(tiny_lm)
    with torch.no_grad(), reselect(tiny_lm, dictionary, s_F, mode, strength=0.5):
        found = read(tiny_lm)
    assert torch.equal(found[:, 0], x[:, 0])  # BOS is never edited
    assert torch.allclose(found[:, 1:], expected[:, 1:], atol=1e-4)
    assert hooks_of(tiny_lm) == before
    with reselect(tiny_lm, dictionary, s_F, mode, keep_error=False, positions="3-5"):
        found = read(tiny_lm)
    assert torch.allclose(found[:, 3:5], (f_new @ dictionary.W_dec + dictionary.b_dec)[:, 3:5], atol=1e-4)
    assert torch.equal(found[:, :3], x[:, :3]) and torch.equal(found[:, 5:], x[:, 5:])


def test_swap_keeps_magnitudes_and_weight_does_not(tiny_lm, kinds):
    half = torch.full((64,), 0.5)
    x = read(tiny_lm)
    f = kinds["topk"].encode(x[:, 1:].flatten(0, 1)).to_dense().view(2, 7, 64)
    with reselect(tiny_lm, kinds["topk"], half, "swap"):
        assert torch.allclose(read(tiny_lm), x, atol=1e-5)  # the same latents win
    with reselect(tiny_lm, kinds["topk"], half, "weight"):
        assert torch.allclose(read(tiny_lm)[:, 1:], x[:, 1:] - 0.5 * f @ kinds["topk"].W_dec, atol=1e-4)


@pytest.mark.parametrize("name", FAMILY[:-1])  # a crosscoder's readings ahead are of steered positions with a cache only
def test_a_cache_changes_nothing(tiny_lm, kinds, name):
    from transformers import DynamicCache

    with reselect(tiny_lm, kinds[name], factors(), "swap"), torch.inference_mode():
        whole, cache = tiny_lm.hf(IDS, use_cache=False).logits, DynamicCache(config=tiny_lm.hf.config)
        parts = [tiny_lm.hf(IDS[:, :5], past_key_values=cache, use_cache=True).logits]
        parts += [tiny_lm.hf(IDS[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(5, 8)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    assert not torch.allclose(whole, tiny_lm.logits(IDS), atol=1e-3)


def test_a_skip_is_left_as_it_is(tiny_lm, kinds):
    dictionary = kinds["skip"]
    mlp_out, mlp_in = dictionary.config.writes[0], dictionary.config.reads[0]
    x, y = read(tiny_lm, mlp_in)[:, 1:].flatten(0, 1), read(tiny_lm, mlp_out)
    with reselect(tiny_lm, dictionary, torch.zeros(64), "weight"):
        found = read(tiny_lm, mlp_out)
    latents_only = dictionary.decode(dictionary.encode(x)) - dictionary.b_dec
    assert torch.allclose(found[:, 1:], y[:, 1:] - latents_only.view(2, 7, -1), atol=1e-4)


def test_zero_strength_hooks_nothing(tiny_lm, kinds):
    before = hooks_of(tiny_lm)
    with reselect(tiny_lm, kinds["topk"], factors(), strength=0.0):
        assert hooks_of(tiny_lm) == before


# --- the aligner ---


@pytest.fixture(scope="module")
def aligner(tiny_lm, kinds):
    return TopicAligner(kinds["topk"], TEXTS[1], Reference.of_texts(tiny_lm, kinds["topk"], TEXTS))


def test_clamp_adds_to_each_of_the_best(tiny_lm, kinds, aligner):
    best, x = list(aligner.chosen(3).latents), read(tiny_lm)
    with aligner.steer(tiny_lm, "clamp", count=3, value=7.0, strength=0.5):
        found = read(tiny_lm)
    assert torch.allclose(found[:, 1:], x[:, 1:] + 3.5 * kinds["topk"].W_dec[best].sum(0), atol=1e-4)
    assert torch.equal(found[:, 0], x[:, 0])


def test_steer_selects_by_the_scores(tiny_lm, kinds, aligner):
    for mode in ("weight", "swap"):
        with aligner.steer(tiny_lm, mode, strength=0.7):
            found = tiny_lm.logits(IDS)
        with reselect(tiny_lm, kinds["topk"], aligner.s_F, mode, strength=0.7):
            assert torch.equal(tiny_lm.logits(IDS), found)
        with aligner.steer(tiny_lm, mode):
            assert isinstance(tiny_lm.generate("def value", 8), str)


def test_scores_are_kept(kinds, aligner, tmp_path):
    aligner.save(tmp_path / "topic.safetensors")
    again = TopicAligner.load(tmp_path / "topic.safetensors", kinds["topk"])
    assert np.array_equal(again.s_F, aligner.s_F) and again.topic == aligner.topic == (TEXTS[1],)
    with pytest.raises(UserError, match="another dictionary"):
        TopicAligner.load(tmp_path / "topic.safetensors", kinds["jumprelu"])
    with pytest.raises(UserError, match="is missing"):
        TopicAligner.load(tmp_path / "none.safetensors", kinds["topk"])


def test_errors_say_what_to_do(tiny_lm, kinds, aligner):
    def enter(*args, **options):
        with reselect(tiny_lm, *args, **options):
            pass

    gated = parse_dictionary({"architecture": "gated", "d_sae": 64, "d_in": 32, "site": SITE}, "gated").build()
    for dictionary in (kinds["clt"], kinds["lorsa"], gated):
        with pytest.raises(UserError, match="use clamp"):
            enter(dictionary, torch.ones(64))
    for wrong in (torch.ones(63), -torch.ones(64), torch.full((64,), torch.nan)):
        with pytest.raises(UserError, match="64 finite numbers"):
            enter(kinds["topk"], wrong)
    with pytest.raises(UserError, match="weight or swap"):
        enter(kinds["topk"], torch.ones(64), "clamp")
    with pytest.raises(UserError, match="positions"):
        enter(kinds["topk"], torch.ones(64), positions="nowhere")
    reference = Reference.of_texts(tiny_lm, kinds["topk"], TEXTS)
    for topic in ("zzz qqq", "", []):
        with pytest.raises(UserError, match="shares no word"):
            TopicAligner(kinds["topk"], topic, reference)
    with pytest.raises(UserError, match="one row for each"):
        Reference.of_texts(tiny_lm, kinds["topk"], TEXTS, lambda texts: np.ones(3))
    with pytest.raises(UserError, match="3 rows for 4"):
        Reference.of_texts(tiny_lm, kinds["topk"], TEXTS, lambda texts: np.ones((3, 2)))
    with pytest.raises(UserError, match="no latent fires"):
        topic_scores(np.ones(2), sp.csr_array((2, 5)))
    with pytest.raises(UserError, match="found no latent"):
        aligner.chosen(0)

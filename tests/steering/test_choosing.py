"""Latents chosen by hand, by contrast and by output: the output score against steering one latent at a time, and planted directions."""

import numpy as np
import pytest
import torch

import saebench as sb
from saebench.activations import ActivationStream
from saebench.errors import UserError
from saebench.features import index
from saebench.features.contrast import contrast, contrast_texts
from saebench.features.effects import LogitEffects
from saebench.features.prompts import tokenise
from saebench.steering.baselines import random_directions, unit_of
from saebench.steering.choosing import NEUTRAL, RANDOM, by_contrast, by_documents, by_hand, by_output, output_score
from saebench.steering.chosen import Chosen
from saebench.steering.edits import add
from saebench.steering.hooks import steer

PROMPTS = ["def value", "the number 3 and", "x"]
CODE = [f"def value_{i}(x):\n    return x * {i}" for i in range(6)]
PROSE = [f"the number {i} and the name {i * i}" for i in range(5)]
SITE = "blocks.2.hook_resid_post"


# --- one at a time, by the edits that steer ---


def directions(dictionary, latents):
    """An `add` of each latent, and one of each random direction at the sites that the dictionary writes."""
    sites, widths = dictionary.config.writes, list(dictionary.config.blocks_out)
    chance = [
        [add(block, site=site, unit=float(block.norm())) for site, block in zip(sites, row.split(widths), strict=True)]
        for row in random_directions(sum(widths), RANDOM, 0)
    ]
    return [[add(dictionary, latent)] for latent in latents], chance


def steered_logp(lm, edits, ids, length):
    times = [edit.at(length) for edit in edits]
    with steer(lm, times):
        return lm.logits(torch.tensor([ids]))[0].double().log_softmax(-1)


def log_mass(lm, edits, prompt, tokens, length):
    return float(steered_logp(lm, edits, lm.prompt_ids(prompt), length)[-1, tokens].exp().sum().log())


def likelihood(lm, edits, text, length):
    ids = tokenise(lm, text)[0]
    logp_SV = steered_logp(lm, edits, ids, length)
    return float(np.mean([logp_SV[place, token] for place, token in enumerate(ids[1:])]))


@pytest.mark.parametrize("kind", ["topk", "transcoder", "crosscoder", "clt", "lorsa"])
def test_the_score_is_what_one_latent_at_a_time_gives(kind, tiny_lm, kinds, monkeypatch):
    vocabulary = tiny_lm.hf.config.vocab_size
    monkeypatch.setattr("saebench.steering.choosing.LOGITS_AT_ONCE", 5 * 4 * vocabulary)  # a few rows at once, in uneven parts
    dictionary, latents, tokens = kinds[kind], [3, 60, 0, 17, 5, 41, 22], [40, 7, 300]
    unit = unit_of(tiny_lm, dictionary.config.writes, PROMPTS)
    of_latents, chance = directions(dictionary, latents)
    found = output_score(tiny_lm, dictionary, latents, tokens, prompts=PROMPTS, strength=3)
    values = [
        np.mean([log_mass(tiny_lm, edits, prompt, tokens, 3 * unit) for prompt in PROMPTS]) for edits in [*of_latents, *chance]
    ]
    assert found == pytest.approx(np.array(values[:7]) - np.mean(values[7:]), abs=2e-4)
    assert np.std(found) > 0.01


def test_without_tokens_it_is_of_those_that_each_latent_promotes(tiny_lm, kinds):
    dictionary, latents = kinds["topk"], [3, 60, 17]
    found = output_score(tiny_lm, dictionary, latents, prompts=PROMPTS, strength=2, unit=1.5)
    effects = LogitEffects(dictionary, tiny_lm)
    for latent, score in zip(latents, found, strict=True):
        tokens = effects.of(latent, latent + 1, 20)[0][0].tolist()
        assert len(set(tokens)) == 20
        alone = output_score(tiny_lm, dictionary, latent, tokens, prompts=PROMPTS, strength=2, unit=1.5)
        assert score == pytest.approx(alone[0], abs=1e-5)


def test_with_texts_it_is_the_rise_of_their_likelihood_over_that_of_others(tiny_lm, kinds):
    dictionary, latents, texts = kinds["topk"], [3, 60], (CODE[:2], PROSE[:3])
    of_latents, chance = directions(dictionary, latents)
    found = output_score(tiny_lm, dictionary, latents, positives=texts[0], negatives=texts[1], strength=2, unit=1.5)

    def value(edits):
        return np.subtract(*[np.mean([likelihood(tiny_lm, edits, text, 3.0) for text in side]) for side in texts])

    by_chance = np.mean([value(other) for other in chance])
    assert found == pytest.approx([value(edits) - by_chance for edits in of_latents], abs=1e-4)


# --- planted ---


@pytest.fixture
def planted(tiny_lm):
    """A dictionary at the last layer: latent 0 lowers the logit of one token and latent 5 raises it, more than any other direction."""
    dictionary = sb.TopK(d_sae=8, k=2, decoder="unit").for_sites({SITE: 32}).build()
    rows_FD = random_directions(32, 8, 1)
    token = 77
    up_D = tiny_lm.direct_unembedding_VD[token] - tiny_lm.direct_unembedding_VD.mean(0)
    rows_FD[5], rows_FD[0] = up_D / up_D.norm(), -up_D / up_D.norm()
    with torch.no_grad():
        dictionary.W_enc_FD.copy_(rows_FD)
        dictionary.W_dec.copy_(rows_FD)
        dictionary.b_dec.zero_()
    return dictionary.settled().eval().requires_grad_(False), token


def test_a_direction_that_raises_a_token_comes_first_and_one_that_lowers_it_last(planted, tiny_lm):
    dictionary, token = planted
    scores = output_score(tiny_lm, dictionary, range(8), [token], prompts=PROMPTS)
    assert (np.argmax(scores), np.argmin(scores)) == (5, 0)
    assert scores[5] > 1 and scores[0] < -1
    assert np.abs(np.delete(scores, [0, 5])).mean() < scores[5] / 2
    candidates = Chosen("contrast", (4, 0, 5), (3.0, 2.0, 1.0), (0.1, 0.2, 0.3))
    found = by_output(tiny_lm, dictionary, candidates, [token], count=1, prompts=PROMPTS)
    assert (found.method, found.latents, found.weights) == ("contrast, output score", (5,), (0.3,))
    assert found.scores[0] == pytest.approx(scores[5], abs=1e-5)
    with pytest.raises(UserError, match="contrast, output score found no latent"):
        by_output(tiny_lm, dictionary, Chosen("contrast", (0,), (1.0,)), [token], prompts=PROMPTS)


def test_random_latents_have_no_score_on_average(tiny_lm):
    dictionary = sb.TopK(d_sae=200, k=2, decoder="unit").for_sites({SITE: 32}).build()
    with torch.no_grad():
        for weight in (dictionary.W_enc_FD, dictionary.W_dec):
            weight.copy_(random_directions(32, 200, 5))
    dictionary = dictionary.settled()
    scores = output_score(tiny_lm, dictionary, range(200), [40, 7], prompts=PROMPTS)
    assert abs(scores.mean()) < 4 * scores.std() * np.sqrt(1 / 200 + 1 / RANDOM)
    assert (output_score(tiny_lm, dictionary, range(200), prompts=PROMPTS) > 0).mean() > 0.9  # of what they promote


def test_a_hundred_latents_in_one_pass_a_prompt(builtin_lm, monkeypatch):
    widths = {SITE: builtin_lm.width(SITE)}
    dictionary = sb.TopK(d_sae=128, k=2, decoder="unit").for_sites(widths).build()
    with torch.no_grad():
        for weight in (dictionary.W_enc_FD, dictionary.W_dec):
            weight.copy_(random_directions(widths[SITE], 128, 0))
    passes = []
    logits = builtin_lm.logits
    monkeypatch.setattr(builtin_lm, "logits", lambda ids: passes.append(len(ids)) or logits(ids))
    scores = output_score(builtin_lm, dictionary.settled(), range(100))
    assert sorted(passes) == [RANDOM] * len(NEUTRAL) + [100] * len(NEUTRAL)
    assert (scores > 0).mean() > 0.9


# --- by hand, by contrast ---


def test_by_hand(kinds):
    assert by_hand(kinds["topk"], 5) == Chosen("by hand", (5,), (1.0,))
    assert by_hand(kinds["topk"], np.array([9, 2])).latents == (9, 2)
    for latents, message in (
        ([], "no latent is named"),
        ([64], "latent 64 is not one of the 64"),
        ([-1], "latent -1 is not one of the 64"),
        ([3, 4, 3], "latent 3 is named 2 times"),
        ([1.5], "are not all whole numbers"),
        (["3"], "are not all whole numbers"),
    ):
        with pytest.raises(UserError, match=message):
            by_hand(kinds["topk"], latents)


def test_by_contrast_takes_what_fires_more_in_the_positives(tiny_lm, kinds):
    dictionary = kinds["topk"]
    by_latent = {d.latent: d for d in contrast_texts(tiny_lm, dictionary, CODE, PROSE, 64, min_firings=3)}
    found = by_contrast(tiny_lm, dictionary, CODE, PROSE, count=64, min_firings=3)
    more = {latent for latent, d in by_latent.items() if d.rate_a > d.rate_b}
    assert set(found.latents) == more and 0 < len(more) < len(by_latent)
    assert found.scores == tuple(by_latent[latent].z for latent in found.latents)
    assert list(found.scores) == sorted(found.scores, reverse=True)
    assert by_contrast(tiny_lm, dictionary, CODE, PROSE, count=2, min_firings=3) == found.best(2)
    other = by_contrast(tiny_lm, dictionary, PROSE, CODE, count=64, min_firings=3)
    assert not set(other.latents) & more


def test_by_documents_of_a_store(tiny_lm, kinds, contexts, tmp_path):
    stream = ActivationStream(tiny_lm, contexts[:60], list(kinds["topk"].config.reads))
    store = index(kinds["topk"], stream, tmp_path / "store", lm=tiny_lm)
    names = np.arange(len(store.contexts.names))
    a, b = names < 3, (names >= 3) & (names < 6)
    more = [d for d in contrast(store, a, b, 64) if d.rate_a > d.rate_b]
    found = by_documents(store, a, b, count=64)
    assert dict(zip(found.latents, found.scores, strict=True)) == {d.latent: d.z for d in more}
    assert by_documents(store, a, b, count=1) == found.best(1) and found.method == "contrast"
    with pytest.raises(UserError, match="documents are in both sets"):
        by_documents(store, a, a)


def test_contrasts_that_cannot_be_made_are_named(tiny_lm, kinds, builtin_lm):
    dictionary = kinds["topk"]
    with pytest.raises(UserError, match="a set with 1 texts cannot be told from chance: give at least two texts on each side"):
        by_contrast(tiny_lm, dictionary, ["one"], PROSE)
    with pytest.raises(UserError, match="a set with 0 texts"):
        by_contrast(tiny_lm, dictionary, CODE, [])
    with pytest.raises(UserError, match="a set with 0 texts"):
        by_contrast(tiny_lm, dictionary, [], [])
    with pytest.raises(UserError, match="contrast found no latent"):
        by_contrast(tiny_lm, dictionary, CODE, PROSE, min_firings=10**6)
    with pytest.raises(UserError, match="count=0 chooses nothing"):
        by_contrast(tiny_lm, dictionary, CODE, PROSE, count=0)
    with pytest.raises(UserError, match="wrong model"):
        by_contrast(builtin_lm, dictionary, CODE, PROSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": ["two tokens"]}, "'two tokens' is .* tokens .* give texts of one token each"),
        ({"tokens": []}, "are no list of tokens"),
        ({"tokens": "x"}, "are no list of tokens"),
        ({"tokens": [10**6]}, "token 1000000 is not one of the"),
        ({"tokens": ["x"], "positives": CODE, "negatives": PROSE}, "tokens and texts are both given"),
        ({"positives": CODE}, "the negatives have no tokens"),
        ({"prompts": ["x", ""]}, "prompt '' has no token behind the first"),
        ({"prompts": []}, "no prompt is given"),
        ({"strength": float("nan")}, "strength nan times unit .* is no length"),
    ],
)
def test_scores_that_cannot_be_had_are_named(options, message, tiny_lm, kinds):
    with pytest.raises(UserError, match=message):
        output_score(tiny_lm, kinds["topk"], [1], **options)


def test_a_dictionary_of_neurons_needs_tokens(tiny_lm):
    site = "blocks.1.mlp.hook_post"
    dictionary = sb.TopK(d_sae=8, k=2, decoder="unit").for_sites({site: tiny_lm.width(site)}).build().settled()
    with torch.no_grad():
        dictionary.W_dec.copy_(random_directions(tiny_lm.width(site), 8))
    with pytest.raises(UserError, match="its latents promote no tokens: give tokens or texts"):
        output_score(tiny_lm, dictionary, [1], prompts=PROMPTS)
    assert output_score(tiny_lm, dictionary, [1, 2], [40], prompts=PROMPTS).shape == (2,)

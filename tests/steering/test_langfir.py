"""LangFIR on planted codes, on a model whose features are known, and on one that was trained on two artificial languages."""

import random

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import saebench as sb
from saebench.errors import UserError
from saebench.lm import Document, Text, pack
from saebench.steering.activity import Activity
from saebench.steering.edits import add, latent_rows
from saebench.steering.langfir import contrasted, langfir, language_check, random_sequences
from saebench.synthetic import save_induction_transformer

SITE = "blocks.1.hook_resid_post"
TEXTS = ["def alpha(x): return x", "the number 12 and the name 7", "import beta as gamma", "value * value + value"]


def planted(fires_UF, tokens=5):
    """What fires, as shares of texts: each of them on one token, latent i with value i + 1."""
    values_UF = np.array(fires_UF) * np.arange(1, len(fires_UF[0]) + 1)
    tokens_U = np.full(len(values_UF), tokens)
    return Activity(tokens_U, (values_UF > 0).sum(0), values_UF.sum(0).astype(float), sp.csr_array(values_UF.astype(float)))


def test_planted_latents_are_found():
    """Latents 1 and 3 are of the language, 0 fires on everything, 2 on half of the texts, 4 never."""
    mono = planted([[1, 1, number % 2, 1, 0] for number in range(10)])
    chance = planted([[1, 0, 0, number == 0, 0] for number in range(10)])
    chosen = contrasted(mono, chance)
    assert chosen.latents == (1, 3)
    assert chosen.scores == pytest.approx((1.0, 0.9))
    assert chosen.weights == pytest.approx((2 / 5, 4 / 5))  # means over tokens
    assert contrasted(mono, chance, tau_lo=0.05).latents == (1,)
    assert contrasted(mono, chance, tau_hi=0.5).latents == (1, 3, 2)
    with pytest.raises(UserError, match="LangFIR found no latent"):
        contrasted(chance, mono)


def test_texts_count_and_not_tokens():
    """A latent that fires on many tokens of few texts is not consistent; one that fires on one token of each is."""
    tokens_U = np.full(10, 100)
    sums_UF = np.zeros((10, 2))
    sums_UF[:3, 0], sums_UF[:, 1] = 500.0, 0.1
    mono = Activity(tokens_U, np.array([300, 10]), sums_UF.sum(0), sp.csr_array(sums_UF))
    chance = Activity(tokens_U, np.zeros(2, dtype=int), np.zeros(2), sp.csr_array((10, 2)))
    assert contrasted(mono, chance).latents == (1,)


def test_by_brute_force(tiny_lm, kinds):
    dictionary = kinds["topk"]
    chosen = langfir(tiny_lm, dictionary, TEXTS, tau_hi=0.75, tau_lo=0.5, sequences=6, seed=3)
    ids = [[0, *tiny_lm.tokenizer(text)["input_ids"]] for text in TEXTS]
    by_chance = random_sequences(tiny_lm, [len(some) for some in ids], 1, 6, 3)

    def codes(some):
        return dictionary.encode(tiny_lm.read(torch.tensor([some]), [SITE])[SITE][0, 1:]).to_dense()

    mono_F = torch.stack([(codes(some) > 0).any(0).float() for some in ids]).mean(0)
    chance_F = torch.stack([(codes(some) > 0).any(0).float() for some in by_chance]).mean(0)
    kept = ((mono_F >= 0.75) & (chance_F <= 0.5)).nonzero()[:, 0].tolist()
    assert sorted(chosen.latents) == kept and len(kept) > 0
    means_F = torch.cat([codes(some) for some in ids]).mean(0)
    assert chosen.weights == pytest.approx(means_F[list(chosen.latents)].tolist(), rel=1e-4)
    assert chosen.scores == pytest.approx((mono_F - chance_F)[list(chosen.latents)].tolist(), abs=1e-6)
    assert list(chosen.scores) == sorted(chosen.scores, reverse=True)


def test_random_tokens_are_ordinary_and_repeatable(tiny_lm):
    sequences = random_sequences(tiny_lm, [7, 12], 1, 1000)
    assert [len(ids) for ids in sequences[:4]] == [7, 12, 7, 12] and len(sequences) == 1000
    drawn = {token for ids in sequences for token in ids[1:]}
    assert all(ids[0] == tiny_lm.tokenizer.bos_token_id for ids in sequences)
    assert drawn == set(range(len(tiny_lm.tokenizer))) - set(tiny_lm.tokenizer.all_special_ids)
    assert sequences == random_sequences(tiny_lm, [7, 12], 1, 1000)
    assert sequences != random_sequences(tiny_lm, [7, 12], 1, 1000, seed=1)


def test_the_vector_is_the_weighted_sum(tiny_lm, kinds):
    chosen = langfir(tiny_lm, kinds["topk"], TEXTS, tau_hi=0.75, tau_lo=0.5, sequences=6, seed=3)
    edit = add(kinds["topk"], chosen.latents, 1.0, weights=chosen.weights)
    sum_D = torch.tensor(chosen.weights) @ latent_rows(kinds["topk"], chosen.latents)
    assert torch.allclose(edit.vectors[0][0], sum_D / sum_D.norm(), atol=1e-5)


def test_errors_say_what_to_do(tiny_lm, kinds):
    for texts in ([], ["one text only"], ["one", "", ""]):
        with pytest.raises(UserError, match="give two texts at least"):
            langfir(tiny_lm, kinds["topk"], texts)
    for options in ({"tau_hi": 0.0}, {"tau_hi": 1.5}, {"tau_lo": -0.1}, {"tau_lo": float("nan")}):
        with pytest.raises(UserError, match="shares of texts"):
            langfir(tiny_lm, kinds["topk"], TEXTS, **options)
    with pytest.raises(UserError, match="sequences=0"):
        langfir(tiny_lm, kinds["topk"], TEXTS, sequences=0)
    chosen = langfir(tiny_lm, kinds["topk"], TEXTS, tau_hi=0.75, tau_lo=0.5, sequences=6, seed=3)
    with pytest.raises(UserError, match="'fi' have no tokens"):
        language_check(tiny_lm, kinds["topk"], chosen, {"en": TEXTS, "fi": [""]})


def test_loss_is_that_of_the_model(tiny_lm, kinds):
    chosen = langfir(tiny_lm, kinds["topk"], TEXTS, tau_hi=0.75, tau_lo=0.5, sequences=6, seed=3)
    before, after = language_check(tiny_lm, kinds["topk"], chosen, {"code": TEXTS})["code"]

    def by_hand():
        losses = []
        for text in TEXTS:
            ids = torch.tensor([[0, *tiny_lm.tokenizer(text)["input_ids"]]])
            log_TV = tiny_lm.logits(ids)[0, :-1].log_softmax(-1)
            losses += (-log_TV[torch.arange(ids.shape[1] - 1), ids[0, 1:]]).tolist()
        return float(np.mean(losses))

    assert before == pytest.approx(by_hand(), rel=1e-4)
    U_DN = torch.linalg.qr(latent_rows(kinds["topk"], chosen.latents).T)[0]

    def without(x_BSD):
        changed = x_BSD - x_BSD @ U_DN @ U_DN.T
        changed[:, 0] = x_BSD[:, 0]
        return changed

    with tiny_lm.edit({SITE: without}):
        assert after == pytest.approx(by_hand(), rel=1e-3)


# --- two languages ---


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The induction transformer, and its own token and position directions as a dictionary."""
    directory = tmp_path_factory.mktemp("models") / "induction"
    circuit = save_induction_transformer(directory, 94, max_context=20)
    lm, site = sb.load_lm(directory), "blocks.0.hook_resid_pre"
    rows_FD = circuit.directions_at(site)
    config = sb.TopK(d_sae=len(rows_FD), k=2, site=site, decoder="unit").for_sites({site: rows_FD.shape[1]})
    dictionary = config.build()
    with torch.no_grad():
        for weight in (dictionary.W_enc_FD, dictionary.W_dec):
            weight.copy_(rows_FD)
        dictionary.b_enc.zero_(), dictionary.b_dec.zero_()
    return lm, dictionary, circuit.names_at(site)


def repeated(letters, rng):
    return "".join(rng.sample(letters, len(letters))) * 3


def test_latents_of_a_language_and_what_they_are_for(written):
    """Two languages of six letters each: what is chosen are the letters, and without them only that language is lost."""
    lm, dictionary, names = written
    rng, letters = random.Random(0), {"lower": "abcdef", "upper": "UVWXYZ"}
    held_out = {language: [repeated(some, rng) for _ in range(20)] for language, some in letters.items()}
    for language, other in (("lower", "upper"), ("upper", "lower")):
        chosen = langfir(lm, dictionary, [repeated(letters[language], rng) for _ in range(60)], tau_lo=0.4)
        assert {names[latent] for latent in chosen.latents} == {f"token {letter}" for letter in letters[language]}
        assert chosen.weights == pytest.approx((1 / 6,) * 6, rel=1e-3)  # each stands on a sixth of the tokens with value 1
        losses = language_check(lm, dictionary, chosen, held_out)
        assert losses[language][0] == pytest.approx(7 / 18 * np.log(95), rel=1e-3)  # nothing tells the first 7 of 18
        assert losses[language][1] > 2 * losses[language][0]
        assert losses[other][1] == pytest.approx(losses[other][0], rel=1e-4)


SYLLABLES = {"A": ["ka", "ro", "ti", "mu", "se", "lo"], "B": ["bri", "dan", "fex", "gol", "hup", "wem"]}
GRAMMAR = {"A": [1, 2, 3, 4, 5, 0], "B": [3, 4, 5, 1, 2, 0]}
"""Which word mostly follows which."""


def sentence(language, rng, length=14):
    word, words = rng.randrange(6), []
    for _ in range(length):
        words.append(SYLLABLES[language][word])
        word = GRAMMAR[language][word] if rng.random() < 0.8 else rng.randrange(6)
    return " ".join(words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A GPT-2 trained for seconds on sentences of two languages without a common word, and a dictionary trained on its stream."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<bos>", *SYLLABLES["A"], *SYLLABLES["B"], *(f"noise{i}" for i in range(51))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>", unk_token="<bos>")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
                        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    rng = random.Random(0)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(250):
        ids = torch.tensor([[0, *fast(sentence("AB"[n % 2], rng))["input_ids"]] for n in range(32)])
        optimiser.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimiser.step()
    directory = tmp_path_factory.mktemp("models") / "two"
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    lm = sb.load_lm(directory)
    text = Text("two", lambda: (Document(f"{n}", sentence("AB"[n % 2], random.Random(n))) for n in range(1200)))
    source = sb.ActivationStream(lm, pack(text, fast, 15), ["blocks.0.hook_resid_post"])
    return lm, sb.train(sb.TopK(d_sae=48, k=3), source, sb.TrainConfig(num_tokens=40_000, batch_size=256, lr=3e-3), lm=lm)


@pytest.mark.slow
def test_what_was_learned_takes_out_one_language_more_than_the_other(trained):
    """Learned directions are not quite orthogonal to those of the other language, which is hurt a little too."""
    lm, dictionary = trained
    rng = random.Random(7)
    held_out = {language: [sentence(language, rng) for _ in range(40)] for language in "AB"}
    for language, other in ("AB", "BA"):
        chosen = langfir(lm, dictionary, [sentence(language, rng) for _ in range(60)], tau_lo=0.5)
        losses = language_check(lm, dictionary, chosen, held_out)
        rises = {name: after / before - 1 for name, (before, after) in losses.items()}
        assert rises[language] > 0.5 and rises[other] < rises[language] / 4

"""CRISP: the choice of latents, the loss against a loop, training that leaves nothing behind, what is forgotten and what is kept."""

import re
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import saebench as sb
from saebench.dictionaries import parse_dictionary
from saebench.errors import UserError
from saebench.lm import load_lm
from saebench.steering.activity import Activity
from saebench.steering.adapters import attached, inject, parameters
from saebench.steering.chosen import Chosen
from saebench.steering.retention import activation_on, retention, sweep, text_loss
from saebench.steering.unlearning import CrispSettings, Suppressed, crisp_latents, hidden, lora_config, unlearn

TARGET = [f"import module_{n}\nfrom module_{n} import name\n" for n in range(12)]
BENIGN = [f"def value_{n}(x):\n    return x * {n} + 1\n" for n in range(12)]
NEUTRAL = [f"# the number {n} and the name {n}\nx = {n}\n" for n in range(12)]
SHORT = {"count": 3, "ratio": 1.0, "beta": 0.5, "lr": 1e-2}
QUICK = CrispSettings(**SHORT, epochs=2)


def made(firings_F, value=1.0, tokens=100):
    """The activity of one text."""
    sums_F = value * np.array(firings_F, dtype=float)
    return Activity(np.array([tokens]), np.array(firings_F), sums_F, sp.csr_array(sums_F[None]))


def state(lm):
    """Everything that an adapter could leave behind on a model."""
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.hf.modules())
    flags = [(module.training, type(module)) for module in lm.hf.modules()]
    return (
        hooks,
        flags,
        [p.requires_grad for p in lm.hf.parameters()],
        sorted(lm.hf.__dict__),
        [id(p) for p in lm.hf.parameters()],
    )


@pytest.fixture
def ids_BS(tiny_lm):
    return torch.randint(len(tiny_lm.tokenizer), (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def forgotten(tiny_lm, kinds):
    return unlearn(tiny_lm, kinds["topk"], TARGET, BENIGN, NEUTRAL, QUICK)


# --- the choice ---


def test_planted_latents_are_chosen():
    rng = np.random.default_rng(0)
    common_F = rng.integers(0, 40, 200)
    planted = rng.choice(200, 10, replace=False)
    target = common_F + rng.integers(0, 5, 200)
    target[planted] = rng.integers(60, 90, 10)
    benign = common_F + rng.integers(0, 5, 200)
    benign[planted] = rng.integers(0, 5, 10)
    assert set(crisp_latents(made(target, 2.0), made(benign, 2.0)).latents) == set(planted.tolist())


def test_pool_ratio_and_count_by_hand():
    target, benign = made([50, 40, 30, 8, 0]), made([30, 9, 10, 0, 0])
    # c_t - c_b = 20, 31, 20, 8, 0; s_t / (s_b + 1) = 50/31, 4, 30/11, 8, 0
    assert crisp_latents(target, benign).latents == (1, 3)
    assert crisp_latents(target, benign).scores == (31.0, 8.0)
    assert crisp_latents(target, benign, ratio=1.5).latents == (1, 0, 2, 3), "of equal ones the first; a silent latent never"
    assert crisp_latents(target, benign, ratio=1.5, pool=3).latents == (1, 0, 2)
    assert crisp_latents(target, benign, ratio=1.5, count=2).latents == (1, 0)


def test_the_longer_text_does_not_win_by_its_length():
    target, benign = made([50, 40, 8]), made([30, 9, 0])
    long = made([500, 400, 80], tokens=1000)
    assert crisp_latents(long, benign) == crisp_latents(target, benign), "the larger set is scaled down"
    assert crisp_latents(target, made([300, 90, 0], tokens=1000)) == crisp_latents(target, benign)


def test_refuses_activities_of_two_dictionaries_and_subjects_that_nothing_marks():
    with pytest.raises(UserError, match="target and benign are of 2 and 3 latents"):
        crisp_latents(made([1, 2]), made([1, 2, 3]))
    with pytest.raises(UserError, match="crisp found no latent"):
        crisp_latents(made([5, 5]), made([5, 5]))


# --- the loss ---


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "relu"])
def test_loss_is_that_of_a_loop_over_all_latents(architecture):
    torch.manual_seed(0)
    values = {"architecture": architecture, "d_sae": 24, "d_in": 8, "site": "blocks.0.hook_resid_post", "subtract_b_dec": True}
    dictionary = parse_dictionary(values | ({"k": 5} if "topk" in architecture else {"target_l0": 5}), "d").build()
    for parameter in dictionary.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    dictionary = dictionary.settled().requires_grad_(False)
    if architecture in ("batchtopk", "jumprelu"):
        dictionary.threshold.copy_(torch.full_like(dictionary.threshold, 0.8))
    latents, alpha = [3, 0, 17, 9], 2.0
    x_SD, before_SD = torch.randn(30, 8), torch.randn(30, 8)
    part = Suppressed(dictionary, Chosen("hand", tuple(latents), (1.0,) * 4), alpha, torch.device("cpu"))
    active_SM = part.active(before_SD)

    f_before_SF, f_SF = dictionary.encode(before_SD).to_dense(), dictionary.encode(x_SD).to_dense()
    z_SF = (x_SD - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc
    found = []
    for s in range(30):
        for i in latents:
            was, shift = bool(f_before_SF[s, i] > 0), abs(alpha * float(z_SF[s].mean()))
            z = float(z_SF[s, i]) + shift * was
            threshold = {"topk": 0.0, "relu": 0.0}.get(architecture, 0.8)
            if z > threshold and (was or f_SF[s, i] > 0):
                found.append(z)
    assert active_SM.any() and not active_SM.all()
    x_SD.requires_grad_(True)
    loss = part.loss(x_SD, active_SM)
    assert float(loss.detach()) == pytest.approx(np.mean(found), rel=1e-5)
    loss.backward()
    assert x_SD.grad.abs().sum() > 0
    assert float(part.loss(torch.full((2, 8), 0.0), torch.zeros(2, 4, dtype=torch.bool))) >= 0, (
        "nothing active is no division by zero"
    )


def test_the_reader_gives_what_the_sites_hold(tiny_lm, ids_BS):
    site = "blocks.1.hook_resid_post"
    seen, last_SD = hidden(tiny_lm, ids_BS[:1], [site])
    assert torch.equal(seen[site], tiny_lm.read(ids_BS[:1], [site])[site][0, 1:])
    assert torch.equal(last_SD, tiny_lm.read(ids_BS[:1], ["ln_final.hook_out"])["ln_final.hook_out"][0, 1:])


# --- training ---


def test_an_untrained_adapter_changes_nothing(tiny_lm, kinds, ids_BS, forgotten):
    assert (forgotten.losses[0, 1:] == 0).all(), "L_r and L_c before the first step"
    assert (forgotten.losses[1:, 1:] > 0).all()
    before = tiny_lm.logits(ids_BS)
    try:
        inject(tiny_lm, lora_config(tiny_lm, [kinds["topk"]], QUICK))
        assert torch.equal(tiny_lm.logits(ids_BS), before)
        assert len(parameters(tiny_lm)) == 2 * 4 * 2, "two matrices for each of four projections of layers 0 and 1"
    finally:
        sb.steering.adapters.detach(tiny_lm)


def test_the_latents_fall_silent_and_nothing_else_is_touched(tiny_lm, kinds, ids_BS):
    dictionary = kinds["topk"]
    weights = {name: tensor.clone() for name, tensor in dictionary.state_dict().items()}
    before, was = tiny_lm.logits(ids_BS), state(tiny_lm)
    result = unlearn(tiny_lm, dictionary, TARGET, BENIGN, NEUTRAL, QUICK)
    assert len(result.losses) == 2 * len(TARGET)
    assert state(tiny_lm) == was
    assert torch.equal(tiny_lm.logits(ids_BS), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in dictionary.state_dict().items())
    assert all(parameter.grad is None for parameter in dictionary.parameters()), "no gradient reaches the dictionary"
    found = retention(tiny_lm, [dictionary], result, TARGET, BENIGN, NEUTRAL)
    assert found.activation_fall > 0.8
    with attached(tiny_lm, result.adapter):
        assert found.activation_after == activation_on(tiny_lm, [dictionary], result.chosen, TARGET)
        assert found.target_loss_after == text_loss(tiny_lm, TARGET)
    assert found.activation_before == activation_on(tiny_lm, [dictionary], result.chosen, TARGET)
    assert torch.equal(tiny_lm.logits(ids_BS), before)


def test_equal_seeds_give_equal_adapters(tiny_lm, kinds, forgotten):
    again = unlearn(tiny_lm, kinds["topk"], TARGET, BENIGN, NEUTRAL, QUICK)
    other = unlearn(tiny_lm, kinds["topk"], TARGET, BENIGN, NEUTRAL, QUICK.model_copy(update={"seed": 1}))
    assert again.chosen == forgotten.chosen and np.array_equal(again.losses, forgotten.losses)
    assert all(torch.equal(tensor, forgotten.adapter.tensors[name]) for name, tensor in again.adapter.tensors.items())
    assert any(not torch.equal(tensor, forgotten.adapter.tensors[name]) for name, tensor in other.adapter.tensors.items())


def test_several_layers_and_settings_have_an_effect(tiny_lm, kinds):
    def losses(**changes):
        return unlearn(tiny_lm, kinds["topk"], TARGET[:3], BENIGN, NEUTRAL, CrispSettings(**SHORT | changes)).losses

    plain = losses()
    changes = {"alpha": 0.0, "beta": 0.9, "gamma": 5.0, "dropout": 0.5, "rank": 2, "layers": (1,), "choose": "usage", "lr": 1e-3}
    for name, value in (changes | {"count": 1}).items():
        assert not np.allclose(losses(**{name: value}), plain), name
    assert len(losses(epochs=3)) == 9
    with pytest.raises(UserError, match="crisp found no latent"):
        losses(ratio=1e9)
    both = unlearn(tiny_lm, [kinds["topk"], kinds["jumprelu"]], TARGET[:3], BENIGN, NEUTRAL, CrispSettings(**SHORT))
    assert len(both.chosen) == 2
    assert [site for site, _ in both.adapter.trained["latents"]] == ["blocks.1.hook_resid_post"] * 2


def test_interrupted_training_leaves_nothing_behind(tiny_lm, kinds, ids_BS, monkeypatch):
    before, was = tiny_lm.logits(ids_BS), state(tiny_lm)
    steps = []

    def stops(part, *inputs):
        steps.append(part)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return torch.nn.Parameter(torch.ones(())) * inputs[0].sum()

    monkeypatch.setattr(Suppressed, "loss", stops)
    with pytest.raises(KeyboardInterrupt):
        unlearn(tiny_lm, kinds["topk"], TARGET, BENIGN, settings=QUICK)
    assert len(steps) == 3
    assert state(tiny_lm) == was
    assert torch.equal(tiny_lm.logits(ids_BS), before)


# --- the report ---


def test_a_sweep_reports_every_setting(tiny_lm, kinds):
    settings = [QUICK, CrispSettings(ratio=1e9), QUICK.model_copy(update={"lr": 1e-6})]
    trials = sweep(tiny_lm, kinds["topk"], TARGET, BENIGN, NEUTRAL, settings)
    assert [trial.settings for trial in trials] == settings
    assert "crisp found no latent" in trials[1].failed and trials[1].row()["ratio"] == 1e9
    strong, weak = trials[0].retention, trials[2].retention
    assert strong.activation_fall > 0.5 > weak.activation_fall
    assert abs(weak.forgetting) < 0.01 and abs(weak.general_change) < 0.1
    assert strong.target_loss_before == weak.target_loss_before == pytest.approx(text_loss(tiny_lm, TARGET[3::4]))
    assert weak.perplexity_before == strong.perplexity_before
    row = trials[0].row()
    assert row["parameters"] == 4 * sum(i + o for i, o in [(32, 96), (32, 32), (32, 128), (128, 32)]) * 2
    assert row["lr"] == 1e-2 and row["seconds"] > 0 and row["latents"] == 3 and row["forgetting"] == strong.forgetting
    with pytest.raises(UserError, match="no setting led to an adapter; of the first: crisp found no latent"):
        sweep(tiny_lm, kinds["topk"], TARGET, BENIGN, NEUTRAL, settings[1:2])
    with pytest.raises(UserError, match="benign has 7 texts"):
        sweep(tiny_lm, kinds["topk"], TARGET, BENIGN[:7], NEUTRAL, settings)
    with pytest.raises(UserError, match="no settings are given"):
        sweep(tiny_lm, kinds["topk"], TARGET, BENIGN, NEUTRAL, [])


def test_loss_of_texts_is_that_of_each_token(tiny_lm):
    texts = [TARGET[0], BENIGN[3] * 8, NEUTRAL[1]]
    losses = []
    for text in texts:
        ids = tiny_lm.tokenizer(text)["input_ids"]
        for start in range(0, len(ids), 63):  # pieces of 64 positions, with BOS
            piece = torch.tensor([[0, *ids[start : start + 63]]])
            p_SV = tiny_lm.logits(piece)[0].double().softmax(-1)
            losses += [-float(p_SV[s, piece[0, s + 1]].log()) for s in range(piece.shape[1] - 1)]
    assert text_loss(tiny_lm, texts) == pytest.approx(np.mean(losses), rel=1e-6)


# --- bad input ---


def test_refuses_bad_input_in_one_line(tiny_lm, kinds, monkeypatch):
    topk, was = kinds["topk"], state(tiny_lm)
    refused = [
        (lambda: unlearn(tiny_lm, topk, TARGET[:1], BENIGN), "target is one text: give a list"),
        (lambda: unlearn(tiny_lm, topk, TARGET[0], BENIGN), "target is one text: give a list"),
        (lambda: unlearn(tiny_lm, topk, TARGET, []), "benign is empty"),
        (lambda: unlearn(tiny_lm, topk, TARGET, BENIGN, NEUTRAL[:1]), "coherence is one text"),
        (lambda: unlearn(tiny_lm, [], TARGET, BENIGN), "no dictionary is given"),
        (lambda: unlearn(tiny_lm, topk, TARGET, ["", ""]), "the texts have no tokens"),
        (lambda: unlearn(tiny_lm, topk, TARGET, BENIGN, ["", ""]), "the coherence texts have no tokens"),
        (
            lambda: unlearn(tiny_lm, topk, TARGET, BENIGN, settings=QUICK.model_copy(update={"layers": (7,)})),
            "layer 7 is unknown",
        ),
        (
            lambda: unlearn(tiny_lm, topk, TARGET, BENIGN, settings=QUICK.model_copy(update={"layers": (2,)})),
            "no projection of the chosen",
        ),
        (lambda: unlearn(tiny_lm, kinds["crosscoder"], TARGET, BENIGN), "a dictionary of 2 sites cannot be used"),
        (lambda: unlearn(tiny_lm, kinds["clt"], TARGET, BENIGN), "architecture 'clt' has no pre-activations"),
        (lambda: unlearn(tiny_lm, kinds["lorsa"], TARGET, BENIGN), "architecture 'lorsa' has no pre-activations"),
        (lambda: CrispSettings(beta=2.0), "beta=2.0"),
        (lambda: CrispSettings(rnak=2), "did you mean 'rank'"),
    ]
    for call, message in refused:
        with pytest.raises(UserError, match=re.escape(message)) as error:
            call()
        assert "\n" not in str(error.value)
    monkeypatch.setattr(topk, "trained_on", {"model": "another"})
    with pytest.raises(UserError, match="trained on a model with other weights"):
        unlearn(tiny_lm, topk, TARGET, BENIGN)
    monkeypatch.setattr(topk, "trained_on", {})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=re.escape('pip install "saebench[steering]"')):
        unlearn(tiny_lm, topk, TARGET, BENIGN)
    assert state(tiny_lm) == was


# --- the bundled model ---

IMPORT = re.compile(r"(import|from) [\w., ]+( import [\w., ]+)?$")


@pytest.mark.slow
def test_the_bundled_model_forgets_import_statements(tmp_path):
    lm, site = load_lm("builtin"), "blocks.2.hook_resid_post"
    contexts = sb.pack(sb.builtin_text(), lm.tokenizer, 128, 150_000)
    training = sb.TrainConfig(num_tokens=150_000, batch_size=1024)
    trained = sb.train(sb.TopK(d_sae=1024, k=32, site=site), sb.ActivationStream(lm, contexts, [site]), training, lm=lm)
    target, benign = [], []
    for _, text in sb.builtin_text():
        lines = [line.strip() for line in text.splitlines()]
        imports = [line for line in lines if IMPORT.match(line)]
        if len(imports) >= 3:
            target.append("\n".join(imports[:8]) + "\n")
        rest = "\n".join(line for line in text.splitlines() if "import" not in line)
        if len(rest) > 3000:
            benign.append(rest[2000:2400])
    neutral = [text[:3000] for _, text in sb.builtin_text("held_out")][:24]
    ids_BS = contexts.ids_NS[:4, :64]
    before, was = lm.logits(ids_BS), state(lm)

    result = unlearn(lm, trained, target[:120], benign[:120])
    found = retention(lm, [trained], result, target[200:260], benign[200:240], neutral)
    assert found.activation_fall > 0.8
    assert found.forgetting > 0.5
    assert abs(found.general_change) < 2
    assert abs(found.benign_change) < 0.05
    assert state(lm) == was and torch.equal(lm.logits(ids_BS), before)
    result.adapter.save(tmp_path / "adapter")
    with attached(lm, result.adapter):
        after = lm.logits(ids_BS)
    with attached(lm, tmp_path / "adapter"):
        assert torch.equal(lm.logits(ids_BS), after) and not torch.equal(after, before)
    assert torch.equal(lm.logits(ids_BS), before)

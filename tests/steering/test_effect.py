"""Dose-response against figures computed by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from saebench.errors import UserError
from saebench.figures.steering import beyond_controls
from saebench.steering import measures
from saebench.steering.baselines import Method
from saebench.steering.edits import add
from saebench.steering.effect import REPORTED, Dose, Effects, Estimate, dose_response
from saebench.steering.hooks import steer
from saebench.steering.measures import repetition
from saebench.steering.targets import Pattern

SITE = "blocks.1.hook_resid_post"
PROMPTS = ["def value", "x = 3", "return x", "# the number", "value_3(x)"]
DIGITS = Pattern.of(r"\d", "lines with digits")


@pytest.fixture(scope="module")
def neutral(contexts):
    return contexts.ids_NS[:6]


@pytest.fixture(scope="module")
def found(tiny_lm, kinds, neutral):
    methods = [
        Method("latent", "features", (add(kinds["topk"], 3, unit=2.0),)),
        Method("other", "control", (add(torch.ones(32), site=SITE, unit=2.0),), group="random"),
        Method("prompt", "baseline", prefix="x * 3 + 3\n"),
    ]
    return dose_response(tiny_lm, methods, PROMPTS, DIGITS, neutral=neutral, strengths=(1, 8), seeds=2, max_new_tokens=6)


def test_every_method_is_there_at_every_strength(found):
    assert [(dose.method, dose.strength) for dose in found.doses] == [
        ("latent", 1), ("latent", 8), ("other", 1), ("other", 8), ("prompt", 1),
    ]  # fmt: skip
    rows = found.rows()
    assert rows[0]["method"] == "untouched" and len(rows) == 6
    for row in rows:
        assert row["target_low"] <= row["target"] <= row["target_high"]
        assert row["seconds_per_token"] > 0


def test_figures_are_those_of_the_texts(found, tiny_lm):
    """Perplexity by one pass a text, without batching; targets by counting lines."""
    for dose in (found.untouched, found.doses[1]):
        for p in range(len(PROMPTS)):
            for r, text in enumerate(dose.texts[p]):
                lines = [line for line in text.split("\n") if line.strip()]
                assert dose.target_PR[p, r] == (np.mean([any(c.isdigit() for c in line) for line in lines]) if lines else 0.0)
    start = tiny_lm.prompt_ids(PROMPTS[0])
    with steer(tiny_lm, add(torch.ones(32), site=SITE, unit=2.0, strength=8.0)):
        written = tiny_lm.generate_ids(torch.tensor([start]), 6, temperature=0.0, whole=True)
    ids = torch.cat([torch.tensor([start]), written], 1)
    logp = tiny_lm.logits(ids).log_softmax(-1)[0]
    by_hand = -np.mean([float(logp[t - 1, ids[0, t]]) for t in range(len(start), ids.shape[1])])
    assert measures.nll(tiny_lm, start, written.tolist())[0] == pytest.approx(by_hand, rel=1e-4)


def test_the_divergence_and_the_size_of_the_edit(found, tiny_lm, kinds, neutral):
    one = add(kinds["topk"], 3, unit=2.0, strength=8.0)
    clean, x = tiny_lm.logits(neutral)[:, 1:], tiny_lm.read(neutral, [SITE])[SITE][:, 1:].clone()
    with steer(tiny_lm, one):
        steered = tiny_lm.logits(neutral)[:, 1:]
    p, q = clean.double().softmax(-1), steered.double().softmax(-1)
    dose = next(dose for dose in found.doses if dose.method == "latent" and dose.strength == 8)
    np.testing.assert_allclose(dose.kl_C, (p * (p / q).log()).sum(-1).mean(1), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(dose.size_C, (16.0 / x.norm(dim=-1)).mean(1), rtol=1e-4)
    assert not found.untouched.kl_C.any() and not found.untouched.size_C.any()
    assert np.isnan(found.doses[-1].kl_C).all()  # a prompt edits nothing


def test_the_same_seeds_for_all_methods(found, tiny_lm, kinds, neutral):
    """A method that does nothing writes what the model writes untouched."""
    nothing = Method("nothing", "control", (add(kinds["topk"], 3, strength=0.0),))
    again = dose_response(tiny_lm, [nothing], PROMPTS, DIGITS, neutral=neutral, strengths=(1,), seeds=2, max_new_tokens=6)
    assert again.doses[0].texts == again.untouched.texts == found.untouched.texts
    assert found.untouched.texts[0][0] != found.untouched.texts[0][1]


def test_intervals_are_students():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    low, high = stats.t.interval(0.95, 3, loc=4.0, scale=stats.sem(values))
    estimate = Estimate.of(values)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((4.0, low, high))
    assert math.isnan(Estimate.of(values[:1]).low)


def test_repetition_counts_runs_of_three():
    assert repetition([1, 2, 3, 4]) == 0
    assert repetition([1, 1, 1, 1, 1]) == pytest.approx(2 / 3)  # three runs, all alike
    assert repetition([1, 2]) == 0


def dose(method, strength, target, nll, prompts=4):
    """A dose with the same target on all prompts, or one each."""
    target_PR = np.broadcast_to(np.reshape(target, (-1, 1)), (prompts, 1)).astype(float)
    nothing = np.zeros(2)
    return Dose(
        method, method, "features", strength, target_PR, np.full((prompts, 1), nll), np.zeros((prompts, 1)), nothing, nothing, 0.0
    )


def test_the_best_strength_is_chosen_on_one_half_and_told_on_the_other():
    doses = [
        dose("a", 1.0, [0.1, 0.9, 0.1, 0.9], 1.0),
        dose("a", 2.0, [0.5, 0.2, 0.5, 0.2], 1.5),
        dose("a", 4.0, 1.0, 1.0 + math.log(3) + 0.01),
        dose("a", 8.0, 1.0, 5.0),
        dose("b", 1.0, 1.0, 9.0),
    ]
    effects = Effects("t", ["p"] * 4, dose("untouched", 0.0, 0.0, 1.0), doses)
    best = effects.best("a")
    assert best.strength == 2.0  # 4 and 8 are no longer fluent
    assert best.estimate("target", REPORTED).mean == pytest.approx(0.2)
    assert effects.breaks_at("a") == 4.0
    assert effects.best("b") is None and effects.breaks_at("b") == 1.0
    assert Effects("t", [], dose("u", 0.0, 0.0, 5.0), doses).breaks_at("a") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": ["a", "b"]}, "2 prompts are too few"),
        ({"prompts": ["a", " ", "c", "d"]}, "a prompt is empty"),
        ({"methods": []}, "no method"),
        ({"strengths": (0.0, 1.0)}, "not numbers above 0"),
        ({"strengths": (float("nan"),)}, "not numbers above 0"),
        ({"seeds": 0}, "at least 1"),
        ({"max_new_tokens": 100}, "exceed the model's 64 positions"),
    ],
)
def test_wrong_input_is_one_line(change, said, tiny_lm, kinds, neutral):
    given = {
        "methods": [Method("m", "features", (add(kinds["topk"], 3),))],
        "prompts": PROMPTS,
        "target": DIGITS,
        "neutral": neutral,
    }
    with pytest.raises(UserError, match=said) as error:
        dose_response(tiny_lm, **{**given, **change})
    assert "\n" not in str(error.value)
    both = [Method("m", "features", (add(kinds["topk"], 3),)), Method("m", "features", (add(kinds["topk"], 4),))]
    with pytest.raises(UserError, match="two methods are called 'm'"):
        dose_response(tiny_lm, both, PROMPTS, DIGITS, neutral=neutral)


def row(method, kind, strength, low, high):
    return {"method": method, "kind": kind, "strength": strength, "target_low": low, "target_high": high}


def test_what_is_beyond_the_controls_is_told_by_strength():
    """Controls count at the same strength alone, untouched text at every one."""
    rows = [
        row("untouched", "control", 0.0, 0.0, 0.3),
        row("a", "features", 1.0, 0.2, 0.4),  # within untouched text
        row("a", "features", 2.0, 0.5, 0.7),
        row("b", "features", 2.0, 0.1, 0.9),
        row("c", "features", 4.0, 0.8, 0.9),
        row("random", "control", 1.0, 0.0, 0.1),
        row("random", "control", 2.0, 0.2, 0.45),
        row("random", "control", 4.0, 0.5, 0.85),
    ]
    assert (
        beyond_controls(rows, {"a": 4.0})
        == "Beyond every control of the same strength, intervals apart: a from 2 (fluency breaks at 4)."
    )
    assert beyond_controls([rows[0], rows[3], rows[6]], {}).startswith("No selection of features")

"""Steering without a browser: texts against those of the package, addresses and presets that come back, refusals in a line."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest

pytest.importorskip("streamlit")

from page_run import HOSTILE, LABELLED
from test_pages import figures, html_of, parameter, problems, text_of

from saebench.commands import steer as command
from saebench.dictionaries import load_dictionary
from saebench.features import FeatureStore
from saebench.lm import load_lm
from saebench.steering import samples, trial
from saebench.steering.edits import add, clamp
from saebench.steering.measures import side_effect
from saebench.steering.presets import Preset, Setting

PROMPT = "return 17 + 4"
SET = {"prompt": PROMPT, "tokens": 10, "seed": 3}


@pytest.fixture
def own_run(hostile_run, tmp_path):
    """A copy of the run, for tests that write into it."""
    shutil.copytree(hostile_run.path, tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture(scope="module")
def parts(hostile_run):
    """Model, dictionary and store of b, opened apart from the pages."""
    lm = load_lm(hostile_run.record["recipe"]["model"]["name"])
    return lm, load_dictionary(hostile_run.path / "dictionaries" / "b"), FeatureStore(hostile_run.features("b"))


def written(test) -> list[tuple[str, str]]:
    """Prompt and text of either side, as the page shows them."""
    import re
    from html import unescape

    found = re.findall(r'sb-written sb-tokens"><span class="dim">(.*?)</span><span>(.*?)</span></div>', html_of(test), re.S)
    return [(unescape(prompt), unescape(text)) for prompt, text in found]


def press(test, key: str):
    test.button(key=key).click().run()
    assert not test.exception, [one.value for one in test.exception]
    return test


# --- writing ---


def test_both_texts_are_those_of_the_package(opened, parts):
    lm, dictionary, store = parts
    test = press(opened("steering", dictionary="b", edits="5_add_3~7_clamp_1_2.5", where="generated", **SET), "write")
    unit = trial.unit(lm, dictionary, store)
    edits = [add(dictionary, 5, 3.0, unit=unit, positions="generated"), clamp(dictionary, 7, 2.5, positions="generated")]
    expected = [samples.write(lm, some, PROMPT, 10, seed=3) for some in ([], edits)]
    assert written(test) == [(PROMPT, sample.text) for sample in expected]
    assert expected[0].text != expected[1].text
    assert f"<b>{expected[1].perplexity:.1f}</b>" in html_of(test)
    kl_C, size_C = side_effect(lm, edits, trial.neutral(store))
    shown = figures(test) | {}
    assert f"<b>{kl_C.mean():.4f}</b>" in html_of(test) and f"<b>{size_C.mean():.1%}</b>" in html_of(test), shown
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in _models())


def _models():
    import opening

    return opening.lm(next(iter(opening.runs().values()))).hf.modules()


def test_without_strength_the_texts_are_the_same(opened):
    test = press(opened("steering", dictionary="b", edits="5_add_0~7_ablate_0", **SET), "write")
    (_, first), (_, second) = written(test)
    assert first == second and first
    assert "<b>0.0000</b>" in html_of(test) and "<b>0.0%</b>" in html_of(test)


def test_a_change_is_told_and_the_old_texts_stay(opened):
    test = press(opened("steering", dictionary="b", edits="5_add_3", **SET), "write")
    before = written(test)
    test.slider(key="row-0-strength").set_value(5.0).run()
    assert parameter(test, "edits") == "5_add_5"
    assert written(test) == before and "has changed since" in text_of(test)
    assert "has changed since" not in text_of(press(test, "write")) and written(test) != before


# --- setting ---


def test_nothing_chosen_says_what_to_do(opened):
    text = text_of(opened("steering", dictionary="a"))
    assert "Choose a feature" in text


def test_a_feature_by_number_and_by_label(opened):
    test = opened("steering", dictionary="a")
    test.text_input(key="w-add").set_value("11").run()
    assert parameter(test, "edits") == "11_add_4" and "add" not in test.query_params
    test.text_input(key="w-add").set_value("onmouseover").run()
    assert f"edits=11_add_4~{LABELLED}_add_4" in html_of(test)
    assert HOSTILE in text_of(test) and HOSTILE not in html_of(test)
    test.selectbox(key="row-0-how").set_value("clamp").run()
    largest = FeatureStore(_entry("a").store_path).latents["max"][11].as_py()
    assert parameter(test, "edits").startswith("11_clamp_1_")
    assert float(parameter(test, "edits").rpartition("_")[2]) == pytest.approx(largest)
    test.selectbox(key="row-0-how").set_value("ablate").run()
    assert parameter(test, "edits") == "11_ablate_1"
    press(test, "remove-0")
    assert "edits" not in test.query_params and "Choose a feature" in text_of(test)


def _entry(name: str):
    import opening

    return next(iter(opening.runs().values())).entries[name]


def test_positions(opened):
    test = opened("steering", dictionary="a", edits="11")
    test.selectbox(key="where-kind").set_value("span").run()
    assert parameter(test, "where") == "1-9"
    test.number_input(key="where-first").set_value(12).run()
    assert parameter(test, "where") == "12-13"
    test.selectbox(key="where-kind").set_value("after").run()
    test.text_input(key="where-token").set_value("+").run()
    assert parameter(test, "where") == "after:+"
    test.selectbox(key="where-kind").set_value("all").run()
    assert "where" not in test.query_params


def test_features_of_another_dictionary_are_forgotten(opened):
    test = opened("steering", dictionary="a", edits="11")
    test.selectbox(key="w-dictionary").set_value("b").run()
    assert "edits" not in test.query_params and "Choose a feature" in text_of(test)


def test_the_feature_page_leads_here(opened):
    shown = html_of(opened("feature", dictionary="a", feature=7))
    assert "steering?run=small&amp;dictionary=a&amp;edits=7" in shown


# --- refusals ---


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"edits": "9999"}, "there is no feature 9999: they are 0 to 39"),
        ({"edits": "<b>_add"}, "'<b>_add' is no edit"),
        ({"edits": "5_frob"}, "unknown primitive 'frob'"),
        ({"edits": "5_add_nan"}, "'nan' is not finite"),
        ({"edits": "5_add_x"}, "'x' is no number"),
        ({"edits": "5.5_add_1"}, "repeat"),
        ({"edits": "5_swap"}, "swap exchanges two"),
        ({"edits": "5", "where": "nowhere"}, "positions 'nowhere' are unknown"),
        ({"edits": "5", "where": "9-4"}, "the span 9-4 holds no position"),
        ({"edits": "5", "length": "inf"}, "not finite"),
        ({"edits": "~".join(["5"] * 30)}, "30 edits are too many"),
    ],
)
def test_a_wrong_address_is_told(opened, asked, told):
    test = opened("steering", dictionary="b", prompt=PROMPT, temperature="nan", **asked)
    (problem,) = problems(test)
    assert told in problem and "\n" not in problem.strip()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": PROMPT * 12}, "exceed the model's 64 positions"),
        ({"prompt": PROMPT, "where": "after:return 17"}, "give one token"),
    ],
)
def test_what_cannot_be_written_is_told_in_a_line(opened, asked, told):
    test = press(opened("steering", dictionary="b", edits="5", tokens=10, **asked), "write")
    (problem,) = problems(test)
    assert told in problem and not written(test)
    assert "Dose-response" in text_of(test)  # the rest of the page is there
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in _models())


# --- presets and the terminal ---


def test_a_preset_is_kept_and_opened(opened, own_run):
    test = opened("steering", runs=[own_run], dictionary="b", edits="5_add_-3~7_clamp_1_2.5", where="2-6", prompt=PROMPT)
    test.text_input(key="preset-name").set_value("down with it").run()
    press(test, "preset-save")
    preset = Preset.open(own_run / "steering" / "down with it.json")
    assert [(edit.latents, edit.how, edit.strength, edit.value) for edit in preset.edits] == [
        ((5,), "add", -3.0, None),
        ((7,), "clamp", 1.0, 2.5),
    ]
    assert {edit.positions for edit in preset.edits} == {"2-6"} and preset.prompt == PROMPT
    assert float(parameter(test, "length")) == pytest.approx(preset.edits[0].unit)
    assert "--preset 'down with it'" in test.code[0].value
    press(test, "preset-save")
    assert "there is a preset 'down with it' already" in problems(test)[0]

    other = opened("steering", runs=[own_run], dictionary="a")
    press(other, "preset-open")
    assert parameter(other, "edits") == "5_add_-3~7_clamp_1_2.5"
    assert (parameter(other, "dictionary"), parameter(other, "where"), parameter(other, "prompt")) == ("b", "2-6", PROMPT)
    press(other, "preset-delete")
    assert not list((own_run / "steering").glob("*.json"))


def test_presets_that_are_refused(opened, own_run):
    test = opened("steering", runs=[own_run], dictionary="b", edits="5")
    for name, told in (("", "has no name"), ("../out", "is no name for a preset")):
        test.text_input(key="preset-name").set_value(name).run()
        assert told in problems(press(test, "preset-save"))[0]
    settings = [Setting(dictionary="b", latents=(1, 2), weights=(1.0, 2.0))]
    Preset(name="weighted", edits=settings).save(own_run)
    (own_run / "steering" / "zdamaged.json").write_text("{")
    test = opened("steering", runs=[own_run], dictionary="b")
    for name, told in (("weighted", "--preset weighted"), ("zdamaged", "is damaged")):
        test.selectbox(key="preset-chosen").set_value(name).run()
        assert told in problems(press(test, "preset-open"))[0]


def test_the_command_is_one_that_the_terminal_takes(opened, hostile_run):
    import argparse

    parser = argparse.ArgumentParser()
    command.arguments(parser)
    shown = opened("steering", dictionary="b", edits="7_clamp_0.5_2.5", where="after:+", **(SET | {"prompt": "-x 'y'\n"})).code[0]
    words = shlex.split(shown.value)
    args = parser.parse_args(words[2:])
    assert words[:2] == ["saebench", "steer"] and str(args.run) == str(hostile_run.path) and args.dictionary == "b"
    assert (args.feature, args.how, args.strength, args.value) == ([7], "clamp", 0.5, 2.5)
    assert (args.positions, args.prompt, args.tokens, args.seed) == ("after:+", "-x 'y'\n", 10, 3)
    assert not opened("steering", dictionary="b", edits="5~7", **SET).code


# --- dose-response ---


def test_a_dose_response_that_is_there_is_shown(opened, own_run, parts):
    lm, dictionary, _ = parts
    store = FeatureStore(own_run / "features" / "b")
    wanted = trial.Trial(edits=(Setting(dictionary="b", latents=(5,), strength=4.0),), unit_of_store=True)
    test = opened("steering", runs=[own_run], dictionary="b", edits="5_add_4")
    assert test.button(key=f"job-doses {_entry('b').key}") and not test.get("plotly_chart")
    effects = trial.measure(lm, dictionary, store, wanted, strengths=(1.0, 4.0), seeds=1, max_new_tokens=3)
    trial.keep(effects, wanted.path(store))
    for strength in ("4", "2.5"):  # it is of all strengths
        test = opened("steering", runs=[own_run], dictionary="b", edits=f"5_add_{strength}")
        (figure,) = test.get("plotly_chart")
        assert json.loads(figure.proto.spec)["data"] and "random direction 1" in text_of(test)
    assert not opened("steering", runs=[own_run], dictionary="b", edits="5_add_-4").get("plotly_chart")


def test_a_wrong_pattern_is_told_before_anything_runs(opened):
    test = opened("steering", dictionary="b", edits="5", target="pattern", pattern="(")
    press(test, f"job-doses {_entry('b').key}")
    assert "'(' is no regular expression" in problems(test)[0]

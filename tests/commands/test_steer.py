"""`saebench steer`: both texts, what they cost, presets, and wrong input in one line."""

import json
import re

import pytest
from helpers import SENTENCE

import saebench as sb
from saebench.cli import main
from saebench.runs import Run
from saebench.steering.edits import add, clamp
from saebench.steering.measures import side_effect
from saebench.steering.samples import side_by_side

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_lm_directory):
    """A trained run with one dictionary, made by the command."""
    folder = tmp_path_factory.mktemp("steer")
    (folder / "text.txt").write_text("".join(SENTENCE.format(i, i * i % 17) for i in range(120)))
    recipe = f"""
name = "tiny"
model = {{ name = "{tiny_lm_directory}" }}
text = {{ source = "{folder / "text.txt"}" }}
activations = {{ sites = ["{SITE}"], context_size = 16, path = "{folder / "acts"}" }}
dictionaries = [{{ architecture = "topk", d_sae = 64, k = 4, id = "sae" }}]
training = {{ num_tokens = 3200, batch_size = 128, lr = 0.01 }}
evaluation = {{ num_tokens = 512 }}
"""
    (folder / "recipe.toml").write_text(recipe)
    assert main(["train", str(folder / "recipe.toml"), "--out", str(folder / "run")]) == 0
    examples = {
        "positives": [f"value_{i}(x): return x" for i in range(8)],
        "negatives": [f"# the number {i}" for i in range(8)],
        "single": ["one text"],
    }
    for name, texts in examples.items():
        (folder / f"{name}.txt").write_text("\n\n".join(texts))
    return folder / "run"


def call(capsys, *arguments, code=0):
    capsys.readouterr()
    assert main(["steer", *map(str, arguments), "--json"]) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


def test_both_texts_and_what_they_cost(run, tiny_lm, capsys):
    result, err = call(capsys, run, "--feature", 3, "--strength", 6, "--prompt", "def value", "--tokens", 12, "--seed", 2)
    sae = sb.load(run / "dictionaries" / "sae")
    unit = result["edits"][0]["unit"]
    untouched, steered = side_by_side(tiny_lm, add(sae, 3, 6.0, unit=unit), "def value", 12, seed=2)
    assert result["untouched"]["text"] == untouched.text and result["steered"]["text"] == steered.text != untouched.text
    assert result["steered"]["perplexity"] == pytest.approx(steered.perplexity)
    assert result["kl"] > 0 and 0.3 < result["size"] < 1.2  # six tenths of the mean length
    assert "by hand: 3" in err and "untouched" in err and "on neutral text: KL" in err


def test_other_primitives(run, tiny_lm, capsys):
    sae = sb.load(run / "dictionaries" / "sae")
    result, _ = call(
        capsys, run, "--feature", 3, "--how", "clamp", "--value", 30, "--prompt", "def value", "--tokens", 8, "--temperature", 0
    )
    _, steered = side_by_side(tiny_lm, clamp(sae, 3, 30.0), "def value", 8, temperature=0.0)
    assert result["steered"]["text"] == steered.text
    nothing, _ = call(capsys, run, "--feature", 3, "--strength", 0, "--prompt", "def value", "--tokens", 8)
    assert nothing["steered"]["text"] == nothing["untouched"]["text"] and nothing["kl"] == nothing["size"] == 0


def test_a_preset_is_kept_and_used(run, capsys):
    made, err = call(
        capsys, run, "--feature", 3, "--feature", 5, "--strength", 6, "--prompt", "def value", "--tokens", 8, "--save", "numbers"
    )
    assert made["preset"] == str(run / "steering" / "numbers.json") and "preset:" in err
    again, err = call(capsys, run, "--preset", "numbers", "--prompt", "def value", "--tokens", 8)
    assert again["steered"]["text"] == made["steered"]["text"] and "preset numbers" in err


def test_texts_choose_features(run, capsys):
    folder = run.parent
    result, err = call(
        capsys,
        run,
        "--positives",
        folder / "positives.txt",
        "--negatives",
        folder / "negatives.txt",
        "--count",
        2,
        "--prompt",
        "x",
        "--tokens",
        4,
    )
    assert 1 <= len(result["edits"][0]["latents"]) <= 2 and "contrast, output score" in err


@pytest.mark.slow
def test_all_methods_are_compared(run, capsys):
    folder = run.parent
    result, err = call(
        capsys, run, "--compare", "--positives", folder / "positives.txt", "--negatives", folder / "negatives.txt", "--count", 2
    )
    methods = {row["method"] for row in result["doses"]}
    assert {"untouched", "contrast", "DiffMean", "PCA", "random direction 1", "random dictionary"} <= methods
    page = (run / "steering" / "positives.html").read_text()
    assert "DiffMean" in page and "Plotly" in page and str(run.parent) not in page
    assert "figure, table and texts" in err


def test_a_stopped_comparison_keeps_what_was_measured(run, capsys, monkeypatch):
    folder, path = run.parent, run / "steering" / "numbers of mine.html"
    whole = side_effect
    calls = []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr("saebench.steering.effect.side_effect", stopped)
    texts = ["--positives", folder / "positives.txt", "--negatives", folder / "negatives.txt", "--count", 2]
    result, _ = call(capsys, run, "--compare", *texts, "--save", "numbers of mine", code=130)
    assert f"{path} holds what was measured until then" in result["error"] and "contrast" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--feature", 64, "--prompt", "x"], "latent 64 is not one of the 64"),
        (["--feature", 3, "--prompt", " "], "the prompt is empty"),
        (["--feature", 3], "the prompt is empty"),
        (["--feature", 3, "--prompt", "x", "--strength", "nan"], "strength is nan"),
        (["--feature", 3, "--prompt", "x", "--strength", "inf"], "strength is inf"),
        (["--feature", 3, "--prompt", "x", "--positions", "middle"], "positions 'middle' are unknown"),
        (["--feature", 3, "--prompt", "x", "--how", "push"], "unknown primitive 'push'"),
        (["--feature", 3, "--prompt", "x", "--how", "clamp"], "clamp needs a value"),
        (["--feature", 3, "--prompt", "x" * 500], "exceed the model.s 64 positions"),
        (["--feature", 3, "--prompt", "x", "--tokens", 0], "writes nothing"),
        (["--feature", 3, "--prompt", "x", "--dictionary", "other"], "no dictionary 'other': it has sae"),
        (["--feature", 3, "--prompt", "x", "--save", "../up"], "no name for a preset"),
        (["--prompt", "x"], "no feature is named"),
        (["--feature", 3, "--topic", "y", "--prompt", "x"], "are given together"),
        (["--topic", "y", "--prompt", "x"], "has no feature store of .sae.: it has none; run `saebench index"),
        (["--preset", "none", "--prompt", "x"], "has no preset 'none'"),
        (["--positives", "single.txt", "--prompt", "x"], "go together"),
        (["--positives", "positives.txt", "--negatives", "single.txt", "--prompt", "x"], "single.txt has 1 example"),
        (["--positives", "positives.txt", "--negatives", "missing.txt", "--prompt", "x"], "missing.txt"),
    ],
)
def test_wrong_input_is_one_line(arguments, said, run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    result, err = call(capsys, run, *arguments, code=2)
    assert re.search(said, result["error"]) and "\n" not in result["error"]
    assert "Traceback" not in err


def test_a_run_of_another_model_is_told(run, capsys):
    opened = Run.open(run)
    before = dict(opened.record["model"])
    opened.record["model"]["fingerprint"] = "0" * 16
    opened.save()
    try:
        result, _ = call(capsys, run, "--feature", 3, "--prompt", "x", code=2)
        assert "with other weights" in result["error"]
    finally:
        opened.record["model"] = before
        opened.save()

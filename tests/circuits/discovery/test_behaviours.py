"""Published behaviours: what the files say, what each model can be asked, the metric by hand, and the whole path on small local models."""

import csv
import json
import runpy
from pathlib import Path

import pytest
import torch

from saebench.circuits.discovery.behaviours import FILES, LaterYears, behaviour, published_heads, read_pairs
from saebench.circuits.discovery.edge_circuits import edge_curve
from saebench.circuits.discovery.examples import Examples
from saebench.circuits.discovery.model_edges import Components
from saebench.errors import UserError
from saebench.lm import LanguageModel, load_lm

IOI = {
    "clean": "Then, Ann and Bob had a ball. Bob gave it to",
    "corrupted": "Then, Ann and Bob had a ball. Tom gave it to",
    "corrupted_hard": "Then, Ann and Bob had a ball. Ann gave it to",
}
YEAR = {"clean": "From the year 1732 to the year 17", "corrupted": "From the year 1701 to the year 17", "label": "32"}
VERB = {"clean_prefix": "The dog", "patch_prefix": "The dogs", "clean_answer": " has", "patch_answer": " have"}
SCRIPT = Path(__file__).parents[3] / "evals" / "behaviours.py"


@pytest.fixture
def data(tmp_path):
    """Writes rows as the file of a behaviour, and says where."""

    def write(name, *rows, text=None):
        path = tmp_path / FILES[name]
        with path.open("w", newline="") as file:
            if text is not None:
                file.write(text)
            elif path.suffix == ".csv":
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        return tmp_path

    return write


@pytest.fixture(scope="module")
def gpt2_like(tmp_path_factory, shared_data) -> LanguageModel:
    """GPT-2's tokens and random weights: 2 layers, width 16."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("models") / "gpt2-tiny"
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "gpt2-tokenizer")
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=48, n_embd=16, n_layer=2, n_head=4, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(directory)
    return load_lm(directory, device="cpu")


def test_pairs_are_read_as_the_papers_mean_them(data):
    (ioi,) = read_pairs(data("ioi", IOI), "ioi")
    assert (ioi.prompt, ioi.counterfactual, ioi.answer, ioi.other) == (IOI["clean"], IOI["corrupted"], " Ann", " Bob")
    (year,) = read_pairs(data("greater_than", YEAR), "greater_than")
    assert (year.answer, year.other) == ("32", None)
    early = YEAR | {"clean": YEAR["clean"].replace("1732", "1704"), "label": "4"}  # as the file writes it
    assert read_pairs(data("greater_than", early), "greater_than")[0].answer == "04"
    (verb,) = read_pairs(data("sva_simple", VERB | {"case": "singular"}), "sva_simple")
    assert (verb.prompt, verb.counterfactual, verb.answer, verb.other) == ("The dog", "The dogs", " has", " have")


def test_of_the_files_every_line_can_be_read_and_names_stand_in_their_sentences(shared_data):
    counts = {name: len(read_pairs(shared_data / "circuits", name)) for name in FILES}
    assert counts == {"ioi": 499, "greater_than": 1000, "sva_simple": 120, "sva_nounpp": 480}
    for pair in read_pairs(shared_data / "circuits", "ioi"):
        # The indirect object is named once, the subject twice, and in the counterfactual the subject once.
        words = pair.prompt.replace(",", " ").replace(".", " ").split()
        assert words.count(pair.answer.strip()) == 1 and words.count(pair.other.strip()) == 2
        assert pair.counterfactual.replace(".", " ").replace(",", " ").split().count(pair.other.strip()) == 1


def test_gpt2s_tokens_allow_all_names_and_years_and_most_verbs(shared_data, gpt2_like):
    """Counts from the tokenizer alone, row by row, in `clean` and `corrupted` columns as they are."""
    expected = {"ioi": 499, "greater_than": 1000, "sva_simple": 97, "sva_nounpp": 414}
    for name, count in expected.items():
        found = behaviour(gpt2_like, shared_data / "circuits", name)
        assert len(found.pairs) == len(found.examples) == count
        assert sum(found.unusable.values()) == len(read_pairs(shared_data / "circuits", name)) - count
        ends = found.examples.ends_B.tolist()
        for row in (0, count // 2, count - 1):
            ids = gpt2_like.prompt_ids(found.pairs[row].prompt)
            assert found.examples.ids_BS[row, : ends[row] + 1].tolist() == ids
            assert gpt2_like.tokenizer.decode([int(found.examples.answers_B[row])]) == found.pairs[row].answer
    assert found.unusable == {"whose counterfactual has another number of tokens": 480 - 414}
    few = behaviour(gpt2_like, shared_data / "circuits", "ioi", limit=5)
    assert len(few.examples) == 5 and few.pairs[0].answer != few.pairs[-1].answer


def test_the_metric_of_years_is_the_difference_of_two_sums(gpt2_like):
    year = {text: gpt2_like.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("00", "31", "32", "33", "99")}
    logits = torch.full((2, 3, 50257), -torch.inf)
    for text, probability in {"00": 0.1, "31": 0.2, "32": 0.3, "33": 0.15, "99": 0.05}.items():
        logits[0, 1, year[text]] = torch.tensor(probability).log()
    logits[0, 1, 0] = torch.tensor(0.2).log()  # another token, which counts for neither
    logits[1, 2, year["99"]] = 0.0
    examples = Examples(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1, 2]), torch.tensor([year["32"], year["99"]]))
    assert LaterYears(gpt2_like)(logits, examples).tolist() == pytest.approx([0.15 + 0.05 - 0.1 - 0.2 - 0.3, -1.0])


@pytest.mark.parametrize("name", FILES)
def test_heads_and_edges_of_each_behaviour_are_found_on_a_model_with_gpt2s_tokens(shared_data, gpt2_like, name):
    found = behaviour(gpt2_like, shared_data / "circuits", name, limit=6)
    components = Components(gpt2_like, found.examples, metric=found.metric, batch_size=3)
    effects, exact = components.effects("eap_ig"), components.effects("exact")
    assert effects.heads_LH.shape == exact.heads_LH.shape == (2, 4) and exact.heads_LH.abs().max() > 0
    edges = components.edges("eap")
    clean = found.metric(gpt2_like.logits(found.examples.ids_BS), found.examples).mean()
    assert edge_curve(components, edges, [0, 5]).full == pytest.approx(float(clean), abs=1e-4)


def test_the_bundled_model_can_be_asked_agreement_and_says_why_not_the_others(shared_data, builtin_lm):
    found = behaviour(builtin_lm, shared_data / "circuits", "sva_simple", limit=8)
    assert len(found.examples) == 8 and sum(found.unusable.values()) == 120 - 55
    assert Components(builtin_lm, found.examples, metric=found.metric).effects("eap").heads_LH.shape == (4, 8)
    with pytest.raises(UserError, match="none of the 499 prompts of 'ioi' .499 with an answer of several tokens.: use another"):
        behaviour(builtin_lm, shared_data / "circuits", "ioi")
    with pytest.raises(UserError, match="writes 83 of the 100 years 00 to 99 in several tokens"):
        behaviour(builtin_lm, shared_data / "circuits", "greater_than")


def test_published_heads_are_named_of_gpt2_small_alone(gpt2_like, tiny_lm):
    from transformers import GPT2Config

    assert published_heads(tiny_lm, "ioi") == {} and published_heads(gpt2_like, "ioi") == {}

    class Model:
        name = "gpt2"
        hf = type("", (), {"config": GPT2Config()})

    assert published_heads(Model, "ioi")["name mover"] == ((9, 6), (9, 9), (10, 0))
    assert sum(map(len, published_heads(Model, "ioi").values())) == 26  # Wang et al. 2023
    assert published_heads(Model, "sva_simple") == {}
    Model.name = "another"
    assert published_heads(Model, "ioi") == {}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("ioi", {"rows": [IOI | {"corrupted": ""}]}, "ioi.csv, line 2: 'corrupted' is missing or empty"),
        ("ioi", {"text": "clean,corrupted\na,b\n"}, "line 2: 'corrupted_hard' is missing"),
        ("ioi", {"rows": [IOI, IOI | {"corrupted": "Then, Ann ran. Tom gave it to"}]}, "line 3: .* should differ in one word"),
        ("ioi", {"rows": [IOI | {"corrupted_hard": IOI["clean"]}]}, "should differ in one word"),
        ("ioi", {"text": "clean,corrupted,corrupted_hard\n"}, "holds no prompts"),
        ("greater_than", {"rows": [YEAR | {"label": "132"}]}, "label '132' is no year"),
        ("sva_simple", {"text": '{"clean_prefix": "The dog"\n'}, "sva_simple_test.jsonl, line 1: not JSON"),
        ("sva_simple", {"text": "[1]\n"}, "line 1: list instead of an object"),
        ("sva_nounpp", {"rows": [VERB | {"clean_answer": 3}]}, "'clean_answer' is missing or empty"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_one_line_that_says_where(data, name, rows, message):
    directory = data(name, *rows.get("rows", []), text=rows.get("text"))
    with pytest.raises(UserError, match=message) as caught:
        read_pairs(directory, name)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_asked_is_one_line(data, tiny_lm, tmp_path):
    for build, message in (
        (lambda: read_pairs(tmp_path, "docstring"), "behaviour 'docstring' is unknown: use ioi, greater_than"),
        (lambda: read_pairs(tmp_path / "none", "ioi"), "ioi.csv is not there: give the directory"),
        (lambda: behaviour(tiny_lm, tmp_path, "ioi", limit=0), "limit=0 leaves no prompts"),
        (lambda: behaviour(tiny_lm, data("ioi", IOI), "ioi"), "1 with an answer of several tokens"),
        (
            lambda: behaviour(tiny_lm, data("sva_simple", VERB | {"clean_answer": "a", "patch_answer": "b"}), "sva_simple"),
            "1 whose counterfactual has another number of tokens",
        ),
        (
            lambda: behaviour(
                tiny_lm,
                data(
                    "sva_simple",
                    VERB | {"clean_answer": "a", "patch_answer": "b", "clean_prefix": "x" * 99, "patch_prefix": "y" * 99},
                ),
                "sva_simple",
            ),
            "1 longer than the model's positions",
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            build()
        assert "\n" not in str(caught.value)


# --- the script ---


def test_the_script_ranks_heads_edges_and_features_and_says_what_is_left_out(shared_data, gpt2_like, tmp_path, capsys):
    main, out = runpy.run_path(str(SCRIPT))["main"], tmp_path / "behaviours.json"
    arguments = ["--lm", gpt2_like.name, "--data", str(shared_data / "circuits"), "--out", str(out), "--prompts", "4"]
    main([*arguments, "--only", "sva_simple"])
    (found,) = json.loads(out.read_text()).values()
    assert found["left_out"] == {"whose counterfactual has another number of tokens": 23} and found["prompts"] == 4
    assert "23 left out whose counterfactual" in capsys.readouterr().err
    exact = Components(gpt2_like, behaviour(gpt2_like, shared_data / "circuits", "sva_simple", limit=4).examples).effects("exact")
    best = int(exact.heads_LH.abs().argmax())
    assert found["heads"][0]["head"] == f"{best // 4}.{best % 4}" and found["heads"][0]["rank exact"] == 1
    assert found["heads"][0]["effect"] == pytest.approx(float(exact.heads_LH.flatten()[best]), rel=1e-3)
    assert "published" not in found["heads"][0] and {row["truth"] for row in found["agreement"]} == {"exhaustive ablation"}
    assert found["edge_curve"]["faithfulness_K"][0] == 0 and found["edge_curve"]["faithfulness_K"][-1] == 1


def test_what_the_script_cannot_do_is_one_line(shared_data, tiny_lm_directory, tmp_path):
    main = runpy.run_path(str(SCRIPT))["main"]
    for arguments, message in (
        (["--data", str(tmp_path)], "ioi.csv is not there"),
        (["--data", str(shared_data / "circuits"), "--only", "docstring"], "behaviour 'docstring' is unknown"),
        (["--data", str(shared_data / "circuits"), "--lm", str(tiny_lm_directory), "--only", "ioi"], "none of the 499 prompts"),
        (
            ["--data", str(shared_data / "circuits"), "--lm", str(tiny_lm_directory), "--run", str(tmp_path)],
            "not a run directory",
        ),
        (["--data", str(shared_data / "circuits"), "--lm", str(tiny_lm_directory)], "can be asked none of ioi, greater_than"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            main([*arguments, "--out", str(tmp_path / "out.json")])
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.json").exists()

"""The command line from outside: what each command prints and writes, and what it says to wrong input."""

import json
import math
import shutil

import pytest
import torch
from helpers import SENTENCE
from safetensors.torch import load_file, save_file

import saebench as sb
from saebench.cli import COMMANDS, main

SITE, OTHER_SITE = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"
RECIPE = """
name = "tiny"
[model]
name = "{model}"
[text]
source = "text.txt"
[activations]
sites = ["{site}"]
context_size = 16
[[dictionaries]]
architecture = "topk"
d_sae = 64
k = 4
[training]
num_tokens = 6400
batch_size = 128
lr = 0.01
log_every = 10
checkpoint_every = 20
[evaluation]
num_tokens = 512
"""
ID = "topk-64-k4"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch, tiny_lm_directory):
    """A folder with a text and a recipe, and the process in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(SENTENCE.format(i, i * i % 17) for i in range(120)))
    (tmp_path / "recipe.toml").write_text(RECIPE.format(model=tiny_lm_directory, site=SITE))
    return tmp_path


@pytest.fixture
def call(capsys):
    """Run a command that succeeds; returns what `--json` printed as its last line, and standard error."""

    def run(*arguments):
        capsys.readouterr()
        code = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out.splitlines()[-1]), err

    return run


@pytest.fixture
def refused(capsys, workplace):
    """Run a command that must fail with one line, exit code 2, and everything on the disk as it was; returns that line."""

    def run(*arguments):
        capsys.readouterr()
        before = snapshot(workplace)
        code = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert code == 2
        line = err.splitlines()[-1]
        assert [row for row in err.splitlines() if row.startswith("error: ")] == [line]
        assert "Traceback" not in err
        assert json.loads(out.splitlines()[-1]) == {"error": line.removeprefix("error: "), "exit_code": 2}
        assert snapshot(workplace) == before
        return line

    return run


@pytest.fixture
def harvest_arguments(tiny_lm_directory):
    return ["harvest", "--model", tiny_lm_directory, "--text", "text.txt", "--sites", SITE, "--context-size", 16, "--out", "acts"]


@pytest.fixture
def other_model(workplace, tiny_lm_directory):
    """Copy the tiny model under another name, with one of its weights changed by a function."""

    def make(name, change):
        shutil.copytree(tiny_lm_directory, workplace / name)
        path = workplace / name / "model.safetensors"
        tensors = load_file(path)
        change(tensors["transformer.h.1.mlp.c_proj.weight"])
        save_file(tensors, path, metadata={"format": "pt"})
        return name

    return make


def snapshot(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def weights(run):
    return {p.parent.name: p.read_bytes() for p in sorted((run / "dictionaries").rglob("*.safetensors"))}


def test_harvest_stores_what_the_model_computes(call, harvest_arguments, workplace, tiny_lm_directory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result, err = call(*harvest_arguments, "--storage", "float32")
    ids = AutoTokenizer.from_pretrained(tiny_lm_directory)((workplace / "text.txt").read_text())["input_ids"]
    count = (len(ids) + 1) // 15  # a separator before the document, BOS at the head of every context
    store = sb.ActivationStore("acts")
    assert result == {
        "store": "acts",
        "identity": store.identity,
        "tokens": count * 16,
        "widths": {SITE: 32},
        "storage_fvu": {SITE: 0.0},
    }
    assert "mean norm" in err
    assert {p.name for p in (workplace / "acts").iterdir()} >= {"manifest.json", "tokens.safetensors", "documents.json"}
    first = torch.tensor([[0, 0, *ids[:14]], [0, *ids[14:29]]])
    with torch.inference_mode():
        hidden = AutoModelForCausalLM.from_pretrained(tiny_lm_directory)(first, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(store.read(SITE, 0, 2), hidden, rtol=1e-5, atol=1e-4)


def test_harvest_of_a_part_at_two_sites(call, harvest_arguments):
    harvest_arguments.insert(harvest_arguments.index(SITE), OTHER_SITE)
    result, _ = call(*harvest_arguments, "--tokens", 500, "--storage", "int8", "--batch-size", 4)
    assert result["tokens"] == 496
    assert set(result["widths"]) == {SITE, OTHER_SITE}
    assert 0 < result["storage_fvu"][SITE] < 1e-3


@pytest.mark.parametrize("mode", ["store", "stream"])
def test_train_and_evaluate(call, workplace, mode):
    result, err = call("train", "recipe.toml", "--set", f"activations.mode={mode}")
    run = workplace / "runs" / "tiny"
    assert result["run"] == "runs/tiny"
    assert result["dictionaries"] == {ID: f"runs/tiny/dictionaries/{ID}"}
    assert "saebench evaluate runs/tiny" in err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50]
    assert result["training"] == {ID: rows[-1]}
    assert rows[-1]["fvu"] < rows[0]["fvu"]
    record = json.loads((run / "run.json").read_text())
    assert record["finished"]
    assert record["recipe"]["activations"]["mode"] == mode
    assert set(record["seconds"]) == {"activations", "training"}
    assert (workplace / "acts").exists() == (mode == "store")
    sae = sb.load(run / "dictionaries" / ID)
    assert (sae.config.d_in, sae.config.site, sae.trained_on["tokens"]) == (32, SITE, 6400)

    result, err = call("evaluate", "runs/tiny")
    written = json.loads((run / "evals" / "core.json").read_text())
    figures = result["dictionaries"][ID]
    assert written["suite"] == result["suite"] == "core"
    assert result["written"] == "runs/tiny/evals/core.json"
    assert {k: v for k, v in written["dictionaries"][ID].items() if k != "density"} == figures
    assert figures["tokens"] % 15 == 0
    assert figures["tokens"] <= 512
    assert figures["l0"] <= 4
    assert 0 < figures["fvu"] < 1
    assert len(written["dictionaries"][ID]["density"]) == 64
    assert sum(written["dictionaries"][ID]["density"]) == pytest.approx(figures["l0"])
    assert f"FVU {figures['fvu']:.4f}" in err
    fewer, _ = call("evaluate", "runs/tiny", "--tokens", 64)
    assert fewer["dictionaries"][ID]["tokens"] == 60


def test_a_finished_run_is_left_alone(call, workplace):
    first, _ = call("train", "recipe.toml")
    before = snapshot(workplace)
    second, err = call("train", "recipe.toml")
    assert err == "runs/tiny is finished already; --overwrite trains it again\n"
    assert second == first
    assert snapshot(workplace) == before
    call("train", "recipe.toml", "--overwrite")
    assert weights(workplace / "runs" / "tiny") == {ID: before[f"runs/tiny/dictionaries/{ID}/weights.safetensors"]}


def test_a_ready_made_store_is_trained_on(call, harvest_arguments, workplace):
    made, _ = call(*harvest_arguments)
    before = snapshot(workplace / "acts")
    call("train", "recipe.toml", "--set", "activations.path=acts")
    record = json.loads((workplace / "runs" / "tiny" / "run.json").read_text())
    assert record["activations"] == {"identity": made["identity"], "tokens": made["tokens"], "path": "acts"}
    assert snapshot(workplace / "acts") == before
    assert {p.name for p in workplace.iterdir()} == {"text.txt", "recipe.toml", "acts", "runs"}


def test_a_store_named_but_not_there_yet_is_made_there(call, workplace):
    call("train", "recipe.toml", "--set", "activations.path=deep/acts")
    assert (workplace / "deep" / "acts" / "manifest.json").exists()
    assert not (workplace / "acts").exists()


def test_a_store_that_a_stopped_harvest_left_is_completed(call, workplace, monkeypatch):
    from saebench.lm import LanguageModel

    monkeypatch.setattr("saebench.activations.harvesting.SHARD_BYTES", 1)
    read, calls = LanguageModel.read, []

    def stopping(self, *arguments):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return read(self, *arguments)

    arguments = ["train", "recipe.toml", "--set", "activations.path=acts"]
    monkeypatch.setattr(LanguageModel, "read", stopping)
    assert main(arguments) == 130
    assert not json.loads((workplace / "acts" / "manifest.json").read_text())["complete"]
    monkeypatch.setattr(LanguageModel, "read", read)
    _, err = call(*arguments)
    assert "acts: continuing at token" in err
    call("train", "recipe.toml", "--out", "runs/whole")
    assert weights(workplace / "runs" / "tiny") == weights(workplace / "runs" / "whole")


def test_settings_reach_every_part_of_a_recipe(call):
    settings = [
        "name=changed",
        "dictionaries.0.k=2",
        "dictionaries.0.id=small",
        "training.num_tokens=1280",
        "activations.storage=float32",
        "text.held_out=0.2",
    ]
    result, _ = call("train", "recipe.toml", *(part for setting in settings for part in ("--set", setting)))
    assert result["run"] == "runs/changed"
    assert result["training"]["small"]["step"] == 10
    assert sb.load("runs/changed/dictionaries/small").config.k == 2


def test_several_dictionaries_in_one_run(call, workplace):
    with (workplace / "recipe.toml").open("a") as file:
        file.write('[[dictionaries]]\narchitecture = "topk"\nid = "second"\nd_sae = 32\nk = 2\n')
    call("train", "recipe.toml", "--set", "training.num_tokens=1280")
    result, err = call("evaluate", "runs/tiny")
    assert set(result["dictionaries"]) == {ID, "second"}
    assert result["dictionaries"]["second"]["l0"] <= 2
    assert "second: FVU" in err


def test_plan_counts_before_anything_is_written(call, workplace):
    before = snapshot(workplace)
    result, err = call("plan", "recipe.toml")
    assert snapshot(workplace) == before
    parameters = 2 * 64 * 32 + 64 + 32
    assert result["tokens"]["train"] == 6400
    assert result["parameters"] == {ID: parameters}
    assert result["bytes"]["store"] == result["tokens"]["harvest"] * 32 * 2
    assert result["bytes"]["checkpoints"] == 3 * 10 * parameters
    assert result["epochs"] == pytest.approx(6400 / (result["tokens"]["harvest"] * 15 / 16))
    assert result["bytes"]["memory"] == sum(result["bytes"]["memory_parts"].values())
    assert all(math.isfinite(seconds) and seconds >= 0 for seconds in result["seconds"].values())
    assert "memory" in err
    trained, _ = call("train", "recipe.toml")
    assert trained["training"][ID]["tokens"] == result["tokens"]["train"]
    stored = sum(p.stat().st_size for p in workplace.glob("acts/*/shard-*"))
    assert stored == pytest.approx(result["bytes"]["store"], rel=0.01)
    streamed, _ = call("plan", "recipe.toml", "--set", "activations.mode=stream")
    assert streamed["bytes"]["store"] == 0


@pytest.mark.filterwarnings("ignore:weights=bfloat16 is for a GPU")
def test_plan_counts_copies_and_moments_by_their_types(call, workplace):
    plans = {}
    for momentum, weights in (("bfloat16", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        settings = ("--set", f"training.momentum={momentum}", "--set", f"training.weights={weights}")
        plans[momentum, weights] = call("plan", "recipe.toml", *settings)[0]["bytes"]
    parameters = 2 * 64 * 32 + 64 + 32
    usual, moments, copies = (
        (each["checkpoints"], each["memory_parts"]["dictionaries with optimiser"]) for each in plans.values()
    )
    assert usual == (3 * 10 * parameters, 14 * parameters)
    assert moments == (3 * 12 * parameters, 16 * parameters)
    assert copies == (3 * 10 * parameters, 16 * parameters)  # copies are not kept in checkpoints


def test_doctor_finds_nothing_wrong_here(call):
    result, err = call("doctor")
    assert result["problems"] == []
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__ in result["versions"]["torch"]
    assert {"builtin", "gpt2-small", "local"} <= set(result["recipes"])
    assert set(result["kernels"]) == {"float32 in memory", "other types in memory"}
    assert "all well" in err


def test_doctor_names_what_is_missing(call, tmp_path, monkeypatch):
    monkeypatch.setattr("saebench.lm.model.BUILTIN", tmp_path / "gone")
    monkeypatch.setattr("saebench.commands.doctor.find_spec", lambda name: None)
    result, err = call("doctor")
    assert result["problems"] == [
        "the bundled model lacks config.json, model.safetensors, tokenizer.json: install saebench again"
    ]
    assert "pip install 'saebench[tensorboard]'" in err
    assert "all well" not in err


@pytest.mark.parametrize(
    ("model", "text", "clean"),
    [
        ("builtin", "builtin", (1.0, 6.0)),
        ("stories260k", "stories260k/tinystories_1000.jsonl", (1.1, 2.0)),  # published: 1.297 on whole stories
        ("austen-gpt2", "austen/persuasion.txt", (2.0, 5.0)),
        pytest.param("austen-gpt2", "austen", (2.0, 5.0), marks=pytest.mark.slow),
    ],
)
def test_other_models_train_as_the_bundled_one_does(call, request, workplace, model, text, clean):
    if model != "builtin":
        data = request.getfixturevalue("shared_data")
        model, text = data / model, data / text
    settings = {
        "model.name": model,
        "text.source": text,
        "activations.sites": f"['{SITE}']",
        "activations.context_size": 64,
        "activations.num_tokens": 8192,
        "dictionaries.0.d_sae": 128,
        "training.num_tokens": 7680,
    }
    result, _ = call("train", "recipe.toml", *(part for item in settings.items() for part in ("--set", "{}={}".format(*item))))
    figures = call("evaluate", result["run"])[0]["dictionaries"]["topk-128-k4"]
    assert clean[0] < figures["ce_clean"] < clean[1]
    assert figures["ce_clean"] < figures["ce_spliced"]
    assert 0 < figures["fvu"] < 1
    assert figures["l0"] <= 4


def test_a_run_is_indexed(call, refused, workplace):
    call("train", "recipe.toml")
    result, err = call("index", "runs/tiny")
    store = sb.FeatureStore(workplace / "runs" / "tiny" / "features" / ID)
    found = result["stores"][ID]
    assert (found["path"], found["identity"]) == (f"runs/tiny/features/{ID}", store.identity)
    assert found["firings"] == store.num_entries > 0 and found["tokens"] == store.num_tokens
    assert f"{ID}: {store.num_entries:,} firings of" in err and "saebench browse runs/tiny" in err
    assert call("index", "runs/tiny")[0] == result
    assert "holds features of" in refused("index", "runs/tiny", "--tokens", 160)
    less, _ = call("index", "runs/tiny", "--tokens", 160, "--overwrite")
    assert less["stores"][ID]["tokens"] == 160 // 16 * 15
    again, _ = call("index", "runs/tiny", "--dictionary", ID)  # one of fewer tokens gives way
    assert again == result
    assert "runs/tiny has no dictionary 'other': it has topk-64-k4" in refused("index", "runs/tiny", "--dictionary", "other")
    assert "--tokens 0 must be positive" in refused("index", "runs/tiny", "--tokens", 0)
    assert "nowhere is not a run directory" in refused("index", "nowhere")


def test_demo_runs_the_main_job_and_shows_it_again(call, workplace):
    settings = {
        "activations.num_tokens": 20480,
        "dictionaries.0.d_sae": 256,
        "dictionaries.0.k": 8,
        "training.num_tokens": 40960,
        "evaluation.num_tokens": 2048,
    }
    arguments = ["demo", *(part for item in settings.items() for part in ("--set", "{}={}".format(*item)))]
    result, err = call(*arguments)
    run = workplace / "runs" / "demo"
    assert result["run"] == "runs/demo"
    assert result["report"] == "runs/demo/report.html"
    assert set(result["dictionaries"]) == set(result["features"]) == {"topk-256-k8"}
    shown = result["features"]["topk-256-k8"]
    assert len(set(shown)) == len(shown) <= 12
    assert f"{len(shown)} characteristic features of topk-256-k8" in err
    assert "<!doctype html>" in (run / "report.html").read_text()
    trained = weights(run)
    again, _ = call(*arguments)
    assert again["features"] == result["features"]
    assert again["dictionaries"] == result["dictionaries"]
    assert weights(run) == trained


# Wrong input


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.name=./nowhere", "model directory ./nowhere does not exist: give builtin, a checkpoint directory, or a hub name"),
        ("model.name=text.txt", "text.txt is not a directory: a local model is a Hugging Face checkpoint directory"),
        ("model.name=nobody/no-such-model", "cannot load model 'nobody/no-such-model' from the hub"),
        (
            "activations.sites=['blocks.7.hook_resid_post']",
            "unknown site 'blocks.7.hook_resid_post': the model has layers 0 to 2",
        ),
        ("activations.sites=['resid']", "unknown site 'resid': valid sites are blocks.N.hook_resid_pre"),
        ("text.source=nowhere.txt", "text 'nowhere.txt' not found: give builtin, a file, a directory"),
        ("text.source=empty.txt", "empty.txt is empty"),
        ("text.source=blank.txt", "text 'blank.txt' is empty: nothing to tokenise"),
        ("text.source=short.txt", "less than one context of 16: use more text or a smaller context_size"),
        ("text.source=one.txt", "nothing is left to evaluate on: use more text or set text.evaluation"),
        ("text.evaluation=nowhere.txt", "text 'nowhere.txt' not found"),
        ("activations.context_size=65", "context_size=65 exceeds the 64 positions of model"),
        ("activations.context_size=1", "activations.context_size=1: input should be greater than 2"),
        ("activations.num_tokens=-5", "activations.num_tokens=-5: input should be greater than 0"),
        ("training.learning_rate=1", "unknown key training.learning_rate: known keys: num_tokens, batch_size, lr"),
        ("trainning.lr=1", "unknown key trainning: did you mean 'training'?"),
        ("dictionaries.0.kk=1", "unknown key dictionaries.0.kk: did you mean 'k'?"),
        ("training.lr=fast", "training.lr='fast': input should be a valid number"),
        ("dictionaries.0.k=65", "k=65 exceeds d_sae=64: lower k or raise d_sae (key dictionaries.0)"),
        ("dictionaries.0.d_in=33", "d_in=33 does not match site 'blocks.1.hook_resid_post', which is 32 wide"),
        ("dictionaries.0.architecture=vae", "dictionaries.0.architecture='vae' is unknown: use one of batchtopk"),
        ("dictionaries.0.site=blocks.0.hook_mlp_out", "which activations.sites lacks: add it there"),
        (
            "activations.sites=['blocks.0.hook_mlp_out','blocks.1.hook_mlp_out']",
            "no site is named and the activations have several",
        ),
        ("training.num_tokens=100", "num_tokens=100 is less than one batch of 128: raise it or lower batch_size"),
        ("name=a/b", "name='a/b': string should match pattern"),
        ("training.lr", "--set 'training.lr' is not of the form key=value, such as training.lr=0.001"),
        ("dictionaries.1.k=2", "--set dictionaries.1.k: there is no entry '1'; the list has 1, counted from 0"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_wrong_settings_are_refused(refused, workplace, command, setting, message):
    (workplace / "empty.txt").write_text("")
    (workplace / "blank.txt").write_text(" \n" * 9)
    (workplace / "short.txt").write_text("x = 1")
    (workplace / "one.txt").write_text("x = 1\n" * 5)
    assert message in refused(command, "recipe.toml", "--set", setting)


def test_wrong_recipes_are_refused(refused, workplace):
    assert "recipe 'nowhere' not found: give a toml file or one of builtin" in refused("train", "nowhere")
    (workplace / "broken.toml").write_text("name = \n")
    assert "recipe broken.toml is not valid toml: " in refused("train", "broken.toml")
    (workplace / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "recipe binary.toml is not valid toml: " in refused("train", "binary.toml")
    (workplace / "bare.toml").write_text('name = "bare"\n')
    assert "missing key activations: it has no default" in refused("train", "bare.toml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "./nowhere"], "model directory ./nowhere does not exist"),
        (["--model", "nobody/no-such-model"], "cannot load model 'nobody/no-such-model' from the hub"),
        (["--text", "nowhere.txt"], "text 'nowhere.txt' not found"),
        (["--text", "short.txt"], "less than one context of 16"),
        (["--sites", "blocks.3.hook_resid_post"], "unknown site 'blocks.3.hook_resid_post': the model has layers 0 to 2"),
        (["--context-size", 65], "context_size=65 exceeds the 64 positions"),
        (["--context-size", -1], "context_size=-1 is too small: use at least 2"),
        (["--tokens", -5], "--tokens -5 must be positive"),
        (["--batch-size", 0], "--batch-size 0 must be positive"),
        (["--storage", "int4"], "unknown storage type 'int4': use one of float32, bfloat16, float16, int8"),
        (["--out", "text.txt"], "text.txt is a file: name another directory for the store"),
        (["--out", "thesis"], "thesis is not empty and holds no store"),
    ],
)
def test_wrong_harvests_are_refused(refused, harvest_arguments, workplace, options, message):
    (workplace / "short.txt").write_text("x = 1")
    (workplace / "thesis").mkdir()
    (workplace / "thesis" / "chapter.tex").write_text("precious")
    assert message in refused(*harvest_arguments, *options)


def test_a_place_inside_a_file_is_refused(capsys, harvest_arguments, workplace):
    before = snapshot(workplace)
    for arguments in ([*harvest_arguments, "--out", "text.txt/acts"], ["train", "recipe.toml", "--out", "text.txt/a/b"]):
        assert main([*map(str, arguments)]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(("error: cannot use text.txt/a", "error: text.txt is a file"))
    assert snapshot(workplace) == before


def test_nan_in_the_activations_is_named(refused, harvest_arguments, other_model):
    model = other_model("sick", lambda weight: weight[5, 3].fill_(float("nan")))
    message = "NaN or Inf in the activations of site 'blocks.1.hook_resid_post', contexts 0 to 31"
    assert message in refused(*harvest_arguments, "--model", model)
    for mode in ("store", "stream"):
        assert message in refused("train", "recipe.toml", "--set", f"model.name={model}", "--set", f"activations.mode={mode}")


def test_a_store_that_does_not_fit_is_refused(call, refused, harvest_arguments, other_model, workplace):
    call(*harvest_arguments)
    arguments = ["train", "recipe.toml", "--set", "activations.path=acts", "--set"]
    assert "site 'blocks.0.hook_mlp_out' is not in the store acts: it holds blocks.1.hook_resid_post" in refused(
        *arguments, "activations.sites=['blocks.0.hook_mlp_out']"
    )
    model = other_model("other", lambda weight: weight.mul_(2))
    assert "acts holds activations of model" in refused(*arguments, f"model.name={model}")
    assert "acts holds another harvest (model: " in refused(*harvest_arguments, "--model", model)
    assert "acts holds another harvest (" in refused(*harvest_arguments, "--context-size", 32)


def test_a_damaged_store_is_refused(call, refused, harvest_arguments, workplace):
    call(*harvest_arguments)
    manifest, shard = workplace / "acts" / "manifest.json", workplace / "acts" / "shard-00000.safetensors"
    whole, content = manifest.read_text(), shard.read_bytes()
    arguments = ["train", "recipe.toml", "--set", "activations.path=acts"]

    flip_a_byte(shard)
    assert "acts/shard-00000.safetensors is damaged: its content does not match its recorded hash" in refused(*arguments)
    shard.write_bytes(content[:-7])
    assert "acts/shard-00000.safetensors is truncated or damaged" in refused(*arguments)
    shard.unlink()
    assert "acts/shard-00000.safetensors is missing" in refused(*arguments)
    shard.write_bytes(content)
    manifest.write_text(json.dumps(json.loads(whole) | {"version": 99}))
    assert "acts is a saebench-activations of version 99; this saebench reads version 1" in refused(*arguments)
    manifest.write_text(json.dumps(json.loads(whole) | {"colour": "red"}))
    assert "acts/manifest.json has unknown fields: colour" in refused(*arguments)
    manifest.write_text(whole[: len(whole) // 2])
    assert "acts/manifest.json is damaged" in refused(*arguments)
    manifest.write_text(whole)
    call(*arguments)


def test_another_run_is_kept_unless_it_is_to_be_overwritten(call, refused, workplace):
    call("train", "recipe.toml")
    call("evaluate", "runs/tiny")
    changed = ["train", "recipe.toml", "--set", "training.lr=0.02"]
    assert refused(*changed) == (
        "error: runs/tiny holds a run with another recipe (training.lr: 0.01 there, 0.02 here): use --overwrite or another --out"
    )
    assert "unknown site" in refused(*changed, "--overwrite", "--set", "activations.sites=['resid']")
    call(*changed, "--overwrite")
    call(*changed, "--out", "runs/fresh")
    assert weights(workplace / "runs" / "tiny") == weights(workplace / "runs" / "fresh")
    assert not (workplace / "runs" / "tiny" / "evals").exists()


def test_an_unfinished_run_goes_on_only_with_the_same_activations(call, refused, workplace):
    arguments = ["train", "recipe.toml", "--set", "activations.mode=stream"]
    call(*arguments)
    path = workplace / "runs" / "tiny" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))
    text = (workplace / "text.txt").read_text()
    (workplace / "text.txt").write_text(text.replace("return", "yield"))
    assert "the activations are not those that runs/tiny began with" in refused(*arguments)
    (workplace / "text.txt").write_text(text)
    call(*arguments)


def test_places_that_hold_no_run_are_refused(refused, workplace):
    (workplace / "thesis").mkdir()
    (workplace / "thesis" / "chapter.tex").write_text("precious")
    for path, message in (
        ("text.txt", "text.txt is a file: name another directory for the store"),
        ("thesis", "thesis is not empty and holds no store (it has chapter.tex): name another directory"),
    ):
        assert message in refused("train", "recipe.toml", "--set", f"activations.path={path}")
    for options in ([], ["--overwrite"]):
        assert "text.txt is a file: name a directory for the run" in refused(
            "train", "recipe.toml", "--out", "text.txt", *options
        )
        assert "thesis is not empty and holds no run" in refused("train", "recipe.toml", "--out", "thesis", *options)
    assert "thesis is not a run directory: it has no run.json" in refused("evaluate", "thesis")
    assert "text.txt is not a run directory" in refused("evaluate", "text.txt")
    assert "nowhere is not a run directory" in refused("evaluate", "nowhere")


def test_wrong_evaluations_are_refused(call, refused, workplace, monkeypatch, other_model, tiny_lm_directory):
    call("train", "recipe.toml")
    assert "unknown suite 'saebench': use one of core" in refused("evaluate", "runs/tiny", "--suite", "saebench")
    assert "--tokens -5 must be positive" in refused("evaluate", "runs/tiny", "--tokens", -5)
    record = json.loads((workplace / "runs" / "tiny" / "run.json").read_text())
    record["recipe"]["model"]["name"] = other_model("other", lambda weight: weight.mul_(2))
    (workplace / "runs" / "tiny" / "run.json").write_text(json.dumps(record))
    assert "was trained on a model 'other' with other weights" in refused("evaluate", "runs/tiny")
    (workplace / "runs" / "tiny" / "run.json").write_text(json.dumps(record | {"version": 7}))
    assert "run.json is of version 7; this saebench reads version 1" in refused("evaluate", "runs/tiny")
    (workplace / "runs" / "tiny" / "run.json").write_text(json.dumps(record | {"finished": False}))
    assert "has no trained dictionaries yet: run `saebench train` to the end first" in refused("evaluate", "runs/tiny")


def test_a_damaged_dictionary_is_refused(call, refused, workplace):
    call("train", "recipe.toml")
    flip_a_byte(workplace / "runs" / "tiny" / "dictionaries" / ID / "weights.safetensors")
    before = snapshot(workplace)
    assert main(["evaluate", "runs/tiny"]) == 2
    assert snapshot(workplace) == before


@pytest.mark.parametrize(
    "arguments", [[], ["bake"], ["train"], ["train", "recipe.toml", "--fast"], ["harvest", "--tokens", "many"]]
)
def test_misspelt_commands_end_with_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: saebench" in capsys.readouterr().err


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help_and_json(capsys, command):
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0
    assert "--json" in capsys.readouterr().out

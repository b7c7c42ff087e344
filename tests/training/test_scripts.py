"""The scripts people run and edit, on small settings."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import SENTENCE

import saebench as sb

TRAINING = Path(__file__).parent.parent.parent / "training"
SMALL = ["--layers", "1", "--width", "32", "--heads", "2", "--context", "32", "--batch", "4", "--vocab", "300", "--warmup", "2"]


@pytest.fixture
def run_script(monkeypatch):
    """Run a script of training/ in this process, as if from the command line."""

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(name, TRAINING / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        spec.loader.exec_module(module)
        module.main()
        return module

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(SENTENCE.format(i, i * i % 17) for i in range(300)))
    return path


def test_train_lm_learns_and_resumes_to_the_same_weights(run_script, text, tmp_path, monkeypatch, capsys):
    arguments = ["--text", text, *SMALL, "--steps", 30, "--save-every", 7]
    script = run_script("train_lm", *arguments, "--out", tmp_path / "whole")
    assert "bits per byte" in capsys.readouterr().err
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "training_log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]

    batch_at, calls = script.batch_at, []

    def stopping(*given):
        calls.append(1)
        if len(calls) == 17:
            raise KeyboardInterrupt
        return batch_at(*given)

    monkeypatch.setattr(script, "batch_at", stopping)
    monkeypatch.setattr(sys, "argv", ["train_lm", *map(str, arguments), "--out", str(tmp_path / "parts")])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    monkeypatch.setattr(script, "batch_at", batch_at)
    script.main()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    lm = sb.load_lm(tmp_path / "whole")
    assert lm.logits(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, len(lm.tokenizer))


def test_train_lm_names_bad_text_and_writes_nothing(run_script, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for text, message in ((tmp_path / "empty.txt", "is empty"), (tmp_path / "nowhere", "not found")):
        with pytest.raises(sb.UserError, match=message):
            run_script("train_lm", "--text", text, *SMALL, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_orthogonalise_pushes_singular_values_towards_one(run_script):
    spec = importlib.util.spec_from_file_location("train_lm", TRAINING / "train_lm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for shape in ((20, 50), (50, 20)):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(module.orthogonalise(g))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_induction_score_of_a_planted_pattern(run_script):
    """A head that attends by the rule scores one; one that spreads its attention evenly scores one over the positions it sees."""
    spec = importlib.util.spec_from_file_location("train_lm", TRAINING / "train_lm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Planted:
        class config:
            vocab_size, n_positions = 50, 64

        def set_attn_implementation(self, name):
            self.implementation = name

        def __call__(self, ids, output_attentions):
            size, length = ids.shape[1], (ids.shape[1] - 1) // 2
            rule = torch.zeros(size, size)
            for row in range(size):
                rule[row, max(0, row - length + 1)] = 1
            even = torch.tril(torch.ones(size, size)) / torch.arange(1, size + 1)[:, None]
            return type("Output", (), {"attentions": [torch.stack([rule, even]).expand(len(ids), 2, size, size)]})

    scores = module.induction_scores(Planted(), bos=0, length=20)
    assert scores[0, 0] == 1
    assert float(scores[0, 1]) == pytest.approx(sum(1 / n for n in range(22, 42)) / 20, rel=1e-5)


def test_train_sae_tells_the_whole_story(run_script, text, tiny_lm_directory, tmp_path, capsys, monkeypatch):
    pack = sb.pack
    monkeypatch.setattr(sb, "pack", lambda *args, context_size, num_tokens: pack(*args, context_size=32, num_tokens=num_tokens))
    out = tmp_path / "run"
    run_script(
        "train_sae", "--model", tiny_lm_directory, "--text", text, "--site", "blocks.1.hook_resid_post", "--tokens", 8000,
        "--d-sae", 64, "--k", 4, "--out", out,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "CE recovered" in printed
    assert json.loads((out / "figures.json").read_text())["l0"] <= 4
    assert sb.load(out / "dictionaries" / "topk-64-k4").config.site == "blocks.1.hook_resid_post"
    assert len((TRAINING / "train_sae.py").read_text().splitlines()) < 100

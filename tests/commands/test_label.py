"""`saebench label`: labels without a model, and by one behind an endpoint on this machine, with what it costs said first."""

import json
import sys

import pytest
from features.chat_server import Server

import saebench as sb
from saebench.activations import ActivationStream
from saebench.cli import main
from saebench.features.labelling.labels import Labels
from saebench.runs import Run

SITE = "blocks.1.hook_resid_post"


@pytest.fixture
def run(tmp_path, tiny_lm, contexts, monkeypatch):
    """A run directory with one indexed dictionary."""
    stream = ActivationStream(tiny_lm, contexts, [SITE])
    run = Run.begin(tmp_path / "run", {})
    run.save()
    training = sb.TrainConfig(num_tokens=32 * 60, batch_size=32, lr=5e-3)
    sae = sb.train(sb.TopK(d_sae=40, k=4, site=SITE), stream, training)
    sae.save(tmp_path / "run" / "dictionaries" / "sae")
    sb.index(sae, stream, run.features("sae"), lm=tiny_lm)
    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def call(capsys, *arguments, code=0):
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == code
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


def test_labels_without_a_model(run, capsys):
    result, err = call(capsys, "label", "run")
    assert result["labels"]["sae"] == {"path": "run/features/sae.labels.parquet", "count": 40}
    assert "sae: 40 labels in run/features/sae.labels.parquet" in err
    labels = Labels.open(sb.FeatureStore(run.features("sae")))
    assert len(labels) == 40 and all(labels.of(latent).text for latent in range(40))
    assert call(capsys, "label", "run", "--latents", "3,5-7", "--overwrite")[0]["labels"]["sae"]["count"] == 40


def test_labels_by_an_endpoint_are_asked_for_only_after_what_they_cost_is_said(run, server, capsys, monkeypatch):
    options = ["--endpoint", server.url, "--model", "stub", "--latents", "0-9", "--prices", "1,2"]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    error, err = call(capsys, "label", "run", *options, code=2)
    assert "10 latents: up to" in err and "at the given prices" in err
    assert error["error"] == "nothing was sent: add --yes to send what was said above" and not server.requests
    result, err = call(capsys, "label", "run", *options, "--yes")
    found = result["labels"]["sae"]
    assert (
        0 < len(server.requests) <= found["calls"] and found["count"] > 0 and found["path"] == "run/features/sae.endpoint.jsonl"
    )
    sent = len(server.requests)
    assert "(" in call(capsys, "label", "run", *options, "--yes")[1] and len(server.requests) == sent  # nothing is paid for twice


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--endpoint", "http://127.0.0.1:1/v1"], "--endpoint and --model go together"),
        (["--latents", "1,x"], "--latents '1,x' is no list of latents: write one such as 3,17,100-199"),
        (["--latents", "40"], "latent 40 is not one of the 40, counted from 0"),
        (["--dictionary", "other"], "run has no feature store of 'other': it has sae; run `saebench index run`"),
        (["--endpoint", "http://127.0.0.1:1/v1", "--model", "m", "--prices", "1"], "--prices '1' are not two numbers"),
        (["--endpoint", "here", "--model", "m"], "'here' is no base URL"),
    ],
)
def test_wrong_input_is_one_line(run, capsys, options, message):
    assert message in call(capsys, "label", "run", *options, code=2)[0]["error"]


def test_a_run_without_stores_is_told(tmp_path, capsys):
    Run.begin(tmp_path / "run", {}).save()
    assert "run `saebench index" in call(capsys, "label", tmp_path / "run", code=2)[0]["error"]

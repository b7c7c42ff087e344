"""Many prompts: each graph kept as it is made, and read again only where tracing would make the same."""

import json

import numpy as np
import pytest
import torch
from mixes import TEXT

from saebench.circuits.graphs.graph_file import graph_path, load_graph
from saebench.circuits.graphs.targets import Difference, Direction, Feature, Logit
from saebench.circuits.graphs.tracing import trace
from saebench.circuits.sets import tracing_many as many
from saebench.circuits.sets.tracing_many import trace_many
from saebench.errors import UserError

PROMPTS = [TEXT, TEXT + "\n\ndef other(y):", "# the number 3"]
SETTINGS = {"max_features": 30, "keep": 20}


@pytest.fixture
def traces(monkeypatch):
    """The prompts that were traced anew."""
    made = []

    def counted(lm, dictionaries, prompt, **options):
        made.append(prompt)
        return trace(lm, dictionaries, prompt, **options)

    monkeypatch.setattr(many, "trace", counted)
    return made


def equal(one, two):
    assert one.prompt == two.prompt and one.ids == two.ids and one.labels == two.labels
    for name, column in one.nodes.__dict__.items():
        np.testing.assert_array_equal(column, getattr(two.nodes, name))
    np.testing.assert_array_equal(one.weights_E, two.weights_E)


def test_a_stopped_job_goes_on_where_it_was(models, mixed, tmp_path, traces):
    lm, dictionaries = models["gpt2"], mixed["gpt2", "lorsa"]
    job = trace_many(lm, dictionaries, PROMPTS, tmp_path, **SETTINGS)
    first, second = next(job), next(job)
    assert second.path.exists() and second.graph.origin is not None and first.graph.origin is None
    second.graph.verify(3)
    job.close()
    assert traces == PROMPTS[:2]
    done = list(trace_many(lm, dictionaries, PROMPTS, tmp_path, **SETTINGS))
    assert traces == PROMPTS and [each.loaded for each in done] == [True, True, False]
    assert [each.path.name for each in done] == [
        "def-value-3-x-return-x-3-9.json",
        "def-value-3-x-return-x-3-9-def-other-y.json",
        "the-number-3.json",
    ]
    for each, prompt in zip(done, PROMPTS, strict=True):
        fresh = trace(lm, dictionaries, prompt, **SETTINGS)
        equal(each.graph, fresh)
        equal(load_graph(each.path), fresh)


@pytest.mark.parametrize(
    "change",
    [
        {"max_features": 31},
        {"keep": 21},
        {"keep": 1.0},
        {"targets": [Logit(5)]},
        {"dictionaries": "transcoders"},
        {"lm": "llama"},
    ],
)
def test_another_model_target_or_setting_is_another_graph(models, mixed, tmp_path, traces, change):
    lm, mix = models[change.get("lm", "gpt2")], mixed[change.get("lm", "gpt2"), change.get("dictionaries", "lorsa")]
    one = next(trace_many(models["gpt2"], mixed["gpt2", "lorsa"], PROMPTS[:1], tmp_path, **SETTINGS))
    before = one.path.read_bytes()
    options = {**SETTINGS, **{name: value for name, value in change.items() if name not in ("lm", "dictionaries")}}
    other = next(trace_many(lm, mix, PROMPTS[:1], tmp_path, **options))
    assert not other.loaded and len(traces) == 2
    assert other.path == one.path.with_name("def-value-3-x-return-x-3-9-2.json") and one.path.read_bytes() == before
    again = next(trace_many(lm, mix, PROMPTS[:1], tmp_path, **options))
    assert again.loaded and again.path == other.path and len(traces) == 2


def test_targets_of_every_kind_are_known_again(models, mixed, tmp_path, traces):
    lm, dictionaries = models["llama"], mixed["llama", "transcoders"]
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    kinds = [
        [Logit(5), Logit(6)], [Logit(5)], [Logit(5, position=4)], [Difference(5, 6)], [Difference(6, 5)],
        [Direction("blocks.1.hook_resid_mid", v)],
        [Direction("blocks.1.hook_resid_mid", 2 * v)], [Feature(1, 3, 7)], [Feature(1, 3, 8)], [Feature(2, 3, 7)], None,
    ]  # fmt: skip
    for _ in range(2):
        for targets in kinds:
            next(trace_many(lm, dictionaries, PROMPTS[:1], tmp_path, targets=targets, **SETTINGS))
        assert len(traces) == len(kinds)


def test_what_is_no_graph_or_pruned_is_left_as_it_is(models, mixed, tmp_path, traces):
    lm, dictionaries = models["gpt2"], mixed["gpt2", "transcoders"]
    path = graph_path(tmp_path, "the-number-3")
    trace(lm, dictionaries, PROMPTS[2], **SETTINGS).prune().save(path)
    graph_path(tmp_path, "the-number-3-2").write_text("{")
    made = next(trace_many(lm, dictionaries, PROMPTS[2:], tmp_path, **SETTINGS))
    assert made.path.name == "the-number-3-3.json" and graph_path(tmp_path, "the-number-3-2").read_text() == "{"
    assert json.loads(path.read_text())["settings"]["node_share"] == 0.8


def test_prompts_of_one_beginning_have_files_of_their_own(models, mixed, tmp_path):
    lm, dictionaries = models["gpt2"], mixed["gpt2", "transcoders"]
    prompts = ["x = 3", "x + 3", lm.prompt_ids("x * 3")]
    for _ in range(2):
        names = [each.path.name for each in trace_many(lm, dictionaries, prompts, tmp_path, **SETTINGS)]
        assert names == ["x-3.json", "x-3-2.json", "x-3-3.json"]


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "there is no prompt"),
        (["x", "y", "x"], "prompt 3 is the same as prompt 1"),
        (["x", ""], "the prompt is empty"),
        (["x", "x " * 200], "exceeds the model's 64 positions"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_traced(models, mixed, tmp_path, traces, prompts, message):
    with pytest.raises(UserError, match=message):
        list(trace_many(models["gpt2"], mixed["gpt2", "transcoders"], prompts, tmp_path, **SETTINGS))
    assert not traces and not (tmp_path / "graphs").exists()

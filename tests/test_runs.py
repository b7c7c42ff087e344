"""Run directories: what may be begun where, what is opened, and that nothing foreign is touched."""

import json
import shutil

import pytest

from saebench.config import first_difference
from saebench.errors import UserError
from saebench.runs import Run, versions

RECIPE = {"name": "r", "activations": {"sites": ["a"], "path": None}, "training": {"lr": 0.01, "betas": [0.9, 0.999]}}


@pytest.fixture
def run(tmp_path):
    """A finished run with one dictionary."""
    run = Run.begin(tmp_path / "run", RECIPE)
    run.record["finished"] = True
    run.save()
    (run.path / "dictionaries" / "sae").mkdir(parents=True)
    (run.path / "metrics.jsonl").write_text("{}\n")
    run.write_evaluation("core", {"sae": {"fvu": 0.5}})
    return run


def tree(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ({"x": 1}, {"x": 1}, None),
        ({"x": 1}, {"x": 2}, ("x", 1, 2)),
        ({"x": {"y": 1, "z": 2}}, {"x": {"y": 1, "z": 3}}, ("x.z", 2, 3)),
        ({"x": [1, {"y": 2}]}, {"x": [1, {"y": 3}]}, ("x.1.y", 2, 3)),
        ({"x": [1]}, {"x": [1, 2]}, ("x", [1], [1, 2])),
        ({"x": 1, "y": 2}, {"x": 1, "z": 3}, ("y", 2, None)),
        ({}, {"z": 3}, ("z", None, 3)),
        ({"x": None}, {}, None),
        ({"x": {"y": 1}}, {"x": 1}, ("x", {"y": 1}, 1)),
        ({"x": 0, "y": 0}, {"x": False, "y": 1}, ("y", 0, 1)),
    ],
)
def test_the_first_difference(a, b, expected):
    assert first_difference(a, b) == expected


def test_beginning_writes_nothing_before_it_is_saved(tmp_path):
    run = Run.begin(tmp_path / "deep" / "run", RECIPE)
    assert tree(tmp_path) == []
    assert not run.finished
    run.save()
    assert tree(tmp_path) == ["deep", "deep/run", "deep/run/run.json"]
    record = json.loads((tmp_path / "deep" / "run" / "run.json").read_text())
    assert (record["format"], record["version"], record["name"], record["finished"]) == ("saebench-run", 1, "run", False)
    assert record["recipe"] == RECIPE
    assert record["versions"] == versions()


def test_the_same_recipe_takes_up_the_run(run):
    again = Run.begin(run.path, json.loads(json.dumps(RECIPE)))
    assert again.finished
    assert again.record == run.record
    assert again.evaluation("core") == {"sae": {"fvu": 0.5}}
    assert again.evaluation("other") is None
    assert list(again.dictionaries()) == ["sae"]


def test_another_recipe_is_named_and_touches_nothing(run):
    before = tree(run.path)
    changed = RECIPE | {"training": {"lr": 0.02, "betas": [0.9, 0.999]}}
    with pytest.raises(
        UserError, match=r"another recipe \(training.lr: 0.01 there, 0.02 here\): use --overwrite or another --out"
    ):
        Run.begin(run.path, changed)
    assert tree(run.path) == before


def test_overwriting_removes_what_the_old_run_wrote_and_nothing_else(run):
    (run.path / "notes.txt").write_text("mine")
    before = tree(run.path)
    fresh = Run.begin(run.path, RECIPE | {"name": "s"}, overwrite=True)
    assert tree(run.path) == before
    assert not fresh.finished
    fresh.save()
    assert tree(run.path) == ["notes.txt", "run.json"]
    assert Run.open(run.path).record["recipe"]["name"] == "s"
    (run.path / "metrics.jsonl").write_text("{}\n")
    fresh.save()
    assert "metrics.jsonl" in tree(run.path)


def test_a_kill_while_overwriting_leaves_an_unfinished_run(run, monkeypatch):
    def killed(path):
        raise SystemExit

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(SystemExit):
        Run.begin(run.path, RECIPE | {"name": "s"}, overwrite=True).save()
    left = Run.open(run.path)
    assert not left.finished
    with pytest.raises(UserError, match="no trained dictionaries yet"):
        left.dictionaries()


def test_leftovers_of_a_killed_beginning_do_no_harm(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.partial").write_text("{")
    Run.begin(tmp_path / "run", RECIPE).save()
    assert tree(tmp_path / "run") == ["run.json"]


def test_a_store_inside_the_run_is_no_obstacle(tmp_path):
    (tmp_path / "run" / "acts").mkdir(parents=True)
    (tmp_path / "run" / "acts" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not empty and holds no run"):
        Run.begin(tmp_path / "run", RECIPE)
    inside = RECIPE | {"activations": {"path": str(tmp_path / "run" / "acts")}}
    Run.begin(tmp_path / "run", inside).save()
    Run.begin(tmp_path / "run", RECIPE, overwrite=True).save()
    assert tree(tmp_path / "run") == ["acts", "acts/manifest.json", "run.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_places_are_refused(tmp_path, overwrite):
    (tmp_path / "file").write_text("x")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(UserError, match="file is a file: name a directory for the run"):
        Run.begin(tmp_path / "file", RECIPE, overwrite=overwrite)
    with pytest.raises(UserError, match="thesis is not empty and holds no run: name another directory"):
        Run.begin(tmp_path / "thesis", RECIPE, overwrite=overwrite)
    (tmp_path / "thesis" / "run.json").write_text('{"format": "something else"}')
    with pytest.raises(UserError, match="run.json is not of format saebench-run"):
        Run.begin(tmp_path / "thesis", RECIPE, overwrite=overwrite)
    assert tree(tmp_path) == ["file", "thesis", "thesis/chapter.tex", "thesis/run.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "run.json is of version 2; this saebench reads version 1"),
        ({"format": "x"}, "run.json is not of format saebench-run"),
        ({"colour": "red"}, "run.json has unknown fields: colour"),
        (None, "run.json lacks the fields activations, finished"),
        ("{", "run.json is damaged"),
    ],
)
def test_only_runs_of_this_version_are_opened(run, change, message):
    record = {"format": "saebench-run", "version": 1} if change is None else change
    record = record if isinstance(record, str) else json.dumps(record if change is None else run.record | record)
    (run.path / "run.json").write_text(record)
    with pytest.raises(UserError, match=message):
        Run.open(run.path)


def test_what_is_no_run_is_not_opened(tmp_path):
    with pytest.raises(UserError, match="is not a run directory: it has no run.json"):
        Run.open(tmp_path)
    with pytest.raises(UserError, match="is not a run directory"):
        Run.open(tmp_path / "nowhere")

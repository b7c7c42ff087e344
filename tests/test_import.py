"""What the package costs before it does anything, and that nothing it reads or writes is pickled."""

import ast
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import SITES

import saebench as sb

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "saebench").rglob("*.py"), *(ROOT / "training").rglob("*.py")])
PICKLING_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING_CALLS = {
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "torch.jit.save",
    "np.load",
    "np.save",
    "numpy.load",
    "numpy.save",
}


def best_of_three(*arguments):
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def test_the_import_is_quick_and_light():
    script = "import sys, saebench; print(*sorted({'torch', 'transformers', 'transformer_lens', 'plotly'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
    assert best_of_three("-c", "import saebench") < 1.0


def test_help_is_quick():
    assert best_of_three("-m", "saebench", "--help") < 1.5


def test_every_public_name_is_there():
    for name in sb.__all__:
        assert getattr(sb, name) is not None
        assert name in dir(sb)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = sb.trian


def pickling(tree):
    """The lines of a module that import or call something that pickles."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names} & PICKLING_MODULES
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = {module.partition(".")[0]} & PICKLING_MODULES
            names |= {f"{module}.{alias.name}" for alias in node.names} & PICKLING_CALLS
        elif isinstance(node, ast.Attribute):
            names = {ast.unparse(node)} & PICKLING_CALLS
        elif isinstance(node, ast.keyword):
            names = {node.arg or ""} & {"allow_pickle"}
        else:
            continue
        if names:
            yield node.lineno if hasattr(node, "lineno") else 0, names


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_file_pickles(source):
    assert list(pickling(ast.parse(source.read_text(encoding="utf-8")))) == []


def test_the_search_for_pickling_finds_it():
    code = (
        "import pickle\nfrom torch import save\ntorch.load(x)\nnp.load(y, allow_pickle=True)\nimport json, os.path\njson.load(z)"
    )
    assert {line for line, _ in pickling(ast.parse(code))} == {1, 2, 3, 4}


def test_nothing_is_pickled_while_harvesting_training_saving_and_loading(make_store, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("something is being pickled")

    for module, name in [(pickle, name) for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler")] + [
        (torch, "load"),
        (torch, "save"),
    ]:
        monkeypatch.setattr(module, name, refuse)
    store = make_store()
    training = sb.TrainConfig(num_tokens=640, batch_size=64, lr=1e-2, checkpoint_every=3, log_every=2)
    config = sb.TopK(d_sae=32, k=4, site=SITES[0])
    sae = sb.train(config, store, training, out=tmp_path / "run")
    again = sb.train(config, store, training, out=tmp_path / "run")
    sae.save(tmp_path / "saved")
    for path in (tmp_path / "saved", tmp_path / "run" / "dictionaries" / "topk-32-k4"):
        assert torch.equal(sb.load(path).W_dec, again.W_dec)
    names = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert names == {".json", ".jsonl", ".safetensors"}

"""An architecture from outside the package, word for word the one on docs/new-dictionary.md."""

import json
import re
from pathlib import Path

import pytest
import torch

import saebench as sb
from saebench.activations import TensorSource
from saebench.cli import main
from saebench.dictionaries import base
from saebench.evaluation import evaluate
from saebench.features import index
from saebench.trainer import TrainConfig

PAGE = Path(__file__).parent.parent.parent / "docs" / "new-dictionary.md"


@pytest.fixture
def my_sae(tmp_path):
    """The page's Python file, forgotten again afterwards."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    path = tmp_path / "my_sae.py"
    path.write_text(code)
    yield path
    for registry in (base.CONFIGS, base.DICTIONARIES):
        registry.pop("margin", None)


def test_trained_saved_loaded_and_indexed_from_a_recipe(my_sae, tmp_path, tiny_lm_directory, tiny_lm, contexts, capsys):
    (tmp_path / "text.txt").write_text("def value(x):\n    return x * 3  # the number and the name\n\n" * 200)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"""
name = "outside"
modules = ["{my_sae}"]
[model]
name = "{tiny_lm_directory}"
[text]
source = "{tmp_path}/text.txt"
[activations]
sites = ["blocks.1.hook_resid_post"]
context_size = 16
mode = "stream"
[[dictionaries]]
architecture = "margin"
id = "mine"
d_sae = 64
margin = 0.3
[training]
num_tokens = 6400
batch_size = 64
lr = 0.01
""")
    run = tmp_path / "run"
    assert main(["train", str(recipe), "--out", str(run), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])["training"]["mine"]
    assert trained["l1"] > 0 and trained["fvu"] < 1
    assert main(["evaluate", str(run), "--json"]) == 0

    sae = sb.load(run / "dictionaries" / "mine")
    stream = sb.ActivationStream(tiny_lm, contexts, ["blocks.1.hook_resid_post"])
    x = stream.fetch(torch.arange(4), ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"].values[:, 1:].flatten(0, 1)
    assert sae.encode(x).values.min() > float(sae.threshold) > 0
    read = stream.fetch(torch.arange(len(contexts)), list(stream.widths))["blocks.1.hook_resid_post"].values
    assert index(sae, stream, tmp_path / "features").num_entries == int(sae.encode_contexts(read).l0().sum())
    assert 0 < evaluate(sae, tiny_lm, contexts[:8])["fvu"] < 1


def test_the_threshold_is_folded_along(my_sae):
    from saebench.recipes import import_module

    import_module(str(my_sae))
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)) * 7 + 2
    config = base.parse_dictionary({"architecture": "margin", "d_sae": 24, "margin": 0.5}, "here")
    from saebench.trainer import Member

    member = Member.create(config, TrainConfig(), x)
    normal, raw = member.dictionary, member.finished()
    before, after = normal.encode(member.read(x)), raw.encode(x)
    assert torch.equal(before.indices, after.indices)
    scale = float(member.read.scale_D[0])
    torch.testing.assert_close(raw.decode(after), normal.decode(before) / scale)


@pytest.mark.parametrize(
    ("content", "message"),
    [("import nothing_of_this_name", "ModuleNotFoundError"), ("1 / 0", "ZeroDivisionError"), (None, "cannot be imported")],
)
def test_a_module_that_fails_is_named(tmp_path, content, message):
    from saebench.errors import UserError
    from saebench.recipes import import_module

    path = tmp_path / "broken.py"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        import_module(str(path))


def test_training_on_given_tensors():
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(1))
    sae = sb.train(
        sb.TopK(d_sae=32, k=4), TensorSource({"embedding": x}), TrainConfig(num_tokens=20_000, batch_size=256, lr=0.01)
    )
    assert sae.config.site == "embedding"
    assert float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()) < 0.5

"""Presets: written, read, refused."""

import json

import pytest

from saebench.errors import UserError
from saebench.steering.presets import Preset, Setting, presets


def preset(**changes):
    setting = Setting(dictionary="topk-64", latents=(3, 5), how="clamp", value=4.0, strength=0.5, positions="after:=")
    return Preset(**{"name": "more numbers", "edits": (setting,), "prompt": "def value", **changes})


def test_what_is_saved_is_opened(tmp_path, kinds, tiny_lm):
    made = preset(model=tiny_lm.fingerprint)
    path = made.save(tmp_path)
    assert path == tmp_path / "steering" / "more numbers.json" and presets(tmp_path) == {"more numbers": path}
    opened = Preset.open(path)
    assert opened == made
    (edit,) = opened.made({"topk-64": kinds["topk"]}, tiny_lm)
    assert (edit.how, edit.latents, edit.value, edit.strength, str(edit.positions)) == ("clamp", (3, 5), 4.0, 0.5, "after:=")
    assert edit.dictionary is kinds["topk"]


def test_a_weighted_direction_comes_back(tmp_path, kinds, tiny_lm):
    import torch

    setting = Setting(dictionary="d", latents=(3, 5), weights=(1.0, 2.0), strength=3.0)
    (edit,) = Preset(name="w", edits=(setting,)).made({"d": kinds["topk"]}, tiny_lm)
    expected = kinds["topk"].W_dec[3] + 2 * kinds["topk"].W_dec[5]
    torch.testing.assert_close(edit.vectors[0][0], expected / expected.norm())


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 81])
def test_names_are_file_names(name, tmp_path):
    with pytest.raises(UserError, match="no name for a preset"):
        preset(name=name).save(tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_wrong_presets_are_one_line(tmp_path, kinds, tiny_lm):
    path = preset().save(tmp_path)
    found = json.loads(path.read_text())
    for change, said in (
        ({"format": "other"}, "is not a saebench-steering"),
        ({"version": 9}, "version 9"),
        ({"colour": 1}, "unknown key"),
        ({"edits": []}, "edits"),
        ({"edits": [{"dictionary": "d", "latents": [1], "strength": float("nan")}]}, "strength"),
    ):
        path.write_text(json.dumps(found | change))
        with pytest.raises(UserError, match=said) as error:
            Preset.open(path)
        assert "\n" not in str(error.value)
    path.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Preset.open(path)
    with pytest.raises(UserError, match="is missing"):
        Preset.open(tmp_path / "none.json")
    with pytest.raises(UserError, match="'topk-64' is not in the run: it has other"):
        preset().made({"other": kinds["topk"]}, tiny_lm)
    with pytest.raises(UserError, match="other weights"):
        preset(model="abc").made({"topk-64": kinds["topk"]}, tiny_lm)
    with pytest.raises(UserError, match="positions 'nowhere'"):
        Preset(name="n", edits=(Setting(dictionary="d", latents=(1,), positions="nowhere"),)).save(tmp_path)

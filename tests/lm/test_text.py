import json

import pytest

from saebench.errors import UserError
from saebench.lm import builtin_text, load_text
from saebench.lm.text import is_held_out


def test_builtin_text_is_split_whole_by_module():
    train, held_out, everything = ({d.name for d in builtin_text(split)} for split in ("train", "held_out", "all"))
    assert train | held_out == everything
    assert not train & held_out
    assert 0.02 < len(held_out) / len(everything) < 0.1
    assert "argparse.py" in everything
    assert not any("test" in name.split("/") or name.startswith(("idlelib", "lib2to3", "pydoc_data")) for name in everything)


def test_held_out_modules_do_not_depend_on_the_version():
    names = ("ast.py", "abc.py", "json/decoder.py", "asyncio/tasks.py", "typing.py")
    assert [name for name in names if is_held_out(name)] == ["ast.py"]
    assert is_held_out(next(d.name for d in builtin_text("held_out")))


def test_files_directories_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("two", " ", "three")))
    (tmp_path / "c.json").write_text(json.dumps(["four"]))
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    assert [tuple(d) for d in load_text(tmp_path)] == [
        ("a.txt", "one"),
        ("b.jsonl:0", "two"),
        ("b.jsonl:2", "three"),
        ("c.json:0", "four"),
    ]
    assert [d.text for d in load_text(tmp_path / "a.txt")] == ["one"]


def test_datasets_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"body": ["x y", "z"]}).save_to_disk(tmp_path / "ds")
    assert [d.text for d in load_text(f"hf:{tmp_path / 'ds'}", column="body")] == ["x y", "z"]
    with pytest.raises(UserError, match="no column 'text'"):
        list(load_text(f"hf:{tmp_path / 'ds'}"))
    with pytest.raises(UserError, match="cannot open data set 'nobody/none'"):
        list(load_text("hf:nobody/none"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("{", "not valid JSON"),
        ('[{"a": 1}]', "no text in column 'text'"),
        ('{"text": "x"}', "must hold a list"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        list(load_text(path))


def test_missing_text_says_what_can_be_given(tmp_path):
    with pytest.raises(UserError, match="not found: give builtin, a file"):
        load_text("nowhere.txt")
    with pytest.raises(UserError, match="no text files"):
        load_text(tmp_path)
    with pytest.raises(UserError, match="unknown split"):
        load_text("builtin:test")

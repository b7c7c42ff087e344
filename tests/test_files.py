import errno
import json

import pytest
import torch

from saebench import files
from saebench.errors import UserError


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.json"
    files.write_json(target, {"x": 1})
    with pytest.raises(RuntimeError), files.replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(target.read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), files.replacing_directory(tmp_path / "d") as temporary:
        (temporary / "x").write_text("1")
        raise RuntimeError
    assert not any(tmp_path.iterdir())
    with files.replacing_directory(tmp_path / "d") as temporary:
        (temporary / "x").write_text("1")
    assert (tmp_path / "d" / "x").read_text() == "1"


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(UserError, match="no space left while writing .*a.bin"), files.replacing(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_damaged_and_missing_tensors_are_named(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(UserError, match="missing"):
        files.read_tensors(path)
    files.write_tensors(path, {"a": torch.arange(4)})
    assert files.read_tensors(path)["a"].tolist() == [0, 1, 2, 3]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="damaged"):
        files.read_tensors(path)


def test_manifest_errors_name_what_is_wrong(tmp_path):
    (tmp_path / "f").write_text("content")
    hashes = {"f": files.sha256(tmp_path / "f")}
    files.write_manifest(tmp_path, "thing", 2, {"a": 1}, hashes)
    assert files.read_manifest(tmp_path, "thing", 2, {"a"})["a"] == 1
    files.check_files(tmp_path, hashes)
    for arguments, message in {
        ("other", 2, frozenset("a")): "not a other",
        ("thing", 3, frozenset("a")): "version 2; this saebench reads version 3",
        ("thing", 2, frozenset()): "unknown fields: a",
        ("thing", 2, frozenset("ab")): "lacks the fields b",
    }.items():
        with pytest.raises(UserError, match=message):
            files.read_manifest(tmp_path, *arguments)
    (tmp_path / "f").write_text("contenT")
    with pytest.raises(UserError, match="f is damaged"):
        files.check_files(tmp_path, hashes)

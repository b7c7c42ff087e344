import errno
import json
import subprocess
import sys

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


HOLDER = """
import sys
from pathlib import Path
from saebench.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
    Path(sys.argv[2]).write_text("done")
"""


def test_a_lock_is_of_one_process(tmp_path):
    """Another process holds it: who says what is busy is refused at once, who does not waits for its end."""
    lock, done = tmp_path / "lock", tmp_path / "done"
    lock.write_text("content")
    command = [sys.executable, "-c", HOLDER, str(lock), str(done)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match="^another process is reading a: wait until it is done$"),
            files.locked(lock, "reading a"),
        ):
            raise AssertionError
        assert not done.exists()
        holder.stdin.write("\n")
        holder.stdin.flush()
        with files.locked(lock):
            assert done.read_text() == "done"
    with files.locked(lock, "reading a"), pytest.raises(UserError, match="another process"), files.locked(lock, "reading b"):
        raise AssertionError  # another handle of the same process is refused as well
    with pytest.raises(RuntimeError), files.locked(lock):
        raise RuntimeError
    with files.locked(lock, "reading a"):  # free again after an exception
        assert lock.read_text() == "content"

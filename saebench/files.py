"""How anything is written: safetensors and JSON under a directory with a `manifest.json`, atomically, and checked on reading.

A file appears under its name only when it is whole: it is written beside its place, flushed to the disk and renamed. A
directory does the same as a whole. The manifest names the format, its version and the SHA-256 of every file; no pickle anywhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from saebench.errors import UserError

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """Content hash of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(value: Any) -> str:
    """A short content hash of anything JSON can hold: the name of a configuration."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the given temporary path; on leaving without an exception it takes the place of `path` at once.

    A full disk becomes a `UserError` that names the file, and the partial file is removed.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name_full_disk(error, path)
        raise


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """As `replacing`, for a directory with everything in it; `path` must not exist yet."""
    temporary = path.with_name(f".{path.name}.partial")
    if temporary.exists():
        shutil.rmtree(temporary)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        temporary.replace(path)
        _flush(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _name_full_disk(error, path)
        raise


def _name_full_disk(error: BaseException, path: Path) -> None:
    if is_disk_full(error):
        raise UserError(f"no space left while writing {path}: free some space and run the command again to continue") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception of Python or of safetensors says that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and ("No space left" in str(error) or "quota" in str(error).lower())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Nobody else holds the lock of a file while the block runs. The file is made where it is missing; what is in it stays.

    Waits until it is free, or, where `busy` says what its holder is doing, raises UserError: "another process is {busy}".
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise UserError(f"another process is {busy}: wait until it is done") from None
        yield


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises UserError where the file is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file atomically."""
    with replacing(path) as temporary:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, metadata=dict(metadata or {}))


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file. Raises UserError where it is missing or damaged."""
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safetensors handle is no mapping)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


MAPPED = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
}


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as views of the mapped file (bfloat16 as its bits): nothing is read until it is used."""
    mapped = np.memmap(path, mode="r")
    length = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    header = json.loads(mapped[8:length].tobytes())
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (length + offset for offset in entry["data_offsets"])
            tensors[name] = np.asarray(mapped[start:stop]).view(MAPPED[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def write_manifest(
    directory: Path, format_name: str, version: int, content: Mapping[str, Any], files: Mapping[str, str], name: str = MANIFEST
) -> None:
    """Write the manifest of a directory: format, version, the SHA-256 of its files and whatever describes them."""
    write_json(directory / name, {"format": format_name, "version": version, **content, "files": dict(files)})


def read_manifest(directory: Path, format_name: str, version: int, fields: set[str], name: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a directory; UserError names a missing one, another format or version, and unknown or missing fields."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    if not (directory / name).exists():
        raise UserError(f"{directory} is not a {format_name}: it has no {name}")
    manifest = read_json(directory / name)
    if not isinstance(manifest, dict) or manifest.get("format") != format_name:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise UserError(f"{directory} is not a {format_name}: its manifest says {found!r}")
    if manifest.get("version") != version:
        raise UserError(
            f"{directory} is a {format_name} of version {manifest.get('version')}; this saebench reads version {version}"
        )
    expected = fields | {"format", "version", "files"}
    if unknown := sorted(set(manifest) - expected):
        raise UserError(f"{directory / name} has unknown fields: {', '.join(unknown)}")
    if missing := sorted(expected - set(manifest)):
        raise UserError(f"{directory / name} lacks the fields {', '.join(missing)}")
    return manifest


def check_files(directory: Path, files: Mapping[str, str]) -> None:
    """Compare every file with its hash; UserError names the first that is missing or differs."""
    for name, expected in files.items():
        path = directory / name
        if not path.exists():
            raise UserError(f"{path} is missing: the manifest lists it")
        if sha256(path) != expected:
            raise UserError(f"{path} is damaged: its content does not match its recorded hash")

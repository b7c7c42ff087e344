"""Checkpoints: everything a run needs to go on bit for bit. Written whole or not at all; the latest two are kept.

checkpoint/step-00001000/manifest.json, ID.safetensors for each dictionary
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from saebench.errors import UserError
from saebench.files import check_files, read_manifest, read_tensors, replacing_directory, sha256, write_manifest, write_tensors
from saebench.progress import say

FORMAT, VERSION = "saebench-checkpoint", 2
FIELDS = {"step", "position", "metrics_bytes", "seconds", "settings"}
KEPT = 2


def write_checkpoint(directory: Path, states: dict[str, dict[str, Tensor]], progress: dict[str, Any]) -> None:
    """Write the states of all members and the loop's own (`FIELDS`), then remove older checkpoints."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{progress['step']:08d}"
    for stale in [path, *directory.glob(".step-*.partial")]:  # a damaged one of the same step, or what a kill left behind
        shutil.rmtree(stale, ignore_errors=True)
    with replacing_directory(path) as temporary:
        for name, tensors in states.items():
            write_tensors(temporary / f"{name}.safetensors", tensors)
        files = {f"{name}.safetensors": sha256(temporary / f"{name}.safetensors") for name in states}
        write_manifest(temporary, FORMAT, VERSION, progress, files)
    for old in _complete(directory)[:-KEPT]:
        shutil.rmtree(old)


def read_checkpoint(directory: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The states and progress of the newest intact checkpoint, or None where there is none.

    A damaged newest one is named and the one before it used; raises UserError when all are damaged.
    """
    problems = []
    for path in reversed(_complete(directory)):
        try:
            manifest = read_manifest(path, FORMAT, VERSION, FIELDS)
            check_files(path, manifest["files"])
            states = {name.removesuffix(".safetensors"): read_tensors(path / name) for name in manifest["files"]}
        except UserError as error:
            say(f"checkpoint {path.name} is damaged ({error}); trying the one before it")
            problems.append(error)
            continue
        return states, {field: manifest[field] for field in FIELDS}
    if problems:
        raise UserError(f"no checkpoint in {directory} is intact: train again with --overwrite ({problems[0]})")
    return None


def _complete(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*")) if directory.is_dir() else []

"""A run directory: the unit a person keeps, copies and opens. Layout in docs/formats.md.

run.json, metrics.jsonl, dictionaries/ID/, checkpoint/, evals/*.json, report.html
"""

from __future__ import annotations

import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from saebench.config import first_difference
from saebench.errors import UserError
from saebench.files import read_json, write_json

FORMAT, VERSION = "saebench-run", 1
FIELDS = {"format", "version", "name", "started", "finished", "recipe", "versions", "model", "activations", "seconds"}
RUN = "run.json"
WRITTEN = ("metrics.jsonl", "report.html", "checkpoint", "dictionaries", "evals", "features", "tensorboard", "wandb")
VERSIONED = ("saebench", "torch", "transformers", "transformer-lens", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class Run:
    """One run directory and its `run.json`."""

    def __init__(self, path: Path, record: dict[str, Any]):
        self.path, self.record = path, record
        self._replaces: Run | None = None

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Raises UserError where there is no run of this version."""
        path = Path(path)
        if not (path / RUN).exists():
            raise UserError(f"{path} is not a run directory: it has no {RUN}")
        record = read_json(path / RUN)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise UserError(f"{path / RUN} is not of format {FORMAT}")
        if record.get("version") != VERSION:
            raise UserError(f"{path / RUN} is of version {record.get('version')}; this saebench reads version {VERSION}")
        if unknown := sorted(set(record) - FIELDS):
            raise UserError(f"{path / RUN} has unknown fields: {', '.join(unknown)}")
        if missing := sorted(FIELDS - set(record)):
            raise UserError(f"{path / RUN} lacks the fields {', '.join(missing)}")
        return cls(path, record)

    @classmethod
    def begin(cls, path: str | Path, recipe: dict[str, Any], *, overwrite: bool = False) -> Run:
        """A new run, or the one in `path` when it has the same recipe. Raises UserError where another run, or anything else,
        stands there, unless a run is to be overwritten. Nothing is written or removed before the first `save()`."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: name a directory for the run")
        replaced = None
        if path.exists() and any(_is_foreign(p, recipe) for p in path.iterdir()):
            if not (path / RUN).exists():
                raise UserError(f"{path} is not empty and holds no run: name another directory")
            found = cls.open(path)
            if not overwrite:
                if difference := first_difference(found.record["recipe"], recipe):
                    key, there, here = difference
                    raise UserError(
                        f"{path} holds a run with another recipe ({key}: {there!r} there, {here!r} here): use --overwrite or another --out"
                    )
                return found
            replaced = found
        record = {
            "format": FORMAT,
            "version": VERSION,
            "name": path.name,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "finished": False,
            "recipe": recipe,
            "versions": versions(),
            "model": {},
            "activations": {},
            "seconds": {},
        }
        run = cls(path, record)
        run._replaces = replaced
        return run

    @property
    def finished(self) -> bool:
        return bool(self.record["finished"])

    def features(self, dictionary: str) -> Path:
        """Where the feature store of a dictionary is, or would be."""
        return self.path / "features" / dictionary

    def dictionaries(self) -> dict[str, Path]:
        """Paths of the trained dictionaries by id. Raises UserError where there are none."""
        found = {p.name: p for p in sorted((self.path / "dictionaries").glob("*")) if p.is_dir() and not p.name.startswith(".")}
        if not found or not self.finished:
            raise UserError(f"{self.path} has no trained dictionaries yet: run `saebench train` to the end first")
        return found

    def write_evaluation(self, suite: str, results: dict[str, Any]) -> Path:
        """Write evals/SUITE.json."""
        path = self.path / "evals" / f"{suite}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(
            path, {"format": "saebench-evaluation", "version": 1, "suite": suite, "versions": versions(), "dictionaries": results}
        )
        return path

    def evaluation(self, suite: str) -> dict[str, Any] | None:
        """Figures by dictionary id, or None before they were measured."""
        path = self.path / "evals" / f"{suite}.json"
        return read_json(path)["dictionaries"] if path.exists() else None

    def save(self) -> None:
        """Write run.json; the first time also remove the run that this one overwrites."""
        if self._replaces is not None:
            self._replaces._clear()
            self._replaces = None
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / RUN, self.record)

    def _clear(self) -> None:
        """Remove what the run wrote, run.json apart: it says first that the run is unfinished, so a kill in between does no harm."""
        self.record["finished"] = False
        self.save()
        for name in WRITTEN:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _is_foreign(path: Path, recipe: dict[str, Any]) -> bool:
    """Whether something in a directory without run.json is neither a leftover of writing that nor the recipe's own store."""
    store = recipe.get("activations", {}).get("path")
    return path.name != f".{RUN}.partial" and not (store and Path(store).resolve().is_relative_to(path.resolve()))

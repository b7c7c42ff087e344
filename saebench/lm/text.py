"""Where text comes from: the bundled corpus, plain files, directories, JSON lines, or a Hugging Face data set.

Everything downstream sees a `Text`: a name and a way to iterate over named documents, as often as needed. The bundled corpus
is the source text of the running Python's standard library: real, on every machine, and free of a download.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from saebench.errors import UserError

HELD_OUT_ONE_IN = 20
SKIPPED_PARTS = {
    "test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages", "__pycache__",
    "lib-dynload", "turtledemo", "_bundled",
}  # fmt: skip
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".text", ".json", ".jsonl"}


class Document(NamedTuple):
    """One text with the name it is shown under (a module path, a file name, a row number)."""

    name: str
    text: str


@dataclass(frozen=True)
class Text:
    """A named collection of documents that can be iterated over repeatedly, always in the same order."""

    name: str
    read: Callable[[], Iterable[Document]]

    def __iter__(self) -> Iterator[Document]:
        return iter(self.read())


def builtin_text(split: str = "train") -> Text:
    """The standard library's modules, without tests, generated tables and optional tools.

    `split` is `train`, `held_out` (one module in twenty, whole, chosen by a hash of its path, so that the choice is the
    same on every Python version) or `all`. Raises UserError for another split and where Python was
    installed without its sources.
    """
    if split not in {"train", "held_out", "all"}:
        raise UserError(f"unknown split {split!r} of the builtin text: use train, held_out or all")
    root = Path(sysconfig.get_paths()["stdlib"])

    def read() -> Iterator[Document]:
        found = False
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if SKIPPED_PARTS & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
                continue
            if split != "all" and is_held_out(relative.as_posix()) != (split == "held_out"):
                continue
            text = _read_utf8(path)
            if relative.parts[0] == "encodings" and "decoding_" in text:  # character tables, not prose or code
                continue
            if text.strip():
                found = True
                yield Document(relative.as_posix(), text)
        if not found:
            raise UserError(f"no standard library sources under {root}: pass a text file or directory instead")

    return Text("builtin" if split == "train" else f"builtin:{split}", read)


def is_held_out(module: str) -> bool:
    """Whether the module at this path relative to the library's root is kept out of the language model's training."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def load_text(spec: str | Path | Text, *, split: str | None = None, column: str = "text") -> Text:
    """Open a text by name: `builtin`, `builtin:held_out`, a file, a directory, or `hf:NAME[:CONFIG]` for a data set.

    Files ending in .jsonl hold one object a line whose `column` is the text; .json a list of such objects or strings; any
    other file is one document. A directory is all its text files, sorted by path. `split` and `column` select inside a
    Hugging Face data set (default split `train`). Raises UserError naming what is wrong.
    """
    if isinstance(spec, Text):
        return spec
    name = str(spec)
    if name == "builtin" or name.startswith("builtin:"):
        return builtin_text(name.partition(":")[2] or split or "train")
    if name.startswith("hf:"):
        return _hugging_face_text(name, split or "train", column)
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"no text files in {path}: expected files ending in {', '.join(sorted(TEXT_SUFFIXES))}")
        return Text(name, lambda: (d for f in files for d in _read_documents(f, f.relative_to(path).as_posix(), column)))
    if path.is_file():
        if path.stat().st_size == 0:
            raise UserError(f"text file {path} is empty")
        return Text(name, lambda: _read_documents(path, path.name, column))
    raise UserError(f"text {name!r} not found: give builtin, a file, a directory, or hf:NAME for a data set")


def _read_documents(path: Path, name: str, column: str) -> Iterator[Document]:
    if path.suffix.lower() in {".jsonl", ".json"}:
        text = _read_utf8(path)
        rows = text.splitlines() if path.suffix.lower() == ".jsonl" else None
        try:
            items = [json.loads(row) for row in rows if row.strip()] if rows is not None else json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(items, list):
            raise UserError(f"{path} must hold a list of texts or of objects with a {column!r} column")
        for number, item in enumerate(items):
            value = item.get(column) if isinstance(item, dict) else item
            if not isinstance(value, str):
                raise UserError(f"{path}, item {number}: no text in column {column!r}")
            if value.strip():
                yield Document(f"{name}:{number}", value)
        return
    text = _read_utf8(path)
    if text.strip():
        yield Document(name, text)


def _read_utf8(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _hugging_face_text(name: str, split: str, column: str) -> Text:
    dataset, _, config = name.removeprefix("hf:").partition(":")

    def read() -> Iterator[Document]:
        try:
            import datasets  # heavy: imported only by those who name a data set
        except ImportError:
            raise UserError(f"text {name!r} needs the datasets package: pip install 'saebench[datasets]'") from None
        try:
            if Path(dataset).is_dir():
                opened = datasets.load_from_disk(dataset)
                rows = opened[split] if isinstance(opened, datasets.DatasetDict) else opened
            else:
                rows = datasets.load_dataset(dataset, config or None, split=split, streaming=True)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"cannot open data set {dataset!r} ({reason}): check name, config, split and network") from error
        for number, row in enumerate(rows):
            if column not in row:
                raise UserError(f"data set {dataset} has no column {column!r}: it has {', '.join(row)}")
            if row[column].strip():
                yield Document(f"{dataset}:{number}", row[column])

    return Text(name, read)

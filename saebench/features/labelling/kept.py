"""Labels from an endpoint, kept line by line as they arrive in `ID.endpoint.jsonl` beside the store: what was paid for is never lost.

A line that a kill cut short does not count and is cut off when the file is next written to. The format is in docs/formats.md.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO

from saebench.errors import UserError
from saebench.features.labelling.label import Label
from saebench.files import locked

FORMAT, VERSION = "saebench-endpoint-labels", 1


class KeptLabels:
    """The endpoint's labels of one dictionary."""

    def __init__(self, path: Path, dictionary: str):
        """`dictionary` is its hash: labels of another are left alone and not shown. They outlive the store they were made from."""
        self.path, self.dictionary = path, dictionary
        self._writing = threading.Lock()

    def read(self) -> dict[int, Label]:
        """The labels by latent, the latest of each. Raises UserError naming a damaged line."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        found = {}
        for number, line in enumerate(lines[:-1], 1):  # behind the last line end there is nothing, or what a kill cut short
            try:
                record = json.loads(line)
                kind, dictionary = (record["format"], record["version"]), record["dictionary"]
                label = Label(**record["label"]) if kind == (FORMAT, VERSION) else None
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path} is damaged in line {number}: remove that line, the others are whole") from None
            if label is None:
                raise UserError(f"{self.path}, line {number}: not of format {FORMAT}, version {VERSION}")
            if dictionary == self.dictionary:
                found[label.latent] = label
        return found

    @contextmanager
    def writing(self) -> Iterator[IO[bytes]]:
        """Add labels while the block runs, with `add`. Raises UserError where another process does."""
        with locked(self.path, busy=f"labelling into {self.path}"), self.path.open("ab+") as file:
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
            yield file

    def add(self, file: IO[bytes], label: Label) -> None:
        """Write one label to the disk; any thread may."""
        record = {"format": FORMAT, "version": VERSION, "dictionary": self.dictionary, "label": asdict(label)}
        with self._writing:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

"""A person's bookmarks, own labels and notes on latents, kept beside the store in `ID.notes.json`.

Two browsers may write at once: each change takes a lock, reads the file again, changes the one latent and writes the whole file in one
step. A file that cannot be read is named and left as it is; lists of many latents go on without it, after one line that says so, and
without what is kept of latents that the store does not have. The format is in docs/formats.md.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from saebench.errors import UserError
from saebench.features.labelling.label import NOTES, beside
from saebench.features.store import FeatureStore
from saebench.files import locked, read_json, write_json
from saebench.progress import say

FORMAT, VERSION = "saebench-notes", 1
LONGEST_LABEL, LONGEST_NOTE = 300, 20_000
DIGITS = 18  # of the number of a latent
SURROGATE = re.compile(r"[\ud800-\udfff]")  # half a character, which no table can hold


@dataclass(frozen=True)
class Note:
    """What a person kept of one latent."""

    bookmark: bool = False
    label: str = ""
    note: str = ""
    changed: str = ""
    """When, as YYYY-MM-DDTHH:MM:SS with the offset of the time zone."""


class Notes:
    """The notes on a store's latents. Reading sees what others wrote meanwhile."""

    def __init__(self, path: Path, latents: int):
        self.path, self.latents = path, latents
        self._state: tuple[int, int] | None = None
        self._notes: dict[int, Note] = {}
        self._told = ""

    @classmethod
    def open(cls, store: FeatureStore) -> Notes:
        """The notes beside a store; none where there is no file yet."""
        return cls(beside(store.path, NOTES), store.d_sae)

    def of(self, latent: int) -> Note:
        """What is kept of a latent; an empty note for nothing. Raises UserError naming a damaged file."""
        return self.all().get(latent, Note())

    def all(self) -> dict[int, Note]:
        """All notes by latent, of those that the store has. Raises UserError naming a damaged file."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return {}
        if self._state != (stat.st_mtime_ns, stat.st_ino):  # every change makes a new file
            self._notes, self._state = self._read(), (stat.st_mtime_ns, stat.st_ino)
        return self._notes

    def _read(self) -> dict[int, Note]:
        notes = _parsed(self.path)
        known = {latent: note for latent, note in notes.items() if latent < self.latents}
        if len(known) < len(notes):
            self._tell(
                f"{self.path} has notes on latents from {self.latents} on, which the store does not have: they are ignored"
            )
        return known

    def _listed(self) -> dict[int, Note]:
        try:
            return self.all()
        except UserError as error:
            self._tell(f"{error}; its notes are ignored")
            return {}

    def _tell(self, line: str) -> None:
        if line != self._told:
            self._told = line
            say(line)

    def bookmarks(self) -> list[int]:
        """The bookmarked latents, ascending; none where the file is damaged, which one line says."""
        return sorted(latent for latent, note in self._listed().items() if note.bookmark)

    def labels(self) -> dict[int, str]:
        """A person's own labels by latent; none where the file is damaged, which one line says."""
        return {latent: note.label for latent, note in self._listed().items() if note.label}

    def change(self, latent: int, *, bookmark: bool | None = None, label: str | None = None, note: str | None = None) -> Note:
        """Set what is given and leave the rest, whatever others wrote meanwhile; what is empty altogether is removed.

        Returns the note as it is now. Raises UserError for an unknown latent, for text that is too long, where the file cannot be written,
        and where it is damaged, which is then left as it is."""
        if not 0 <= latent < self.latents:
            raise UserError(f"latent {latent} is not one of the {self.latents:,}, counted from 0")
        for name, text, longest in (("label", label, LONGEST_LABEL), ("note", note, LONGEST_NOTE)):
            if text is not None and len(text) > longest:
                raise UserError(f"the {name} of latent {latent} has {len(text):,} characters: {longest:,} is the most")
        given: dict[str, Any] = {"bookmark": bookmark, "label": label and " ".join(label.split()), "note": note and note.strip()}
        try:
            with locked(self.path.with_name(f".{self.path.name}.lock")):
                return self._changed(latent, {name: value for name, value in given.items() if value is not None})
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _changed(self, latent: int, given: dict[str, Any]) -> Note:
        notes = dict(_parsed(self.path)) if self.path.exists() else {}
        before = notes.pop(latent, Note())
        after = replace(before, **given)
        if after == before:
            return before
        after = replace(after, changed=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        if after.bookmark or after.label or after.note:
            notes[latent] = after
        kept = {str(number): asdict(one) for number, one in sorted(notes.items())}
        write_json(self.path, {"format": FORMAT, "version": VERSION, "latents": kept})
        return after


def _parsed(path: Path) -> dict[int, Note]:
    """The notes of a file. Raises UserError naming a damaged one."""
    try:
        content = read_json(path)
    except (OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a file of format {FORMAT}: move it away to begin anew")
    if content.get("version") != VERSION:
        raise UserError(f"{path} is of version {content.get('version')}; this saebench reads version {VERSION}")
    kinds = {field.name: bool if field.name == "bookmark" else str for field in fields(Note)}
    latents = content.get("latents")
    whole = isinstance(latents, dict) and all(
        number.isdecimal()
        and len(number) <= DIGITS
        and isinstance(note, dict)
        and {name: type(value) for name, value in note.items()} == kinds
        and not any(SURROGATE.search(text) for text in note.values() if isinstance(text, str))
        for number, note in latents.items()
    )
    if not isinstance(latents, dict) or not whole:
        raise UserError(f"{path} is damaged: latents is to hold a note with {', '.join(kinds)} for each number")
    return {int(number): Note(**note) for number, note in latents.items()}

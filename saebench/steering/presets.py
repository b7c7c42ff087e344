"""Edits as a file: what a person found worth keeping, to be opened again, by others too.

A preset names dictionaries by their ID in a run and the run's model by its hash; directions that are of no dictionary have none and
are not kept. Written beside the run's dictionaries: steering/NAME.json (docs/formats.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from saebench.config import Config
from saebench.dictionaries import Dictionary
from saebench.errors import UserError
from saebench.files import read_json, write_json
from saebench.steering.edits import NEED_VALUE, Edit, How, edit
from saebench.steering.positions import Positions

FORMAT, VERSION = "saebench-steering", 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,79}")


class Setting(Config):
    """One edit as data."""

    dictionary: str
    """ID of the dictionary in its run."""
    latents: tuple[int, ...]
    how: How = "add"
    strength: float = Field(default=1.0, allow_inf_nan=False)
    value: float | None = Field(default=None, allow_inf_nan=False)
    unit: float = Field(default=1.0, allow_inf_nan=False)
    weights: tuple[float, ...] = ()
    positions: str = "all"
    keep_error: bool = True

    def edit(self, dictionaries: Mapping[str, Dictionary]) -> Edit:
        """The edit itself. Raises UserError for a dictionary that is not among those given, and as `steering.edits.edit` does."""
        if self.dictionary not in dictionaries:
            raise UserError(f"dictionary {self.dictionary!r} is not in the run: it has {', '.join(dictionaries) or 'none'}")
        return edit(
            self.how, dictionaries[self.dictionary], self.latents, strength=self.strength, unit=self.unit, weights=self.weights,
            value=self.value if self.how in NEED_VALUE else None, positions=self.positions, keep_error=self.keep_error,
        )  # fmt: skip


class Preset(Config):
    """Edits with a name, and what they were tried on."""

    name: str
    edits: tuple[Setting, ...] = Field(min_length=1)
    model: str | None = None
    """Hash of the weights of the model that it was made for."""
    prompt: str = ""
    note: str = ""
    format: Literal["saebench-steering"] = "saebench-steering"
    version: int = VERSION

    def save(self, run: Path) -> Path:
        """Write it to steering/NAME.json of a run. Raises UserError for a name that is no file name."""
        path = preset_path(run, self.name)
        for setting in self.edits:
            Positions.parse(setting.positions)
        path.parent.mkdir(exist_ok=True)
        write_json(path, self.model_dump(mode="json"))
        return path

    @classmethod
    def open(cls, path: Path) -> Preset:
        """Raises UserError where the file is missing, damaged, or of another format or version."""
        found = read_json(path)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise UserError(f"{path} is not a {FORMAT}: it is something else, or damaged")
        if found.get("version") != VERSION:
            raise UserError(f"{path} is a {FORMAT} of version {found.get('version')}; this saebench reads version {VERSION}")
        return cls.parse(found, str(path))

    def made(self, dictionaries: Mapping[str, Dictionary], lm: Any) -> list[Edit]:
        """Its edits. Raises UserError where it was made for other weights."""
        if self.model not in (None, "unknown", lm.fingerprint) and lm.fingerprint != "unknown":
            raise UserError(f"preset {self.name!r} was made for a model with other weights ({self.model}) than {lm.name!r} has")
        return [setting.edit(dictionaries) for setting in self.edits]


def preset_path(run: Path, name: str) -> Path:
    """Where a preset of that name is kept. Raises UserError for a name that is no file name."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no name for a preset: use letters, digits, spaces, dots, dashes; up to 80, a letter or digit first"
        )
    return run / "steering" / f"{name}.json"


def presets(run: Path) -> dict[str, Path]:
    """The presets of a run by name."""
    return {path.stem: path for path in sorted((run / "steering").glob("*.json")) if not path.name.startswith(".")}

"""Recipes: everything a training run needs, in one toml file.

name, [model], [text], [activations], [[dictionaries]], [training], [evaluation]
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from saebench.config import Config
from saebench.dictionaries import DictionaryConfig, parse_dictionary
from saebench.errors import UserError
from saebench.trainer import TrainConfig
from saebench.trainer.loop import name_dictionaries

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
PLACES = (Path(__file__).parent / "_recipes", Path(__file__).parent.parent / "training" / "recipes")


class ModelConfig(Config):
    """The language model."""

    name: str = "builtin"
    """`builtin`, a Hugging Face checkpoint directory, or a hub name."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Compute type; bfloat16 is for GPUs (CPUs without bfloat16 units emulate it, 100 times slower)."""
    device: str = "auto"
    """auto, cpu, cuda, or any torch device."""


class TextConfig(Config):
    """The text the model reads."""

    source: str = "builtin"
    """`builtin`, a file, a directory, or `hf:NAME[:CONFIG]`."""
    split: str | None = None
    """Split of a Hugging Face data set; default train."""
    column: str = "text"
    """Column of a data set or of JSON lines that holds the text."""
    evaluation: str | None = None
    """Another text to evaluate on; default the builtin text's held-out modules, or a part of `source` kept back."""
    held_out: float = Field(default=0.05, gt=0, lt=1)
    """Share of the contexts kept back for evaluation, where the text has no held-out part of its own."""


class ActivationsConfig(Config):
    """Which activations, and where they are kept."""

    sites: list[str] = Field(min_length=1)
    """TransformerLens names, such as blocks.2.hook_resid_post."""
    num_tokens: int | None = Field(default=None, gt=0)
    """Tokens of text to run the model over; default the whole text."""
    context_size: int = Field(default=256, gt=2)
    """Tokens in a context, the leading BOS included."""
    mode: Literal["store", "stream"] = "store"
    """Keep activations on disk, or compute them anew while training."""
    storage: Literal["float32", "bfloat16", "float16", "int8"] = "float16"
    """Type on disk."""
    batch_size: int = Field(default=32, gt=0)
    """Contexts in a forward pass."""
    path: str | None = None
    """Where the store is, or will be; default acts/NAME-HASH beside the run."""


class EvaluationConfig(Config):
    """What is measured after training."""

    num_tokens: int = Field(default=100_000, gt=0)
    """Held-out tokens, at most."""
    batch_size: int = Field(default=16, gt=0)
    """Contexts in a forward pass."""


class Recipe(Config):
    """A whole training run."""

    name: str = Field(pattern=NAME)
    """Name of the run; its directory is runs/NAME unless --out says otherwise."""
    modules: tuple[str, ...] = ()
    """Python files, or modules by name, that define architectures of your own."""
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    activations: ActivationsConfig
    dictionaries: list[dict[str, Any]] = Field(min_length=1)
    """Each with an `architecture`, optionally an `id`, and the settings of that architecture."""
    training: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _dictionaries_parse(self) -> Self:
        for module in self.modules:
            import_module(module)
        for name, config in self.dictionary_configs().items():
            for site in config.sites:
                if site not in self.activations.sites:
                    raise ValueError(f"dictionary {name!r} needs site {site!r}, which activations.sites lacks: add it there")
        return self

    def dictionary_configs(self) -> dict[str, DictionaryConfig]:
        """The configured dictionaries by id. Raises UserError naming the key."""
        given: dict[str, DictionaryConfig] = {}
        unnamed = []
        for number, values in enumerate(self.dictionaries):
            values = dict(values)
            name = values.pop("id", None)
            config = parse_dictionary(values, f"dictionaries.{number}")
            if name is None:
                unnamed.append(config)
            elif name in given or not isinstance(name, str) or not re.fullmatch(NAME, name):
                raise UserError(
                    f"dictionaries.{number}.id={name!r} must be a new name of letters, digits, dots, dashes and underscores"
                )
            else:
                given[name] = config
        named = name_dictionaries(unnamed) if unnamed else {}
        if taken := [name for name in named if name in given]:
            raise UserError(f"two dictionaries are called {taken[0]!r}: give each an id of its own")
        return {**given, **named}


def import_module(name: str) -> None:
    """Run a Python file, once, or import a module, so that what it registers is known. Raises UserError where that fails."""
    path = Path(name)
    try:
        if path.suffix != ".py":
            importlib.import_module(name)
        elif str(path.resolve()) not in sys.modules:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules[str(path.resolve())] = module
    except UserError:
        raise
    except Exception as error:  # whatever a person's own file does wrong
        raise UserError(f"module {name!r} cannot be imported ({type(error).__name__}: {error}): correct modules") from error


def load_recipe(name: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path or by name, then apply `key=value` settings such as `training.lr=0.001` or `dictionaries.0.k=64`.

    Raises UserError naming the file, line or key that is wrong.
    """
    path = find_recipe(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid toml: {error}") from None
    for setting in settings:
        apply_setting(values, setting)
    return Recipe.parse(values)


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one that ships with saebench."""
    path = Path(name)
    if path.is_file():
        return path
    for place in PLACES:
        if (place / f"{name}.toml").is_file():
            return place / f"{name}.toml"
    raise UserError(f"recipe {str(name)!r} not found: give a toml file or one of {', '.join(recipe_names())}")


def recipe_names() -> list[str]:
    return sorted({path.stem for place in PLACES if place.is_dir() for path in place.glob("*.toml")})


def apply_setting(values: dict[str, Any], setting: str) -> None:
    """Set one dotted key in recipe data; the value is read as toml, or as a string where it is none."""
    key, equals, text = setting.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {setting!r} is not of the form key=value, such as training.lr=0.001")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    target: Any = values
    for part, after in itertools.pairwise(parts):
        target = _enter(target, part, key) if isinstance(target, list) else target.setdefault(part, [] if after.isdigit() else {})
        if not isinstance(target, dict | list):
            raise UserError(f"--set {setting!r}: {part} is {json.dumps(target)}, not a table")
    if isinstance(target, list):
        _enter(target, parts[-1], key)
        target[int(parts[-1])] = value
    else:
        target[parts[-1]] = value


def _enter(items: list, part: str, key: str) -> Any:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(f"--set {key}: there is no entry {part!r}; the list has {len(items)}, counted from 0")
    return items[int(part)]

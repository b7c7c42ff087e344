"""What every dictionary is: a configuration, parameters, `encode`, `decode`, training losses, and a directory on disk.

A new architecture is a `DictionaryConfig` and a `Dictionary` in one file, joined by `@register`.
Shape suffixes: `B` tokens, `D` d_in, `F` d_sae.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.config import Config
from saebench.errors import UserError
from saebench.files import check_files, read_manifest, read_tensors, replacing_directory, sha256, write_manifest, write_tensors

FORMAT, VERSION = "saebench-dictionary", 1
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
FIELDS = {"architecture", "config", "trained_on"}


class DictionaryConfig(Config):
    """What all dictionaries have in common. Subclasses set `architecture` and add their own settings."""

    architecture: ClassVar[str]

    d_sae: int = Field(gt=0)
    """Number of latents."""
    d_in: int | None = Field(default=None, gt=0)
    """Width of the site; taken from the activations when left out."""
    site: str | None = None
    """The site it reads and writes; may be left out when the activations have only one."""
    normalise: Literal["sqrt_d", "unit_ms", "none"] = "sqrt_d"
    """Scaling of the inputs while training, folded into the weights afterwards: mean norm sqrt(d), mean squared norm 1, or none."""

    def build(self) -> Dictionary:
        """The dictionary of this configuration, with empty parameters. Raises UserError while d_in is unknown."""
        if self.d_in is None:
            raise UserError("d_in is not known: give it, or train on activations that have a width")
        return DICTIONARIES[self.architecture](self)

    def for_site(self, site: str, width: int) -> Self:
        """The same with site and d_in filled in. Raises UserError where d_in was given and differs."""
        if self.d_in is not None and self.d_in != width:
            raise UserError(f"d_in={self.d_in} does not match site {site!r}, which is {width} wide: leave d_in out or correct it")
        return self.model_copy(update={"d_in": width, "site": site})

    @property
    def default_id(self) -> str:
        """The name of the dictionary inside a run, unless one is given."""
        return f"{self.architecture}-{self.d_sae}"


@dataclass
class Losses:
    """One training step's result: the scalar to minimise, its parts by name (detached), the codes and the squared error [B]."""

    total: Tensor
    parts: dict[str, Tensor]
    codes: SparseCodes
    squared_error_B: Tensor


class Dictionary(nn.Module, ABC):
    """A sparse dictionary: `encode` gives sparse codes, `decode` turns them back. Inputs are raw activations [B, D]."""

    def __init__(self, config: DictionaryConfig):
        super().__init__()
        self.config = config
        self.trained_on: dict[str, Any] = {}

    @abstractmethod
    def encode(self, x_BD: Tensor) -> SparseCodes:
        """Active latents of each token."""

    @abstractmethod
    def decode(self, codes: SparseCodes) -> Tensor:
        """Reconstruction [B, D]."""

    def forward(self, x_BD: Tensor) -> Tensor:
        """Reconstruction of x: [B, D]."""
        return self.decode(self.encode(x_BD))

    @abstractmethod
    def initialise(self, sample_BD: Tensor, generator: torch.Generator) -> None:
        """Set the parameters, given a sample of (normalised) inputs."""

    @abstractmethod
    def losses(self, x_BD: Tensor, dead_F: Tensor) -> Losses:
        """The training objective on a batch; `dead_F` marks latents that count as dead."""

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Adjust gradients to constraints on the parameters; called before clipping and the optimiser's step."""

    @torch.no_grad()
    def constrain(self) -> None:
        """Restore constraints on the parameters; called after the optimiser's step."""

    @abstractmethod
    def fold_scale(self, scale: float) -> None:
        """Change the parameters so that raw inputs x give what scale * x gave before, in units of x."""

    @abstractmethod
    def public_tensors(self) -> dict[str, Tensor]:
        """The tensors of the file format, by their public names and shapes."""

    @abstractmethod
    def load_public(self, tensors: dict[str, Tensor]) -> None:
        """Take over tensors in the file format."""

    def save(self, path: str | Path) -> None:
        """Write `config.json` and `weights.safetensors` into a new directory. Raises UserError where it exists."""
        path = Path(path)
        if path.exists():
            raise UserError(f"{path} exists already: name another place or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_directory(path) as temporary:
            write_tensors(temporary / WEIGHTS, self.public_tensors())
            content = {
                "architecture": self.config.architecture,
                "config": self.config.model_dump(mode="json"),
                "trained_on": self.trained_on,
            }
            write_manifest(temporary, FORMAT, VERSION, content, {WEIGHTS: sha256(temporary / WEIGHTS)}, name=CONFIG)


CONFIGS: dict[str, type[DictionaryConfig]] = {}
DICTIONARIES: dict[str, type[Dictionary]] = {}


def register(config_class: type[DictionaryConfig]) -> Any:
    """Class decorator: make an architecture known to recipes, checkpoints and `load`."""

    def add(dictionary_class: type[Dictionary]) -> type[Dictionary]:
        CONFIGS[config_class.architecture] = config_class
        DICTIONARIES[config_class.architecture] = dictionary_class
        return dictionary_class

    return add


def parse_dictionary(values: dict[str, Any], where: str) -> DictionaryConfig:
    """A dictionary configuration from recipe data with an `architecture` key. Raises UserError naming the key."""
    values = dict(values)
    name = values.pop("architecture", None)
    if name is None:
        raise UserError(f"missing key {where}.architecture: one of {', '.join(CONFIGS)}")
    if name not in CONFIGS:
        raise UserError(f"{where}.architecture={name!r} is unknown: use one of {', '.join(CONFIGS)}")
    return CONFIGS[name].parse(values, where)


def load_dictionary(path: str | Path, device: str | torch.device = "cpu") -> Dictionary:
    """Open a saved dictionary. Raises UserError for anything missing, damaged, of another version or architecture."""
    path = Path(path)
    manifest = read_manifest(path, FORMAT, VERSION, FIELDS, name=CONFIG)
    check_files(path, manifest["files"])
    config = parse_dictionary({"architecture": manifest["architecture"], **manifest["config"]}, str(path / CONFIG))
    dictionary = config.build().to(device)
    dictionary.load_public(read_tensors(path / WEIGHTS, device))
    dictionary.trained_on = manifest["trained_on"]
    return dictionary.eval().requires_grad_(False)


class KRule(DictionaryConfig):
    """A mixin of settings for dictionaries that keep k latents."""

    k: int = Field(default=32, gt=0)
    """Latents active on each token, at most."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.d_sae:
            raise ValueError(f"k={self.k} exceeds d_sae={self.d_sae}: lower k or raise d_sae")
        return self

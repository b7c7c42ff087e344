"""What every dictionary is: a configuration, parameters, `encode`, `decode`, training losses, and a directory on disk.

A dictionary reads the activations of some sites, side by side in one row, and writes those of some sites: an SAE writes what it
reads, a transcoder writes elsewhere, a crosscoder reads and writes several. A new architecture is a `DictionaryConfig` and a
`Dictionary` in one file, joined by `@register`.
Shape suffixes: `B` tokens, `C` contexts, `S` positions, `D` width of what is read or written, `F` d_sae.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.config import Config
from saebench.dictionaries.scaling import Scaling
from saebench.errors import UserError
from saebench.files import check_files, read_manifest, read_tensors, replacing_directory, sha256, write_manifest, write_tensors

FORMAT, VERSION = "saebench-dictionary", 1
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
FIELDS = {"architecture", "config", "trained_on"}


class DictionaryConfig(Config):
    """What all dictionaries have in common. Subclasses set `architecture` and add their own settings."""

    architecture: ClassVar[str]
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    """Adam's averaging constants that suit this architecture."""
    largest_lr_rise: ClassVar[float] = 10.0
    """By how much a short run may raise the default learning rate at most."""
    sequential: ClassVar[bool] = False
    """Whether it reads whole contexts [C, S, D] instead of tokens [B, D]."""

    d_sae: int = Field(gt=0)
    """Number of latents."""
    site: str | tuple[str, ...] | None = None
    """The site it reads, or several; may be left out when the activations have only one."""
    target: str | tuple[str, ...] | None = None
    """The site it writes, or several; default what it reads."""
    d_in: int | None = Field(default=None, gt=0)
    """Width of what it reads, all sites together; taken from the activations when left out."""
    d_out: int | None = Field(default=None, gt=0)
    """Width of what it writes, all sites together; default that of what it reads."""
    widths_in: tuple[int, ...] | None = None
    """Width of each site it reads; taken from the activations."""
    widths_out: tuple[int, ...] | None = None
    """Width of each site it writes; taken from the activations."""
    normalise: Literal["sqrt_d", "unit_ms", "none"] = "sqrt_d"
    """Scaling of each site while training, folded into the weights afterwards: mean norm sqrt(d), mean squared norm 1, or none."""
    centre: bool = False
    """Whether the mean of each site is subtracted while training, and folded into the biases afterwards."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of this dictionary; default that of the training."""
    seed: int | None = None
    """Of this dictionary's initialisation; default that of the training."""

    def build(self) -> Dictionary:
        """The dictionary of this configuration, with empty parameters. Raises UserError while d_in is unknown."""
        if self.d_in is None:
            raise UserError("d_in is not known: give it, or train on activations that have a width")
        return DICTIONARIES[self.architecture](self)

    @property
    def reads(self) -> tuple[str, ...]:
        """The sites it reads, in order; empty while unknown."""
        return _as_tuple(self.site)

    @property
    def writes(self) -> tuple[str, ...]:
        """The sites it writes, in order."""
        return self.reads if self.target is None else _as_tuple(self.target)

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites it reads or writes, each once."""
        return tuple(dict.fromkeys(self.reads + self.writes))

    @property
    def rewrites(self) -> bool:
        """Whether it writes what it reads, as an autoencoder does."""
        return self.target is None or self.reads == self.writes

    @property
    def width_out(self) -> int:
        """Width of what it writes. Raises UserError while unknown."""
        width = self.d_out or (self.d_in if self.rewrites else None)
        if width is None:
            raise UserError("the width of what is written is not known: give d_out, or train on activations that have a width")
        return width

    @property
    def blocks_in(self) -> tuple[int, ...]:
        """Widths of the sites it reads; one block while they are not told apart."""
        return self.widths_in or (self.d_in or 0,)

    @property
    def blocks_out(self) -> tuple[int, ...]:
        """Widths of the sites it writes."""
        return self.widths_out or (self.blocks_in if self.rewrites else (self.width_out,))

    def for_sites(self, widths: Mapping[str, int]) -> Self:
        """The same with sites and widths filled in from activations. Raises UserError for a site they lack, or another width."""
        site = self.site
        if site is None:
            if len(widths) > 1:
                raise UserError(f"no site is named and the activations have several: set site to one of {', '.join(widths)}")
            site = next(iter(widths))
        named = self.model_copy(update={"site": site})
        if missing := [name for name in named.sites if name not in widths]:
            raise UserError(f"site {missing[0]!r} is not among the activations: they hold {', '.join(widths)}")
        widths_in, widths_out = (tuple(widths[name] for name in sites) for sites in (named.reads, named.writes))
        for key, given, found, sites in (
            ("d_in", self.d_in, sum(widths_in), named.reads),
            ("d_out", self.d_out, sum(widths_out), named.writes),
        ):
            if given is not None and given != found:
                one = (
                    f"site {sites[0]!r}, which is {found} wide"
                    if len(sites) == 1
                    else f"the {len(sites)} sites, which are {found} wide"
                )
                raise UserError(f"{key}={given} does not match {one}: leave {key} out or correct it")
        update = {"d_in": sum(widths_in), "d_out": sum(widths_out), "widths_in": widths_in, "widths_out": widths_out}
        return named.model_copy(update=update)

    def for_lm(self, lm: Any) -> Self:
        """The same with what depends on the model filled in, once the sites are known; nothing here."""
        return self

    @property
    def needs_lm(self) -> bool:
        """Whether initialising takes the model that the activations come from."""
        return False

    @property
    def default_id(self) -> str:
        """The name of the dictionary inside a run, unless one is given."""
        return f"{self.architecture}-{self.d_sae}"


def _as_tuple(site: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if site is None else (site,) if isinstance(site, str) else tuple(site)


class FirstDirections(DictionaryConfig):
    """Settings of dictionaries whose first directions are drawn."""

    initial_directions: Literal["random", "active_subspace"] = "random"
    """Where the first directions lie: anywhere, or in the subspace that holds `active_share` of the variance (methods.md T15)."""
    active_share: float = Field(default=0.99, gt=0, le=1)
    """Share of the variance that the active subspace holds."""

    @property
    def drawn_share(self) -> float | None:
        """Share of the variance in the subspace that directions are drawn from; None for the whole space."""
        return self.active_share if self.initial_directions == "active_subspace" else None


@dataclass(frozen=True)
class TrainingBatch:
    """One step's data, normalised: what is read and what is to be written, and where in the run the step is."""

    x: Tensor
    """[B, D], or [C, S, D] for a dictionary that reads sequences."""
    y: Tensor
    """What is to be written; the same tensor as x for an autoencoder."""
    dead_F: Tensor
    """Latents that count as dead."""
    step: int = 0
    steps: int = 1
    seed: int = 0
    most_dead: int | None = None
    """No more latents than so many are dead, where that is known without asking the device; None where it is not."""

    @property
    def progress(self) -> float:
        """Share of the run that lies behind this step, from 0 to below 1."""
        return self.step / self.steps

    def generator(self) -> torch.Generator:
        """Random numbers that belong to this step of this seed, on the CPU."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.step + 1) % (1 << 63))


@dataclass
class Losses:
    """One training step's result: the scalar to minimise, its parts by name (detached), and for the tokens that count the codes, the
    squared errors [B] and the targets [B, D], from which FVU, L0 and dead latents are logged."""

    total: Tensor
    parts: dict[str, Tensor]
    codes: SparseCodes
    squared_error_B: Tensor
    target_BD: Tensor


class Dictionary(nn.Module, ABC):
    """A sparse dictionary: `encode` gives sparse codes, `decode` turns them back. Inputs are raw activations [B, D]."""

    training_only: ClassVar[tuple[str, ...]] = ()
    """Parameters, buffers and modules that a finished dictionary does without."""
    folded = True
    """Whether it is finished. Families whose finished members differ from those in training start with False."""

    def __init__(self, config: DictionaryConfig):
        super().__init__()
        self.config = config
        self.trained_on: dict[str, Any] = {}
        self.scalings: tuple[Scaling, Scaling] | None = None  # of what is read and written, while in training

    @abstractmethod
    def encode(self, x_BD: Tensor) -> SparseCodes:
        """Active latents of each token. A sequential dictionary takes contexts [C, S, D] and gives the codes of C * S tokens."""

    @abstractmethod
    def decode(self, codes: SparseCodes) -> Tensor:
        """What the codes stand for: [B, D]."""

    def forward(self, x_BD: Tensor) -> Tensor:
        """The reconstruction of x, or the prediction of the target from x: [B, D]."""
        return self.reconstruct(x_BD, self.encode(x_BD))

    def reconstruct(self, x_BD: Tensor, codes: SparseCodes) -> Tensor:
        """As `forward`, from codes that are known already; differs from `decode` where something bypasses the codes."""
        return self.decode(codes)

    def encode_contexts(self, x_CSD: Tensor, skip: int = 1) -> SparseCodes:
        """Codes of the tokens of whole contexts but the first `skip` of each: C * (S - skip) of them, row-major."""
        return self.encode(x_CSD[:, skip:].flatten(0, 1))

    def reconstruct_contexts(self, x_CSD: Tensor, skip: int = 1) -> tuple[SparseCodes, Tensor]:
        """Codes and reconstruction of the tokens of whole contexts but the first `skip` of each, row-major."""
        x_BD = x_CSD[:, skip:].flatten(0, 1)
        codes = self.encode(x_BD)
        return codes, self.reconstruct(x_BD, codes)

    def check_rows(self, x_BD: Tensor) -> None:
        """Raises UserError for anything but rows of the width that is read."""
        if x_BD.ndim != 2 or x_BD.shape[1] != self.config.d_in:
            raise UserError(
                f"activations have shape {tuple(x_BD.shape)}, but {self.config.architecture!r} encodes rows [tokens, {self.config.d_in}]: "
                "flatten contexts by x.flatten(0, -2), and read the site that the dictionary was trained on"
            )

    def depends_on(self, write: int) -> range:
        """Which of the sites read, by number, the site written as number `write` depends on."""
        return range(len(self.config.reads))

    def write_one(self, reads: Sequence[Tensor], write: int, skip: int = 1) -> Tensor:
        """What is written to one site, given [C, S, D] at the sites read that it depends on: tokens but the first `skip` [B, D]."""
        _, y_hat_BD = self.reconstruct_contexts(torch.cat(list(reads), -1), skip)
        return y_hat_BD.split(list(self.config.blocks_out), dim=1)[write]

    @property
    def directions(self) -> Tensor | None:
        """What each latent writes, by rows [F, D], where that is one vector for each."""
        W_dec = getattr(self, "W_dec", None)
        return W_dec.detach() if isinstance(W_dec, Tensor) else None

    def parts(self) -> dict[str, Dictionary]:
        """The dictionaries that are measured one by one, by name; here the dictionary itself."""
        return {"": self}

    @abstractmethod
    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator, lm: Any = None) -> None:
        """Set the parameters, given a (normalised) sample of what is read and of what is written, shaped as in training; `lm` is
        the model they come from, where it is known."""

    @abstractmethod
    def losses(self, batch: TrainingBatch) -> Losses:
        """The training objective on a batch."""

    def unit_rows(self) -> Sequence[Tensor]:
        """Parameters whose rows, whatever is within one flattened, the optimiser keeps at length 1: it removes from the gradient of a row
        what points along it, and scales the row after the step."""
        return ()

    def latent_rows(self) -> Sequence[Tensor]:
        """Parameters that training may round to bfloat16 for the time of `losses` and its backward pass: matrices with a row for each
        latent, which nothing but kernels, or what takes mixed types, reads there. Empty where that is not so."""
        return ()

    @torch.no_grad()
    def constrain(self, lr: float = 0.0) -> None:
        """Restore other constraints on the parameters; called after the optimiser's step, which had this learning rate."""

    @torch.no_grad()
    def resample(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Give dead latents a new start; returns by parameter name the rows whose optimiser moments must be forgotten."""
        raise UserError(f"resample_every is not for architecture {self.config.architecture!r}: leave it out")

    def drop_training(self) -> None:
        """Leave out what only training needs. Calling it again changes nothing."""
        for name in self.training_only:
            if name in self._modules or name in self._parameters or name in self._buffers:
                delattr(self, name)

    def settled(self) -> Self:
        """What a file holds: this dictionary, or where it is not finished a copy without what only training needs."""
        if self.folded:
            return self
        copied = copy.deepcopy(self)
        copied.fold(Scaling.identity(sum(self.config.blocks_in)), Scaling.identity(sum(self.config.blocks_out)))
        return copied

    @abstractmethod
    def fold(self, read: Scaling, write: Scaling) -> None:
        """Change the parameters so that raw inputs give, in raw units, what normalised ones gave in normalised units. What is finished
        may be folded again, from one layer's units into another's (layer_group.py)."""

    def public_tensors(self) -> dict[str, Tensor]:
        """The tensors of the file format by name: parameters and buffers; what is kept by rows as `NAME_FD` is `NAME` [D, F]."""
        return {name.removesuffix("_FD"): t.T if name.endswith("_FD") else t for name, t in self.state_dict().items()}

    @torch.no_grad()
    def load_public(self, tensors: dict[str, Tensor]) -> None:
        """Take over tensors in the file format. Raises UserError naming one that is missing, unknown or of another shape."""
        self.drop_training()
        own = self.state_dict()
        names = {name.removesuffix("_FD"): name for name in own}
        for name in sorted(set(names) ^ set(tensors)):
            raise UserError(f"tensor {name!r} is {'missing' if name in names else 'unknown'} for {self.config.architecture!r}")
        for name, key in names.items():
            tensor = tensors[name].T if key.endswith("_FD") else tensors[name]
            if tensor.shape != own[key].shape:
                raise UserError(f"tensor {name!r} has shape {tuple(tensors[name].shape)}, which does not fit the configuration")
            own[key].copy_(tensor)
        self.folded = True

    def save(self, path: str | Path) -> None:
        """Write `config.json` and `weights.safetensors` into a new directory. Raises UserError where it exists."""
        path = Path(path)
        if path.exists():
            raise UserError(f"{path} exists already: name another place or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_directory(path) as temporary:
            write_tensors(temporary / WEIGHTS, self.settled().public_tensors())
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
        raise UserError(f"missing key {where}.architecture: one of {', '.join(sorted(CONFIGS))}")
    if name not in CONFIGS:
        raise UserError(f"{where}.architecture={name!r} is unknown: use one of {', '.join(sorted(CONFIGS))}")
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

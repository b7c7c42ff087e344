"""One dictionary in training: its parameters, optimiser, dead-latent counters and running metrics.

A member does not know of other members or of files; the loop feeds it batches and reads its metrics now and then. Nothing in a step
waits for the device on purpose: sums are kept there until `read_metrics`, and how many latents may be dead is foreseen.
Shape suffixes: `B` tokens, `D` width of what is read or written, `F` d_sae.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from saebench.activations.statistics import SiteStatistics
from saebench.dictionaries import Dictionary, DictionaryConfig, Losses, Scaling, TrainingBatch
from saebench.errors import UserError
from saebench.kernels import current_implementation
from saebench.kernels.latent_numbers import latent_firings
from saebench.kernels.row_lengths import distances
from saebench.trainer.config import TrainConfig
from saebench.trainer.optimiser import Adam, asking_waits

FORESIGHT, FORESIGHT_SHARE = 50, 1 / 8
"""Steps over which the number of latents that may be dead is foreseen, where counting them anew would wait for the device; and at most this
share of the time after which a latent is dead, so that few more may be dead than are."""


class Member:
    """A dictionary being trained on normalised activations; `finished()` gives the dictionary for raw ones."""

    def __init__(self, dictionary: Dictionary, training: TrainConfig, read: Scaling, write: Scaling, mean_D: Tensor):
        """`read` and `write` normalise what goes in and what is to come out; `mean_D` is the mean of the raw target: the reference
        of the logged FVU."""
        self.dictionary, self.training, self.read, self.write = dictionary, training, read, write
        config, device = dictionary.config, mean_D.device
        self.lr = config.lr or training.lr_for(config.d_sae, config.largest_lr_rise)
        self.seed = training.seed if config.seed is None else config.seed
        self.mean_D = write(mean_D.float())
        betas = training.betas or config.betas
        momentum, weights = getattr(torch, training.momentum), None
        if training.weights == "bfloat16":
            _check_rounding(dictionary, device)
            weights = torch.bfloat16
        self.optimiser = Adam(dictionary, betas, training.eps, training.clip, momentum, weights)
        self.silent_F = torch.zeros(config.d_sae, dtype=torch.int64, device=device)  # tokens since it last fired
        self._most_dead, self._foreseen = 0, -1  # latents that may be dead, and for how many tokens from now on that holds
        self._resampled_at: int | None = None
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    @classmethod
    def create(
        cls,
        config: DictionaryConfig,
        training: TrainConfig,
        sample: Mapping[str, Tensor] | Tensor,
        statistics: Mapping[str, SiteStatistics] | SiteStatistics | None = None,
        lm: Any = None,
    ) -> Member:
        """A freshly initialised member. `sample` holds raw activations to initialise from, by site ([B, D], or [C, S, D] for a
        dictionary that reads sequences); one tensor is the only site's. `statistics` are those of the whole corpus (default: of
        the sample). `lm` is the model, where the configuration starts from it."""
        if isinstance(sample, Tensor):
            sample = {config.reads[0] if config.reads else "": sample}
        config = config.for_sites({site: x.shape[-1] for site, x in sample.items()})
        config = config if lm is None else config.for_lm(lm)
        if isinstance(statistics, SiteStatistics):
            statistics = {config.reads[0]: statistics}
        if statistics is None:
            statistics = {site: SiteStatistics.empty(x.shape[-1]) for site, x in sample.items()}
            for site, x in sample.items():
                statistics[site].update(x.flatten(0, -2))
        dictionary = config.build()
        read, write = (
            Scaling.measured(config.normalise, config.centre, [statistics[site] for site in sites])
            for sites in (config.reads, config.writes)
        )
        mean_D = torch.cat([statistics[site].mean_D for site in config.writes])
        statistics = None  # covariances are large, and the optimiser's memory is about to be taken
        x, y = join(sample, config)
        seed = training.seed if config.seed is None else config.seed
        x_normal = read(x.cpu().float())
        y_normal = x_normal if y is x else write(y.cpu().float())
        dictionary.scalings = (read, write)
        dictionary.initialise(x_normal, y_normal, torch.Generator().manual_seed(seed), lm)
        dictionary.to(x.device)
        return cls(dictionary, training, read.to(x.device), write.to(x.device), mean_D.to(x.device))

    @torch.no_grad()
    def move_into(self, memory: Mapping[str, Tensor]) -> None:
        """Keep the parameters, which stay what they are, in this memory from now on: by name, of their shapes."""
        for name, parameter in self.dictionary.named_parameters():
            parameter.data = memory[name].copy_(parameter)
        before = self.optimiser
        self.optimiser = Adam(self.dictionary, before.betas, before.eps, before.clip, getattr(torch, self.training.momentum))
        self.optimiser.load_state(before.state())

    @property
    def scales(self) -> dict[str, float]:
        """What the activations of each site are multiplied by."""
        config = self.dictionary.config
        pairs = ((config.reads, config.blocks_in, self.read), (config.writes, config.blocks_out, self.write))
        return {
            site: float(part[0])
            for sites, blocks, by in pairs
            for site, part in zip(sites, by.scale_D.split(list(blocks)), strict=True)
        }

    @property
    def dead_F(self) -> Tensor:
        """Latents that have been silent for `dead_after` tokens."""
        return self.silent_F >= self.training.dead_after_tokens

    def rate_at(self, step: int) -> float:
        """The learning rate of a step; it rises anew after dead latents were resampled."""
        rate = self.lr * self.training.rate_at(step)
        if self._resampled_at is not None and self.training.resample_warmup:
            rate *= min(1.0, (step - self._resampled_at + 1) / self.training.resample_warmup)
        return rate

    def step(self, activations: Mapping[str, Tensor] | Tensor, step: int) -> None:
        """One optimiser step on a batch of raw activations by site; one tensor is the only site's."""
        if isinstance(activations, Tensor):
            activations = {self.dictionary.config.reads[0]: activations}
        x, y = join(activations, self.dictionary.config)
        x_normal = self.read(x)
        y_normal = x_normal if y is x else self.write(y)
        batch = TrainingBatch(x_normal, y_normal, self.dead_F, step, self.training.steps, self.seed, self.dead_at_most())
        self.optimiser.forget_gradients()
        with self.optimiser.rounded():
            losses = self.dictionary.losses(batch)
            losses.total.backward()
        norm = self.take_step(step)
        firings_F = latent_firings(losses.codes)
        self.silent_F.add_(len(losses.codes)).masked_fill_(firings_F > 0, 0)
        self.add(figures(losses, norm, firings_F, self.mean_D), len(losses.codes))
        if self.training.resamples_after(step):
            self.resample(batch)

    def dead_at_most(self) -> int | None:
        """An upper bound of the number of dead latents, for which the device is asked now and then. None where asking costs nothing."""
        if not asking_waits(self.silent_F.device):
            return None
        if self._foreseen < 0:
            dead_after = self.training.dead_after_tokens
            self._foreseen = min(FORESIGHT * self.training.batch_size, int(FORESIGHT_SHARE * dead_after))
            self._most_dead = int((self.silent_F >= dead_after - self._foreseen).sum())
        return self._most_dead

    def take_step(self, step: int) -> Tensor:
        """Change the parameters by the gradients that are there; returns the norm of these, 0-dim."""
        rate = self.rate_at(step)
        norm = self.optimiser.step(rate)
        self.dictionary.constrain(rate)
        return norm

    @torch.no_grad()
    def resample(self, batch: TrainingBatch) -> None:
        """Dead latents start anew; the optimiser forgets their rows."""
        batch = TrainingBatch(batch.x, batch.y, self.dead_F, batch.step, batch.steps, batch.seed)
        for name, rows in self.dictionary.resample(batch).items():
            self.optimiser.forget_rows(name, rows)
            self.silent_F[rows] = 0
            self._resampled_at = batch.step + 1

    @torch.no_grad()
    def add(self, figures: Mapping[str, Tensor], tokens: int) -> None:
        """Count a step of so many tokens and its figures, 0-dim each, for `read_metrics`."""
        if self._foreseen >= 0:
            self._foreseen -= tokens
        for name, value in figures.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.double()
        self._steps += 1

    def read_metrics(self) -> dict[str, float]:
        """Means since the last reading: loss and its parts, FVU of the training batches, L0, gradient norm; and the dead share now."""
        sums, steps = {name: float(value) for name, value in self._sums.items()}, max(1, self._steps)
        self._sums, self._steps = {}, 0
        fvu = sums.pop("squared_error") / sums.pop("squares")
        return {**{name: sums[name] / steps for name in sorted(sums)}, "fvu": fvu, "dead": float(self.dead_F.float().mean())}

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        tensors = {f"dictionary.{name}": t for name, t in self.dictionary.state_dict().items()}
        tensors |= {f"optimiser.{name}": t for name, t in self.optimiser.state().items()}
        for name, scaling in (("read", self.read), ("write", self.write)):
            tensors |= {f"{name}.shift": scaling.shift_D, f"{name}.scale": scaling.scale_D}
        tensors |= {"silent": self.silent_F, "mean": self.mean_D}
        tensors |= {f"sums.{name}": value for name, value in self._sums.items()}
        at = -1 if self._resampled_at is None else self._resampled_at
        tensors["foreseen"] = torch.tensor([self._most_dead, self._foreseen])
        return tensors | {"steps_since_log": torch.tensor(self._steps), "resampled_at": torch.tensor(at)}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state()`."""
        part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        self.dictionary.load_state_dict(part("dictionary."))
        self.optimiser.load_state(part("optimiser."))
        self.silent_F.copy_(tensors["silent"])
        self.mean_D.copy_(tensors["mean"])
        self.read = Scaling(tensors["read.shift"].clone(), tensors["read.scale"].clone())
        self.write = Scaling(tensors["write.shift"].clone(), tensors["write.scale"].clone())
        self._sums = {name: value.clone() for name, value in part("sums.").items()}
        self._steps = int(tensors["steps_since_log"])
        self._most_dead, self._foreseen = tensors["foreseen"].tolist()
        at = int(tensors["resampled_at"])
        self._resampled_at = None if at < 0 else at

    @torch.no_grad()
    def finished(self) -> Dictionary:
        """The dictionary for raw activations: constraints restored, the normalisation folded into the weights."""
        dictionary = self.dictionary.config.build().to(self.mean_D.device)
        dictionary.load_state_dict(self.dictionary.state_dict())
        dictionary.constrain()
        dictionary.fold(self.read, self.write)
        return dictionary.eval().requires_grad_(False)


def _check_rounding(dictionary: Dictionary, device: torch.device) -> None:
    """Raises UserError where weights=bfloat16 cannot be."""
    architecture, kernels = dictionary.config.architecture, current_implementation()
    if not dictionary.latent_rows():
        raise UserError(
            f"weights=bfloat16 is not for architecture {architecture!r}, whose matrices are not read by kernels alone: "
            "leave out training.weights"
        )
    if kernels == "reference" or (kernels == "cpu" and device.type == "cpu"):
        raise UserError(
            f"weights=bfloat16 does not work with the {kernels} kernels, which were ordered: leave out training.weights"
        )
    if device.type == "cpu":
        _warn_slow()


@cache
def _warn_slow() -> None:
    warnings.warn(
        "weights=bfloat16 is for a GPU: in memory it runs on stock torch operations and is several times slower than float32 (told once)",
        RuntimeWarning,
        stacklevel=2,
    )


def figures(losses: Losses, norm: Tensor, firings_F: Tensor, mean_D: Tensor) -> dict[str, Tensor]:
    """What is logged of a step: numbers, or where what is given has one more axis in front, those of each of its rows."""
    tokens = losses.squared_error_B.shape[-1]
    return {
        "loss": losses.total.detach(),
        **losses.parts,
        "l0": firings_F.sum(-1) / tokens,
        "gradient_norm": norm,
        "squared_error": losses.squared_error_B.sum(-1),
        "squares": distances(losses.target_BD, mean_D).square().sum(-1),
    }


def join(activations: Mapping[str, Tensor], config: DictionaryConfig) -> tuple[Tensor, Tensor]:
    """What a dictionary reads and what it is to write: sites side by side, [..., D] each; one tensor for an autoencoder."""
    beside = lambda sites: (  # noqa: E731
        activations[sites[0]] if len(sites) == 1 else torch.cat([activations[site] for site in sites], -1)
    )
    x = beside(config.reads)
    return x, x if config.rewrites else beside(config.writes)

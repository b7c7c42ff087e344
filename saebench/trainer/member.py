"""One dictionary in training: its parameters, optimiser, dead-latent counters and running metrics.

A member does not know of other members or of files; the loop feeds it batches and reads its metrics now and then. Nothing in a step
waits for the device on purpose: sums are kept there until `read_metrics`.
Shape suffixes: `B` tokens, `D` d_in, `F` d_sae.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saebench.activations.statistics import SiteStatistics
from saebench.dictionaries import Dictionary, DictionaryConfig, Losses
from saebench.trainer.config import TrainConfig


def input_scale(rule: str, statistics: SiteStatistics) -> float:
    """The scalar that normalises inputs (methods.md 0.4)."""
    if rule == "sqrt_d":
        return math.sqrt(len(statistics.total_D)) / statistics.mean_norm
    return 1 / math.sqrt(statistics.mean_square) if rule == "unit_ms" else 1.0


class Member:
    """A dictionary being trained on normalised inputs; `finished()` gives the dictionary for raw ones."""

    def __init__(self, dictionary: Dictionary, training: TrainConfig, scale: float, mean_D: Tensor):
        """`mean_D` is the mean of the raw activations: the reference of the logged FVU."""
        self.dictionary, self.training, self.scale = dictionary, training, scale
        self.lr = training.lr_for(dictionary.config.d_sae)
        device = mean_D.device
        self.mean_D = (mean_D * scale).float()
        self.optimiser = torch.optim.Adam(
            dictionary.parameters(), lr=self.lr, betas=training.betas, eps=training.eps, fused=device.type in ("cpu", "cuda")
        )
        self.silent_F = torch.zeros(dictionary.config.d_sae, dtype=torch.int64, device=device)  # tokens since it last fired
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    @classmethod
    def create(
        cls, config: DictionaryConfig, training: TrainConfig, sample_BD: Tensor, statistics: SiteStatistics | None = None
    ) -> Member:
        """A freshly initialised member. `sample_BD` are raw activations to initialise from; `statistics` those of the whole
        corpus (default: of the sample)."""
        if statistics is None:
            statistics = SiteStatistics.empty(sample_BD.shape[1])
            statistics.update(sample_BD)
        if config.d_in is None:
            config = config.model_copy(update={"d_in": sample_BD.shape[1]})
        dictionary = config.build()
        scale = input_scale(config.normalise, statistics)
        generator = torch.Generator().manual_seed(training.seed)
        dictionary.initialise(sample_BD.cpu().float() * scale, generator)
        dictionary.to(sample_BD.device)
        return cls(dictionary, training, scale, statistics.mean_D.to(sample_BD.device))

    @property
    def dead_F(self) -> Tensor:
        """Latents that have been silent for `dead_after` tokens."""
        return self.silent_F >= self.training.dead_after_tokens

    def step(self, x_BD: Tensor, step: int) -> None:
        """One optimiser step on a batch of raw activations."""
        x_BD = x_BD * self.scale
        losses = self.dictionary.losses(x_BD, self.dead_F)
        self.optimiser.zero_grad(set_to_none=True)
        losses.total.backward()
        self.dictionary.project_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.dictionary.parameters(), self.training.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * self.training.rate_at(step)
        self.optimiser.step()
        self.dictionary.constrain()
        self._count(x_BD, losses, norm)

    @torch.no_grad()
    def _count(self, x_BD: Tensor, losses: Losses, norm: Tensor) -> None:
        firings_F = losses.codes.firings()
        self.silent_F.add_(len(x_BD)).masked_fill_(firings_F > 0, 0)
        news = {
            "loss": losses.total.detach(),
            **losses.parts,
            "l0": firings_F.sum() / len(x_BD),
            "gradient_norm": norm,
            "squared_error": losses.squared_error_B.sum(),
            "squares": (x_BD - self.mean_D).square().sum(),
        }
        for name, value in news.items():
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
        for index, entry in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in entry.items()}
        tensors |= {"silent": self.silent_F, "mean": self.mean_D, "scale": torch.tensor(self.scale, dtype=torch.float64)}
        tensors |= {f"sums.{name}": value for name, value in self._sums.items()}
        return tensors | {"steps_since_log": torch.tensor(self._steps)}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state()`."""
        part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        self.dictionary.load_state_dict(part("dictionary."))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part("optimiser.").items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.silent_F.copy_(tensors["silent"])
        self.mean_D.copy_(tensors["mean"])
        self.scale = float(tensors["scale"])
        self._sums = {name: value.clone() for name, value in part("sums.").items()}
        self._steps = int(tensors["steps_since_log"])

    @torch.no_grad()
    def finished(self) -> Dictionary:
        """The dictionary for raw activations: constraints restored, the input scale folded into the weights."""
        dictionary = self.dictionary.config.build().to(self.mean_D.device)
        dictionary.load_state_dict(self.dictionary.state_dict())
        dictionary.constrain()
        dictionary.fold_scale(self.scale)
        return dictionary.eval().requires_grad_(False)

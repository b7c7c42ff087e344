"""How dictionaries are trained: every setting of the loop, the same for all architectures."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from saebench.config import Config

DEAD_AFTER_TOKENS = 10_000_000
LR_AT_16K = 2e-4
LONG_RUN = 300_000_000


class TrainConfig(Config):
    """Settings of a training run."""

    num_tokens: int = Field(default=10_000_000, gt=0)
    """Tokens to train on; more than the activations hold means several epochs, each shuffled anew."""
    batch_size: int = Field(default=2048, gt=0)
    """Tokens in a step."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of Adam; default 2e-4 * sqrt(16384 / d_sae) for 300 million tokens and more, rising with the 0.3rd power
    of their shortage, up to ten times that."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps with rising learning rate."""
    decay: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps, at the end, with learning rate falling linearly to zero."""
    betas: tuple[float, float] | None = None
    """Adam's averaging constants; default those that suit the architecture."""
    eps: float = Field(default=6.25e-10, gt=0)
    """Adam's epsilon."""
    stack: bool = True
    """Whether TopK dictionaries that differ only in k, learning rate, seed and the like take their steps together, which is faster where
    they are small; equal to each alone up to rounding."""
    momentum: Literal["bfloat16", "float32"] = "bfloat16"
    """What the running mean of a matrix' gradient is kept in: 2 bytes a weight less, and no difference in what is learned."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """What the matrices of latents are read in by the kernels; with bfloat16, for a GPU, they are rounded anew after every step, which
    float32 masters take: 2 bytes a weight more, and half of what products and gathering of rows read."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; longer ones are scaled down."""
    dead_after: int | None = Field(default=None, gt=0)
    """A latent that was silent for this many tokens counts as dead; default 10 million or a tenth of the run, whichever is less."""
    resample_every: int | None = Field(default=None, gt=0)
    """Tokens between resamplings, which give dead latents a new start, up to the falling end of the learning rate; default never."""
    resample_warmup: int = Field(default=200, ge=0)
    """Steps over which the learning rate rises anew after a resampling."""
    seed: int = 0
    """Of initialisation and data order."""
    log_every: int = Field(default=50, gt=0)
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = Field(default=1000, gt=0)
    """Steps between checkpoints."""
    loggers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Where metrics go besides metrics.jsonl."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.num_tokens < self.batch_size:
            raise ValueError(
                f"num_tokens={self.num_tokens} is less than one batch of {self.batch_size}: raise it or lower batch_size"
            )
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup={self.warmup} and decay={self.decay} add up to more than the whole run")
        return self

    @property
    def steps(self) -> int:
        return self.num_tokens // self.batch_size

    @property
    def dead_after_tokens(self) -> int:
        return self.dead_after or min(DEAD_AFTER_TOKENS, max(self.batch_size, self.num_tokens // 10))

    def lr_for(self, d_sae: int, largest_rise: float = 10.0) -> float:
        """The peak learning rate of a dictionary of this size; a short run raises it by no more than `largest_rise`."""
        if self.lr is not None:
            return self.lr
        return LR_AT_16K * (16384 / d_sae) ** 0.5 * min(largest_rise, max(1.0, LONG_RUN / self.num_tokens) ** 0.3)

    def resamples_after(self, step: int) -> bool:
        """Whether dead latents get a new start after this step: never in the first warm-up or the last decay."""
        if self.resample_every is None or not self.warmup * self.steps <= step < (1 - self.decay) * self.steps:
            return False
        tokens = step * self.batch_size
        return (tokens + self.batch_size) // self.resample_every > tokens // self.resample_every

    def rate_at(self, step: int) -> float:
        """The factor on the learning rate at a step: linear up, constant, linear down to zero behind the last step."""
        up = (step + 1) / max(1.0, self.warmup * self.steps)
        down = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, up, down)

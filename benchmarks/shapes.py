"""The sizes at which a training step is measured, each with the planted data that suits it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One TopK SAE and its data: `n_features` planted directions of which `mean_l0` are active in a token on average; with 0 of them,
    the data are recorded activations of the bundled model."""

    d_in: int
    d_sae: int
    k: int
    batch_size: int
    n_features: int
    mean_l0: float


SHAPES = {
    "builtin": Shape(d_in=256, d_sae=2048, k=32, batch_size=256, n_features=0, mean_l0=0.0),  # recorded, not planted
    "tiny": Shape(d_in=64, d_sae=256, k=8, batch_size=128, n_features=256, mean_l0=6.0),
    "mini": Shape(d_in=64, d_sae=512, k=8, batch_size=512, n_features=512, mean_l0=6.0),
    "small": Shape(d_in=128, d_sae=1024, k=16, batch_size=1024, n_features=1024, mean_l0=12.0),
    "A": Shape(d_in=512, d_sae=4096, k=32, batch_size=2048, n_features=4096, mean_l0=24.0),
    "B": Shape(d_in=768, d_sae=24576, k=32, batch_size=1024, n_features=4096, mean_l0=24.0),
    "C": Shape(d_in=2048, d_sae=16384, k=64, batch_size=512, n_features=4096, mean_l0=48.0),
}

"""Change what a model does by its features, and measure what that does: edits, ways to choose features, controls, dose-response."""

from saebench.steering.chosen import Chosen
from saebench.steering.edits import Edit, ablate, add, affine, cap, clamp, edit, orthogonal, scale, swap
from saebench.steering.hooks import steer

__all__ = [
    "steer",
    "Edit", "edit", "add", "scale", "clamp", "ablate", "swap", "orthogonal", "cap", "affine",
    "Chosen",
]  # fmt: skip

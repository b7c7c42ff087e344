"""Triton kernels for CUDA: the `Primitives` of `saebench/kernels/primitives.py`, matching pursuit and the attention of Lorsa.

Inputs are float32, bfloat16 or float16; sums and comparisons are float32, and so is whatever comes out. Written for Hopper, correct on any
CUDA card, and checked without one under TRITON_INTERPRET=1. No sum uses atomics, so results have the same bits every time; nothing but
`above` waits for the device. Triton is an optional extra: importing this package needs it.
"""

from saebench.kernels.triton.above import above
from saebench.kernels.triton.attention import attention, attention_gradients, entry_gradients
from saebench.kernels.triton.decode import decode
from saebench.kernels.triton.dots import dots
from saebench.kernels.triton.gradient_square import gradient_square
from saebench.kernels.triton.latents import by_latent
from saebench.kernels.triton.pursuit import pursue, pursuit_step
from saebench.kernels.triton.sums import sums
from saebench.kernels.triton.topk import topk
from saebench.kernels.triton.update import update

__all__ = [
    "topk",
    "above",
    "decode",
    "dots",
    "by_latent",
    "sums",
    "gradient_square",
    "update",
    "pursuit_step",
    "pursue",
    "attention",
    "attention_gradients",
    "entry_gradients",
]

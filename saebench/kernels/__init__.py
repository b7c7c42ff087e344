"""The few operations that cost time. Each file holds one operation: its mathematics, its gradient, and `reference`, the same in plain dense
algebra under autograd, any dtype, the twin every test compares with.

What takes the time in an operation is one of the primitives (primitives.py), which exist several times: stock.py, cpu/, triton/.
implementations.py says which one runs; `use_implementation("reference")` switches all of them, for tests and for measuring.
"""

from saebench.kernels.decode_error import decode_error, decode_error_beside
from saebench.kernels.encode_above import encode_above
from saebench.kernels.encode_batch_topk import encode_batch_topk
from saebench.kernels.encode_jumprelu import encode_jumprelu
from saebench.kernels.encode_topk import encode_topk
from saebench.kernels.entries import with_gradient
from saebench.kernels.implementations import current_implementation, use_implementation
from saebench.kernels.latent_order import stable_order
from saebench.kernels.matching_pursuit import matching_pursuit
from saebench.kernels.prefix_errors import prefix_errors
from saebench.kernels.proximal_step import proximal_step
from saebench.kernels.sparse_decode import gathered_dot, sparse_decode

__all__ = [
    "encode_topk",
    "encode_above",
    "encode_batch_topk",
    "encode_jumprelu",
    "with_gradient",
    "matching_pursuit",
    "prefix_errors",
    "proximal_step",
    "stable_order",
    "sparse_decode",
    "decode_error",
    "decode_error_beside",
    "gathered_dot",
    "current_implementation",
    "use_implementation",
]

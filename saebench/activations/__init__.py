"""Activations: harvest them into a store or compute them as a stream, and draw shuffled batches from either."""

from saebench.activations.batches import Batches, ContextBatches, Source
from saebench.activations.harvesting import harvest
from saebench.activations.joined import JoinedSource
from saebench.activations.sequences import sequences
from saebench.activations.store import ActivationStore
from saebench.activations.stream import ActivationStream
from saebench.activations.tensors import TensorSource

__all__ = [
    "harvest",
    "ActivationStore",
    "ActivationStream",
    "TensorSource",
    "JoinedSource",
    "Batches",
    "ContextBatches",
    "sequences",
    "Source",
]

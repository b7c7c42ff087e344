"""Dictionaries: one file per architecture, one registry, one file format."""

from saebench.dictionaries.base import (
    Dictionary,
    DictionaryConfig,
    Losses,
    TrainingBatch,
    load_dictionary,
    parse_dictionary,
    register,
)
from saebench.dictionaries.sae import SAEConfig, SparseAutoencoder
from saebench.dictionaries.scaling import Scaling
from saebench.dictionaries.topk import TopK

__all__ = [
    "Dictionary",
    "DictionaryConfig",
    "Losses",
    "TrainingBatch",
    "Scaling",
    "load_dictionary",
    "parse_dictionary",
    "register",
    "SAEConfig",
    "SparseAutoencoder",
    "TopK",
]

"""Dictionaries: one file per architecture, one registry, one file format."""

from saebench.dictionaries.atoms import Threshold
from saebench.dictionaries.base import (
    Dictionary,
    DictionaryConfig,
    Losses,
    TrainingBatch,
    load_dictionary,
    parse_dictionary,
    register,
)
from saebench.dictionaries.batchtopk import BatchTopK, OrtSAE
from saebench.dictionaries.clt import CLT
from saebench.dictionaries.clt_jumprelu import CLTJumpReLU
from saebench.dictionaries.crosscoder import Crosscoder
from saebench.dictionaries.csr import CSR
from saebench.dictionaries.discrete import Discrete
from saebench.dictionaries.gated import Gated
from saebench.dictionaries.jumprelu import JumpReLU
from saebench.dictionaries.layer_group import LayerGroup
from saebench.dictionaries.lorsa import Lorsa
from saebench.dictionaries.matching_pursuit import MatchingPursuit
from saebench.dictionaries.matryoshka import Matryoshka
from saebench.dictionaries.relu import ReLU
from saebench.dictionaries.sae import SAEConfig, SparseAutoencoder
from saebench.dictionaries.scaling import Scaling
from saebench.dictionaries.structured import Structured
from saebench.dictionaries.topafa import TopAFA
from saebench.dictionaries.topk import TopK
from saebench.dictionaries.transcoder import Transcoder
from saebench.dictionaries.unrolled import IHT, ISTA

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
    "BatchTopK",
    "OrtSAE",
    "Matryoshka",
    "TopAFA",
    "JumpReLU",
    "Threshold",
    "ReLU",
    "Gated",
    "Structured",
    "Transcoder",
    "Crosscoder",
    "CLT",
    "CLTJumpReLU",
    "LayerGroup",
    "Lorsa",
    "MatchingPursuit",
    "ISTA",
    "IHT",
    "Discrete",
    "CSR",
]

"""Small feature stores of four kinds of dictionary, each with its codes by brute force."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import saebench as sb
from saebench.activations import ActivationStream
from saebench.dictionaries import Dictionary
from saebench.dictionaries.lorsa import Lorsa
from saebench.features import FeatureStore, index

KINDS = {
    "topk": sb.TopK(d_sae=48, k=6, site="blocks.1.hook_resid_post"),
    "jumprelu": sb.JumpReLU(d_sae=48, target_l0=6.0, initial_l0=6.0, site="blocks.1.hook_resid_post"),
    "transcoder": sb.Transcoder(d_sae=48, k=5, site="blocks.1.mlp.hook_in", target="blocks.1.hook_mlp_out"),
    "lorsa": Lorsa(d_sae=48, k=6, score="abs", num_qk=4, site="blocks.1.attn.hook_in", target="blocks.1.hook_attn_out"),
}
DEAD = 7


@dataclass
class Small:
    """A store and what it was made from. `dense_TF` are the codes of all tokens in the precision of the store, 0 on first tokens."""

    kind: str
    store: FeatureStore
    dictionary: Dictionary
    dense_TF: np.ndarray

    @property
    def ids_T(self) -> np.ndarray:
        return self.store.contexts.ids_NS.flatten().numpy()

    @property
    def alive(self) -> list[int]:
        return np.flatnonzero((self.dense_TF != 0).any(0)).tolist()


@pytest.fixture(scope="session", params=KINDS)
def small(request, tiny_lm, contexts, tmp_path_factory) -> Small:
    """A store over 423 contexts of 16 tokens, of 40 documents."""
    torch.manual_seed(0)
    config = KINDS[request.param]
    stream = ActivationStream(tiny_lm, contexts, list(dict.fromkeys([*config.reads, *config.writes])))
    config = config.for_sites(stream.widths).for_lm(tiny_lm)
    everything = torch.arange(len(contexts))
    x_CSD, y_CSD = (stream.fetch(everything, list(sites))[sites[0]].decode() for sites in (config.reads, config.writes))
    dictionary = config.build()
    sample = (x_CSD, y_CSD) if config.sequential else (x_CSD.flatten(0, 1), y_CSD.flatten(0, 1))
    generator = torch.Generator().manual_seed(3)
    dictionary.initialise(*sample, generator, tiny_lm)
    dictionary = dictionary.settled().requires_grad_(False)
    if hasattr(dictionary, "b_enc"):
        dictionary.b_enc[DEAD] = -1e3
    store = index(dictionary, stream, tmp_path_factory.mktemp("features") / request.param, lm=tiny_lm)
    dense_CSF = torch.zeros(*x_CSD.shape[:2], config.d_sae)
    dense_CSF[:, 1:] = dictionary.encode_contexts(x_CSD).to_dense().view(len(x_CSD), -1, config.d_sae)
    rounded_CSF = (dense_CSF / store.value_scale).half().float() * store.value_scale
    return Small(request.param, store, dictionary, rounded_CSF.flatten(0, 1).numpy())

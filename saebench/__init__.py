"""saebench: a workbench for sparse-autoencoder interpretability.

    import saebench as sb
    lm    = sb.load_lm("builtin")
    store = sb.harvest(lm, sb.builtin_text(), sites=["blocks.2.hook_resid_post"], num_tokens=1_000_000, out="acts/demo")
    sae   = sb.train(sb.TopK(d_sae=4096, k=32), store, sb.TrainConfig(num_tokens=1_000_000))
    codes = sae.encode(x_BD); x_hat_BD = sae.decode(codes)
    sae.save("my-sae"); sae = sb.load("my-sae")

Names are imported when first used, so that `import saebench` itself is quick.
"""

import os
from importlib import import_module
from typing import Any

# Threads that spin while they wait starve each other where cores are shared (10 x measured); for the fraction of a millisecond between two
# operations it is sooner there than waking up. Read when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__version__ = "0.1.0"

_NAMES = {
    "load_lm": "saebench.lm:load_lm",
    "LanguageModel": "saebench.lm:LanguageModel",
    "builtin_text": "saebench.lm:builtin_text",
    "load_text": "saebench.lm:load_text",
    "pack": "saebench.lm:pack",
    "harvest": "saebench.activations:harvest",
    "ActivationStore": "saebench.activations:ActivationStore",
    "ActivationStream": "saebench.activations:ActivationStream",
    "layer_groups": "saebench.activations.angular:layer_groups",
    "Batches": "saebench.activations:Batches",
    "TensorSource": "saebench.activations:TensorSource",
    "JoinedSource": "saebench.activations:JoinedSource",
    "SparseCodes": "saebench.codes:SparseCodes",
    "TopK": "saebench.dictionaries:TopK",
    "BatchTopK": "saebench.dictionaries:BatchTopK",
    "OrtSAE": "saebench.dictionaries:OrtSAE",
    "Matryoshka": "saebench.dictionaries:Matryoshka",
    "TopAFA": "saebench.dictionaries:TopAFA",
    "JumpReLU": "saebench.dictionaries:JumpReLU",
    "Threshold": "saebench.dictionaries:Threshold",
    "ReLU": "saebench.dictionaries:ReLU",
    "Gated": "saebench.dictionaries:Gated",
    "Structured": "saebench.dictionaries:Structured",
    "CLT": "saebench.dictionaries:CLT",
    "CLTJumpReLU": "saebench.dictionaries:CLTJumpReLU",
    "LayerGroup": "saebench.dictionaries:LayerGroup",
    "Lorsa": "saebench.dictionaries:Lorsa",
    "MatchingPursuit": "saebench.dictionaries:MatchingPursuit",
    "ISTA": "saebench.dictionaries:ISTA",
    "IHT": "saebench.dictionaries:IHT",
    "Discrete": "saebench.dictionaries:Discrete",
    "CSR": "saebench.dictionaries:CSR",
    "Transcoder": "saebench.dictionaries:Transcoder",
    "Crosscoder": "saebench.dictionaries:Crosscoder",
    "Dictionary": "saebench.dictionaries:Dictionary",
    "DictionaryConfig": "saebench.dictionaries:DictionaryConfig",
    "SparseAutoencoder": "saebench.dictionaries:SparseAutoencoder",
    "SAEConfig": "saebench.dictionaries:SAEConfig",
    "register": "saebench.dictionaries:register",
    "load": "saebench.dictionaries:load_dictionary",
    "train": "saebench.trainer:train",
    "TrainConfig": "saebench.trainer:TrainConfig",
    "evaluate": "saebench.evaluation:evaluate",
    "index": "saebench.features:index",
    "FeatureStore": "saebench.features:FeatureStore",
    "steer": "saebench.steering:steer",
    "trace": "saebench.circuits:trace",
    "PlantedDictionary": "saebench.synthetic:PlantedDictionary",
    "UserError": "saebench.errors:UserError",
}

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'saebench' has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])

"""Planted truth: activations, and a language model, whose features are known because we put them there."""

from saebench.synthetic.planted import PlantedDictionary
from saebench.synthetic.toy_transformer import InductionCircuit, induction_transformer, save_induction_transformer

__all__ = ["PlantedDictionary", "induction_transformer", "save_induction_transformer", "InductionCircuit"]

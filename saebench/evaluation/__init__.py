"""Evaluation: the metrics, and a dictionary measured inside its model."""

from saebench.evaluation.metrics import Reconstruction, SplicedLoss, describe
from saebench.evaluation.reconstruction import reconstruction
from saebench.evaluation.splice import evaluate

__all__ = ["evaluate", "reconstruction", "Reconstruction", "SplicedLoss", "describe"]

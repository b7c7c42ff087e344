"""Features: latents with their evidence in the corpus."""

from saebench.features.characteristic import Example, Feature, characteristic_features
from saebench.features.postings import Postings, collect

__all__ = ["collect", "Postings", "characteristic_features", "Feature", "Example"]

"""Features: latents with their evidence in a corpus."""

from saebench.features.building import index
from saebench.features.characteristic import Example, Feature, characteristic_features
from saebench.features.store import Details, FeatureStore

__all__ = ["index", "FeatureStore", "Details", "characteristic_features", "Feature", "Example"]

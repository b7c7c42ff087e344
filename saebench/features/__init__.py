"""Features: latents with their evidence in a corpus."""

from saebench.features.building import index
from saebench.features.characteristic import Feature, characteristic_features
from saebench.features.contrast import contrast_texts, document_sets, themes
from saebench.features.examples import (
    Example,
    ExampleGroup,
    cofiring_examples,
    quantile_groups,
    top_examples,
    window,
)
from saebench.features.prompts import PromptCodes, feature_on_text, read_prompt
from saebench.features.search import (
    filter_latents,
    like,
    on_token,
    promoting,
    similar_contexts,
    together,
    tokens_named,
)
from saebench.features.sources import example_sources
from saebench.features.store import Details, FeatureStore

__all__ = [
    "index", "FeatureStore", "Details",
    "Example", "ExampleGroup", "top_examples", "quantile_groups", "cofiring_examples", "window",
    "on_token", "tokens_named", "like", "together", "promoting", "similar_contexts", "filter_latents",
    "read_prompt", "PromptCodes", "feature_on_text", "example_sources",
    "document_sets", "themes", "contrast_texts",
    "characteristic_features", "Feature",
]  # fmt: skip

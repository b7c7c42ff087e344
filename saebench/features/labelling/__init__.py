"""What is said of latents: labels by rules found in their firings, labels of a language model, and a person's own."""

from saebench.features.labelling.labels import Labels, label_offline
from saebench.features.labelling.notes import Notes

__all__ = ["label_offline", "Labels", "Notes"]

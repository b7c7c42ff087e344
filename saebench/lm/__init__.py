"""Language models and text: load, tokenise, read sites, replace them, generate."""

from saebench.lm.model import LanguageModel, load_lm
from saebench.lm.text import Document, Text, builtin_text, load_text
from saebench.lm.tokens import Contexts, pack

__all__ = ["LanguageModel", "load_lm", "Document", "Text", "builtin_text", "load_text", "Contexts", "pack"]

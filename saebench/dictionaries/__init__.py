"""Dictionaries: one file per architecture, one registry, one file format."""

from saebench.dictionaries.base import Dictionary, DictionaryConfig, Losses, load_dictionary, parse_dictionary, register
from saebench.dictionaries.topk import TopK

__all__ = ["Dictionary", "DictionaryConfig", "Losses", "load_dictionary", "parse_dictionary", "register", "TopK"]

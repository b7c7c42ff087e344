"""The feature store on disk: names, versions, tables. The format is in docs/formats.md.

A store holds every code of a corpus twice, by token and by latent, and what follows from them for each latent. It is written by
`building.py` and read by `store.py`.
"""

from __future__ import annotations

from typing import Any

FORMAT, VERSION = "saebench-features", 1
FIELDS = {
    "complete", "config", "num_contexts", "num_tokens", "num_entries", "d_sae", "chunk_contexts", "ranges", "value_scale",
    "rounding", "sizes",
}  # fmt: skip

IDS, RUNS = ".ids", ".run-*"  # token ids of the corpus and entries by latent, which exist only while a store is built
TOKENS, DOCUMENTS, VOCABULARY = "tokens.parquet", "documents.parquet", "vocabulary.parquet"
POSTINGS_GROUP = 1 << 18  # rows of a row group of postings: what is read to find one latent's
TOKENS_GROUP = 1 << 18  # tokens of a row group, about: whole contexts
DETAILS_GROUP = 512  # latents of a row group of details

BINS = 50  # of the histogram of a latent's values
POSITION_BINS = 16  # of the places in a context where it fires
TOP_TOKENS = 20
NEIGHBOURS = 16
COACTIVE = 16
LOGITS = 20


def describe(config: dict[str, Any], num_contexts: int) -> str:
    """What a store is made from, in words."""
    return f"dictionary {config['dictionary']} over {num_contexts} contexts of activations {config['activations']}"


def codes_name(number: int) -> str:
    return f"codes-{number:05d}.safetensors"


def run_name(number: int) -> str:
    """Entries of a chunk by latent, which exist only while a store is built."""
    return f".run-{number:05d}.safetensors"


def postings_name(number: int) -> str:
    return f"postings-{number:05d}.parquet"


def latents_name(number: int) -> str:
    return f"latents-{number:05d}.parquet"


def details_name(number: int) -> str:
    return f"details-{number:05d}.parquet"

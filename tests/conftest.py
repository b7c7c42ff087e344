"""Shared fixtures. Seeds are fixed; a test that needs ../shared/data skips itself when the folder is absent."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

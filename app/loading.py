"""Modules of the app are imported when a page first needs them, by one visitor at a time: several would meet half-imported ones."""

from __future__ import annotations

import importlib
from threading import Lock
from types import ModuleType

_LOCK = Lock()


def load(name: str) -> ModuleType:
    with _LOCK:
        return importlib.import_module(name)

"""A table of very many rows that scrolls and sorts at once: the browser holds the columns as plain arrays and draws only the rows in view.

What is sent is one piece of bytes: the length of a JSON header (uint32, little endian), the header, and the columns where it says, from the
next multiple of 8 on: numbers as float32, texts as uint32 offsets [rows + 1] and then UTF-8.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Column:
    """How a column is shown: `form` is text, int, f2, or p4 (a share as percent, with that many digits)."""

    name: str
    title: str
    form: str
    width: str
    """As in CSS grids."""
    help: str = ""


def pack(table: pa.Table, columns: Sequence[Column], link: str, of: str) -> bytes:
    """A table of `columns` for `show`. A row opens `link` followed by its first column; `of` names what is listed, so that Back finds the
    place again. The column to sort by stands in the query string as `sort`, with a dash at the end for descending."""
    described, parts, place = [], [], 0
    for column in columns:
        values = table[column.name].combine_chunks()
        values = values.chunk(0) if isinstance(values, pa.ChunkedArray) and values.num_chunks == 1 else values
        kind = "text" if column.form == "text" else "number"
        blobs = _text(values) if kind == "text" else [values.cast(pa.float32()).to_numpy(zero_copy_only=False).tobytes()]
        described.append({
            "name": column.name, "title": column.title, "form": column.form, "width": column.width, "help": column.help,
            "kind": kind, "places": [place + sum(map(len, blobs[:i])) for i in range(len(blobs) + 1)],
        })  # fmt: skip
        blob = b"".join(blobs)
        blob += bytes(-len(blob) % 8)
        parts.append(blob)
        place += len(blob)
    digest = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    header = json.dumps({"rows": len(table), "columns": described, "link": link, "of": of, "digest": digest}).encode()
    header += b" " * (-(len(header) + 4) % 8)
    return b"".join([len(header).to_bytes(4, "little"), header, *parts])


def _text(values: Any) -> list[bytes]:
    encoded = [text.encode() for text in values.fill_null("").to_pylist()]
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in encoded])]).astype(np.uint32)
    return [offsets.tobytes(), b"".join(encoded)]


@cache
def _component() -> Any:
    from streamlit.components.v2 import component

    return component("saebench_grid", js=(HERE / "grid.js").read_text(encoding="utf-8"), isolate_styles=False)


def show(packed: bytes, key: str, height: int) -> None:
    """Draw a packed table."""
    _component()(data=packed, key=key, height=height)

"""JSON that others wrote: read so that no file can harm, and checked by rules that each answer in one line with the place and the fix.

A validator is a generator of such lines. `problems` collects the first of them, `refuse` makes the error that a reader raises.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from saebench.errors import UserError

LARGEST = 1 << 30  # bytes of a file
MOST = 100  # problems that are named
SHOWN = 40  # letters of a wrong value

Kinds = tuple[str, ...]
TEXT, WHOLE, NUMBER, FLAG, LIST, OBJECT, NULL = (
    "text",
    "a whole number",
    "a number",
    "true or false",
    "a list",
    "an object",
    "null",
)


def read_document(path: str | Path) -> Any:
    """What a JSON file holds; an object that has a key twice becomes a `Twice`. Raises UserError for a file that is missing, larger than
    1 GiB, or not JSON."""
    path = Path(path)
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= LARGEST else b""
    except FileNotFoundError:
        raise UserError(f"{path} is missing: check the path") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from None
    if size > LARGEST:
        raise UserError(
            f"{path} has {size / 2**30:.1f} GiB, and at most {LARGEST >> 30} is read: prune what it holds before saving"
        )
    try:
        return json.loads(content, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}; save it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not JSON: byte {error.start} is no text; save it again") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read: no format here is, save it again") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path} is not JSON: {' '.join(str(error).split())[:100]}; save it again") from None


class Twice(dict):
    """An object that a file wrote with one key twice."""

    key: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        found = Twice(found)
        found.key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return found


def problems(found: Iterator[str]) -> list[str]:
    """The first lines of a validator, at most 100."""
    return list(islice(found, MOST))


def refuse(path: str | Path, found: list[str]) -> None:
    """Raises UserError with the first problem of a file, if it has any."""
    if found:
        further = f" (and {len(found) - 1}{'+' if len(found) == MOST else ''} more)" if len(found) > 1 else ""
        raise UserError(f"{path}: {found[0]}{further}")


def shown(value: Any) -> str:
    """A value as it stands in a message."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = "null" if value is None else repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def fits(value: Any, kinds: Kinds) -> bool:
    """Whether a value is of one of the kinds; numbers are finite."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (
        (TEXT in kinds and isinstance(value, str))
        or (WHOLE in kinds and number and isinstance(value, int) and abs(value) < 2**53)  # as far as JavaScript counts
        or (NUMBER in kinds and number and math.isfinite(value))
        or (FLAG in kinds and isinstance(value, bool))
        or (LIST in kinds and isinstance(value, list))
        or (OBJECT in kinds and isinstance(value, dict))
        or (NULL in kinds and value is None)
    )


def wrong_fields(
    found: Any, where: str, needed: Mapping[str, Kinds], optional: Mapping[str, Kinds] | None = None
) -> Iterator[str]:
    """What is wrong with an object's fields: missing ones, and values of another kind. Further fields are let be."""
    if not isinstance(found, dict):
        yield f"{where} is {shown(found)}: it must be an object"
        return
    if isinstance(found, Twice):
        yield f"{where} has {found.key!r} twice: keep one of them"
    for name, kinds in needed.items():
        if name not in found:
            yield f"{where} lacks {name!r}: add it, {' or '.join(kinds)}"
    for name, kinds in {**needed, **(optional or {})}.items():
        if name in found and not fits(found[name], kinds):
            yield f"{where}.{name} is {shown(found[name])}: it must be {' or '.join(kinds)}"

"""The base of every configuration: typed, frozen, strict about names, with errors a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from saebench.errors import UserError


class ConfigError(UserError):
    """A key that is wrong, and what stands before and after it in the message; containers put their own key in front of it."""

    def __init__(self, key: str, before: str = "", after: str = ""):
        super().__init__(f"{before}{key}{after}")
        self.key, self.before, self.after = key, before, after

    def under(self, container: str) -> ConfigError:
        """The same error, seen from outside."""
        return ConfigError(f"{container}.{self.key}", self.before, self.after) if container else self


class Config(BaseModel):
    """A configuration. Unknown keys and wrong types are errors that name the key; instances cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(type(self), error) from None

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Build from plain data; `where` is the key the data stands under, for messages. Raises UserError."""
        try:
            return cls(**values)
        except ConfigError as error:
            raise error.under(where) from None
        except UserError as error:
            raise UserError(f"{error}{f' (key {where})' if where else ''}") from None


def explain(cls: type[BaseModel], error: ValidationError) -> UserError:
    """The first problem of a validation in one line, with the key it concerns."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if isinstance(inner := problem.get("ctx", {}).get("error"), ConfigError):
        return inner.under(key)
    if problem["type"] == "extra_forbidden":
        known = list(cls.model_fields)
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return ConfigError(key, "unknown key ", f": {hint}")
    if problem["type"] == "missing":
        return ConfigError(key, "missing key ", ": it has no default")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return UserError(f"{message}{f' (key {key})' if key else ''}")
    return ConfigError(key, after=f"={problem['input']!r}: {message[0].lower()}{message[1:]}")


def first_difference(a: Any, b: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key in which two configurations differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            if found := first_difference(a.get(name), b.get(name), f"{key}.{name}" if key else name):
                return found
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            if found := first_difference(x, y, f"{key}.{number}"):
                return found
        return None
    return None if a == b else (key, a, b)

"""The base of every configuration: typed, frozen, strict about names, with errors a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from saebench.errors import UserError


class Config(BaseModel):
    """A configuration. Unknown keys and wrong types are errors that name the key; instances cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(explain(type(self), error)) from None

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Build from plain data; `where` is the key the data stands under, for messages. Raises UserError."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(explain(cls, error, where)) from None


def explain(cls: type[BaseModel], error: ValidationError, where: str = "") -> str:
    """The first problem of a validation in one line, with the recipe key it concerns."""
    problem = error.errors()[0]
    key = ".".join([*([where] if where else []), *(str(part) for part in problem["loc"])])
    if problem["type"] == "extra_forbidden":
        known = _keys_at(cls, problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {key}: {hint}"
    if problem["type"] == "missing":
        return f"missing key {key}: it has no default"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{message}{f' (key {key})' if key else ''}"
    return f"{key}={problem['input']!r}: {message[0].lower()}{message[1:]}"


def _keys_at(cls: type[BaseModel], location: tuple) -> list[str]:
    current: Any = cls
    for part in location:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            break
        current = next(
            (a for a in [field.annotation, *getattr(field.annotation, "__args__", ())] if hasattr(a, "model_fields")), None
        )
    return list(getattr(current, "model_fields", cls.model_fields))

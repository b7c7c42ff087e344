"""Where in a text an edit acts. Position 0 (BOS, of outlying norm) is never edited.

As text, for recipes, presets and the command line: `all`, `prompt`, `generated`, `last`, `4-9` (from 4 up to and without 9), `after:TOKEN`.
Shape suffixes: `B` texts, `S` positions of one forward pass.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from saebench.errors import UserError

Kind = Literal["all", "prompt", "generated", "last", "span", "after"]
KINDS = ("all", "prompt", "generated", "last")
FORMS = f"{', '.join(KINDS)}, a span such as 4-9, or after:TOKEN"
SKIP = 1


@dataclass(frozen=True)
class Positions:
    """Where an edit acts, counted from 0 (BOS).

    `prompt` is what the first forward pass of a text reads, `generated` what is fed to later ones; `last` the last position of every
    pass, which is the one that the next token is drawn from; `after` every position behind the first occurrence of a token.
    """

    kind: Kind = "all"
    first: int = 0
    end: int = 0
    """The first position behind a span."""
    token: str = ""

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, "span", "after"):
            raise UserError(f"positions {self.kind!r} are unknown: use {FORMS}")
        if self.kind == "span" and not 0 <= self.first < self.end:
            raise UserError(f"the span {self.first}-{self.end} holds no position: the second number is the first behind it")
        if self.kind == "after" and not self.token:
            raise UserError("positions after: name no token: write such as after:import")

    @classmethod
    def parse(cls, text: str | Positions) -> Positions:
        """From their form as text. Raises UserError with the forms there are."""
        if isinstance(text, Positions):
            return text
        if text in KINDS:
            return cls(text)  # type: ignore[arg-type]
        if text.startswith("after:"):
            return cls("after", token=text.removeprefix("after:"))
        if found := re.fullmatch(r"(\d+)-(\d+)", text):
            return cls("span", int(found[1]), int(found[2]))
        raise UserError(f"positions {text!r} are unknown: use {FORMS}")

    def __str__(self) -> str:
        return {"span": f"{self.first}-{self.end}", "after": f"after:{self.token}"}.get(self.kind, self.kind)

    def token_id(self, lm: Any) -> int | None:
        """The id of the token that they are after. Raises UserError for a text that is not one token."""
        if self.kind != "after":
            return None
        ids = lm.tokenizer(self.token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = ", ".join(repr(lm.token_strings[i]) for i in ids)
            raise UserError(f"positions after:{self.token}: {self.token!r} is {len(ids)} tokens ({pieces}), give one token")
        return ids[0]

    def part(self, start: int, size: int) -> slice | None:
        """Which positions of a forward pass over start .. start + size are meant, where they are neighbours; None for none of them."""
        first, end = SKIP, start + size
        if self.kind == "prompt":
            end = end if start == 0 else 0
        elif self.kind == "generated":
            first = SKIP if start else end
        elif self.kind == "last":
            first = max(SKIP, end - 1)
        elif self.kind == "span":
            first, end = max(SKIP, self.first), min(end, self.end)
        first = max(first, start)
        return slice(first - start, end - start) if first < end else None


def after_token(ids_BS: Tensor, token: int, seen_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which positions are behind the first occurrence of a token [B, S], and whether it has occurred by the end of the pass [B], given
    whether it had before."""
    here_BS = ids_BS == token
    count_BS = here_BS.cumsum(1)
    behind_BS = count_BS - here_BS.long() > 0
    if seen_B is not None:
        behind_BS = behind_BS | seen_B[:, None]
    return behind_BS, behind_BS[:, -1] | here_BS[:, -1]

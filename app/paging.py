"""Long lists, a part at a time. The first that is shown stands in the query string, under a key of the list's own."""

from __future__ import annotations

import address
import layout


def start(key: str, size: int, page: int) -> int:
    """The first to show of a list, so that it is the first of a part."""
    return min(max(0, address.get_number(key, 0)), max(0, size - 1)) // page * page


def turn(view: str, key: str, first: int, size: int, page: int) -> None:
    """Which part of a list is shown, with links to the next and the previous one."""
    last = min(first + page, size)
    back = layout.a("previous", view, **{key: max(0, first - page)}) if first else ""
    on = layout.a("next", view, **{key: last}) if last < size else ""
    layout.show(f'<div class="sb-turn"><span class="sb-dim">{first + 1:,} to {last:,} of {size:,}</span> {back} {on}</div>')

"""The tables of `browse.py`, and what is in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report

PROMPT_LENGTH = 64
TARGETS = {"Feature": ("content", 300), "Prompt": ("complete", 500)}  # milliseconds that the 95th percentile may take
FIRST = "first of a process"
VISIT_TARGET_S = 2.0
LOOKUP_HEAD = ("lookup", "times", "p50 ms", "p95 ms", "max ms")
PAGE_HEAD = ("page", "times", "first content p50 ms", "p95 ms", "whole p50 ms", "p95 ms", "max ms", "sent KiB", "p95 may be")
TABLE_HEAD = ("the table in chromium", "ms until shown", "longest gap between frames, ms", "frames later than 33 ms")
VISIT_HEAD = (
    *(
        "visitors",
        "pause s",
        "pages",
        "first content p50 s",
        "p95 s",
        "whole p50 s",
        "p95 s",
        "max s",
        "pages/s",
        "server CPU s a page",
    ),
    *("peak MiB", "own MiB", "problems", "p95 may be"),
)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def write(result: dict, stem: Path) -> str:
    """The tables of what has been measured, also on disk."""
    tables = [made for made in (_lookups(result), _pages(result), _table(result), _visits(result), _problems(result)) if made]
    given = result["arguments"]
    about = f"A store of {given['d_sae']:,} latents over {given['tokens']:,} tokens"
    if "latents" in result:
        about += f" ({result['latents']['entries']:,} firings), drawn codes over the bundled text repeated"
    report.write(result, "The feature browser", tables, stem, f"{about}.\n\n")
    return "\n\n".join(tables) + "\n"


def _lookups(result: dict) -> str:
    if "lookups" not in result:
        return ""
    found, counts = result["lookups"], result["latents"]["counts"]
    rows = [[f"once: {name}", "1", *[f"{value:.1f}"] * 3] for name, value in found["open"].items()]
    rows += [[name, *spread(values)] for name, values in found["warm"].items()]
    rows += [[f"{name}, not in memory", *spread(values)] for name, values in found["cold"].items()]
    said = f"Latents that fire {min(counts):,} to {max(counts):,} times, evenly spaced in the logarithm."
    return f"{said}\n\n{report.format_table(list(LOOKUP_HEAD), rows)}"


def spread(values: Sequence[float]) -> list[str]:
    return [f"{len(values)}", *(f"{quantile(values, share):.1f}" for share in (0.5, 0.95, 1.0))]


def _pages(result: dict) -> str:
    rows = [[name, *page_cells(name, runs)] for name, runs in result.get("pages", {}).items()]
    return report.format_table(list(PAGE_HEAD), rows) if rows else ""


def page_cells(name: str, runs: Sequence[dict]) -> list[str]:
    """A row of the table of pages; what the 95th percentile may be, and whether it is, where that was set."""
    contents, wholes = ([one[what] for one in runs if one[what] is not None] for what in ("content", "complete"))
    first = [f"{quantile(contents, share):.0f}" for share in (0.5, 0.95)] if contents else ["-", "-"]
    what, limit = TARGETS.get(name.partition(",")[0], ("", 0))
    target = "-"
    if limit and FIRST not in name:
        met = quantile([one[what] for one in runs if one[what] is not None] or [math.inf], 0.95) <= limit
        target = f"{'first content' if what == 'content' else 'whole'} {limit}: {said(met)}"
    sent = sum(one["bytes"] for one in runs) / len(runs) / 1024
    return [f"{len(runs)}", *first, *(f"{quantile(wholes, share):.0f}" for share in (0.5, 0.95, 1.0)), f"{sent:.0f}", target]


def said(met: bool) -> str:
    return "met" if met else "**missed**"


def _table(result: dict) -> str:
    if "table" not in result:
        return ""
    found = result["table"]
    rows = [
        [f"load {found['rows']:,} rows", f"{found['load_ms']:.0f}", "-", "-"],
        ["load again", f"{found['load_again_ms']:.0f}", "-", "-"],
        ["filter by token", f"{found['filter_ms']:.0f}", "-", "-"],
    ]
    names = {"idle": "nothing, 1 s", "wheel": "scroll by wheel", "drag": "drag from end to end"}
    for key, name in names.items():
        frames = found[key]
        rows.append([name, "-", f"{frames['longest_ms']:.0f}", f"{frames['late']} of {frames['frames']}"])
    for head, ways in found["sorts"].items():
        shown, longest = (max(way[what] for way in ways) for what in ("shown_ms", "longest_ms"))
        rows.append([f"sort by {head}, slower way", f"{shown:.0f}", f"{longest:.0f}", "-"])
    return report.format_table(list(TABLE_HEAD), rows)


def _visits(result: dict) -> str:
    rows = []
    if "visitors" in result:
        rows = [[f"{row['plan']['visitors']} sessions", *visit_cells(row)] for row in result["visitors"]["rows"]]
    if "chromium" in result:
        row = result["chromium"]
        for name, first in (("browsers, opening one by one", True), ("browsers, the next", False)):
            part = [one for one in row["visits"] if one["first"] == first]
            if part:
                cells = visit_cells(row | {"visits": part})
                rows.append([f"{row['plan']['visitors']} {name}", *(opening(cells) if first else cells)])
    if not rows:
        return ""
    table = report.format_table(list(VISIT_HEAD), rows)
    if "visitors" not in result:
        return table
    found = result["visitors"]
    return (
        f"The first visit of a started server took {found['first_visit_s']:.1f} s, imports included, and left it at "
        f"{found['after_first']['peak_mib']:.0f} MiB; tracebacks in its log: {found['tracebacks']}.\n\n{table}"
    )


def visit_cells(row: dict) -> list[str]:
    """A row of the table of visitors."""
    visits = row["visits"]
    contents = [one["title"] for one in visits if one.get("title") is not None]
    wholes = [one["complete"] for one in visits if one["complete"] is not None] or [math.inf]
    first = [f"{quantile(contents, share):.2f}" for share in (0.5, 0.95)] if contents else ["-", "-"]
    problems = len(row["problems"]) if "problems" in row else sum(bool(one["problem"]) for one in visits)
    pages = row["plan"]["visitors"] * row["plan"]["steps"]
    met = said(quantile(wholes, 0.95) <= VISIT_TARGET_S)
    return [
        f"{row['plan']['pause']:g}",
        f"{len(visits)}",
        *first,
        *(f"{quantile(wholes, share):.2f}" for share in (0.5, 0.95, 1.0)),
        f"{pages / row['seconds']:.1f}",
        f"{row['cpu_seconds'] / pages:.3f}",
        f"{row['peak_mib']:.0f}",
        f"{row['own_mib']:.0f}",
        f"{problems}",
        f"{VISIT_TARGET_S:g} s: {met}",
    ]


def opening(cells: list[str]) -> list[str]:
    """A row without what was measured of all visitors at once, later."""
    blank = {"pause s", "pages/s", "server CPU s a page", "p95 may be"}
    return ["-" if head in blank else cell for head, cell in zip(VISIT_HEAD[1:], cells, strict=True)]


def _problems(result: dict) -> str:
    """What went wrong, each once."""
    return "\n".join(f"- {' '.join(str(problem).split())[:300]}" for problem in dict.fromkeys(result.get("problems", ())))

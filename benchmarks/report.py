"""Results as a person reads them (tables in markdown that also line up as plain text) and as a program does (JSON)."""

import json
from pathlib import Path
from statistics import mean, median

BASE = "ours"  # the peer that all ratios are against
SPEED_HEAD = ["peer", "step ms", "(range)", "CPU ms", f"x {BASE}", "(range)", "encode tok/s", "decode tok/s", "peak MiB"]
QUALITY_HEAD = {"fvu": "FVU", "l0": "L0", "dead": "dead", "recovered": "recovered", "cpu_seconds": "CPU s"}
BESIDE_SPEED = ("fvu", "dead", "recovered")


def speed_table(speed: dict[str, dict], quality: dict[str, list[dict]], batch_size: int) -> str:
    """One row per peer; a ratio of 3 says that the peer's step takes 3 times as long as ours in the same round."""
    rows = [
        [name, *_speed_cells(result, speed.get(BASE), batch_size), *_quality_cells(quality.get(name, []), BESIDE_SPEED)]
        for name, result in speed.items()
    ]
    return format_table([*SPEED_HEAD, *(QUALITY_HEAD[key] for key in BESIDE_SPEED)], rows) + _failures(speed)


def quality_table(quality: dict[str, list[dict]]) -> str:
    """One row per peer: the mean over seeds, with the least and the greatest where there are several."""
    rows = [[name, *_quality_cells(runs, tuple(QUALITY_HEAD))] for name, runs in quality.items()]
    errors = {name: next((run for run in runs if run["error"]), {"error": None}) for name, runs in quality.items()}
    return format_table(["peer", *QUALITY_HEAD.values()], rows) + _failures(errors)


def write(result: dict, tables: list[str], stem: Path) -> None:
    """`stem`.json with every round and point kept, `stem`.md with the tables under a head that says where and when."""
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    machine = result["machine"]
    versions = "\n".join(
        f"- {name}: " + ", ".join(f"{package} {number}" for package, number in versions.items())
        for name, versions in result["versions"].items()
        if versions is not None
    )
    head = (
        f"# Training step, {result['date']}\n\n"
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['instructions'])}), {machine['memory_gib']} GiB, "
        f"{machine['system']}; {result['arguments']['threads']} threads; load average {result['load_average_start']:.1f} at the "
        f"start, {result['load_average_end']:.1f} at the end.\n\n{versions}\n"
    )
    stem.with_suffix(".md").write_text("\n".join([head, *(f"{table}\n" for table in tables)]))


def _speed_cells(result: dict, base: dict | None, batch_size: int) -> list[str]:
    if result["error"]:
        return ["failed", *["-"] * (len(SPEED_HEAD) - 2)]
    seconds = result["seconds"]
    ratios = [] if base is None or base["error"] else [peer / ours for peer, ours in zip(seconds, base["seconds"], strict=True)]
    return [
        f"{median(seconds) * 1e3:.1f}",
        f"{min(seconds) * 1e3:.1f}-{max(seconds) * 1e3:.1f}",
        f"{median(result['cpu_seconds']) * 1e3:.1f}",
        f"{median(ratios):.2f}" if ratios else "-",
        f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else "-",
        f"{batch_size / median(result['encode_seconds']):.0f}",
        f"{batch_size / median(result['decode_seconds']):.0f}",
        f"{result['peak_rss_mib']:.0f}",
    ]


def _quality_cells(runs: list[dict], keys: tuple[str, ...]) -> list[str]:
    finished = [run["points"][-1] for run in runs if not run["error"]]
    if not finished:
        return ["failed" if runs else "-"] * len(keys)
    cells = []
    for key in keys:
        values = [point[key] for point in finished]
        digits = 3 if key != "cpu_seconds" else 1
        spread = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else ""
        cells.append(f"{mean(values):.{digits}f}{spread}")
    return cells


def _failures(results: dict[str, dict]) -> str:
    return "".join(f"\n\n{name} failed: {result['error']}" for name, result in results.items() if result["error"])


def format_table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(row: list[str]) -> str:
        name, *figures = row
        return f"| {name.ljust(widths[0])} | " + " | ".join(map(str.rjust, figures, widths[1:])) + " |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return "\n".join([line(head), rule, *map(line, rows)])

"""Results as a person reads them (tables in markdown that also line up as plain text) and as a program does (JSON).

python -m benchmarks.report benchmarks/results/train-DATE.json     # the ratios of a result again
"""

import json
import os
import sys
from pathlib import Path
from statistics import mean, median

from benchmarks.ratios import BASES, TIMES, Ratio, beyond_torch, ratio, ratios

QUALITY_HEAD = {"fvu": "FVU", "l0": "L0", "dead": "dead", "recovered": "recovered", "cpu_seconds": "CPU s"}
BESIDE_SPEED = ("fvu", "l0", "dead", "recovered")
SPEED_HEAD = (
    *("peer", "step ms", "(range)", "CPU ms", "x ours (range)", "x matmul (range)", "encode tok/s", "decode tok/s", "L0 there"),
    *("peak MiB", "beyond torch"),
)


def speed_table(speed: dict[str, dict], quality: dict[str, list[dict]], batch_size: int, bare_mib: float) -> str:
    """One row per peer; a ratio of 3 says that the peer's step takes 3 times as long as ours in the same round. `quality` may be
    empty: then there is none beside."""
    head, keys = list(SPEED_HEAD), BESIDE_SPEED if quality else ()
    rows = [
        [name, *_speed_cells(found, speed, batch_size, bare_mib), *_quality_cells(quality.get(name, []), keys)]
        for name, found in speed.items()
    ]
    return format_table([*head, *(QUALITY_HEAD[key] for key in keys)], rows) + failures(speed)


def ratio_tables(speed: dict[str, dict], bare_mib: float, whole: bool = False) -> dict[str, str]:
    """How the others compare with each of ours that was measured, by its name. With `whole`, rounds that are a whole training are
    compared as such, too."""
    heads = {"rounds": "whole training"} if whole else {}
    heads = {"step": "step", **heads, **{what: what for what in TIMES}}
    made = {}
    for base in BASES:
        if base in speed and (found := ratios(speed, base, bare_mib)):
            rows = [[name, *(_ratio_cell(row.get(what)) for what in (*heads, "memory"))] for name, row in found.items()]
            made[base] = format_table(["time as a multiple", *heads.values(), f"memory of {base} / peer's"], rows)
    return made


def quality_table(quality: dict[str, list[dict]]) -> str:
    """One row per peer: the mean over seeds, with the least and the greatest where there are several."""
    rows = [[name, *_quality_cells(runs, tuple(QUALITY_HEAD))] for name, runs in quality.items()]
    errors = {name: next((run for run in runs if run["error"]), {"error": None}) for name, runs in quality.items()}
    return format_table(["peer", *QUALITY_HEAD.values()], rows) + failures(errors)


def write(result: dict, title: str, tables: list[str], stem: Path, about: str = "") -> None:
    """`stem`.json with every round and point kept, `stem`.md with the tables under a head that says where and when. Each file is
    replaced as a whole, so that an interruption leaves the last complete one."""
    result["load_average_end"] = os.getloadavg()[0]
    head = f"# {title}, {result['date']}\n\n{about}{machine_line(result)}\n\n{version_lines(result)}\n"
    text = "\n".join([head, *(f"{table}\n" for table in tables)])
    for suffix, content in ((".json", json.dumps(result, indent=1) + "\n"), (".md", text)):
        written = stem.with_suffix(suffix + ".partial")
        written.write_text(content)
        written.replace(stem.with_suffix(suffix))


def machine_line(result: dict) -> str:
    machine, arguments = result["machine"], result["arguments"]
    threads = f"{arguments['threads']} threads; " if "threads" in arguments else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['instructions'])}), {machine['memory_gib']} GiB, "
        f"{machine['system']}; {threads}load average {result['load_average_start']:.1f} at the start, "
        f"{result['load_average_end']:.1f} at the end."
    )


def version_lines(result: dict) -> str:
    return "\n".join(
        f"- {name}: " + ", ".join(f"{package} {number}" for package, number in versions.items())
        for name, versions in result["versions"].items()
        if versions is not None
    )


def failures(results: dict[str, dict]) -> str:
    """Why some failed, to be put below their table."""
    return "".join(f"\n\n{name} failed: {result['error']}" for name, result in results.items() if result["error"])


def format_table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(row: list[str]) -> str:
        name, *figures = row
        return f"| {name.ljust(widths[0])} | " + " | ".join(map(str.rjust, figures, widths[1:])) + " |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return "\n".join([line(head), rule, *map(line, rows)])


def _speed_cells(found: dict, speed: dict[str, dict], batch_size: int, bare_mib: float) -> list[str]:
    if found["error"]:
        return ["failed", *["-"] * (len(SPEED_HEAD) - 2)]
    seconds = found["seconds"]
    against = [ratio(found, speed.get(name)) for name in ("ours", "matmul")]
    rates = [batch_size / median(found[name]) if found[name] else None for name in ("encode_seconds", "decode_seconds")]
    return [
        f"{median(seconds) * 1e3:.1f}",
        f"{min(seconds) * 1e3:.1f}-{max(seconds) * 1e3:.1f}",
        f"{median(found['cpu_seconds']) * 1e3:.1f}",
        *("-" if value is None else str(value) for value in against),
        *("-" if rate is None else f"{rate:.0f}" for rate in rates),
        "-" if found.get("l0") is None else f"{found['l0']:.1f}",
        f"{found['peak_rss_mib']:.0f}",
        f"{beyond_torch(found, bare_mib):.0f}",
    ]


def _ratio_cell(value: Ratio | float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


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


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    result = json.loads(Path(sys.argv[1]).read_text())
    whole = result["arguments"].get("whole", False)
    for architecture, shapes in result["speed"].items():
        for shape, speed in shapes.items():
            for base, table in ratio_tables(speed, result["bare_torch_mib"], whole).items():
                print(f"## {architecture} at {shape} against {base}\n\n{table}\n")


if __name__ == "__main__":
    main()

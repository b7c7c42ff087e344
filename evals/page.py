"""The measured part of docs/architectures.md: tables with intervals over seeds, and the figure of FVU against L0."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from evals.shared import pyplot
from saebench.errors import UserError

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architectures.md"
FIGURE = ROOT / "docs" / "images" / "pareto.svg"
COLUMNS = {
    "planted": {
        "l0": ("L0", ".1f"),
        "fvu": ("FVU", ".4f"),
        "dead": ("dead", ".1%"),
        "matched_cosine": ("matched cosine", ".3f"),
        "recovered": ("recovered", ".1%"),
        "f1": ("F1 of firing", ".3f"),
        "absorption": ("absorption", ".1%"),
        "composition": ("composition", ".1%"),
        "relative_reconstruction_bias": ("gamma", ".3f"),
    },
    "builtin": {
        "l0": ("L0", ".1f"),
        "fvu": ("FVU", ".4f"),
        "dead": ("dead", ".1%"),
        "ce_recovered_zero": ("CE recovered", ".4f"),
        "kl_recovered_zero": ("KL recovered", ".4f"),
        "mean_max_decoder_cosine": ("max decoder cosine", ".3f"),
        "relative_reconstruction_bias": ("gamma", ".3f"),
    },
}


def write_page(plan: dict[str, Any], results: dict[str, Any]) -> None:
    """Put the tables between their markers on the page, and draw the figure."""
    text = PAGE.read_text()
    for data in COLUMNS:
        text = replace(text, data, table(data, plan, results))
    PAGE.write_text(text)
    draw(plan, results)


def replace(text: str, name: str, content: str) -> str:
    """The text with what stands between `<!-- NAME -->` and `<!-- end of NAME -->` replaced."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the page has no part between {start} and {end}")
    return f"{before}{start}\n{content}\n{end}{after}"


def values_of(results: dict[str, Any], data: str, name: str, l0: int, figure: str) -> list[float]:
    """One figure of one architecture over its seeds."""
    prefix = f"{data}/{name}/l0={l0}/seed="
    return [row[figure] for key, row in sorted(results.items()) if key.startswith(prefix) and figure in row]


def table(data: str, plan: dict[str, Any], results: dict[str, Any]) -> str:
    columns = COLUMNS[data]
    lines = ["| architecture | " + " | ".join(heading for heading, _ in columns.values()) + " | seeds |"]
    lines.append("|---|" + "--:|" * (len(columns) + 1))
    for entry in plan["dictionaries"]:
        for l0 in plan[data]["l0s"]:
            by_figure = {figure: values_of(results, data, entry["id"], l0, figure) for figure in columns}
            if by_figure["fvu"]:
                cells = [cell(by_figure[figure], form) for figure, (_, form) in columns.items()]
                lines.append(f"| {entry['id']} | " + " | ".join(cells) + f" | {len(by_figure['fvu'])} |")
    return "\n".join(lines)


def cell(values: list[float], form: str) -> str:
    """Mean and half width of the 95 % interval over seeds, by Student's t."""
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{mean:{form}}" if math.isnan(half) else f"{mean:{form}} ± {half:{form}}"


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval of the mean (Student's t); the half width of one value is NaN."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def draw(plan: dict[str, Any], results: dict[str, Any]) -> None:
    """FVU against L0 on the bundled model's activations, one line an architecture."""
    try:
        plt = pyplot()
    except UserError as error:
        print(error)
        return
    figure, axes = plt.subplots(figsize=(9, 5.5))
    colours = plt.get_cmap("tab20")
    for number, entry in enumerate(plan["dictionaries"]):
        points = []
        for l0 in sorted(plan["builtin"]["l0s"] + plan["builtin"]["pareto"]):
            found = [values_of(results, "builtin", entry["id"], l0, name) for name in ("l0", "fvu")]
            if found[0]:
                points.append(tuple(statistics.fmean(values) for values in found))
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=entry["id"], color=colours(number % 20))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="L0: active latents per token",
        ylabel="FVU",
        title="Bundled model, blocks.2.hook_resid_post",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, metadata={"Date": None})
    plt.close(figure)

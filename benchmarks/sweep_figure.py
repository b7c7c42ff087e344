"""The figure of a sweep: time per step and memory against the number of latents, both axes logarithmic."""

import math
from pathlib import Path
from statistics import median

from benchmarks.ratios import beyond_torch

# Ours stand out by colour and width; markers tell the lines apart without colour.
STYLES = {
    "ours": {"color": "#c2410c", "marker": "o", "linewidth": 2.6},
    "ours-torch": {"color": "#f59e0b", "marker": "o", "linewidth": 1.8, "linestyle": "--"},
    "sae-lens": {"color": "#1d4ed8", "marker": "s"},
    "sparsify": {"color": "#047857", "marker": "^"},
    "sparsify-adam": {"color": "#10b981", "marker": "v"},
    "dictionary-learning": {"color": "#6d28d9", "marker": "D"},
    "dense": {"color": "#57534e", "marker": "x"},
    "matmul": {"color": "#a8a29e", "marker": ".", "linestyle": ":"},
}


def draw(result: dict, path: Path) -> str:
    """Draw into an svg file; returns what was done, or why nothing was."""
    try:
        import matplotlib
    except ImportError:
        return "no figure: matplotlib is not installed (pip install 'saebench[evals]')"
    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    panels = (
        ("seconds per step", lambda record: median(record["seconds"])),
        ("GiB beyond a bare import of torch", lambda record: beyond_torch(record, result["bare_torch_mib"]) / 1024),
    )
    names = list(dict.fromkeys(name for point in result["points"].values() for name in point))
    sizes = [int(size) for size in result["points"]]
    figure, all_axes = pyplot.subplots(1, 2, figsize=(11.5, 5.0), constrained_layout=True)
    for axes, (label, figure_of) in zip(all_axes, panels, strict=True):
        ends = {}
        for name in names:
            found = {int(size): point[name] for size, point in result["points"].items() if name in point}
            line = {size: figure_of(record) for size, record in found.items() if not record["error"]}
            if line:  # empty where it failed at once
                axes.plot(list(line), list(line.values()), **{"linewidth": 1.6, "markersize": 5, **STYLES.get(name, {})})
                ends[name] = list(line.items())[-1]
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("latents")
        axes.set_title(label, loc="left", fontsize=11)
        axes.grid(True, color="#e7e5e4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(sizes[0] / 1.15, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.34)  # room for the names at the lines' ends
        if ends:
            _name_lines(axes, ends)
    given = result["arguments"]
    figure.suptitle(
        f"One TopK training step: d_in {given['d_in']}, k {given['k']}, batch {given['batch']}, float32, "
        f"{result['machine']['cores']} cores, {result['date']}",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    figure.savefig(path)
    pyplot.close(figure)
    return f"figure: {path}"


def _name_lines(axes, ends: dict[str, tuple[int, float]]) -> None:
    """Each line's name at its end: right of it, moved apart where they would overlap, or above it where others go on."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    gap = 0.052 * (high - low)  # the least distance between two names
    last = max(size for size, _ in ends.values())
    right = sorted((math.log(value), name) for name, (size, value) in ends.items() if size == last)
    heights: list[float] = []
    for height, _ in right:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    surplus = sum(heights) - sum(height for height, _ in right)
    shift = surplus / max(1, len(right))  # names move up and down alike
    style = lambda name: {"fontsize": 9.5, "color": STYLES.get(name, {}).get("color", "black")}  # noqa: E731
    for height, (_, name) in zip(heights, right, strict=True):
        axes.text(last * 1.14, math.exp(height - shift), name, va="center", **style(name))
    for name, (size, value) in ends.items():
        if size < last:
            axes.annotate(name, (size, value), xytext=(-4, 6), textcoords="offset points", ha="right", **style(name))

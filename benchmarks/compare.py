"""What a comparison of quality says: figures at equal L0, differences against seed noise, verdicts, the table.

Dictionaries that choose k latents have their L0; the others are trained at two or more sparsities, and what they are worth at
the wanted L0 is read off the line between the two runs next to it, in the logarithms of L0 and FVU.
"""

import math
from statistics import mean, stdev

FIGURES = ("fvu", "recovered", "cosine", "dead")
WORDS = {"fvu": "FVU", "recovered": "recovery"}  # the figures that are judged
FAR = 1.3  # at least one run's L0 must be within this factor of the wanted one
# 95 % quantile of Student's t by degrees of freedom: a difference beyond it, in standard errors, is not seed noise
T_95 = {1: 6.31, 2: 2.92, 3: 2.35, 4: 2.13, 5: 2.02, 6: 1.94, 7: 1.89, 8: 1.86, 9: 1.83}
HEAD = ["peer", "L0", "FVU", "FVU at L0", "ours - peer", "recovered", "ours - peer", "cosine", "dead", "CPU s", "verdict on ours"]


def at_l0(points: list[dict], l0: float) -> dict[str, float]:
    """The figures of one seed at this L0. `points` are last measurements: one with its own L0 or with `at_l0`, or several.

    Raises ValueError where no run came close.
    """
    if len(points) == 1:
        figures = points[0] | points[0].get("at_l0", {})
        return {name: figures[name] for name in FIGURES if name in figures}
    below = sorted((point for point in points if point["l0"] <= l0), key=lambda point: point["l0"])
    above = sorted((point for point in points if point["l0"] > l0), key=lambda point: point["l0"])
    if not any(1 / FAR <= point["l0"] / l0 <= FAR for point in points):
        raise ValueError(f"never came near L0 {l0:g}: {', '.join(format(point['l0'], '.1f') for point in points)}")
    if below and above:
        first, second = below[-1], above[0]
    else:
        first, second = below[-2:] if below else above[:2]
    span = math.log(second["l0"] / first["l0"])
    share = math.log(l0 / first["l0"]) / span if span else 0.0
    between = lambda low, high: low + share * (high - low)  # noqa: E731
    return {
        "fvu": math.exp(between(math.log(first["fvu"]), math.log(second["fvu"]))),
        **{name: between(first[name], second[name]) for name in FIGURES if name != "fvu" and name in first},
    }


def difference(ours: list[float], theirs: list[float]) -> tuple[float, float | None]:
    """The mean over seeds of ours - theirs, and its standard error (None for one seed). A seed fixes the data for both."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return mean(differences), stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None


def verdict(difference: float, error: float | None, seeds: int, *, lower_is_better: bool) -> str:
    """`better`, `within noise` or `WORSE`: whether a one-sided t-test at 95 % tells that ours is worse."""
    worse = difference if lower_is_better else -difference
    if worse <= 0:
        return "better" if worse < 0 else "equal"
    if error is None:
        return "worse (one seed)"
    return "within noise" if worse <= T_95.get(seeds - 1, 1.7) * error else "WORSE"


def judge(peers: dict[str, dict], base_name: str) -> dict[str, dict]:
    """For each peer without an error: difference of ours, standard error and verdict for FVU and recovery."""
    base = peers.get(base_name)
    verdicts: dict[str, dict] = {}
    if base is None or base["error"]:
        return verdicts
    for name, result in peers.items():
        if name == base_name or result["error"]:
            continue
        verdicts[name] = {}
        for figure in WORDS:
            if figure not in base["at_l0"][0]:
                continue
            ours, theirs = ([values[figure] for values in peer["at_l0"]] for peer in (base, result))
            delta, error = difference(ours, theirs)
            words = verdict(delta, error, len(ours), lower_is_better=figure == "fvu")
            verdicts[name][figure] = {"difference": delta, "standard_error": error, "verdict": words}
    return verdicts


def table(peers: dict[str, dict], base_name: str) -> list[list[str]]:
    """The rows of one architecture, HEAD first; verdicts are on `base_name`, which is one of ours."""
    verdicts = judge(peers, base_name)
    return [HEAD, *(_row(name, result, verdicts.get(name)) for name, result in peers.items())]


def _row(name: str, result: dict, verdicts: dict | None) -> list[str]:
    if result["error"]:
        return [name, "failed", *["-"] * (len(HEAD) - 2)]
    finished = [run["point"] for run in result["runs"] if not run["error"]]
    fvu, recovered, cosine, dead = ([values[figure] for values in result["at_l0"] if figure in values] for figure in FIGURES)
    several = len(finished) > len(fvu)  # several runs per seed: their own L0 says nothing of the result
    cells = [name, *([_range([p["l0"] for p in finished], 1), "-"] if several else [_figure([p["l0"] for p in finished], 1)])]
    if not several:
        cells.append(_figure([p["fvu"] for p in finished], 4))
    cells += [_figure(fvu, 4), _delta(verdicts, "fvu", 4), _figure(recovered, 3), _delta(verdicts, "recovered", 3)]
    cells += [_figure(cosine, 3), f"{mean(dead):.3f}", f"{mean(p['cpu_seconds'] for p in finished):.0f}"]
    words = [f"{word} {verdicts[figure]['verdict']}" for figure, word in WORDS.items() if figure in (verdicts or {})]
    return [*cells, ", ".join(words)]


def _figure(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _range(values: list[float], digits: int) -> str:
    return f"{min(values):.{digits}f}-{max(values):.{digits}f}"


def _delta(verdicts: dict | None, figure: str, digits: int) -> str:
    if figure not in (verdicts or {}):
        return ""
    error = verdicts[figure]["standard_error"]
    return f"{verdicts[figure]['difference']:+.{digits}f}" + ("" if error is None else f" ({error:.{digits}f})")

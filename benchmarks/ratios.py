"""How many times as long a peer takes as ours, from figures taken in the same round: the machine's speed cancels."""

from dataclasses import dataclass
from statistics import median

BASES = ("ours", "ours-torch")
TIMES = {"step": "seconds", "encode": "encode_seconds", "decode": "decode_seconds"}
YARDSTICKS = ("matmul", "ours-topk")  # what ours is divided by, instead of the other way round


@dataclass(frozen=True)
class Ratio:
    """The median over rounds, the least and the greatest."""

    median: float
    least: float
    greatest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}-{self.greatest:.2f})"


def ratio(above: dict | None, below: dict | None, figure: str = "seconds") -> Ratio | None:
    """`figure` of one contestant over that of another, round by round; None where one of them failed or lacks it."""
    if any(found is None or found["error"] or not found[figure] for found in (above, below)):
        return None
    values = [a / b for a, b in zip(above[figure], below[figure], strict=True)]
    return Ratio(median(values), min(values), max(values))


def beyond_torch(found: dict, bare_mib: float) -> float:
    """Peak memory of a contestant that did not fail beyond that of a process that imported torch and did nothing, in MiB."""
    return found["peak_rss_mib"] - bare_mib


def sums_ratio(above: dict, below: dict) -> float | None:
    """The time of all rounds of one contestant over that of another; None where one of them failed."""
    return None if above["error"] or below["error"] else sum(above["seconds"]) / sum(below["seconds"])


def ratios(speed: dict[str, dict], base: str, bare_mib: float) -> dict[str, dict[str, Ratio | float | None]]:
    """For every peer how many times as long it takes as `base` (`step`, `rounds` together, `encode`, `decode`), and `memory`, that of
    `base` beyond bare torch as a share of the peer's. Of a yardstick only the first two, and the other way round: base over yardstick."""
    found: dict[str, dict[str, Ratio | float | None]] = {}
    for name, peer in speed.items():
        if name == base or peer["error"] or speed[base]["error"]:
            continue
        if name in YARDSTICKS:
            found[f"{base} over {name}"] = {"step": ratio(speed[base], peer), "rounds": sums_ratio(speed[base], peer)}
            continue
        times = {what: ratio(peer, speed[base], figure) for what, figure in TIMES.items()}
        share = beyond_torch(speed[base], bare_mib) / max(1.0, beyond_torch(peer, bare_mib))
        found[f"{name} over {base}"] = {**times, "rounds": sums_ratio(peer, speed[base]), "memory": share}
    return found

"""What the tests of claims share: the bundled model, its activations, training several seeds, telling noise from difference."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import saebench as sb
from saebench.activations import ActivationStore

HERE = Path(__file__).parent
SEEDS = 3
TOKENS = 120_000


@cache
def lm() -> sb.LanguageModel:
    return sb.load_lm("builtin")


def held_out(tokens: int = 8_192) -> Any:
    return sb.pack(sb.load_text("builtin:held_out"), lm().tokenizer, context_size=256, num_tokens=tokens)


def activations(*sites: str, tokens: int = TOKENS) -> ActivationStore:
    """A store of these sites of the bundled model, harvested once."""
    contexts = sb.pack(sb.builtin_text(), lm().tokenizer, context_size=256, num_tokens=tokens)
    name = "-".join([*(site.replace("blocks.", "").replace("hook_", "") for site in sites), str(tokens)])
    return sb.harvest(lm(), contexts, list(sites), HERE / "results" / "acts" / name)


def trained(configs: dict[str, Any], source: Any, seed: int, **settings: Any) -> dict[str, Any]:
    training = sb.TrainConfig(**{"num_tokens": TOKENS, "batch_size": 256, "lr": 3e-3, "seed": seed, **settings})
    return dict(zip(configs, sb.train(configs, source, training, lm=lm()), strict=True))


def architectures() -> dict[str, Any]:
    """The results of evals/architectures.py."""
    path = HERE / "results" / "architectures.json"
    if not path.exists():
        raise sb.UserError("run evals/architectures.py first: this claim is read off its results")
    return json.loads(path.read_text())


def differs(a: list[float], b: list[float]) -> str:
    """Whether a is less than, more than, or within the noise of b: two standard errors of the difference."""
    error = math.sqrt(sum(statistics.variance(v) / len(v) if len(v) > 1 else 0.0 for v in (a, b)))
    difference = statistics.fmean(a) - statistics.fmean(b)
    return "equal within noise" if abs(difference) <= 2 * error else "less" if difference < 0 else "more"


def pyplot() -> Any:
    """matplotlib's, without a window, which writes the same file for the same figures. Raises UserError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise sb.UserError("matplotlib is not installed, so the figure is not drawn: pip install 'saebench[evals]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "saebench"
    from matplotlib import pyplot

    return pyplot


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started

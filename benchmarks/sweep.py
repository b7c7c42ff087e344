"""Time per step and peak memory against the number of latents, for ours and installed peers.

    python -m benchmarks.sweep                                          # d_in 768, 4,096 to 262,144 latents: some half an hour
    python -m benchmarks.sweep --d-sae 4096,8192 --peers ours,sparsify --rounds 2
    python -m benchmarks.sweep --figure benchmarks/results/sweep-DATE.json   # draw an earlier result again

At each size the contestants take turns, as many at a time as the memory holds. One drops out when its step becomes too slow, or when
its memory, taken to grow in proportion, would not fit. Results: JSON, markdown and, where matplotlib is installed, a figure.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python benchmarks/sweep.py` works too

from benchmarks import machine, report
from benchmarks.measure import bare_torch_mib, measure_speed
from benchmarks.options import RESULTS, at_least, free_stem, names_among, new_result, run_command, say
from benchmarks.peers import PEERS
from benchmarks.ratios import beyond_torch
from benchmarks.shapes import Shape
from benchmarks.sweep_figure import draw

CONTESTANTS = ("ours", "ours-torch", "sae-lens", "sparsify", "dictionary-learning")
SIZES = [4096 << doublings for doublings in range(7)]
FEATURES, MEAN_L0 = 4096, 24.0  # of the planted data, the same at all sizes
USABLE = 0.85  # share of the free memory that contestants may fill
POINT_SECONDS = 120.0  # after which no further round begins at a size, but the first two


def main() -> int:
    arguments = parse(sys.argv[1:])
    if arguments.figure:
        say(draw(json.loads(arguments.figure.read_text()), arguments.figure.with_suffix(".svg")))
        return 0
    stem = free_stem(arguments.out, f"sweep-{arguments.d_in}")
    return run_command(lambda: run(arguments, new_result(arguments), stem), stem)


def run(arguments: argparse.Namespace, result: dict, stem: Path) -> None:
    result["bare_torch_mib"] = bare_torch_mib()
    result |= {"points": {}, "stopped": {}}
    for d_sae in arguments.d_sae:
        shape = Shape(arguments.d_in, d_sae, arguments.k, arguments.batch, FEATURES, MEAN_L0)
        point = result["points"][str(d_sae)] = {}
        for together in packed(arguments.peers, d_sae, result, arguments.limit):
            say(f"d_sae {d_sae}: {', '.join(together)}")
            found = measure_speed(
                [PEERS[name] for name in together],
                shape,
                rounds=arguments.rounds,
                burst=arguments.burst,
                threads=arguments.threads,
                say=say,
                codec_rounds=0,
                most_seconds=POINT_SECONDS,
            )
            for name, record in found.items():
                point[name] = record
                result["versions"].setdefault(name, record.get("versions"))
                if record["error"]:
                    result["stopped"][name] = f"failed at {d_sae}: {record['error']}"
            write(result | {"shape": asdict(shape)}, stem)
    print("\n" + write(result, stem))
    say(draw(result, stem.with_suffix(".svg")))


def packed(peers: list[str], d_sae: int, result: dict, limit: float) -> list[list[str]]:
    """Which contestants go on at this size, in sets whose memory fits side by side; the others are entered under `stopped`."""
    free_mib = machine.free_mib()
    usable_mib = float("inf") if free_mib is None else USABLE * free_mib
    sets: list[tuple[float, list[str]]] = []
    for name in peers:
        if name in result["stopped"]:
            continue
        seconds, needed_mib = expected(name, d_sae, result)
        if seconds > limit:
            result["stopped"][name] = f"a step took {seconds:.1f} s before {d_sae}, the limit is {limit:g} s"
        elif needed_mib > usable_mib:
            result["stopped"][name] = f"at {d_sae} it would take {needed_mib:.0f} MiB, of which {usable_mib:.0f} are to be had"
        else:
            place = next((index for index, (taken, _) in enumerate(sets) if taken + needed_mib <= usable_mib), None)
            if place is None:
                sets.append((needed_mib, [name]))
            else:
                sets[place] = (sets[place][0] + needed_mib, [*sets[place][1], name])
        if name in result["stopped"]:
            say(f"{name} stops: {result['stopped'][name]}")
    return [names for _, names in sets]


def expected(name: str, d_sae: int, result: dict) -> tuple[float, float]:
    """Seconds of a step at the size before, and the memory in MiB that this size should take; 0 where nothing is known yet."""
    before = [(int(size), point[name]) for size, point in result["points"].items() if name in point]
    if not before:
        return 0.0, 0.0
    size, record = before[-1]
    bare = result["bare_torch_mib"]
    return median(record["seconds"]), bare + beyond_torch(record, bare) * d_sae / size


def write(result: dict, stem: Path) -> str:
    """The tables, also on disk."""
    bare = result["bare_torch_mib"]
    sizes, names = list(result["points"]), list(dict.fromkeys(name for point in result["points"].values() for name in point))
    tables = []
    for title, cell in (
        ("step ms (range)", _time),
        ("peak MiB beyond bare torch", lambda record: f"{beyond_torch(record, bare):.0f}"),
        ("peak MiB", lambda record: f"{record['peak_rss_mib']:.0f}"),
    ):
        rows = [
            [
                name,
                *(
                    "-" if (record := result["points"][size].get(name)) is None else "failed" if record["error"] else cell(record)
                    for size in sizes
                ),
            ]
            for name in names
        ]
        tables.append(report.format_table([f"{title} at d_sae", *sizes], rows))
    tables.append("\n".join(f"- {name}: {why}" for name, why in result["stopped"].items()))
    given = result["arguments"]
    about = f"TopK with d_in {given['d_in']}, k {given['k']}, batches of {given['batch']} tokens, float32.\n\n"
    report.write(result, "A training step against the number of latents", tables, stem, about)
    return "\n\n".join(tables) + "\n"


def _time(record: dict) -> str:
    low, middle, high = (f"{pick(record['seconds']) * 1e3:.0f}" for pick in (min, median, max))
    return f"{middle} ({low}-{high})"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    known = [name for name, peer in PEERS.items() if "topk" in peer.architectures]
    parser.add_argument("--d-in", type=at_least(1), default=768, help="width of the activations")
    parser.add_argument("--d-sae", type=sizes, default=SIZES, help="numbers of latents, rising, with commas between them")
    parser.add_argument("--k", type=at_least(1), default=32)
    parser.add_argument("--batch", type=at_least(1), default=1024, help="tokens in a step")
    parser.add_argument(
        "--peers",
        type=names_among(known),
        default=list(CONTESTANTS),
        help=f"of {','.join(known)}; default {','.join(CONTESTANTS)}",
    )
    parser.add_argument("--rounds", type=at_least(1), default=5, help="turns that each gets at a size")
    parser.add_argument("--burst", type=at_least(2), default=3, help="steps in a turn, the first not counted")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds of a step after which a contestant stops")
    parser.add_argument("--threads", type=at_least(1), default=2, help="threads of each worker")
    parser.add_argument("--figure", type=Path, help="draw this earlier result again, and measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


def sizes(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if found != sorted(set(found)):
        raise argparse.ArgumentTypeError("sizes must rise")
    return found


if __name__ == "__main__":
    sys.exit(main())

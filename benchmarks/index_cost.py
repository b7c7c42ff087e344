"""What a feature store costs beside encoding alone: time and peak memory over corpora of growing length.

    python -m benchmarks.index_cost                         # 0.1, 1 and 10 million tokens at 16384 latents: about half an hour
    python -m benchmarks.index_cost --tokens 100000         # a minute

Both read the same stored activations of the bundled model (100,000 tokens, as often as it takes), in turns, each in a process of its
own: one encodes and throws the codes away, the other builds the store. README.md says how to read the table. "Peak MiB" counts pages of
mapped files as well, as many as there is room for; "anonymous MiB" is the peak without them, which is what a machine must have.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python benchmarks/index_cost.py` works too

import saebench as sb
from benchmarks import report
from benchmarks.machine import anonymous_peak, peak_rss_mib
from benchmarks.options import RESULTS, at_least, free_stem, new_result, run_command, say
from benchmarks.worker_process import ROOT
from saebench.activations import ActivationStore
from saebench.activations.encoding import Encoded
from saebench.features import index
from saebench.features.building import CONTEXTS_AT_ONCE
from saebench.lm import Contexts

HEAD = (
    *("tokens", "encode s", "store s", "store / encode (range)", "store us a token"),
    *("peak MiB encoding", "peak MiB building", "anonymous MiB encoding", "anonymous MiB building", "MiB written"),
)
SITE, CONTEXT_SIZE, STORED = "blocks.2.hook_resid_post", 128, 100_000


class Repeated:
    """A store's contexts as often as it takes. The tokens are in a mapped file, as those of a store are, and no anonymous memory."""

    def __init__(self, store: ActivationStore, num_tokens: int):
        self.store, self.skip, self.ordered = store, store.skip, True
        self.num_contexts, self.context_size = max(1, num_tokens // store.context_size), store.context_size
        columns = (getattr(store.contexts, name) for name in ("ids_NS", "documents_NS", "positions_NS"))
        self.contexts = Contexts(*(repeated(rows_NS, self.num_contexts) for rows_NS in columns), store.contexts.names)
        self.widths, self.identity = store.widths, f"{store.identity}-{self.num_contexts}"

    def check_sites(self, sites: list[str]) -> None:
        self.store.check_sites(sites)

    def fetch(self, contexts_N: torch.Tensor, sites: list[str], out: dict | None = None) -> dict[str, Encoded]:
        return self.store.fetch(contexts_N % self.store.num_contexts, sites)


def repeated(rows_NS: torch.Tensor, count: int) -> torch.Tensor:
    """So many rows, in a mapped file without a name."""
    with tempfile.TemporaryFile() as file:
        mapped_NS = np.memmap(file, dtype=np.int32, mode="w+", shape=(count, rows_NS.shape[1]))
    for start in range(0, count, len(rows_NS)):
        mapped_NS[start : start + len(rows_NS)] = rows_NS[: count - start].numpy()
    return torch.from_numpy(mapped_NS)


def encode_only(dictionary: sb.Dictionary, source: Repeated) -> None:
    with torch.inference_mode():
        for some_N in torch.arange(source.num_contexts).split(CONTEXTS_AT_ONCE):
            dictionary.encode_contexts(source.fetch(some_N, [SITE])[SITE].decode())


def measure(what: str, folder: Path, num_tokens: int, threads: int) -> dict:
    """In a process of its own: seconds and peak memory of one way over so many tokens."""
    torch.set_num_threads(threads)
    source, dictionary = Repeated(ActivationStore(folder / "acts"), num_tokens), sb.load(folder / "sae")
    encode_only(dictionary, Repeated(source.store, 32 * CONTEXT_SIZE))  # compiled, warm
    before, started = peak_rss_mib(), time.perf_counter()
    with anonymous_peak() as anonymous, tempfile.TemporaryDirectory(dir=folder) as place:
        if what == "encode":
            encode_only(dictionary, source)
            mib = 0.0
        else:
            store = index(dictionary, source, Path(place) / "features")
            mib = sum(store.manifest["sizes"].values()) / 2**20
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak_mib": peak_rss_mib(),
        "anonymous_mib": anonymous.mib,
        "before_mib": before,
        "written_mib": mib,
    }


def main() -> int:
    arguments = parse(sys.argv[1:])
    if arguments.measure:
        what, folder, tokens = arguments.measure
        print(json.dumps(measure(what, Path(folder), int(tokens), arguments.threads)))
        return 0
    stem = free_stem(arguments.out, "index-cost")
    return run_command(lambda: run(arguments, new_result(arguments), stem), stem)


def run(arguments: argparse.Namespace, result: dict, stem: Path) -> None:
    result["rows"] = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        folder = Path(name)
        lm = sb.load_lm("builtin")
        store = sb.harvest(lm, sb.builtin_text(), [SITE], folder / "acts", num_tokens=STORED, context_size=CONTEXT_SIZE)
        training = sb.TrainConfig(num_tokens=arguments.train_tokens, batch_size=1024)
        sb.train(sb.TopK(d_sae=arguments.d_sae, k=arguments.k, site=SITE), store, training).save(folder / "sae")
        for tokens in arguments.tokens:
            found: dict[str, list[dict]] = {"encode": [], "index": []}
            for number in range(arguments.rounds if tokens < 5_000_000 else 1):
                for what in ("encode", "index") if number % 2 == 0 else ("index", "encode"):
                    command = [
                        sys.executable,
                        __file__,
                        "--measure",
                        what,
                        str(folder),
                        str(tokens),
                        "--threads",
                        str(arguments.threads),
                    ]
                    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
                    found[what].append(json.loads(done.stdout.splitlines()[-1]))
                    say(f"{tokens:,} tokens, {what}: {found[what][-1]['seconds']:.1f} s")
            result["rows"].append({"tokens": tokens, **found})
            write(result, stem)
    print("\n" + write(result, stem))


def write(result: dict, stem: Path) -> str:
    rows = []
    for row in result["rows"]:
        encode, whole = (median(each["seconds"] for each in row[what]) for what in ("encode", "index"))
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(row["encode"], row["index"], strict=True)]
        peaks = [
            max(each[memory] for each in row[what]) for memory in ("peak_mib", "anonymous_mib") for what in ("encode", "index")
        ]
        rows.append([
            f"{row['tokens']:,}", f"{encode:.1f}", f"{whole:.1f}", f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
            f"{1e6 * whole / row['tokens']:.1f}", *(f"{peak:.0f}" for peak in peaks), f"{row['index'][0]['written_mib']:.0f}",
        ])  # fmt: skip
    tables = [report.format_table(list(HEAD), rows)]
    about = "TopK, {d_sae} latents, k {k}, activations from a store.\n\n".format_map(result["arguments"])
    report.write(result, "A feature store beside encoding alone", tables, stem, about)
    return "\n\n".join(tables)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index_cost", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--tokens", type=lambda text: [int(part) for part in text.split(",")], default=[100_000, 1_000_000, 10_000_000]
    )
    parser.add_argument("--d-sae", type=at_least(64), default=16384)
    parser.add_argument("--k", type=at_least(1), default=32)
    parser.add_argument("--train-tokens", type=at_least(1024), default=200_000, help="before the dictionary is indexed")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="turns; one above 5 million tokens")
    parser.add_argument("--threads", type=at_least(1), default=2)
    parser.add_argument("--scratch", type=Path, help="where stores are built; default the system's place for temporary files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

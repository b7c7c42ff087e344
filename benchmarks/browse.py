"""The feature browser over a big feature store: what lookups and pages cost the server, how the table moves, what many visitors do to it.

    python -m benchmarks.browse                                        # 131,072 latents, 10 million tokens: some ten minutes, and ten
                                                                       # more once, for the store (5 GiB, kept under --store)
    python -m benchmarks.browse --d-sae 2048 --tokens 50000 --store /tmp/browse-small          # a few minutes
    python -m benchmarks.browse --parts visitors --pause 0,10

What is measured in each part, and how to read the tables, is in README.md.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python benchmarks/browse.py` works too

from benchmarks import browse_chromium, browse_server
from benchmarks.browse_run import D_SAE, DRAWN, PROMPT, PROMPT_D_SAE, TOKENS
from benchmarks.browse_tables import PROMPT_LENGTH, write
from benchmarks.options import RESULTS, UsageError, at_least, free_stem, names_among, new_result, run_command, say
from benchmarks.peers import Peer
from benchmarks.worker_process import ROOT, WorkerProcess

PARTS = ("lookups", "pages", "visitors", "chromium")
COLD_LATENTS = 12


def main() -> int:
    arguments = parse(sys.argv[1:])
    stem = free_stem(arguments.out, "browse")
    return run_command(lambda: run(arguments, new_result(arguments), stem), stem)


def run(arguments: argparse.Namespace, result: dict, stem: Path) -> None:
    begun = time.perf_counter()
    given = ["--d-sae", str(arguments.d_sae), "--tokens", str(arguments.tokens), "--prompt-d-sae", str(arguments.prompt_d_sae)]
    made = subprocess.run([sys.executable, "-m", "benchmarks.browse_run", str(arguments.store), *given], cwd=ROOT)
    if made.returncode:
        raise UsageError("there is no run to browse: the messages above say why")
    result["problems"], result["store_seconds"] = [], time.perf_counter() - begun
    with worker_of(arguments) as worker:
        result["versions"]["saebench"] = answer(worker, "versions")
        chosen = answer(worker, "spread", count=arguments.latents, seed=arguments.seed)
        result["latents"] = chosen
        if "lookups" in arguments.parts:
            say("lookups in the store")
            result["lookups"] = {"open": answer(worker, "open"), "warm": answer(worker, "lookups", latents=chosen["latents"])}
            result["lookups"]["cold"] = answer(worker, "cold_lookups", latents=some(chosen["latents"]))
            write(result, stem)
        prompts = answer(worker, "prompts", count=arguments.prompts, length=PROMPT_LENGTH)["prompts"]
    if "pages" in arguments.parts:
        result["pages"] = {}
        for name, runs in pages(arguments, chosen["latents"], prompts):
            result["pages"][name] = runs
            result["problems"] += [f"{name}: {one['problem']}" for one in runs if one["problem"]]
            write(result, stem)
    if "visitors" in arguments.parts:
        visitors(arguments, result, stem)
    if "chromium" in arguments.parts:
        in_chromium(arguments, result, stem)
    print("\n" + write(result, stem))


def some(latents: list[int]) -> list[int]:
    """A few of them, spread."""
    return latents[:: max(1, len(latents) // COLD_LATENTS)]


@contextmanager
def worker_of(arguments: argparse.Namespace) -> Iterator[WorkerProcess]:
    """A fresh process that runs pages and lookups, which no page has warmed."""
    worker = WorkerProcess(Peer("browse-pages", "browse_pages"), threads=arguments.threads)
    try:
        answer(worker, "init", run=str(arguments.store.resolve()), dictionary=DRAWN, threads=arguments.threads)
        yield worker
    finally:
        worker.close()


def answer(worker: WorkerProcess, what: str, **asked: object) -> dict:
    """Raises UsageError where the worker has none."""
    found = worker.ask(what, **asked)
    if found is None:
        raise UsageError(f"{what} failed: {worker.error}")
    return found


# --- pages ---


def pages(arguments: argparse.Namespace, latents: list[int], prompts: list[str]) -> Iterator[tuple[str, list[dict]]]:
    """Runs of pages by what they are."""
    base = {"run": arguments.store.resolve().name, "dictionary": DRAWN}

    def asked(worker: WorkerProcess, name: str, **query: object) -> dict:
        session = bool(query.pop("session", False))
        return answer(worker, "page", name=name, query=base | query, session=session)

    say("pages: first visits")
    for name, evicted in (("Feature, first of a process", []), ("Feature, first of a process, store not in memory", [""])):
        found = []
        for latent in latents[: arguments.rounds]:
            with worker_of(arguments) as worker:
                answer(worker, "evict", names=evicted)
                found.append(asked(worker, "feature", feature=latent))
        yield name, found
    with worker_of(arguments) as worker:
        say("pages: Feature")
        asked(worker, "feature", feature=latents[0])
        yield "Feature, new visitor", [asked(worker, "feature", feature=latent) for latent in latents]
        yield "Feature, the next one", [asked(worker, "feature", feature=latent, session=True) for latent in latents]
        yield "Feature, every strength", [asked(worker, "feature", feature=f, show="strengths", session=True) for f in latents]
        yield "Feature, with another", [asked(worker, "feature", feature=f, show="both", session=True) for f in latents]
        say("pages: Features")
        yield "Features, first of a process", [asked(worker, "features")]
        yield "Features, again", [asked(worker, "features", session=True) for _ in range(arguments.rounds)]
        ranges = [{"rare": -6 + i / 8, "session": True} for i in range(10)]
        yield "Features, another filter", [asked(worker, "features", **choice) for choice in ranges]
    with worker_of(arguments) as worker:
        say("pages: Prompt")
        first, *others = prompts
        small, big = f"{arguments.prompt_d_sae:,}", f"{arguments.d_sae:,}"
        yield f"Prompt, {small} latents, first of a process", [asked(worker, "prompt", text=first, dictionary=PROMPT)]
        yield f"Prompt, {small} latents", [asked(worker, "prompt", text=text, dictionary=PROMPT) for text in others]
        asked(worker, "prompt", text=first)
        yield f"Prompt, {big} latents", [asked(worker, "prompt", text=text) for text in others]


# --- visitors ---


def visitors(arguments: argparse.Namespace, result: dict, stem: Path) -> None:
    """Many at once, without a browser."""
    found = result["visitors"] = {"rows": []}
    settings = settings_of(arguments)
    with browse_server.served(arguments.store, arguments.threads) as server:
        first = asyncio.run(
            browse_server.visits(server.port, settings["latents"], **settings["page"], visitors=1, steps=1, pause=0.0)
        )
        found["first_visit_s"], found["after_first"] = first[0]["complete"], memory(server)
        for pause in arguments.pause:
            say(f"{arguments.visitors} visitors, {pause:g} s between pages")
            plan = {"visitors": arguments.visitors, "steps": arguments.steps, "pause": pause}
            cpu, started = server.cpu_seconds(), time.perf_counter()
            made = asyncio.run(browse_server.visits(server.port, settings["latents"], **settings["page"], **plan))
            row = {
                "plan": plan,
                "visits": made,
                "seconds": time.perf_counter() - started,
                "cpu_seconds": server.cpu_seconds() - cpu,
            }
            found["rows"].append(row | memory(server))
            found["tracebacks"] = server.tracebacks()
            result["problems"] += [one["problem"] for one in made if one["problem"]]
            write(result, stem)


def in_chromium(arguments: argparse.Namespace, result: dict, stem: Path) -> None:
    """The table, and many at once, each with a browser's page of its own."""
    result["versions"]["chromium"] = {"chromium": asyncio.run(browse_chromium.version())}
    settings = settings_of(arguments)
    with browse_server.served(arguments.store, arguments.threads) as server:
        say("chromium: the table")
        page = {key: settings["page"][key] for key in ("run", "dictionary")}
        result["table"] = asyncio.run(browse_chromium.table(server, **page))
        write(result, stem)
        plan = {"visitors": arguments.visitors, "steps": arguments.steps, "pause": arguments.chromium_pause}
        say(f"chromium: {arguments.visitors} visitors, {arguments.chromium_pause:g} s between pages")
        made = asyncio.run(browse_chromium.visits(server, settings["latents"], **settings["page"], **plan))
        result["chromium"] = made | {"plan": plan, **memory(server), "tracebacks": server.tracebacks()}
    result["problems"] += result["table"]["problems"] + made["problems"]


def memory(server: browse_server.Served) -> dict[str, float]:
    """What the server has had at most, files of stores that are mapped included, and what is its own now."""
    return {"peak_mib": server.mib("VmHWM"), "own_mib": server.mib("RssAnon")}


def settings_of(arguments: argparse.Namespace) -> dict:
    """Which features visitors look at: any that has others to go on to."""
    page = {"run": arguments.store.resolve().name, "dictionary": DRAWN, "seed": arguments.seed}
    return {"latents": range(arguments.d_sae - arguments.steps - 1), "page": page}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.browse", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--parts", type=names_among(PARTS), default=list(PARTS), help=f"of {','.join(PARTS)}; default all")
    place = Path(tempfile.gettempdir()) / "saebench-browse"
    parser.add_argument("--store", type=Path, default=place, help=f"where the run is, or is made, and stays; default {place}")
    parser.add_argument("--d-sae", type=at_least(64), default=D_SAE, help=f"latents; default {D_SAE:,}")
    parser.add_argument("--tokens", type=at_least(1024), default=TOKENS, help=f"of the corpus; default {TOKENS:,}")
    parser.add_argument(
        "--prompt-d-sae", type=at_least(64), default=PROMPT_D_SAE, help="latents of the dictionary that reads prompts"
    )
    parser.add_argument("--latents", type=at_least(2), default=60, help="that are looked up and shown, of all densities")
    parser.add_argument("--prompts", type=at_least(2), default=30, help=f"that are read, of {PROMPT_LENGTH} tokens")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="first visits of a process, each in one of its own")
    parser.add_argument("--visitors", type=at_least(1), default=20)
    parser.add_argument("--steps", type=at_least(1), default=10, help="features that each visitor looks at")
    parser.add_argument(
        "--pause", type=seconds, default=[3.0, 0.0], help="seconds that one is looked at, with commas; default 3,0"
    )
    parser.add_argument("--chromium-pause", type=float, default=15.0, help="the same for visitors with a browser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=at_least(1), default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(argv)


def seconds(text: str) -> list[float]:
    """An argument type: numbers with commas between them."""
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())

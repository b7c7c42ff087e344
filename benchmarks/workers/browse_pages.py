"""What the browser's pages cost the server: lookups in a feature store, and whole pages run as Streamlit runs them, without a browser.

A page is run by Streamlit's AppTest on the app's own script; when each piece of it is handed over to be sent is noted from outside.
"""

import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks.browse_server import PROBLEM
from benchmarks.machine import peak_rss_mib
from benchmarks.workers.common import answer_requests
from saebench.commands.browse import app
from saebench.features.examples import cofiring_examples, quantile_groups, top_examples
from saebench.features.search import filter_latents, like, on_token, similar_contexts, together
from saebench.features.store import FeatureStore

TIMEOUT_S = 300.0
LONG_QUERIES = 12  # lookups that read the codes of many tokens are timed on so few

# The piece of a page that answers what it was opened for, by a class in its HTML: of a feature its label, of a prompt its losses. The
# table of all latents is no HTML.
CONTENT = {"feature": "sb-title", "prompt": "sb-figures"}
GRID = "saebench_grid"


class Pages:
    """Answers requests about one run; every method but the constructor is a request."""

    def init(self, *, run: str, dictionary: str, threads: int) -> dict:
        torch.set_num_threads(threads)
        self.run = Path(run)
        self.place = self.run / "features" / dictionary
        return {}

    def versions(self) -> dict:
        packages = ("saebench", "torch", "streamlit", "pyarrow", "numpy")
        return {"python": platform.python_version()} | {name: version(name) for name in packages}

    # --- the store ---

    def spread(self, *, count: int, seed: int) -> dict:
        """Latents of all densities, evenly spaced in their logarithm, from the densest to the one that fires least; each with its count."""
        counts_F = FeatureStore(self.place).counts_F
        rng = np.random.default_rng(seed)
        alive = np.flatnonzero(counts_F)
        order = alive[np.argsort(-counts_F[alive], kind="stable")]
        wanted = np.geomspace(counts_F[order[0]], counts_F[order[-1]], count)
        places = np.searchsorted(-counts_F[order], -wanted)
        near = np.clip(places + rng.integers(-2, 3, count), 0, len(order) - 1)
        chosen = list(dict.fromkeys(order[near].tolist()))
        return {"latents": chosen, "counts": counts_F[chosen].tolist(), "alive": len(alive), "entries": int(counts_F.sum())}

    def open(self) -> dict:
        """Milliseconds to open the store and to read what is read once."""
        found = {}
        store, found["open"] = timed(lambda: FeatureStore(self.place))
        for name, column in (
            ("latents", lambda: store.counts_F), ("corpus", lambda: store.ids_T), ("vocabulary", lambda: store.token_strings),
            ("codes mapped", lambda: store.chunks),
        ):  # fmt: skip
            _, found[name] = timed(column)
        self.store = store
        return found

    def lookups(self, *, latents: list[int]) -> dict:
        """Milliseconds of every lookup, by latents; of those that are not by latent, for as many contexts, tokens, filters."""
        store = self.store
        others = {latent: next((o for o, *_ in store.details(latent).coactive), (latent + 1) % store.d_sae) for latent in latents}
        contexts = np.linspace(0, store.num_contexts - 1, LONG_QUERIES).astype(int).tolist()
        tokens = np.argsort(-store.token_counts, kind="stable")[: np.count_nonzero(store.token_counts)]
        tokens = tokens[np.geomspace(1, len(tokens), LONG_QUERIES).astype(int) - 1].tolist()
        asked: dict[str, tuple[list[int], Callable[[int], object]]] = {
            "postings": (latents, store.postings),
            "details": (latents, store.details),
            "like": (latents, lambda latent: like(store, latent)),
            "top_examples (13)": (latents, lambda latent: top_examples(store, latent, 13)),
            "quantile_groups (5 x 5)": (latents, lambda latent: quantile_groups(store, latent)),
            "together": (latents, lambda latent: together(store, latent, others[latent])),
            "cofiring_examples": (latents, lambda latent: cofiring_examples(store, latent, others[latent])),
            "similar_contexts": (contexts, lambda context: similar_contexts(store, context)),
            "on_token, from the most frequent on": (tokens, lambda token: on_token(store, token)),
            "filter_latents": (
                tokens,
                lambda token: filter_latents(store.latents, density=(1e-6, 1e-2), max=(1.0, None), token=token),
            ),
        }
        return {name: [timed(partial(lookup, one))[1] for one in about] for name, (about, lookup) in asked.items()}

    def cold_lookups(self, *, latents: list[int]) -> dict:
        """Milliseconds of the lookups of a page whose part of the store the system does not hold in memory, by latents."""
        self.store = None
        found = [self._cold(latent) for latent in latents]
        return {name: [one[name] for one in found] for name in found[0]}

    def _cold(self, latent: int) -> dict[str, float]:
        gc.collect()  # a file that is still mapped stays in memory
        self.evict(names=["postings-", "details-"])
        store = FeatureStore(self.place)
        _ = store.counts_F, store.ids_T, store.token_strings
        lookups = {"details": lambda: store.details(latent), "top_examples (13)": lambda: top_examples(store, latent, 13)}
        return {name: timed(lookup)[1] for name, lookup in lookups.items()}

    def evict(self, *, names: list[str]) -> dict:
        """Have the system forget files of the store whose names begin so; those that are mapped stay."""
        for path in self.place.iterdir():
            if path.name.startswith(tuple(names)):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
        return {}

    # --- pages ---

    def prompts(self, *, count: int, length: int) -> dict:
        """Pieces of the corpus of exactly so many tokens, from all over it."""
        import saebench as sb

        lm, store, found = sb.load_lm("builtin", device="cpu"), FeatureStore(self.place), []
        for context in np.random.default_rng(0).permutation(store.num_contexts):
            first = int(context) * store.context_size + 1
            text = "".join(store.token_strings[i] for i in store.ids_T[first : first + length].tolist())
            if text not in found and len(lm.tokenizer.encode(text)) == length:
                found.append(text)
            if len(found) == count:
                break
        return {"prompts": found}

    def page(self, *, name: str, query: dict, session: bool = False) -> dict:
        """Milliseconds from the start of the script until the first content of a page and until its last piece; what was sent, in bytes; a
        problem that it shows. With `session` the visitor of the call before goes on; else a new one comes."""
        from streamlit.navigation.page import calc_hash
        from streamlit.testing.v1 import AppTest

        sys.argv = ["main.py", str(self.run)]
        began, sent = _watched()
        if not session:
            self.visitor = AppTest.from_file(str(app()), default_timeout=TIMEOUT_S)
        self.visitor._page_hash = calc_hash(name)
        self.visitor.query_params.clear()
        self.visitor.query_params.update({key: str(value) for key, value in query.items()})
        began.clear()
        sent.clear()
        self.visitor.run()
        return described(name, [(moment - began[0], message) for moment, message in sent]) | {"peak_rss_mib": peak_rss_mib()}


@cache
def _watched() -> tuple[list[float], list[tuple[float, object]]]:
    """From now on, when scripts begin, and everything that they hand over to be sent, with the time."""
    from streamlit.runtime.scriptrunner import ScriptRunner
    from streamlit.runtime.scriptrunner_utils.script_run_context import ScriptRunContext

    began: list[float] = []
    sent: list[tuple[float, object]] = []
    run_script, enqueue = ScriptRunner._run_script, ScriptRunContext.enqueue

    def watched_run(self: object, data: object) -> None:
        began.append(time.perf_counter())
        run_script(self, data)

    def watched_enqueue(self: object, message: object) -> None:
        enqueue(self, message)
        sent.append((time.perf_counter(), message))

    ScriptRunner._run_script, ScriptRunContext.enqueue = watched_run, watched_enqueue
    return began, sent


def described(name: str, sent: list[tuple[float, object]]) -> dict:
    """A run of a page from what it sent, (seconds since its start, message)."""
    found: dict = {"content": None, "problem": None, "bytes": sum(message.ByteSize() for _, message in sent)}
    for seconds, message in sent:
        element = message.delta.new_element if message.WhichOneof("type") == "delta" else None
        kind = element.WhichOneof("type") if element is not None else None
        if kind == "exception":
            found["problem"] = element.exception.message
        if kind == "html" and PROBLEM in element.html.body:
            found["problem"] = element.html.body
        if found["content"] is None and is_content(name, kind, element):
            found["content"] = 1e3 * seconds
    found["complete"] = 1e3 * sent[-1][0]
    return found


def is_content(name: str, kind: str | None, element: object) -> bool:
    if kind == "html":
        return name in CONTENT and f'"{CONTENT[name]}"' in element.html.body
    return name == "features" and kind == "bidi_component" and GRID in element.bidi_component.component_name


def timed(work: Callable[[], object]) -> tuple[object, float]:
    """What a piece of work returns, and its milliseconds."""
    started = time.perf_counter()
    done = work()
    return done, 1e3 * (time.perf_counter() - started)


if __name__ == "__main__":
    answer_requests(Pages())

"""saebench's feature store over an `ActivationStream`, which runs the model while it indexes."""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

import saebench as sb
from benchmarks.machine import peak_rss_mib
from benchmarks.workers.common import answer_requests
from benchmarks.workers.ours import kernels
from benchmarks.workers.parts import Parts
from saebench.lm import Contexts

TOP = 20  # examples of a latent that are compared
HALF = 2.0**-11  # what values kept in 16 bits are rounded by, as a share of them


class Ours:
    """Answers requests about stores of one dictionary; every method but the constructor is a request."""

    def init(self, *, folder: str, model: str, dictionary: str, tokens: str, exact: str, site: str, threads: int) -> dict:
        """`exact` is for those whose dictionary is a converted one."""
        torch.set_num_threads(threads)
        self.folder = Path(folder)
        columns = load_file(tokens)
        names = json.loads(Path(tokens).with_name("documents.json").read_text())
        start = time.perf_counter()
        self.lm = sb.load_lm(model, device="cpu")
        self.dictionary = sb.load(dictionary)
        self.source = sb.ActivationStream(
            self.lm, Contexts(columns["ids"], columns["documents"], columns["positions"], names), [site]
        )
        start_seconds = time.perf_counter() - start
        self.parts = Parts()
        self.parts.wrap("model", self.lm, "read")
        self.parts.wrap("encode", self.dictionary, "encode_contexts")
        contexts, size = columns["ids"].shape
        return {
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "saebench": version("saebench")}
            | kernels(),
            "start_seconds": start_seconds,
            "rule": {
                "ignored_ids": [],
                "ignored_positions": [0],
                "num_tokens": contexts * (size - 1),  # what it takes shares of
                "density_rounding": 0.0,
                "value_rounding": [0.0, HALF],
            },
        }

    def build(self, *, number: int) -> dict:
        """One whole store."""
        self.out = self.folder / f"store-{number}"
        cpu, wall = time.process_time(), time.perf_counter()
        self._build()
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "parts": self.parts.of(seconds),
            "bytes": sum(path.stat().st_size for path in self.out.rglob("*") if path.is_file()),
            "peak_rss_mib": peak_rss_mib(),
        }

    # ======== the feature store: what is between these lines is all that this benchmark knows of it ========

    def _build(self) -> None:
        from saebench.features import index

        index(self.dictionary, self.source, self.out, lm=self.lm)

    def numbers(self, *, tops: list[int], numbers: str) -> dict:
        """The file `numbers` gets what the last store says of every latent, and the strongest examples of some."""
        from saebench.features import FeatureStore

        store = FeatureStore(self.out)
        found = {
            "latents": np.arange(store.d_sae),
            "density": np.asarray(store.density_F, dtype=np.float64),
            "max": store.latents["max"].fill_null(0).to_numpy().astype(np.float64),
            "top_latents": np.array(tops),
            "top_tokens": np.full((len(tops), TOP), -1),
            "top_values": np.zeros((len(tops), TOP)),
        }
        for row, latent in enumerate(tops):
            tokens, values = store.postings(latent)
            order = np.argsort(-values, kind="stable")[:TOP]
            found["top_tokens"][row, : len(order)] = tokens[order]
            found["top_values"][row, : len(order)] = values[order]
        save_file(found, numbers)
        return {}

    # ========================================================================================================


if __name__ == "__main__":
    answer_requests(Ours())

"""saebench's attribution graphs of prompts."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

import saebench as sb
from benchmarks.machine import anonymous_mib
from benchmarks.workers.common import answer_requests
from benchmarks.workers.measured import measured
from saebench.circuits import Graph, trace
from saebench.interop import write_circuit_tracer


class Ours:
    """Answers requests about graphs; every method but the constructor is a request."""

    def init(self, *, folder: str, threads: int, batch: int) -> dict:
        """`batch` is for those who take targets together by a number that is asked for."""
        torch.set_num_threads(threads)
        self.folder = Path(folder)
        self.prompts = json.loads((self.folder / "prompts.json").read_text())
        return {"versions": {"python": platform.python_version(), "torch": torch.__version__, "saebench": version("saebench")}}

    def load(self, *, model: str) -> dict:
        """The model that the next requests are about."""
        place = self.folder / model
        self.lm = sb.load_lm(str(place / "model"), device="cpu")
        self.dictionaries = {path.name: sb.load(path) for path in sorted(place.glob("mlp-*"))}
        return {"loaded_mib": anonymous_mib()}

    def trace(self, *, length: int, features: int) -> dict:
        """Time and memory of one graph as it is made by default."""
        graph, cost = measured(lambda: self._trace(length, features))
        nodes, edges = len(graph), graph.num_edges
        return cost | {
            "active": graph.settings["active_features"],
            "nodes": nodes,
            "edges": edges,
            "scores": graph.scores().as_dict(),
        }

    def whole(self, *, length: int, out: str) -> dict:
        """A graph of all active features and all edges: OUT.json as ours, OUT-export.json as circuit-tracer's."""
        graph = self._trace(length, 1 << 30, keep=1.0)
        graph.save(f"{out}.json")
        write_circuit_tracer(graph, f"{out}-export.json")
        return {}

    def _trace(self, length: int, features: int, **options: object) -> Graph:
        return trace(self.lm, self.dictionaries, self.prompts[str(length)], max_features=features, **options)


if __name__ == "__main__":
    answer_requests(Ours())

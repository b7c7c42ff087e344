"""From a prompt to its graph: targets first, then the features through which most of them comes, until there are enough.

Features are taken in the order of their influence as far as it is known, which is estimated anew every few chunks. Edges of a chunk are
dense for a moment; then the strongest of each target are kept, and of the others the sum and the sum of sizes. Edges from features that
were not taken in the end join these. Memory therefore grows with the edges kept.
Shape suffixes: `T` targets of a chunk, `N` sources or nodes, `R` rows so far, `E` edges, `S` positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from saebench.circuits.graphs.assembling import Kept, assemble
from saebench.circuits.graphs.attribution import Rows, Sources
from saebench.circuits.graphs.graph import Graph
from saebench.circuits.graphs.replacement import Dictionaries, LocalModel
from saebench.circuits.graphs.targets import Row, Target, rows_of
from saebench.errors import UserError
from saebench.lm import LanguageModel
from saebench.progress import progress

CHUNK = 64  # targets of one pass backwards
CHUNKS = 4  # between two estimates of influence
MAX_FEATURES = 4096
KEEP = 512
BLOCK = 1 << 18  # edges
CHUNK_BYTES = 192 << 20  # of what targets depend on at all positions


@torch.no_grad()
def trace(
    lm: LanguageModel,
    dictionaries: Dictionaries,
    prompt: str | Sequence[int],
    *,
    targets: Sequence[Target] | None = None,
    max_features: int = MAX_FEATURES,
    keep: int | float = KEEP,
    model: LocalModel | None = None,
) -> Graph:
    """The attribution graph of a prompt (text, or token ids with BOS in front).

    `targets` default to the likeliest next tokens (targets.py). At most `max_features` features become nodes. `keep` is how many edges into
    each node are kept, or, as a float up to 1.0, the share of their sizes. `model` is the `LocalModel` of the same prompt, where there is
    one already. Raises UserError for an empty or too long prompt, a token that the vocabulary lacks, and dictionaries that do not fit.
    """
    if max_features < 1:
        raise UserError(f"max_features={max_features} leaves no feature: use at least 1")
    if (isinstance(keep, float) and not 0 < keep <= 1) or (isinstance(keep, int) and keep < 1):
        raise UserError(f"keep={keep} keeps nothing: use a number of edges, or a share above 0 and at most 1.0")
    model = model or LocalModel(lm, dictionaries, prompt)
    tracing = _Tracing(model, rows_of(model, targets), max_features, keep)
    return tracing.run()


class _Tracing:
    def __init__(self, model: LocalModel, targets: list[Row], max_features: int, keep: int | float):
        self.model, self.targets, self.max_features, self.keep = model, targets, max_features, keep
        self.sources = Sources(model)
        self.rows = Rows(self.sources)
        self.kept = Kept()
        self.row_of_N = np.full(self.sources.count, -1, dtype=np.int64)
        self.values: list[float] = []
        width = 4 * model.size * model.stream[0].shape[1]
        self.chunk = max(1, min(CHUNK, CHUNK_BYTES // (3 * width)))
        parts = enumerate(model.parts)
        self.part_N = np.concatenate([np.full(len(part), i) for i, part in parts] or [np.zeros(0)]).astype(np.int64)
        self.position_N = np.concatenate([part.positions_N.cpu().numpy() for part in model.parts])

    def run(self) -> Graph:
        self._named()
        wanted = min(self.max_features, self.sources.latents)
        with progress("features", wanted, "features") as report:
            while (done := int((self.row_of_N >= 0).sum())) < wanted:
                best = self._most_influential(min(wanted - done, CHUNKS * self.chunk))
                if not len(best):
                    break
                for chunk in self._chunks(best):
                    self._features(chunk)
                report(len(best))
        held = sum(len(sources) for sources in self.kept.sources)  # those from features that became no nodes too
        settings = {"max_features": self.max_features, "keep": self.keep, "edges_held": held}
        return assemble(self.model, self.sources, self.targets, self.kept, self.row_of_N, np.array(self.values), settings)

    # --- rows ---

    def _named(self) -> None:
        """Rows of the targets, those of one place together."""
        model, device = self.model, self.model.lm.device
        found: dict[int, tuple[np.ndarray, float, float]] = {}
        for place in dict.fromkeys(row.place for row in self.targets):
            if place is None:
                continue
            mine = [i for i, row in enumerate(self.targets) if row.place == place]
            positions_M = torch.tensor([self.targets[i].position for i in mine], device=device)
            v_MD = torch.stack([v for i in mine if (v := self.targets[i].vector_D) is not None])
            b_M = torch.tensor([self.targets[i].bias for i in mine], device=device)
            for start in range(0, len(mine), self.chunk):
                some = slice(start, start + self.chunk)
                edges_MN, constants_M = self.rows.of_vectors(place, positions_M[some], v_MD[some], b_M[some])
                values_M = (v_MD[some] * model.stands_at(place, model.stream)[positions_M[some]]).sum(1) + b_M[some]
                rows = zip(edges_MN.cpu().numpy(), constants_M.tolist(), values_M.tolist(), strict=True)
                found |= dict(zip(mine[some], rows, strict=True))
        for i, target in enumerate(self.targets):
            if target.part >= 0:
                found[i] = self._named_latent(target, i)
        for i in range(len(self.targets)):
            row_N, constant, value = found[i]
            self.kept.add(row_N, constant, self.keep)
            self.values.append(value)

    def _named_latent(self, target: Row, number: int) -> tuple[np.ndarray, float, float]:
        """Edges, constant and value of a latent; where it is active, its row is the feature's too."""
        part, device = self.model.parts[target.part], self.model.lm.device
        at = (torch.tensor([target.position], device=device), torch.tensor([target.latent], device=device))
        edges_MN, constants_M = self.rows.of_latents(target.part, *at)
        value = part.pre_activations(self.model.stands_at(part.place, self.model.stream), *at)
        active = ((part.positions_N == target.position) & (part.latents_N == target.latent)).nonzero()
        if len(active):
            self.row_of_N[self.sources.of_parts[target.part] + int(active[0, 0])] = number
        return edges_MN[0].cpu().numpy(), float(constants_M), float(value)

    def _features(self, numbers: np.ndarray) -> None:
        """Rows of features of one part."""
        number = int(self.part_N[numbers[0]])
        part = self.model.parts[number]
        chosen = torch.as_tensor(numbers - self.sources.of_parts[number], device=self.model.lm.device)
        edges_TN, constants_T = self.rows.of_latents(number, part.positions_N[chosen], part.latents_N[chosen])
        self.row_of_N[numbers] = len(self.values) + np.arange(len(numbers))
        self.values += part.values_N[chosen].tolist()
        for row_N, constant in zip(edges_TN.cpu().numpy(), constants_T.tolist(), strict=True):
            self.kept.add(row_N, constant, self.keep)

    def _chunks(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Features of one part and of neighbouring positions together."""
        chunks = []
        for part in np.unique(self.part_N[numbers]):
            mine = np.sort(numbers[self.part_N[numbers] == part])
            chunks += [mine[start : start + self.chunk] for start in range(0, len(mine), self.chunk)]
        return chunks

    def _most_influential(self, count: int) -> np.ndarray:
        """The features without a row through which most of the targets comes, as far as it is known."""
        latents, rows = self.sources.latents, len(self.values)
        wave_R = np.zeros(rows)
        wave_R[: len(self.targets)] = [row.weight for row in self.targets]
        total_N = np.zeros(self.sources.count)
        known_N = np.flatnonzero(self.row_of_N >= 0)
        while wave_R.any():
            wave_N = self._back(wave_R)
            total_N += wave_N
            wave_R = np.zeros(rows)
            wave_R[self.row_of_N[known_N]] = wave_N[known_N]
        free_N = np.flatnonzero((self.row_of_N[:latents] < 0) & (total_N[:latents] > 0))
        return free_N[np.argsort(-total_N[free_N], kind="stable")[:count]]

    def _back(self, wave_R: np.ndarray) -> np.ndarray:
        """From rows to their sources, by the shares of edges: [N]. In blocks of rows, so that edges are never held a second time."""
        kept, wave_N = self.kept, np.zeros(self.sources.count)
        rows = np.flatnonzero(wave_R)
        counts = np.array([len(kept.sources[row]) for row in rows])
        for block in np.split(rows, np.flatnonzero(np.diff(np.cumsum(counts) // BLOCK)) + 1):
            sources_E = np.concatenate([kept.sources[row] for row in block])
            each_R = wave_R[block] / np.maximum([kept.size[row] for row in block], 1e-300)
            shares_E = np.abs(np.concatenate([kept.weights[row] for row in block]), dtype=np.float64)
            shares_E *= np.repeat(each_R, [len(kept.sources[row]) for row in block])
            wave_N += np.bincount(sources_E, shares_E, minlength=len(wave_N))
        return wave_N

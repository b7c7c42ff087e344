"""What adds up to one number of a prompt, one step back, each as the product of its input-invariant and its input-dependent factor (A1).

The number is a target (a latent's pre-activation, a logit, a direction) at a position. It is the sum of

    feature   a latent active at the same token, of a dictionary that writes before: (d . u) times activation and scales
    head      a head at one source token: (r . u through the head) times attention and scales, r the stream there before the head
    look      the same for a latent that looks at other tokens itself, Lorsa's
    skip      a transcoder's linear bypass
    token     what stands in the stream at the start
    error     what a dictionary missed, or an MLP without one wrote
    bias      what a layer adds whatever the nodes do, and the target's own bias

with u by weights alone (invariant.py). What stands before a head, a look or a skip is a sum again, so that these are ways to go on; the
first factor is by weights alone for features, and for tokens and biases given what they are. A dictionary of the stream ends the step.
Shape suffixes: `S` positions, `D` width, `H` heads, `K` latents active at a position, `N` contributions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.circuits.graphs.parts import Place
from saebench.circuits.graphs.replacement import LocalModel, Written
from saebench.circuits.graphs.targets import Row, Target, rows_of, value_of
from saebench.circuits.weights.invariant import Invariant, Reading

KINDS = ("feature", "head", "look", "skip", "token", "error", "bias")
ONWARDS = ("feature", "head", "look", "skip")


@dataclass(frozen=True)
class Contribution:
    """One addend, `value` = `weight` * `input`."""

    kind: str
    id: str
    """Of features, errors and tokens as in a graph."""
    layer: int
    """Where a feature reads, or the step that it is of; -1 for none."""
    head: int
    """Number in the layer, -1 for none."""
    position: int
    dictionary: int
    """Number of the feature's dictionary, -1 for none."""
    latent: int
    """Number in the dictionary, -1 for none."""
    weight: float
    """Input-invariant factor: what the direction that is read reads of one unit of what is written."""
    input: float
    """Input-dependent factor: activation, attention and the scales of norms."""

    @property
    def value(self) -> float:
        return self.weight * self.input


@dataclass(frozen=True)
class At:
    """gain * (v . r) + bias, r the stream at a point and position."""

    point: int
    position: int
    v_D: Tensor
    gain: float
    bias: float = 0.0
    before: bool = False


@dataclass(frozen=True)
class Gather:
    """The sum over heads and source positions of gain * (v . r) of the stream at a point, and a bias."""

    kind: str
    point: int
    position: int
    v_HD: Tensor
    gain_HS: Tensor
    bias: float = 0.0
    name: str = ""
    """Of a latent that looks itself."""

    def at(self, head: int, position: int) -> At:
        return At(self.point, position, self.v_HD[head], float(self.gain_HS[head, position]))


Reader = At | Gather


@dataclass
class Contributions:
    """All addends of one number, by columns [N]."""

    model: LocalModel
    kind_N: Tensor
    """Number in KINDS."""
    layer_N: Tensor
    head_N: Tensor
    position_N: Tensor
    dictionary_N: Tensor
    latent_N: Tensor
    source_N: Tensor
    """Number of the feature's part, or of a text in `sites`."""
    weight_N: Tensor
    input_N: Tensor
    sites: list[str]

    def __len__(self) -> int:
        return len(self.kind_N)

    @property
    def value_N(self) -> Tensor:
        return self.weight_N * self.input_N

    @property
    def total(self) -> float:
        """The number that they add up to."""
        return float((self.weight_N.double() * self.input_N.double()).sum())

    def __getitem__(self, n: int) -> Contribution:
        kind, position = KINDS[int(self.kind_N[n])], int(self.position_N[n])
        layer, head, latent = int(self.layer_N[n]), int(self.head_N[n]), int(self.latent_N[n])
        dictionary = int(self.dictionary_N[n])
        name = {
            "feature": lambda: f"{self.model.names[dictionary]}/{position}/{latent}",
            "head": lambda: f"{layer}.{head}/{position}",
            "token": lambda: f"{position}",
        }.get(kind, lambda: f"{self.sites[int(self.source_N[n])]}/{position}")()
        factors = float(self.weight_N[n]), float(self.input_N[n])
        return Contribution(kind, f"{kind}/{name}", layer, head, position, dictionary, latent, *factors)

    def top(self, count: int, among_N: Tensor | None = None) -> list[int]:
        """Numbers of the largest in size, largest first; only those that are not 0."""
        sizes_N = self.value_N.abs()
        if among_N is not None:
            sizes_N = sizes_N * among_N
        chosen = sizes_N.sort(descending=True, stable=True).indices[:count]
        return chosen[sizes_N[chosen] > 0].tolist()


class Steps:
    """One step back from any number of a local model."""

    def __init__(self, model: LocalModel):
        self.model, self.invariant = model, Invariant(model)
        self._zeros = [torch.zeros_like(model.stream[0])] * len(model.stream)
        self._standing: dict[Place, Tensor] = {}

    def target(self, row: Row) -> tuple[Reader, float]:
        """What reads a target, and the target's value."""
        model = self.model
        if row.place is None:
            part = model.parts[row.part]
            at = self._one(row.position), self._one(row.latent)
            return self.latent(row.part, row.position, row.latent), float(
                part.pre_activations(model.stands_at(part.place, model.stream), *at)
            )
        assert row.vector_D is not None
        reading = Reading(row.place.point, row.vector_D[None], row.place.kind == "input")
        bias = value_of(row, model, self._nothing_at(row.place))
        value = value_of(row, model, model.stands_at(row.place, model.stream))
        return self._reader(row.place, reading, row.position, bias), value

    def latent(self, number: int, position: int, latent: int) -> Reader:
        """What reads a latent of a part, counted from its first."""
        part = self.model.parts[number]
        reading = self.invariant.reading(part, self._one(latent))
        bias = float(part.pre_activations(self._nothing_at(part.place), self._one(position), self._one(latent)))
        if part.pattern_GSS is None:
            return self._reader(part.place, reading, position, bias)
        gain_HS = part.pattern_GSS[None, latent // part.group_size, position, : position + 1]
        if reading.behind_norm:
            gain_HS = gain_HS * self.model.norms[reading.point].scale_S[: position + 1]
        name = f"{self.model.names[part.number]}/{latent + part.first}"
        return Gather("look", reading.point, position, self.invariant.pulled(reading), gain_HS, bias, name)

    def of(self, reader: Reader, *, ways: bool = True) -> Contributions:
        """All that adds up to what a reader reads; without `ways` all but what heads gather."""
        table = _Table(self.model)
        if reader.bias:
            table.add("bias", reader.position, reader.bias, 1.0, site="own")
        if isinstance(reader, Gather):
            self._heads(table, reader)
        else:
            for gather in self._back(table, reader):
                if ways:
                    self._heads(table, gather)
        return table.done()

    def follow(self, reader: Reader, contributions: Contributions, n: int) -> Reader | None:
        """What reads one of its contributions, None for those that nothing adds up to."""
        kind, position, head = KINDS[int(contributions.kind_N[n])], int(contributions.position_N[n]), int(contributions.head_N[n])
        if kind == "feature":
            number = int(contributions.source_N[n])
            return self.latent(number, position, int(contributions.latent_N[n]) - self.model.parts[number].first)
        if kind not in ONWARDS:
            return None
        if isinstance(reader, Gather):
            return reader.at(max(head, 0), position)
        if kind == "head":
            return self._gather(reader, 2 * int(contributions.layer_N[n])).at(head, position)
        site = contributions.sites[int(contributions.source_N[n])]
        return self._skipped(reader, next(point for point in range(reader.point) if _step(point) == site))

    # --- back through the stream ---

    def _back(self, table: _Table, reader: At) -> Iterator[Gather]:
        """Enters all but what heads gather, which is handed out."""
        model, position, v_D, before = self.model, reader.position, reader.v_D, reader.before
        features: dict[int, tuple[Tensor, Tensor, float]] = {}
        for point in range(reader.point, -1, -1):
            if point < reader.point and (written := model.steps[point]) is not None:
                self._take(table, written, v_D, reader, features)
                if (skipped := self._skipped(reader, point)) is not None:
                    weight = torch.dot(skipped.v_D, model.stream[point][position])
                    table.add("skip", position, float(weight), skipped.gain, layer=point // 2, site=_step(point))
            elif point < reader.point:
                yield self._gather(reader, point)
            if point < reader.point:
                weight = torch.dot(v_D, model.constants[point][position])
                table.add("bias", position, float(weight), reader.gain, layer=point // 2, site=_step(point))
            cut = model.cuts[point]
            if cut is not None and not (before and point == reader.point):
                self._take(table, cut, v_D, reader, features)
                weight = torch.dot(v_D, cut.constant_SD[position])
                table.add("bias", position, float(weight), reader.gain, layer=_layer(model, cut.place), site=cut.place.site)
                break
        else:
            table.add("token", position, float(torch.dot(v_D, model.stream[0][position])), reader.gain)
        for number, (numbers_K, weight_K, gain) in features.items():
            table.add_features(number, position, numbers_K, weight_K, gain)

    def _take(
        self, table: _Table, written: Written, v_D: Tensor, reader: At, features: dict[int, tuple[Tensor, Tensor, float]]
    ) -> None:
        """Enters the error of what is written at a place, and adds what latents write there."""
        model, position, gain = self.model, reader.position, reader.gain
        if written.place.kind == "heads":
            layer = written.place.point // 2
            v_D, gain = self.invariant.unmixed(layer, v_D[None])[0], gain * self._post(layer, position)
        for part, write in written.writers:
            numbers_K = part.table_SK[position]
            numbers_K = numbers_K[numbers_K >= 0]
            if len(numbers_K):
                number = next(i for i, other in enumerate(model.parts) if other is part)
                weight_K = write.rows(part.latents_N[numbers_K]).float() @ v_D
                known = features.get(number)
                features[number] = numbers_K, weight_K if known is None else known[1] + weight_K, gain
        weight = torch.dot(v_D, written.error_SD[position])
        table.add("error", position, float(weight), gain, layer=_layer(model, written.place), site=written.place.site)

    def _skipped(self, reader: At, point: int) -> At | None:
        """What reads the input of a bypass, where a step has one."""
        written = self.model.steps[point]
        if written is None or reader.position < self.model.first:
            return None
        for part, _ in written.writers:
            if part.W_skip_DD is not None:
                v_MD, gain = (part.W_skip_DD @ reader.v_D)[None], reader.gain
                if part.place.kind == "input":
                    v_MD = self.invariant.pull(point, v_MD)
                    gain = gain * float(self.model.norms[point].scale_S[reader.position])
                return At(point, reader.position, v_MD[0], gain)
        return None

    # --- heads ---

    def _reader(self, place: Place, reading: Reading, position: int, bias: float) -> Reader:
        if place.kind in ("stream", "input"):
            gain = float(self.model.norms[place.point].scale_S[position]) if reading.behind_norm else 1.0
            return At(place.point, position, self.invariant.pulled(reading)[0], gain, bias, reading.before)
        layer, gain, u_MX = place.point // 2, 1.0, reading.v_MD
        if place.kind == "written":
            u_MX, gain = self.invariant.unmixed(layer, u_MX), self._post(layer, position)
        return self._gathered(layer, position, u_MX, gain, bias)

    def _gather(self, reader: At, step: int) -> Gather:
        """The heads of a layer that writes to the stream before a reader."""
        layer = step // 2
        u_MX = self.invariant.unmixed(layer, reader.v_D[None])
        return self._gathered(layer, reader.position, u_MX, reader.gain * self._post(layer, reader.position))

    def _gathered(self, layer: int, position: int, u_MX: Tensor, gain: float, bias: float = 0.0) -> Gather:
        v_HD = self.invariant.pull(2 * layer, self.invariant.attention[layer].values_back(u_MX)[0])
        looks_HS = self.model.attention[layer].pattern_HSS[:, position, : position + 1]
        gain_HS = gain * looks_HS * self.model.norms[2 * layer].scale_S[: position + 1]
        return Gather("head", 2 * layer, position, v_HD, gain_HS, bias)

    def _heads(self, table: _Table, gather: Gather) -> None:
        weight_HS = gather.v_HD @ self.model.stream[gather.point][: gather.gain_HS.shape[1]].T
        table.add_heads(gather, weight_HS)

    def _post(self, layer: int, position: int) -> float:
        """The scale of the norm between attention and the stream."""
        post = self.model.attention[layer].post
        return 1.0 if post is None else float(post.scale_S[position])

    # --- small things ---

    def _nothing_at(self, place: Place) -> Tensor:
        """What stands at a place when the stream is 0."""
        if place not in self._standing:
            self._standing[place] = self.model.stands_at(place, self._zeros)
        return self._standing[place]

    def _one(self, number: int) -> Tensor:
        return torch.tensor([number], device=self.model.lm.device)


class _Table:
    """Contributions as they are found."""

    def __init__(self, model: LocalModel):
        self.model = model
        self.sites: list[str] = []
        self.whole: list[Tensor] = []
        self.factors: list[Tensor] = []
        self._single: list[tuple[list[int], tuple[float, float]]] = []

    def add(self, kind: str, position: int, weight: float, input: float, *, layer: int = -1, site: str = "") -> None:
        self.sites.append(site)
        columns = [KINDS.index(kind), layer, -1, position, -1, -1, len(self.sites) - 1]
        self._single.append((columns, (weight, input)))

    def add_features(self, number: int, position: int, numbers_K: Tensor, weight_K: Tensor, gain: float) -> None:
        part = self.model.parts[number]
        latents_K = part.latents_N[numbers_K].cpu() + part.first
        same = [KINDS.index("feature"), _layer(self.model, part.place), -1, position, part.number]
        columns = torch.tensor(same)[:, None].expand(-1, len(latents_K))
        self.whole.append(torch.cat([columns, latents_K[None], torch.full_like(latents_K, number)[None]]))
        self.factors.append(torch.stack([weight_K, gain * part.values_N[numbers_K]]).cpu())

    def add_heads(self, gather: Gather, weight_HS: Tensor) -> None:
        heads, size = weight_HS.shape
        self.sites.append(gather.name)
        head_N = torch.arange(heads).repeat_interleave(size)
        position_N = torch.arange(size).repeat(heads)
        fixed = lambda value: torch.full_like(head_N, value)  # noqa: E731
        if gather.kind == "look":
            head_N = fixed(-1)
        columns = [fixed(KINDS.index(gather.kind)), fixed(gather.point // 2), head_N, position_N, fixed(-1), fixed(-1)]
        self.whole.append(torch.stack([*columns, fixed(len(self.sites) - 1)]))
        self.factors.append(torch.stack([weight_HS.flatten(), gather.gain_HS.flatten()]).cpu())

    def done(self) -> Contributions:
        if self._single:
            self.whole.append(torch.tensor([columns for columns, _ in self._single]).T)
            self.factors.append(torch.tensor([factors for _, factors in self._single]).T)
        kind_N, layer_N, head_N, position_N, dictionary_N, latent_N, source_N = torch.cat(self.whole, 1)
        weight_N, input_N = torch.cat(self.factors, 1)
        return Contributions(
            self.model, kind_N, layer_N, head_N, position_N, dictionary_N, latent_N, source_N, weight_N, input_N, self.sites
        )


def _layer(model: LocalModel, place: Place) -> int:
    """The layer of a site: of one behind the last layer the last."""
    named = place.site.split(".")
    return int(named[1]) if named[0] == "blocks" else model.layers - 1


def _step(point: int) -> str:
    return f"blocks.{point // 2}.{'hook_mlp_out' if point % 2 else 'hook_attn_out'}"


@torch.no_grad()
def contributions(model: LocalModel, target: Target) -> Contributions:
    """All that adds up to a target of a prompt, one step back. Raises UserError for a latent, token or position that there is not."""
    steps = Steps(model)
    (row,) = rows_of(model, [target])
    return steps.of(steps.target(row)[0])

"""How latents read and write by the weights alone: the local model with every norm's scale taken as 1 and heads that look at one place.

Connections by weights (connections.py) and the input-invariant factor of what a prompt makes of them (contributions.py) are read off here.
Shape suffixes: `M` some latents, `D` width, `H` heads, `X` the heads' outputs side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.circuits.graphs.parts import Part, Place, Write
from saebench.circuits.graphs.replacement import LocalModel
from saebench.errors import UserError

Head = tuple[int, int]  # layer and number


@dataclass(frozen=True)
class Reading:
    """What some numbers read of the stream at a point, or of what the norm there makes of it: [M, D]."""

    point: int
    v_MD: Tensor
    behind_norm: bool
    before: bool = False
    """What a dictionary writes at the point itself."""

    def reads(self, write: Write) -> bool:
        """Whether what is written is in the stream by then."""
        same = write.place.kind == "stream" and write.place.point == self.point and not self.before
        return write.place.point < self.point or same


class Invariant:
    """The pieces of a local model, of which the prompt does not matter."""

    def __init__(self, model: LocalModel):
        self.model = model
        self.norms = [norm.unit for norm in model.norms]
        self.attention = [attention.unit for attention in model.attention]

    # --- what is read ---

    def reading(self, part: Part, latents_M: Tensor) -> Reading:
        """What latents of a part, counted from its first, read at its place."""
        before = any(write.place.kind == "stream" and write.place.point == part.place.point for write in part.writes)
        return Reading(part.place.point, part.W_read_FD[latents_M].float(), part.place.kind == "input", before)

    def pulled(self, reading: Reading) -> Tensor:
        """What is read of the stream itself: [M, D]."""
        return self.pull(reading.point, reading.v_MD) if reading.behind_norm else reading.v_MD

    def pull(self, point: int, v_MD: Tensor) -> Tensor:
        """Back through a norm."""
        return self.norms[point].pull(v_MD, _nowhere(v_MD))

    def unmixed(self, layer: int, v_MD: Tensor) -> Tensor:
        """From what is read of an attention layer's output to what is read of its heads' outputs: [M, X]."""
        return self.attention[layer].unmixed(v_MD, _nowhere(v_MD))

    def behind(self, reading: Reading, place: Place, head: Head | None, name: str) -> Reading:
        """What is read before a head, where one is named, of the way through it. Raises UserError for what does not read there."""
        attends = place.kind in ("heads", "written")
        if head is None:
            if attends:
                raise UserError(f"{name} reads what the heads of layer {place.point // 2} write: name one, head=(layer, number)")
            return reading
        layer, number = head
        self.check(head)
        if attends and place.point != 2 * layer:
            raise UserError(f"{name} reads what the heads of layer {place.point // 2} write, not head {number} of layer {layer}")
        if not attends and place.point <= 2 * layer:
            raise UserError(f"{name} reads {place.site}, which is not behind head {number} of layer {layer}: name an earlier one")
        if place.kind == "heads":
            u_MX = reading.v_MD
        else:
            u_MX = self.unmixed(layer, reading.v_MD if attends else self.pulled(reading))
        weights = self.attention[layer].weights
        u_MHE = u_MX.unflatten(1, (weights.num_heads, weights.d_head))
        return Reading(2 * layer, u_MHE[:, number] @ weights.W_V_HDE[number].T, True)

    def follows(self, part: Part, head: Head | None) -> bool:
        """Whether a part reads what lies behind a head, or, where none is named, the stream."""
        attends = part.place.kind in ("heads", "written")
        if head is None:
            return not attends
        self.check(head)
        return part.place.point == 2 * head[0] if attends else part.place.point > 2 * head[0]

    # --- what is written ---

    def written(self, part: Part, latents_M: Tensor | None, reading: Reading) -> Tensor | None:
        """What latents of a part (all for None) add to the stream before it is read, or None where that is nothing: [M, D]."""
        writes = [write for write in part.writes if reading.reads(write)]
        if not writes:
            return None
        if latents_M is None:
            latents_M = torch.arange(len(part.W_read_FD), device=part.W_read_FD.device)
        return sum((self.to_stream(write, latents_M) for write in writes[1:]), start=self.to_stream(writes[0], latents_M))

    def to_stream(self, write: Write, latents_M: Tensor) -> Tensor:
        """What latents add to the stream by one of the places that they write: [M, D]."""
        rows = write.rows(latents_M).detach().float()
        return self.attention[write.place.point // 2].mixed(rows) if write.place.kind == "heads" else rows

    def through(self, d_MD: Tensor, head: Head) -> Tensor:
        """From the stream before a head to what it adds to the stream: [M, D]."""
        layer, number = head
        attention = self.attention[layer]
        z_MHE = d_MD.new_zeros(len(d_MD), attention.weights.num_heads, attention.weights.d_head)
        z_MHE[:, number] = self.norms[2 * layer].linear(d_MD) @ attention.weights.W_V_HDE[number]
        return attention.mixed(z_MHE.flatten(1))

    def check(self, head: Head) -> None:
        """Raises UserError for a head that the model lacks."""
        layer, number = head
        heads = self.attention[0].weights.num_heads
        if not 0 <= layer < self.model.layers or not 0 <= number < heads:
            raise UserError(
                f"there is no head {number} in layer {layer}: the model has {self.model.layers} layers of {heads} heads, counted from 0"
            )


def _nowhere(v_MD: Tensor) -> Tensor:
    """The one position that unit pieces have, for each row."""
    return torch.zeros(len(v_MD), dtype=torch.int64, device=v_MD.device)

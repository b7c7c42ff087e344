"""What the weights alone say of how latents are connected (methods.md A1): the input-invariant factor of every edge.

A latent that writes d and one that reads w behind a norm are connected by c = d . w, the norm's gain (and centring) taken into w and its
scale, which depends on the text, taken as 1. Through a head the reader is w pulled back through the head's output and value matrices
and the norm before them, as if the head looked nowhere but at the source. Tokens are read straight from the embedding, and logits are
read through the final norm. What a prompt adds, activations, scales and patterns, is in contributions.py.

c knows nothing of whether two latents are ever active together. With the codes of some text connections of latents at the same token are
ranked by E[f_i 1(f_j > 0)] c instead.
Dictionaries of the stream between two latents are passed by here, where a graph of a prompt is cut by them.
Shape suffixes: `I` sources, `J` targets, `M` some latents, `F` d_sae, `D` width, `V` vocabulary,
`B` tokens of the text, `K` connections that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saebench.circuits.graphs.attribution import BLOCK_BYTES
from saebench.circuits.graphs.parts import Part, Place
from saebench.circuits.graphs.replacement import Dictionaries, LocalModel
from saebench.circuits.graphs.targets import Target, dictionary_number, rows_of
from saebench.circuits.weights.coactivity import CoActivity, Codes
from saebench.circuits.weights.invariant import Head, Invariant, Reading
from saebench.errors import UserError
from saebench.features.effects import largest
from saebench.lm import LanguageModel

MOST = 1 << 24  # numbers that `between` returns
ADDED = 1e-2  # of the embedding from a multiple of its rows, relative


@dataclass(frozen=True)
class Connection:
    """One latent that a target reads, or that reads a source."""

    dictionary: str
    latent: int
    weight: float
    """c, input-invariant."""
    activity: float = 1.0
    """E[f_i 1(f_j > 0)] on the text, 1 without a text."""

    @property
    def score(self) -> float:
        return self.weight * self.activity


@dataclass(frozen=True)
class TokenWeight:
    """One token of the vocabulary."""

    token: int
    text: str
    weight: float


class Connections:
    """Of a model and dictionaries, by their weights. Raises UserError as `LocalModel` does, of which `model` may be one of any prompt."""

    def __init__(self, lm: LanguageModel, dictionaries: Dictionaries, *, model: LocalModel | None = None):
        self.lm = lm
        self.model = model or LocalModel(lm, dictionaries, _any_prompt(lm))
        self.invariant = Invariant(self.model)

    # --- between latents ---

    @torch.no_grad()
    def between(
        self,
        source: str | int,
        target: str | int,
        sources: Sequence[int],
        targets: Sequence[int],
        *,
        head: Head | None = None,
    ) -> Tensor:
        """c of some latents of one dictionary with some of another, straight or through a head (layer, number): [I, J], 0 where the source
        writes nothing before the target reads. Raises UserError for what there is not, and for too many at once."""
        if len(sources) * len(targets) > MOST:
            raise UserError(
                f"{len(sources):,} x {len(targets):,} connections are too many to hold: name fewer latents, or use strongest()"
            )
        out_IJ = self.model.stream[0].new_zeros(len(sources), len(targets))
        for target_part, columns_M, read_M in self._found(target, targets):
            reading = self._reading(target_part, read_M, head)
            for source_part, rows_M, written_M in self._found(source, sources):
                d_MD = self.invariant.written(source_part, written_M, reading)
                if d_MD is not None:
                    out_IJ[rows_M[:, None], columns_M] = d_MD @ self.invariant.pulled(reading).T
        return out_IJ

    @torch.no_grad()
    def strongest(
        self, source: str | int, target: str | int, count: int = 8, *, head: Head | None = None
    ) -> tuple[Tensor, Tensor]:
        """For every latent of the target dictionary the latents of the source with the largest c in size: numbers [F, K], -1 where there
        are fewer that are not 0, and c. Block by block of targets, never all pairs."""
        self._check_count(count)
        found = [self._strongest(source, part, count, head) for part in self._parts(target)]
        return torch.cat([numbers for numbers, _ in found]), torch.cat([weights for _, weights in found])

    def _strongest(self, source: str | int, part: Part, count: int, head: Head | None) -> tuple[Tensor, Tensor]:
        size, none_M = len(part.W_read_FD), torch.zeros(0, dtype=torch.int64, device=self.lm.device)
        writers = []
        if (
            self.invariant.follows(part, head) or size == part.dictionary.config.d_sae
        ):  # of several layers some may come before the head
            reading = self._reading(part, none_M, head)
            writers = [(p, rows) for p in self._parts(source) if (rows := self.invariant.written(p, None, reading)) is not None]
        if not writers:
            return torch.full((size, count), -1), torch.zeros(size, count)
        W_FD = torch.cat([rows for _, rows in writers])
        numbers_F = torch.cat([p.first + torch.arange(len(rows), device=W_FD.device) for p, rows in writers])
        found: list[tuple[Tensor, Tensor]] = []
        for latents_M in _blocks(size, len(W_FD), self.lm.device):
            u_MD = self.invariant.pulled(self._reading(part, latents_M, head))
            sides = [(largest(sign * u_MD, W_FD, count), sign) for sign in (1, -1)]
            which_MK = torch.cat([numbers for (numbers, _), _ in sides], 1)
            weights_MK = torch.cat([sign * values for (_, values), sign in sides], 1)
            order_MK = weights_MK.abs().sort(dim=1, descending=True, stable=True).indices[:, :count]
            which_MK, weights_MK = which_MK.gather(1, order_MK), weights_MK.gather(1, order_MK)
            none_MK = (which_MK < 0) | (weights_MK == 0)
            found.append((numbers_F[which_MK.clamp_min(0)].masked_fill(none_MK, -1).cpu(), weights_MK.cpu()))
        return torch.cat([numbers for numbers, _ in found]), torch.cat([weights for _, weights in found])

    @torch.no_grad()
    def into(self, target: Target, *, head: Head | None = None, codes: Codes | None = None, count: int = 20) -> list[Connection]:
        """The latents that a target (its position does not matter) reads most, by |c|; with the codes of some text, one for each dictionary
        over the same tokens, by |c E[f_i 1(f_j > 0)]|, or |c E[f_i]| for targets that are no latents. Raises UserError."""
        self._check_count(count)
        reading, part, latent = self._target(target, head)
        together = self._together(codes, head)
        active_B = None
        if together is not None and part is not None:
            if part.pattern_GSS is not None:
                name = self.model.names[part.number]
                raise UserError(f"{name} reads other tokens than its own, of which codes say nothing: leave codes out")
            active_B = together.values(part, latent) != 0
        found: list[Connection] = []
        for other in self.model.parts:
            weights_F = self._all(other, reading)
            if weights_F is not None:
                found += self._top(other, weights_F, together and together.of_sources(other, active_B), count)
        return _best(found, count)

    @torch.no_grad()
    def out_of(
        self, dictionary: str | int, latent: int, *, head: Head | None = None, codes: Codes | None = None, count: int = 20
    ) -> list[Connection]:
        """The latents that read a latent most, ranked as by `into`. Raises UserError."""
        self._check_count(count)
        ((source, _, written_M),) = self._found(dictionary, [latent])
        together = self._together(codes, head)
        values_B = None if together is None else together.values(source, int(written_M))
        found: list[Connection] = []
        for part in self.model.parts:
            if not self.invariant.follows(part, head) or (values_B is not None and part.pattern_GSS is not None):
                continue
            reading = self._reading(part, written_M[:0], head)
            d_MD = self.invariant.written(source, written_M, reading)
            if d_MD is None:
                continue
            blocks = _blocks(len(part.W_read_FD), d_MD.shape[1], self.lm.device)
            weights_F = torch.cat([self.invariant.pulled(self._reading(part, some_M, head)) @ d_MD[0] for some_M in blocks])
            together_F = None if together is None or values_B is None else together.of_targets(part, values_B)
            found += self._top(part, weights_F, together_F, count)
        return _best(found, count)

    # --- tokens ---

    @torch.no_grad()
    def de_embedding(self, target: Target, *, head: Head | None = None) -> Tensor:
        """What a target would read straight from each token's embedding, alone in the stream, or through a head that looks at it: [V].
        The norm that reads the embedding has the scale that the embedding gives it; every norm behind has scale 1; biases and positions
        are left out. Raises UserError."""
        reading, _, _ = self._target(target, head)
        W_E_VD = self.lm.hf.get_input_embeddings().weight.detach()
        factor, found = _embedding_factor(self.lm, self.model.stream[0].shape[1]), []
        for tokens_M in _blocks(len(W_E_VD), W_E_VD.shape[1], W_E_VD.device):
            x_MD = factor * W_E_VD[tokens_M].float()
            if reading.behind_norm:
                norm = self.lm.site(_norm_site(reading.point, self.model.layers)).module(self.lm.hf)
                x_MD = norm(x_MD.to(self.lm.hf.dtype)).float() - self.invariant.norms[reading.point].bias_D
            found.append(x_MD @ reading.v_MD[0])
        return torch.cat(found)

    @torch.no_grad()
    def to_logits(self, dictionary: str | int, latent: int, *, head: Head | None = None) -> Tensor:
        """What one unit of a latent adds to every logit, less their mean, straight or through a head that looks at it, every norm's
        scale taken as 1: [V]. Raises UserError."""
        ((source, _, latents_M),) = self._found(dictionary, [latent])
        final, (W_VD, _) = Place.of("ln_final.hook_out", self.model.layers), self.model.unembedding()
        if head is None:
            d_MD = self.invariant.written(source, latents_M, Reading(final.point, W_VD[:0], True))
        else:
            self.invariant.check(head)
            d_MD = self.invariant.written(source, latents_M, Reading(2 * head[0], W_VD[:0], True))
            d_MD = None if d_MD is None else self.invariant.through(d_MD, head)
        if d_MD is None:
            return W_VD.new_zeros(len(W_VD))
        effect_V = W_VD @ self.invariant.norms[final.point].linear(d_MD)[0]
        return effect_V - effect_V.mean()

    def tokens(self, weights_V: Tensor, count: int = 10) -> tuple[list[TokenWeight], list[TokenWeight]]:
        """The tokens with the largest weights, and with the smallest, strongest first; only those above and below 0."""
        self._check_count(count)

        def first(sign: int) -> list[TokenWeight]:
            values, tokens = (sign * weights_V[: len(self.lm.token_strings)]).topk(min(count, len(self.lm.token_strings)))
            pairs = zip(tokens.tolist(), values.tolist(), strict=True)
            return [TokenWeight(t, self.lm.token_strings[t], sign * value) for t, value in pairs if value > 0]

        return first(1), first(-1)

    # --- parts of the answers ---

    def _reading(self, part: Part, latents_M: Tensor, head: Head | None) -> Reading:
        reading = self.invariant.reading(part, latents_M)
        return self.invariant.behind(reading, part.place, head, self.model.names[part.number])

    def _target(self, target: Target, head: Head | None) -> tuple[Reading, Part | None, int]:
        if not isinstance(target, str):
            target = replace(target, position=-1)
        (row,) = rows_of(self.model, [target])
        if row.place is None:
            part = self.model.parts[row.part]
            latents_M = torch.tensor([row.latent], device=self.lm.device)
            return self._reading(part, latents_M, head), part, row.latent
        assert row.vector_D is not None
        reading = Reading(row.place.point, row.vector_D[None], row.place.kind == "input")
        return self.invariant.behind(reading, row.place, head, row.label), None, -1

    def _all(self, part: Part, reading: Reading) -> Tensor | None:
        """c of every latent of a part with one reader: [F]."""
        u_D, found = self.invariant.pulled(reading)[0], []
        for latents_M in _blocks(len(part.W_read_FD), len(u_D), self.lm.device):
            d_MD = self.invariant.written(part, latents_M, reading)
            if d_MD is None:
                return None
            found.append(d_MD @ u_D)
        return torch.cat(found)

    def _top(self, part: Part, weights_F: Tensor, activity_F: Tensor | None, count: int) -> list[Connection]:
        scores_F = weights_F if activity_F is None else weights_F * activity_F
        order = scores_F.abs().topk(min(count, len(scores_F))).indices
        order = order[scores_F[order] != 0]
        activities = [1.0] * len(order) if activity_F is None else activity_F[order].tolist()
        chosen = zip((part.first + order).tolist(), weights_F[order].tolist(), activities, strict=True)
        return [Connection(self.model.names[part.number], *row) for row in chosen]

    # --- names ---

    def _parts(self, dictionary: str | int) -> list[Part]:
        number = dictionary_number(self.model, dictionary)
        return sorted((part for part in self.model.parts if part.number == number), key=lambda part: part.first)

    def _found(self, dictionary: str | int, latents: Sequence[int]) -> list[tuple[Part, Tensor, Tensor]]:
        """Latents by part: the part, which of those given are its, and their numbers counted from its first."""
        given_M = torch.as_tensor(list(latents), dtype=torch.int64, device=self.lm.device)
        parts, found = self._parts(dictionary), []
        d_sae = sum(len(part.W_read_FD) for part in parts)
        if unknown := [latent for latent in given_M.tolist() if not 0 <= latent < d_sae]:
            name = self.model.names[parts[0].number]
            raise UserError(f"latent {unknown[0]} is not one of the {d_sae:,} of {name}, counted from 0")
        for part in parts:
            mine_M = ((given_M >= part.first) & (given_M < part.first + len(part.W_read_FD))).nonzero()[:, 0]
            if len(mine_M):
                found.append((part, mine_M, given_M[mine_M] - part.first))
        return found

    def _together(self, codes: Codes | None, head: Head | None) -> CoActivity | None:
        if codes is not None and head is not None:
            raise UserError("codes say which latents are active at one token, not between those that a head joins: leave one out")
        return None if codes is None else CoActivity(self.model, codes)

    @staticmethod
    def _check_count(count: int) -> None:
        if count < 1:
            raise UserError(f"count={count} asks for nothing: use at least 1")


def _best(found: list[Connection], count: int) -> list[Connection]:
    return sorted(found, key=lambda connection: -abs(connection.score))[:count]


def _blocks(count: int, width: int, device: torch.device) -> Iterator[Tensor]:
    """Numbers below `count`, as many at a time as rows of `width` numbers fit into a block of memory."""
    step = max(1, BLOCK_BYTES // (4 * width))
    for start in range(0, count, step):
        yield torch.arange(start, min(count, start + step), device=device)


def _norm_site(point: int, layers: int) -> str:
    return "ln_final.hook_out" if point == 2 * layers else f"blocks.{point // 2}.ln{1 + point % 2}.hook_out"


def _any_prompt(lm: LanguageModel) -> list[int]:
    """The shortest that a local model takes; what it says is not used."""
    bos = lm.tokenizer.bos_token_id or 0
    return [bos, 1 if bos == 0 else 0]


def _embedding_factor(lm: LanguageModel, width: int) -> float:
    """What rows of the embedding are multiplied by where they enter the stream. Raises UserError where they do not enter as they are."""
    W_E_VD = lm.hf.get_input_embeddings().weight.detach()
    ids_B = torch.linspace(0, len(W_E_VD) - 1, min(8, len(W_E_VD))).long()
    site = "blocks.0.hook_resid_pre"
    entered_BD = lm.read(ids_B[:, None], [site])[site][:, 0].double()
    rows_BD = W_E_VD[ids_B.to(W_E_VD.device)].double()
    if rows_BD.shape[1] == width:
        entered_BD, rows_BD = entered_BD - entered_BD.mean(0), rows_BD - rows_BD.mean(0)  # what all positions get falls out
        factor = float((entered_BD * rows_BD).sum() / rows_BD.square().sum().clamp_min(1e-300))
        if (entered_BD - factor * rows_BD).norm() <= ADDED * entered_BD.norm():
            return factor
    raise UserError(
        f"the embedding of model {lm.name!r} enters the stream through more than a factor (a norm or a matrix): its latents cannot be read "
        "off by tokens"
    )

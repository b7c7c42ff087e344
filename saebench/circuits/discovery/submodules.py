"""The places of a feature circuit: what a dictionary's site holds on some examples, as latents and the rest, and what stands in for them.

At the site that dictionary u writes, y = sum_i f_i d_i + rest. The rest is the dictionary's biases, its linear bypass where it has one, and
its error; it is one node per position, the error node. Any dictionary that writes one site by one direction a latent is a submodule:
autoencoders of the stream or of attention heads, transcoders, Lorsa. Positions before `skip` are left as they are.
Shape suffixes: `B` examples, `S` positions, `s` positions from `skip` on, `R` rows (B * s of them), `D` width, `F` d_sae, `N` entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saebench.circuits.discovery.examples import Examples
from saebench.codes import SparseCodes
from saebench.dictionaries import Dictionary
from saebench.dictionaries.fit import check_model
from saebench.errors import UserError
from saebench.kernels.sparse_decode import gathered_dot, sparse_decode
from saebench.lm import LanguageModel

Patch = Literal["zero", "mean", "resample"]
Changes = dict[str, Callable[[Tensor], Tensor | None]]


@dataclass(frozen=True)
class State:
    """What a submodule holds: codes of R rows, and the rest of what is written there, of which `error_RD` is the dictionary's error."""

    codes: SparseCodes
    rest_RD: Tensor
    error_RD: Tensor


class Submodule:
    """A dictionary at the site that it writes."""

    def __init__(self, dictionary: Dictionary, lm: LanguageModel, skip: int):
        """Raises UserError where the dictionary does not fit the model, writes several sites, or its latents have no direction each."""
        check_model(dictionary, lm)
        if len(dictionary.config.writes) != 1:
            raise UserError(
                f"a {dictionary.config.architecture!r} dictionary that writes {' + '.join(dictionary.config.writes)} is several submodules "
                "at once: use dictionaries that write one site each, such as transcoders, Lorsa and autoencoders"
            )
        dictionary = dictionary.settled().to(lm.device)
        directions_FD = dictionary.directions
        if directions_FD is None:
            raise UserError(
                f"latents of {dictionary.config.architecture!r} do not write one direction each: use another dictionary"
            )
        self.dictionary, self.skip, self.site = dictionary, skip, dictionary.config.writes[0]
        self.reads, self.d_sae = dictionary.config.reads, dictionary.config.d_sae
        self.W_FD = directions_FD.float().contiguous()

    def written(self, codes: SparseCodes) -> Tensor:
        """sum_i f_i d_i: [R, D]."""
        return sparse_decode(codes, self.W_FD)

    def along(self, codes: SparseCodes, gradient_RD: Tensor) -> Tensor:
        """The gradient with respect to each listed latent, given that with respect to what is written: [N], flat."""
        return gathered_dot(codes.replaced(torch.ones_like(codes.values)), gradient_RD.contiguous(), self.W_FD).reshape(-1)

    def rows(self, value_BSD: Tensor) -> Tensor:
        """The positions that count: [R, D] float32."""
        return value_BSD[:, self.skip :].flatten(0, 1).float()

    def put(self, value_BSD: Tensor, added_RD: Tensor) -> Tensor:
        """What stands at the site, with something added at the positions that count."""
        added_BsD = added_RD.unflatten(0, (len(value_BSD), -1)).to(value_BSD.dtype)
        return torch.cat([value_BSD[:, : self.skip], value_BSD[:, self.skip :] + added_BsD], 1)

    def state(self, reads: Sequence[Tensor], y_BSD: Tensor) -> State:
        """From what stands at the sites it reads, [B, S, D] each, and at the one it writes; differentiable in both."""
        codes, y_hat_RD = self.dictionary.reconstruct_contexts(torch.cat([x.float() for x in reads], -1), self.skip)
        y_RD = self.rows(y_BSD)
        return State(codes, y_RD - self.written(codes), y_RD - y_hat_RD)


def submodules(lm: LanguageModel, dictionaries: Iterable[Dictionary], skip: int) -> list[Submodule]:
    """In the order in which the model computes what they write; of a layer group, one for each layer. Raises UserError for none, for two
    that write the same site, and for kinds that are no submodules."""
    found = [Submodule(part, lm, skip) for dictionary in dictionaries for part in dictionary.parts().values()]
    if not found:
        raise UserError("a feature circuit needs dictionaries, and none is given")
    sites = [sub.site for sub in found]
    if twice := [site for site in sites if sites.count(site) > 1]:
        raise UserError(f"two dictionaries write {twice[0]!r}: give one for each site")
    order = list(lm.read(torch.zeros(1, skip + 1, dtype=torch.int64), sites))
    return sorted(found, key=lambda sub: order.index(sub.site))


class Live:
    """What submodules read in the pass that runs, and their state when they write. `write` gets a submodule, its state and the value at
    its site, and returns what takes that value's place."""

    def __init__(self, subs: Sequence[Submodule], write: Callable[[Submodule, State, Tensor], Tensor | None]):
        self.subs, self.write = {sub.site: sub for sub in subs}, write
        self.running: dict[str, Tensor] = {}

    def changes(self) -> Changes:
        """For `LanguageModel.edit`."""
        sites = dict.fromkeys([site for sub in self.subs.values() for site in (*sub.reads, sub.site)])
        return {site: self._at(site) for site in sites}

    def _at(self, site: str) -> Callable[[Tensor], Tensor | None]:
        def at(value_BSD: Tensor) -> Tensor | None:
            self.running[site] = value_BSD
            if (sub := self.subs.get(site)) is None:
                return None
            if missing := [read for read in sub.reads if read not in self.running]:
                raise UserError(f"the dictionary of {site!r} reads {missing[0]!r}, which the model computes later")
            new_BSD = self.write(sub, sub.state([self.running[read] for read in sub.reads], value_BSD), value_BSD)
            if new_BSD is not None:
                self.running[site] = new_BSD
            return new_BSD

        return at


@torch.no_grad()
def states(lm: LanguageModel, subs: Sequence[Submodule], ids_BS: Tensor) -> dict[str, State]:
    """What every submodule holds while the model runs untouched, by site."""
    found: dict[str, State] = {}

    def keep(sub: Submodule, state: State, _value: Tensor) -> None:
        found[sub.site] = state

    with lm.edit(Live(subs, keep).changes()):
        lm.hf(ids_BS, use_cache=False)
    return found


# --- what stands in for a state ---


@dataclass(frozen=True)
class Mean:
    """Mean codes [P, F] and rest [P, D] of a submodule over examples; P is the number of positions that count, or 1 for all together."""

    codes_PF: Tensor
    rest_PD: Tensor

    def rows(self, examples: int, positions: int) -> tuple[SparseCodes, Tensor]:
        """As a state of so many examples: codes of R rows, rest [R, D]."""
        expand = lambda t: t.expand(positions, -1).expand(examples, -1, -1).flatten(0, 1)  # noqa: E731
        return SparseCodes.from_dense(expand(self.codes_PF)), expand(self.rest_PD)


def means(
    lm: LanguageModel, subs: Sequence[Submodule], examples: Examples, *, by_position: bool, batch_size: int
) -> dict[str, Mean]:
    """Means over the counterfactual prompts, or where there are none the prompts themselves, by site."""
    skip = subs[0].skip
    totals: dict[str, tuple[Tensor, Tensor]] = {}
    count_P: Tensor | int = 0
    for batch in examples.batches(batch_size):
        inside_Bs = batch.inside(skip)
        places = inside_Bs.shape[1] if by_position else 1
        place_R = (
            torch.arange(inside_Bs.shape[1], device=inside_Bs.device).expand_as(inside_Bs).flatten() if by_position else None
        )
        place_R = inside_Bs.new_zeros(inside_Bs.numel(), dtype=torch.int64) if place_R is None else place_R
        inside_R = inside_Bs.flatten()
        count_P = count_P + torch.bincount(place_R[inside_R], minlength=places)
        for site, state in states(lm, subs, batch.ids_BS if batch.patch_BS is None else batch.patch_BS).items():
            f_PF, r_PD = totals.get(site) or (
                torch.zeros(places, state.codes.d_sae, device=lm.device),
                torch.zeros(places, state.rest_RD.shape[1], device=lm.device),
            )
            rows_N, latents_N, values_N = state.codes.nonzero()
            f_PF.index_put_((place_R[rows_N], latents_N), values_N * inside_R[rows_N], accumulate=True)
            r_PD.index_add_(0, place_R[inside_R], state.rest_RD[inside_R])
            totals[site] = f_PF, r_PD
    per = torch.as_tensor(count_P).clamp_min(1)[:, None]
    return {site: Mean(f_PF / per, r_PD / per) for site, (f_PF, r_PD) in totals.items()}


@dataclass(frozen=True)
class Delta:
    """What a patch changes in a submodule, patch less clean: entries of latents active in either, and the rest [R, D]."""

    clean: State
    codes: SparseCodes
    rest_RD: Tensor

    def written(self, sub: Submodule) -> Tensor:
        """All of it, as a change of what stands at the site: [R, D]."""
        return sub.written(self.codes) + self.rest_RD


def delta(clean: State, patch: tuple[SparseCodes, Tensor] | None) -> Delta:
    """Against codes and a rest, or for None against zero: no latent, and no error; biases and bypass stay."""
    if patch is None:
        rows_N, latents_N, values_N = clean.codes.nonzero()
        codes = SparseCodes.ragged(rows_N, latents_N, -values_N, len(clean.codes), clean.codes.d_sae)
        return Delta(clean, codes, -clean.error_RD)
    d_sae, keys, values = clean.codes.d_sae, [], []
    for codes, sign in ((clean.codes, -1.0), (patch[0], 1.0)):
        rows_N, latents_N, values_N = codes.nonzero()
        keys.append(rows_N * d_sae + latents_N)
        values.append(sign * values_N)
    both_N, place_N = torch.cat(keys).unique(return_inverse=True)
    change_N = torch.zeros(len(both_N), device=both_N.device).index_add_(0, place_N, torch.cat(values))
    codes = SparseCodes.ragged(both_N // d_sae, both_N % d_sae, change_N, len(clean.codes), d_sae)
    return Delta(clean, codes, patch[1] - clean.rest_RD)

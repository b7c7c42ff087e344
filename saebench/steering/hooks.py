"""Edits on a running model: in every forward pass inside the block, with and without a key-value cache, and gone when it ends or raises.

Each site has one function, which applies the edits of that site in the order given; each acts on what the one before it left. A dictionary
reads what stands at its sites in the same pass. Where one writes a site before all that it reads is computed (a crosscoder's clamp), a pass
without any edit runs ahead and gives the readings; it reads the same cache, and what it added to it is taken back.
A dictionary that reads sequences (Lorsa) gets the inputs of all positions so far, which are kept here.
Shape suffixes: `B` texts, `S` positions of one pass, `D` width of a site, `T` tokens that are changed, `M` latents of an edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from saebench.dictionaries import Dictionary
from saebench.dictionaries.fit import check_model
from saebench.errors import UserError
from saebench.lm import LanguageModel
from saebench.steering.edits import Edit, latent_rows
from saebench.steering.positions import SKIP, after_token

Change = Callable[[Tensor, slice], Tensor]
"""From what stands at the positions of a slice [B, s, D] to what takes its place."""


@contextmanager
def steer(lm: LanguageModel, edits: Edit | Sequence[Edit]) -> Iterator[None]:
    """Apply edits while the block runs. Those of strength 0 are left out, so that nothing at all is hooked where all are.

    Raises UserError where a dictionary or a direction does not fit the model, before anything is hooked.
    """
    wanted = [edits] if isinstance(edits, Edit) else list(edits)
    for edit in wanted:
        check_edit(lm, edit)
    wanted = [edit for edit in wanted if edit.strength]
    if not wanted:
        yield
        return
    running = Pass(lm, wanted)
    with lm.edit(running.functions()):  # first, so that no other thread's pass runs with the hook
        before = lm.hf.base_model.register_forward_pre_hook(running.begin, with_kwargs=True)
        try:
            yield
        finally:
            before.remove()


def check_edit(lm: LanguageModel, edit: Edit) -> None:
    """Raises UserError where an edit does not fit the model."""
    if edit.dictionary is not None:
        check_model(edit.dictionary, lm)
    for site, vectors_ND in zip(edit.sites, edit.vectors, strict=False):
        if lm.width(site) != vectors_ND.shape[1]:
            raise UserError(
                f"a direction of {vectors_ND.shape[1]} numbers does not fit site {site!r}, which is {lm.width(site)} wide"
            )
    edit.positions.token_id(lm)


@dataclass
class _Reader:
    """A dictionary that latents are changed of: what it reads, kept as far as its codes need."""

    dictionary: Dictionary
    ahead: bool
    """Whether a pass has to run ahead because it writes before it has read."""
    history: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, site: str, value_BSD: Tensor, start: int) -> None:
        """Take what stands at a site that it reads."""
        if not self.dictionary.config.sequential:
            self.history[site] = value_BSD
            return
        size = start + value_BSD.shape[1]
        kept = self.history.get(site)
        if start and (kept is None or len(kept) != len(value_BSD)):
            raise UserError("the cache is of a text that was begun outside the block: begin the text inside it")
        if kept is None or start == 0 or kept.shape[1] < size:
            grown = value_BSD.new_empty(len(value_BSD), 2 * size, value_BSD.shape[2])
            if start and kept is not None:
                grown[:, :start] = kept[:, :start]
            self.history[site] = kept = grown
        kept[:, start:size] = value_BSD

    def inputs(self, part: slice, start: int, size: int) -> Tensor:
        """What it reads, side by side: of the positions of a slice [B, s, D], or of all positions so far for one that reads sequences."""
        sites = self.dictionary.config.reads
        if self.dictionary.config.sequential:
            return torch.cat([self.history[site][:, : start + size].float() for site in sites], -1)
        return torch.cat([self.history[site][:, part].float() for site in sites], -1)


class Pass:
    """The forward pass that runs: where in the text it is, what was read in it, and the functions of the sites."""

    def __init__(self, lm: LanguageModel, edits: list[Edit]):
        self.lm, self.edits = lm, edits
        self.start = self.size = 0
        self.off = False
        self.masks: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # by token: positions behind it in this pass, and texts that have had it
        self.tokens = {id(edit): edit.positions.token_id(lm) for edit in edits}
        self.after = sorted({token for token in self.tokens.values() if token is not None})
        self.readers: dict[int, _Reader] = {}
        for edit in edits:
            if edit.on_codes and edit.dictionary is not None:
                self.readers.setdefault(id(edit.dictionary), _Reader(edit.dictionary, _reads_late(lm, edit.dictionary)))
        self.ahead = any(reader.ahead for reader in self.readers.values())

    # --- the pass as a whole ---

    def begin(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before every forward pass: where it is in the text, and, if need be, a pass ahead."""
        if self.off:
            return
        cache = kwargs.get("past_key_values")
        ids_BS = args[0] if args else kwargs.get("input_ids")
        shape = (ids_BS if ids_BS is not None else kwargs["inputs_embeds"]).shape
        self.start, self.size = (cache.get_seq_length() if cache is not None else 0), shape[1]
        for token in self.after:
            if ids_BS is None:
                raise UserError("positions after a token need token ids: run the model on ids, not on embeddings")
            seen_B = self.masks[token][1] if self.start and token in self.masks else None
            self.masks[token] = after_token(ids_BS, token, seen_B)
        if self.ahead:
            self.off = True
            try:
                with self.lm.running_ahead():
                    module(*args, **kwargs)
                if cache is not None:
                    cache.crop(-self.size)
            finally:
                self.off = False

    def functions(self) -> dict[str, Callable[[Tensor], Tensor | None]]:
        """By site, for `LanguageModel.edit`."""
        changes: dict[str, list[tuple[Edit, Change]]] = {}
        for edit in self.edits:
            for number, site in enumerate(edit.sites):
                changes.setdefault(site, []).append((edit, self.change(edit, number)))
        reads = {site for reader in self.readers.values() for site in reader.dictionary.config.reads}
        return {site: partial(self.at_site, site, changes.get(site, [])) for site in dict.fromkeys([*reads, *changes])}

    def at_site(self, site: str, changes: list[tuple[Edit, Change]], value_BSD: Tensor) -> Tensor | None:
        """What a site's hook calls: keep what is read here, then apply the edits of the site."""
        self._keep(site, value_BSD, ahead=self.off)
        if self.off:
            return None
        result_BSD = value_BSD
        for edit, change in changes:
            part = edit.positions.part(self.start, self.size)
            if part is None:
                continue
            if result_BSD is not value_BSD:
                self._keep(site, result_BSD, ahead=False)
            whole = part.stop - part.start == self.size
            new_BsD = change(result_BSD if whole else result_BSD[:, part], part)
            token = self.tokens[id(edit)]
            if token is not None:
                behind_Bs = self.masks[token][0][:, part, None]
                new_BsD = torch.where(behind_Bs, new_BsD, result_BSD[:, part])
            if whole:
                result_BSD = new_BsD
            else:
                result_BSD = result_BSD.clone()
                result_BSD[:, part] = new_BsD
        return None if result_BSD is value_BSD else result_BSD

    def _keep(self, site: str, value_BSD: Tensor, ahead: bool) -> None:
        for reader in self.readers.values():
            if reader.ahead == ahead and site in reader.dictionary.config.reads:
                reader.keep(site, value_BSD, self.start)

    # --- one edit at one of its sites ---

    def change(self, edit: Edit, number: int) -> Change:
        """What an edit does at its site of that number."""
        if edit.on_codes:
            return self.change_of_codes(edit, number)
        rows_ND = edit.vectors[number].to(self.lm.device)
        if edit.how == "add":
            row_D = (edit.strength * edit.unit * rows_ND[0]).to(self.lm.hf.dtype)
            return lambda x_BsD, part: x_BsD + row_D
        if edit.how == "orthogonal":
            basis_DN = _basis(rows_ND)
            return lambda x_BsD, part: x_BsD - (edit.strength * (x_BsD.float() @ basis_DN) @ basis_DN.T).to(x_BsD.dtype)
        length = rows_ND[0].norm()
        u_D = rows_ND[0] / length if length > 0 else rows_ND[0]

        def to_value(x_BsD: Tensor, part: slice) -> Tensor:
            missing_Bs = edit.value - x_BsD.float() @ u_D
            if edit.how == "cap":
                missing_Bs = missing_Bs.clamp_max(0.0)
            return x_BsD + (edit.strength * missing_Bs[..., None] * u_D).to(x_BsD.dtype)

        return to_value

    def change_of_codes(self, edit: Edit, number: int) -> Change:
        dictionary = edit.dictionary
        assert dictionary is not None
        reader, widths = self.readers[id(dictionary)], dictionary.config.blocks_out
        dictionary.to(self.lm.device)
        latents_M = torch.tensor(edit.latents, device=self.lm.device)
        begin = list(accumulate(widths, initial=0))[number]
        rows_MD = latent_rows(dictionary, edit.latents)[:, begin : begin + widths[number]].contiguous()

        def apply(x_BsD: Tensor, part: slice) -> Tensor:
            read = reader.inputs(part, self.start, self.size)
            if dictionary.config.sequential:
                codes, y_hat = dictionary.reconstruct_contexts(read, 0)
                chosen = slice(self.start + part.start, self.start + part.stop)
                f_BsM = codes.columns(latents_M).view(*read.shape[:2], -1)[:, chosen]
                y_hat_BsD = y_hat.view(*read.shape[:2], -1)[:, chosen]
            else:
                flat_TD = read.flatten(0, 1)
                codes = dictionary.encode(flat_TD)
                f_BsM = codes.columns(latents_M).view(*read.shape[:2], -1)
                y_hat_BsD = None if edit.keep_error else dictionary.reconstruct(flat_TD, codes).view(*read.shape[:2], -1)
            added_BsD = edit.strength * (changed(edit, f_BsM) - f_BsM) @ rows_MD
            if not edit.keep_error:
                assert y_hat_BsD is not None
                return (y_hat_BsD[..., begin : begin + widths[number]] + added_BsD).to(x_BsD.dtype)
            return x_BsD + added_BsD.to(x_BsD.dtype)

        return apply


def changed(edit: Edit, f_TM: Tensor) -> Tensor:
    """The latents of an edit on codes as they are at full strength: [..., M]."""
    if edit.how == "scale":
        return edit.value * f_TM
    if edit.how == "swap":
        return f_TM.flip(-1)
    return torch.full_like(f_TM, edit.value if edit.how == "clamp" else 0.0)


def _basis(rows_ND: Tensor) -> Tensor:
    """An orthonormal basis of the span of some directions: [D, N'], without those that depend on others."""
    unit_ND = rows_ND / rows_ND.norm(dim=1, keepdim=True).clamp_min(1e-12)
    _, lengths, basis_ND = torch.linalg.svd(unit_ND, full_matrices=False)
    return basis_ND[lengths > 1e-5 * lengths.max()].T.contiguous()


def _reads_late(lm: LanguageModel, dictionary: Dictionary) -> bool:
    """Whether it writes a site before the model has computed all that it reads."""
    config = dictionary.config
    if len(config.sites) == 1:
        return False
    order = list(lm.read(torch.zeros(1, SKIP + 1, dtype=torch.int64), list(config.sites)))
    return min(order.index(site) for site in config.writes) < max(order.index(site) for site in config.reads)

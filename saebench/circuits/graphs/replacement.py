"""The local replacement model of a prompt (methods.md A3): the model, with its MLPs, attention layers or stream written by dictionaries,
as one linear map between active latents, errors, tokens and logits.

The model runs once. Scales of norms and attention patterns are held as they were, so that attention is linear by the way of its values;
what a dictionary replaces is the sum of what its active latents write, its bias, its linear bypass if it has one, and an error: what the
model wrote less all that. An MLP without a dictionary is error alone; attention without one stays, with its patterns held. A
dictionary of the stream cuts it: behind it there are its latents and its error. With BOS at position 0 no latent is active there, and what
layers write there, which is the same in every prompt, is a constant.

The model is written out, not traced by autograd: `run` goes forwards, `pull` backwards, and both are a few matrix products a layer.
Shape suffixes: `T` targets, `S` positions, `D` width, `N` active latents of a part, `V` vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from saebench.circuits.graphs.frozen import TOLERANCE, FrozenAttention, FrozenNorm
from saebench.circuits.graphs.parts import Part, Place, Write, parts_of
from saebench.dictionaries import Dictionary
from saebench.dictionaries.fit import check_model
from saebench.errors import UserError
from saebench.lm import LanguageModel
from saebench.lm.attention import attention_weights

Dictionaries = Sequence[Dictionary] | Mapping[str, Dictionary]


@dataclass
class Written:
    """What is written at one place: the sum of what `writers` write, an error and a constant."""

    place: Place
    writers: list[tuple[Part, Write]] = field(default_factory=list)
    error_SD: Tensor = field(default_factory=lambda: torch.zeros(0))
    constant_SD: Tensor = field(default_factory=lambda: torch.zeros(0))

    def latents(self, part: Part, write: Write, values_N: Tensor) -> Tensor:
        """What a part's latents write there with some values, by position: [S, D']."""
        return self.by_position(part.positions_N, values_N[:, None] * write.rows(part.latents_N))

    def by_position(self, positions_N: Tensor, rows_ND: Tensor) -> Tensor:
        return rows_ND.new_zeros(len(self.constant_SD), rows_ND.shape[1]).index_add_(0, positions_N, rows_ND)


@dataclass
class Streams:
    """The residual stream at every point, as what is there is read (`before`) and as it goes on (`after`, another where a dictionary of
    the stream writes): [S, D] each."""

    before: list[Tensor]
    after: list[Tensor]


class LocalModel:
    """Made by `local_model`."""

    def __init__(self, lm: LanguageModel, dictionaries: Dictionaries, prompt: str | Sequence[int]):
        named = dictionaries if isinstance(dictionaries, Mapping) else None
        listed = list(dictionaries.values()) if isinstance(dictionaries, Mapping) else list(dictionaries)
        if not listed:
            raise UserError(
                "no dictionary is given, so the graph would have no features: train transcoders of the model's MLPs, "
                'site = "blocks.N.mlp.hook_in" and target = "blocks.N.hook_mlp_out", and give them'
            )
        self.lm, self.dictionaries = lm, listed
        self.names = list(named) if named is not None else _names(listed)
        self.ids, self.prompt = prompt_ids(lm, prompt)
        self.first = 1 if self.ids[0] == lm.tokenizer.bos_token_id else 0
        """The first position at which latents are active and errors are errors."""
        for dictionary in listed:
            check_model(dictionary, lm)
            _check_before_norms(dictionary, lm)
        self.layers = lm.site_table.num_layers
        self.parts = [part for i, d in enumerate(listed) for part in parts_of(d.to(lm.device), i, self.layers)]
        self.parts.sort(key=lambda part: (part.place.point, part.place.kind not in ("stream", "input"), part.number))
        with torch.no_grad():
            self._read()
            self._activate()
            self._write()
            self._check()

    @property
    def size(self) -> int:
        return len(self.ids)

    # --- what the model does on the prompt ---

    def _read(self) -> None:
        lm, layers = self.lm, range(self.layers)
        names = ["blocks.0.hook_resid_pre", "ln_final.hook_out"]
        names += [
            f"blocks.{n}.{end}" for n in layers for end in ("ln1.hook_out", "hook_attn_out", "ln2.hook_out", "hook_mlp_out")
        ]
        names += [site for d in self.dictionaries for site in d.config.reads]
        if missing := [name for name in names if name not in lm.site_table.sites]:
            raise UserError(f"model {lm.name!r} has no site {missing[0]!r}: graphs are for models built as GPT-2 and Llama are")
        ids_BS = torch.tensor([self.ids])
        self.logits_V = lm.logits(ids_BS)[0, -1].float().clone()
        seen = {name: value[0].float().clone() for name, value in lm.read(ids_BS, list(dict.fromkeys(names))).items()}
        self.seen = seen
        self.stream = [seen["blocks.0.hook_resid_pre"]]
        self.norms: list[FrozenNorm] = []
        self.attention: list[FrozenAttention] = []
        for n in layers:
            for end, out in (("ln1.hook_out", "hook_attn_out"), ("ln2.hook_out", "hook_mlp_out")):
                self._norm(f"blocks.{n}.{end}")
                self.stream.append(self.stream[-1] + seen[f"blocks.{n}.{out}"])
            weights = attention_weights(lm, n)
            pattern_HSS = weights.pattern(seen[f"blocks.{n}.ln1.hook_out"][None])[0]
            self.attention.append(FrozenAttention(weights, pattern_HSS, self._post(n)))
        self._norm("ln_final.hook_out")

    def _post(self, layer: int) -> FrozenNorm | None:
        """The norm between a layer's attention and the stream, where there is one."""
        site, before = f"blocks.{layer}.ln1_post.hook_out", f"blocks.{layer}.attn.hook_out"
        if site not in self.lm.site_table.sites:
            return None
        read = self.lm.read(torch.tensor([self.ids]), [before])[before][0].float()
        module = self.lm.site(site).module(self.lm.hf)
        return FrozenNorm.of(module, read, self.seen[f"blocks.{layer}.hook_attn_out"], f"{site} of model {self.lm.name!r}")

    def _norm(self, site: str) -> None:
        where = f"{site} of model {self.lm.name!r}"
        self.norms.append(FrozenNorm.of(self.lm.site(site).module(self.lm.hf), self.stream[-1], self.seen[site], where))

    def stands_at(self, place: Place, stream: Sequence[Tensor]) -> Tensor:
        """What stands at a place, given the stream at the points: [S, D']."""
        r_SD = stream[place.point]
        if place.kind == "stream":
            return r_SD
        n_SD = self.norms[place.point](r_SD)
        if place.kind == "input":
            return n_SD
        attention = self.attention[place.point // 2]
        return attention.heads(n_SD, biases=True) if place.kind == "heads" else attention(n_SD)

    def _activate(self) -> None:
        for number, dictionary in enumerate(self.dictionaries):
            x_SD = torch.cat([self.seen[site] for site in dictionary.config.reads], 1)
            codes = dictionary.encode(x_SD[None] if dictionary.config.sequential else x_SD)
            mine = sorted((part for part in self.parts if part.number == number), key=lambda part: part.first)
            widths = [len(part.W_read_FD) for part in mine]
            for part, some in zip(mine, codes.split(widths) if len(mine) > 1 else [codes], strict=True):
                part.activate(some, self.seen[part.place.site], self.first)

    # --- the parts put together ---

    def _write(self) -> None:
        """Errors and constants of all that is replaced; by step, and by point for dictionaries of the stream."""
        self.steps: list[Written | None] = [None] * (2 * self.layers)
        self.cuts: list[Written | None] = [None] * (2 * self.layers + 1)
        for part in self.parts:
            for write in part.writes:
                where = self.cuts if write.place.kind == "stream" else self.steps
                known = where[write.place.point]
                if known is None:
                    known = where[write.place.point] = Written(write.place)
                elif {p.number for p, _ in known.writers} != {part.number}:
                    both = f"{self.names[known.writers[0][0].number]} and {self.names[part.number]}"
                    raise UserError(f"the dictionaries {both} both write {write.place.site}: leave one of them out")
                known.writers.append((part, write))
        for point in range(1, 2 * self.layers, 2):
            self.steps[point] = self.steps[point] or Written(Place(f"blocks.{point // 2}.hook_mlp_out", point, "written"))
        for written in self.replaced():
            if written.place.kind == "stream":
                out_SD = self.stream[written.place.point]
            elif written.place.kind == "heads":
                out_SD = self.stands_at(written.place, self.stream)
            else:
                out_SD = self.stream[written.place.point + 1] - self.stream[written.place.point]
            self._split(written, out_SD)

    def _split(self, written: Written, out_SD: Tensor) -> None:
        said_SD = torch.zeros_like(out_SD)
        constant_SD = torch.zeros_like(out_SD)
        written.constant_SD = constant_SD
        for part, write in written.writers:
            constant_SD += write.bias_D
            said_SD += written.latents(part, write, part.values_N)
            if part.W_skip_DD is not None:
                read, wrote = part.place, write.place
                if read.kind not in ("stream", "input") or read.point != wrote.point or wrote.kind != "written":
                    raise UserError(
                        f"{self.names[part.number]} has a bypass from {read.site} to {wrote.site}: graphs take one only from the input "
                        "of an MLP or attention to its output"
                    )
                read_SD = self.stands_at(part.place, self.stream)
                bias_D = self.norms[part.place.point].bias_D if part.place.kind == "input" else torch.zeros_like(read_SD[0])
                constant_SD += bias_D @ part.W_skip_DD
                said_SD += (read_SD - bias_D) @ part.W_skip_DD
        error_SD = out_SD - said_SD - constant_SD
        if self.first:
            error_SD[0], constant_SD[0] = 0.0, out_SD[0]
        written.error_SD = error_SD

    def replaced(self) -> list[Written]:
        """All that is written by dictionaries, or as error alone, from the first point to the last; at one point the stream's first."""
        places = [w for pair in zip(self.cuts, [*self.steps, None], strict=True) for w in pair]
        return [written for written in places if written is not None]

    def bypass(self, step: int, r_SD: Tensor) -> Tensor | None:
        """What a step does to the stream past nodes and constants: attention with its patterns held, or a linear bypass."""
        written = self.steps[step]
        if written is None:
            return self.attention[step // 2].linear(self.norms[step].linear(r_SD))
        for part, _ in written.writers:
            if part.W_skip_DD is not None:
                read_SD = self.norms[step].linear(r_SD) if part.place.kind == "input" else r_SD
                out_SD = read_SD @ part.W_skip_DD
                out_SD[: self.first] = 0.0
                return out_SD
        return None

    @cached_property
    def constants(self) -> list[Tensor]:
        """What every step adds to the stream whatever the nodes do: [S, D] each."""
        return [self._constant(step) for step in range(2 * self.layers)]

    def _constant(self, step: int) -> Tensor:
        written = self.steps[step]
        if written is None:
            return self.attention[step // 2](self.norms[step](torch.zeros_like(self.stream[0])))
        added_SD = self.to_stream(written.place, written.constant_SD)
        return added_SD + self.attention[step // 2].bias_SD if written.place.kind == "heads" else added_SD

    def to_stream(self, place: Place, written: Tensor) -> Tensor:
        """What is written at a place as what is added to the stream: for the heads, mixed."""
        return self.attention[place.point // 2].mixed(written) if place.kind == "heads" else written

    # --- forwards ---

    def run(
        self,
        values: Mapping[int, Tensor] | None = None,
        errors: Mapping[str, Tensor] | None = None,
        tokens_SD: Tensor | None = None,
        *,
        constants: bool = True,
    ) -> Streams:
        """The linear model with other values of the active latents of some parts, by number of the part [N], other errors by site [S, D'],
        or another stream at the start. Values of latents are given, not computed: every node acts by its direct paths alone."""
        values, errors = values or {}, errors or {}
        numbers = {id(part): i for i, part in enumerate(self.parts)}

        def total(written: Written) -> Tensor:
            out_SD = errors.get(written.place.site, written.error_SD)
            for part, write in written.writers:
                out_SD = out_SD + written.latents(part, write, values.get(numbers[id(part)], part.values_N))
            return out_SD

        r_SD = self.stream[0] if tokens_SD is None else tokens_SD
        streams = Streams([], [])
        for point in range(2 * self.layers + 1):
            streams.before.append(r_SD)
            cut = self.cuts[point]
            if cut is not None:
                r_SD = total(cut) + cut.constant_SD if constants else total(cut)
            streams.after.append(r_SD)
            if point == 2 * self.layers:
                break
            bypassed_SD, step = self.bypass(point, r_SD), self.steps[point]
            added = [] if bypassed_SD is None else [bypassed_SD]
            if step is not None:
                added.append(self.to_stream(step.place, total(step)))
            if constants:
                added.append(self.constants[point])
            r_SD = sum(added, start=r_SD)
        return streams

    def unembedding(self) -> tuple[Tensor, Tensor]:
        """[V, D] and its bias [V]."""
        head: Any = self.lm.hf.get_output_embeddings()
        W_VD = head.weight.detach().float()
        bias = getattr(head, "bias", None)
        return W_VD, W_VD.new_zeros(len(W_VD)) if bias is None else bias.detach().float()

    def logits(self, streams: Streams) -> Tensor:
        """Of all positions: [S, V]. Some models squash them by a tanh at the very end; targets are logits before that."""
        W_VD, b_V = self.unembedding()
        return self.squashed(self.norms[-1](streams.after[-1]) @ W_VD.T + b_V)

    def squashed(self, logits: Tensor) -> Tensor:
        bound = getattr(self.lm.hf.config, "final_logit_softcapping", None)
        return logits if bound is None else bound * (logits / bound).tanh()

    def _check(self) -> None:
        """Raises UserError where the linear model does not give the model's own logits."""
        found_V = self.logits(self.run())[-1]
        missed = float((found_V - self.logits_V).norm() / self.logits_V.norm().clamp_min(1e-30))
        if not missed < TOLERANCE:
            raise UserError(
                f"the linear model of {self.lm.name!r} gives other logits (off by {missed:.0%}): something between the residual stream and "
                "the logits is not linear, and graphs need that it is"
            )


def prompt_ids(lm: LanguageModel, prompt: str | Sequence[int]) -> tuple[list[int], str]:
    """Token ids of a prompt, behind BOS where the tokenizer has one, and its text. Raises UserError for an empty or too long prompt, and
    for ids that the model lacks."""
    if isinstance(prompt, str):
        ids, text = (lm.prompt_ids(prompt), prompt) if prompt else ([], prompt)
    else:
        ids = [int(i) for i in prompt]
        behind = ids[1:] if ids and ids[0] == lm.tokenizer.bos_token_id else ids
        text = lm.tokenizer.decode(behind)
    if len(ids) - (bool(ids) and ids[0] == lm.tokenizer.bos_token_id) < 1:
        raise UserError("the prompt is empty: give at least one token of text")
    rows = len(lm.hf.get_input_embeddings().weight)
    if unknown := [i for i in ids if not 0 <= i < rows]:
        raise UserError(f"token id {unknown[0]} is not in the model's vocabulary of {rows:,}")
    if lm.max_context is not None and len(ids) > lm.max_context:
        raise UserError(f"the prompt of {len(ids):,} tokens exceeds the model's {lm.max_context:,} positions: shorten it")
    return ids, text


def _check_before_norms(dictionary: Dictionary, lm: LanguageModel) -> None:
    """Raises UserError for a dictionary of a layer's output that passes a norm before it is added to the stream."""
    for site in dictionary.config.sites:
        found = re.fullmatch(r"blocks\.(\d+)\.(attn|mlp)\.hook_out", site)
        if found and f"blocks.{found[1]}.{'ln1' if found[2] == 'attn' else 'ln2'}_post.hook_out" in lm.site_table.sites:
            raise UserError(
                f"{site} is not what this model adds to the stream, a norm comes between: graphs need dictionaries of "
                f"blocks.{found[1]}.hook_{found[2]}_out"
            )


def _names(dictionaries: Sequence[Dictionary]) -> list[str]:
    """A name for each dictionary that is given without one: its default, numbered by layer or as it comes."""
    names: list[str] = []
    for dictionary in dictionaries:
        reads = dictionary.config.reads
        place = reads[0] if len(reads) == 1 else f"{len(reads)} sites" if reads else "?"
        name = f"{dictionary.config.architecture}@{place}"
        names.append(name if name not in names else f"{name}#{len(names)}")
    return names

"""Tasks whose circuits are known or can be found by ablating everything: a planted transformer, a model that sorts, induction.

Each comes with dictionaries for the latents of its circuit: the planted directions themselves, or TopK dictionaries of what all heads
gather (attn.hook_z), trained here in a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import saebench as sb
from evals.shared import HERE, activations
from evals.shared import lm as bundled
from saebench.activations import TensorSource
from saebench.circuits.discovery.examples import Examples
from saebench.circuits.discovery.tasks import induction_task, sorting_task
from saebench.errors import UserError
from saebench.synthetic import save_induction_transformer

TOKENS = 60_000  # that the dictionaries of the bundled model are trained on


@dataclass
class Task:
    """A model, examples of what it does, dictionaries, and what is known of the circuit."""

    name: str
    lm: sb.LanguageModel
    examples: Examples
    dictionaries: list[sb.Dictionary]
    keep_positions: bool = False
    skip: int = 1
    few: int = 8
    """Examples that latents are ablated on one by one."""
    heads_LH: Tensor | None = None
    edges: frozenset[tuple[str, str]] | None = None
    """Between heads, MLPs, input and logits, for the patch from counterfactual prompts."""
    nodes: frozenset[tuple[int, int, int]] | None = None
    """(number of the dictionary, position, latent)."""
    latent_edges: frozenset[tuple[int, int]] | None = None
    """(latent of the first dictionary, latent of the second) between which an edge leads."""


def planted(_data: Path | None, *, count: int = 8, length: int = 9, first: int = 2) -> Task:
    """Letters, one of which comes again: what followed it is right. In the counterfactual another letter stood there first."""
    directory = HERE / "results" / "acts" / "planted-induction"
    circuit = save_induction_transformer(directory, 26, max_context=24, seed=1)
    lm = sb.load_lm(directory, device="cpu")
    examples = induction_task(26, count, length, first)
    sites = ["blocks.0.hook_attn_out", "blocks.1.hook_attn_out"]
    dictionaries: list[sb.Dictionary] = []
    for site in sites:
        directions_FD = circuit.directions_at(site)
        sae = sb.ReLU(d_sae=len(directions_FD), d_in=directions_FD.shape[1], site=site, normalise="none", target_l0=4).build()
        with torch.no_grad():
            sae.W_enc_FD.copy_(directions_FD)
            sae.W_dec.copy_(directions_FD)
            sae.b_enc.fill_(-1e-3)
        dictionaries.append(sae.settled().requires_grad_(False))
    heads_LH = torch.zeros(2, 2, dtype=torch.bool)
    heads_LH[circuit.previous_token_head] = heads_LH[circuit.induction_head] = True
    before, answers = (examples.ids_BS[:, 1 + first] - 1).tolist(), (examples.answers_B - 1).tolist()
    place, end = first + 2, length + 1
    return Task(
        "planted",
        lm,
        examples,
        dictionaries,
        keep_positions=True,
        heads_LH=heads_LH,
        edges=frozenset({("input", "a0.h0<v>"), ("a0.h0", "a1.h1<k>"), ("a1.h1", "logits")}),
        nodes=frozenset({(0, place, latent) for latent in before} | {(1, end, latent) for latent in answers}),
        latent_edges=frozenset(zip(before, answers, strict=True)),
    )


def sorting(data: Path | None, *, count: int = 32, written: int = 2) -> Task:
    """Six letters of three and the first of them sorted: which comes next. In the counterfactual one letter differs, so that the same
    start is right and the next letter another."""
    directory = None if data is None else data / "gpt-nano-sort"
    if directory is None or not directory.is_dir():
        raise UserError("the model that sorts is not here: give the directory that holds gpt-nano-sort by --data")
    lm = sb.load_lm(directory, device="cpu")
    every = torch.cartesian_prod(*[torch.arange(3)] * 6)
    ids = torch.cat([every, every.sort(1).values[:, :5]], 1)
    sites = [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    read = {site: value.clone().flatten(0, 1) for site, value in lm.read(ids, sites).items()}
    training = sb.TrainConfig(num_tokens=200_000, batch_size=512, lr=3e-3)
    dictionaries = sb.train([sb.TopK(d_sae=128, k=8, site=site) for site in sites], TensorSource(read), training, lm=lm)
    return Task("sorting", lm, sorting_task(count, written), list(dictionaries), skip=0)


def induction(_data: Path | None) -> Task:
    """Random tokens, one of which comes again, for the bundled model."""
    lm = bundled()
    sites = [f"blocks.{layer}.attn.hook_z" for layer in range(lm.site_table.num_layers)]
    paths = [HERE / "results" / "acts" / f"discovery-{site}" for site in sites]
    if not all(path.exists() for path in paths):
        configs = [sb.TopK(d_sae=512, k=16, site=site) for site in sites]
        training = sb.TrainConfig(num_tokens=2 * TOKENS, batch_size=256, lr=3e-3)
        for sae, path in zip(sb.train(configs, activations(*sites, tokens=TOKENS), training, lm=lm), paths, strict=True):
            sae.save(path)
    examples = induction_task(lm.hf.config.vocab_size - 1, 8)
    return Task("induction", lm, examples, [sb.load(path) for path in paths], few=4)


TASKS: dict[str, Callable[[Path | None], Task]] = {"planted": planted, "sorting": sorting, "induction": induction}

"""Heads of a circuit from a few examples, without ablating anything (O'Neill and Bui 2024; methods.md T19).

What every head writes on positive examples (the task is there) and negative ones (it is not) is learnt by one small autoencoder; the code
of a head on an example is its strongest latent, an integer. A head whose codes on positives never occur on negatives takes part in what
tells the two apart: its score is the share of its codes on positives that negatives lack.

Heads are brought to equal length and each has its mean removed, so that a head's code says how its output varies, not which head it is.
Codes are those of the last position, as published, or of every position where prompts are alike position by position (`aligned`): then
heads count that differ at any one, as a previous-token head does where the token before differs.
Shape suffixes: `B` examples, `P` positive and `M` negative ones, `S` positions, `L` layers, `H` heads of a layer, `G` all heads, `E`
width of a head, `D` of the residual stream, `K` seeds, `N` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.circuits.discovery.examples import check_ids, prompt_rows
from saebench.dictionaries import Discrete
from saebench.dictionaries.discrete import DiscreteDictionary, edge_scores, equal_heads, head_scores
from saebench.errors import UserError
from saebench.lm import LanguageModel
from saebench.steering.positions import SKIP

STEPS = 300
BATCH = 1024
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class DiscreteCircuit:
    """Scores of heads, from 0 to 1, and of pairs of heads."""

    by_seed_KLH: Tensor
    """A head's score with each of several autoencoders, which differ in their random start."""
    edges_GG: Tensor
    """Share of positives on which both of two heads show codes that negatives lack, mean over seeds; heads layer by layer. Of aligned
    examples each at its best position, as what one head writes another may read further on."""
    positives: int
    negatives: int

    @property
    def scores_LH(self) -> Tensor:
        """The mean over seeds."""
        return self.by_seed_KLH.mean(0)

    @property
    def spread_LH(self) -> Tensor:
        """Standard deviation over seeds, how far a score depends on chance; 0 for one seed."""
        return self.by_seed_KLH.std(0, correction=0)

    def ranked(self) -> list[tuple[int, int, float]]:
        """(layer, head, score), highest score first."""
        heads = self.scores_LH.shape[1]
        order = self.scores_LH.flatten().argsort(descending=True, stable=True).tolist()
        return [(*divmod(i, heads), float(self.scores_LH.flatten()[i])) for i in order]


def discrete_circuit(
    lm: LanguageModel,
    positives: Sequence[str] | Tensor,
    negatives: Sequence[str] | Tensor,
    *,
    aligned: bool = False,
    d_sae: int = 256,
    seeds: int = 3,
) -> DiscreteCircuit:
    """Rank the attention heads of a model by what only positive examples bring out; 5 to 10 of each class are enough.

    Examples are texts, which may differ in length, or token ids [B, S]. One forward pass for each class, then an autoencoder of `d_sae`
    latents for every seed, trained for 300 steps. Their order does not matter. Raises UserError for a class without examples,
    `aligned` prompts of different length, and a model whose heads cannot be told apart.
    """
    if d_sae < 2 or seeds < 1:
        raise UserError(f"d_sae={d_sae} and seeds={seeds} make no dictionary: use at least 2 latents and 1 seed")
    outputs = [head_outputs(lm, *_rows(lm, texts, name)) for name, texts in (("positives", positives), ("negatives", negatives))]
    if aligned and len(torch.cat([ends_B for _, ends_B in outputs]).unique()) > 1:
        raise UserError("aligned examples must all have the same number of tokens: make them so, or leave aligned out")
    both = [_places(outputs_BSGD, ends_B, aligned) for outputs_BSGD, ends_B in outputs]
    counts = [len(part) for part in both]
    together_BSGD = torch.cat(both)
    flat_NGD = together_BSGD.flatten(0, 1)
    vectors_NGD = equal_heads(flat_NGD - flat_NGD.mean(0))
    layers = lm.site_table.num_layers
    scores, edges = [], []
    for seed in range(seeds):
        codes_BSG = train_codes(vectors_NGD.flatten(0, 1), d_sae, seed).codes_of(vectors_NGD).view(together_BSGD.shape[:3])
        positive_PSG, negative_MSG = codes_BSG.split(counts)
        places = range(codes_BSG.shape[1])
        found = torch.stack([head_scores(positive_PSG[:, s], negative_MSG[:, s]) for s in places]).mean(0)
        scores.append(found.view(layers, -1))
        between = edge_scores(positive_PSG.flatten(1), negative_MSG.flatten(1))  # of all positions and heads
        edges.append(between.unflatten(1, (len(places), -1)).unflatten(0, (len(places), -1)).amax((0, 2)))
    return DiscreteCircuit(torch.stack(scores).cpu(), torch.stack(edges).mean(0).cpu(), counts[0], counts[1])


def _rows(lm: LanguageModel, examples: Sequence[str] | Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Ids [B, S] and last positions [B], in an order that depends only on what the examples are, so that theirs changes nothing."""
    if len(examples) == 0:
        raise UserError(f"there are no {name}: give 5 to 10 examples of each class")
    if isinstance(examples, Tensor):
        if examples.ndim != 2:
            raise UserError(
                f"{name} are a tensor of shape {tuple(examples.shape)}: give token ids [examples, positions], or texts"
            )
        check_ids(lm, examples)
        ids_BS, ends_B = examples.to(lm.device), torch.full((len(examples),), examples.shape[1] - 1, device=lm.device)
    else:
        ids_BS, ends_B = prompt_rows(lm, examples)
    if int(ends_B.min()) < SKIP:
        raise UserError(f"one of the {name} has fewer than {SKIP + 1} tokens, BOS included: heads have nothing to attend to")
    order = sorted(range(len(ids_BS)), key=lambda row: ids_BS[row].tolist())
    return ids_BS[order], ends_B[order]


@torch.no_grad()
def head_outputs(lm: LanguageModel, ids_BS: Tensor, ends_B: Tensor) -> tuple[Tensor, Tensor]:
    """What every head adds to the residual stream, heads layer by layer: [B, S, G, D] float32, and the last positions passed through.
    Raises UserError where heads cannot be told apart."""
    sites = [f"blocks.{layer}.attn.hook_z" for layer in range(lm.site_table.num_layers)]
    heads = int(getattr(lm.hf.config, "num_attention_heads", 0))
    if not heads or lm.width(sites[0]) % heads:
        raise UserError(f"model {lm.name!r} has no attention heads that can be told apart at attn.hook_z")
    seen = lm.read(ids_BS, sites)
    parts = []
    for site in sites:
        project = lm.site(site).module(lm.hf)  # the output projection, which reads all heads side by side
        z_BSHE = seen[site].clone().unflatten(2, (heads, -1))
        alone = torch.eye(heads, dtype=z_BSHE.dtype, device=z_BSHE.device)[:, :, None]
        constant_D = project(torch.zeros_like(seen[site][:1, 0]))
        parts.append(torch.stack([project((z_BSHE * one).flatten(2)) - constant_D for one in alone], 2).float())
    return torch.cat(parts, 2), ends_B


def _places(outputs_BSGD: Tensor, ends_B: Tensor, aligned: bool) -> Tensor:
    """The positions that count: all but the first, or the last of each example."""
    if aligned:
        return outputs_BSGD[:, SKIP:]
    return outputs_BSGD[torch.arange(len(ends_B), device=ends_B.device), ends_B][:, None]


def train_codes(vectors_ND: Tensor, d_sae: int, seed: int) -> DiscreteDictionary:
    """The small autoencoder of some vectors: full batches of them up to 1,024, for 300 steps."""
    from saebench.activations import TensorSource
    from saebench.trainer import TrainConfig, train

    batch = min(BATCH, len(vectors_ND))
    training = TrainConfig(num_tokens=batch * STEPS, batch_size=batch, lr=LEARNING_RATE, seed=seed, log_every=STEPS)
    config = Discrete(d_sae=d_sae, target_l0=min(4.0, d_sae / 2))
    dictionary = train(config, TensorSource({"heads": vectors_ND}), training, device=str(vectors_ND.device))
    assert isinstance(dictionary, DiscreteDictionary)
    return dictionary

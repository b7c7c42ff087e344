"""A language model whose algorithm is known because its weights are written by hand: induction, and nothing else.

A two-layer GPT-2. Every vector it handles is a sum of a few unit directions from one orthonormal set: which token stands here,
at which position, which token stood before, what comes next. All directions are orthogonal to the all-ones vector and every sum
has a known length, so LayerNorm is a multiplication by a known number and nothing is approximate except the two softmaxes, whose
leak is below exp(-SHARPNESS / 2) per position.

    layer 0, head 0   position i attends to i - 1 and writes that token as `previous`
    layer 1, head 1   attends to the positions whose `previous` is the token here, and writes their tokens as `prediction`;
                      where there is none it rests on position 0, which writes nothing

The other two heads and both MLPs are zero. A context starts with the BOS token; BOS also separates documents and is never
`previous` nor `prediction`. Where a token occurred several times before, the prediction is the mean over its successors.

Shape suffixes: `B` contexts, `S` positions, `T` positions attended to, `V` characters, `W` vocabulary (BOS first, then the
characters), `D` width, `F` features at a site.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from saebench.codes import SparseCodes
from saebench.errors import UserError

ALPHABET = string.ascii_lowercase + string.ascii_uppercase + string.digits + string.punctuation
BOS = "<bos>"
SHARPNESS = 40.0  # how far an attended position's score stands above the others
CONFIDENCE = 12.0  # logit of a certain prediction above all other tokens
HEADS = 2

_AFTER_0 = ("token", "position", "previous")
_SITES = {
    "hook_embed": ("token",),
    "blocks.0.hook_resid_pre": ("token", "position"),
    "blocks.0.hook_attn_out": ("previous",),
    "blocks.0.hook_resid_mid": _AFTER_0,
    "blocks.0.hook_resid_post": _AFTER_0,
    "blocks.1.hook_resid_pre": _AFTER_0,
    "blocks.1.hook_attn_out": ("prediction",),
    "blocks.1.hook_resid_mid": (*_AFTER_0, "prediction"),
    "blocks.1.hook_resid_post": (*_AFTER_0, "prediction"),
}


@dataclass(frozen=True)
class InductionCircuit:
    """What the model of `induction_transformer` carries where.

    `directions` holds the unit rows of the four families of features: `token` [W, D], `position` [S, D], `previous` [V, D] and
    `prediction` [V, D]; the characters of the last two are those of token ids 1 to V. Heads are (layer, head).
    """

    directions: dict[str, Tensor]
    characters: str
    previous_token_head: tuple[int, int] = (0, 0)
    induction_head: tuple[int, int] = (1, 1)

    def families(self, site: str) -> tuple[str, ...]:
        """The families whose directions a site's activations are sums of. Raises UserError for a site of another kind."""
        if site not in _SITES:
            raise UserError(f"site {site!r} has no known features: use one of {', '.join(_SITES)}")
        return _SITES[site]

    def directions_at(self, site: str) -> Tensor:
        """The true dictionary of a site, family by family: [F, D]."""
        return torch.cat([self.directions[family] for family in self.families(site)])

    def names_at(self, site: str) -> list[str]:
        """A name for every row of `directions_at`, such as `previous a` or `position 3`."""
        labels = {"token": [BOS, *self.characters], "position": [str(i) for i in range(len(self.directions["position"]))]}
        return [f"{family} {label}" for family in self.families(site) for label in labels.get(family, self.characters)]

    def codes(self, ids_BS: Tensor, site: str) -> SparseCodes:
        """The true codes of a site for token ids, from the algorithm and not from the model: [B * S] tokens over the rows of
        `directions_at`. Raises UserError where a context does not begin with BOS."""
        if (ids_BS[:, 0] != 0).any():
            raise UserError("a context does not begin with the BOS token (id 0): put it there")
        vocabulary, positions = len(self.characters) + 1, torch.arange(ids_BS.shape[1])
        token_BSW = one_hot(ids_BS.long(), vocabulary).float()
        previous_BSW = torch.zeros_like(token_BSW)
        previous_BSW[:, 1:, 1:] = token_BSW[:, :-1, 1:]
        matches_BST = (token_BSW @ previous_BSW.mT).tril()
        shares_BST = matches_BST / matches_BST.sum(-1, keepdim=True).clamp_min(1)
        families = {
            "token": token_BSW,
            "position": one_hot(positions, len(self.directions["position"])).float().expand(len(ids_BS), -1, -1),
            "previous": previous_BSW[..., 1:],
            "prediction": (shares_BST @ token_BSW)[..., 1:],
        }
        return SparseCodes.from_dense(torch.cat([families[family] for family in self.families(site)], -1).flatten(0, 1))


def induction_transformer(num_characters: int = 26, *, max_context: int = 64, seed: int = 0) -> tuple[Any, InductionCircuit]:
    """Write the weights. Returns a `GPT2LMHeadModel` (float32, in evaluation mode) and what it carries where.

    `num_characters` is the vocabulary besides BOS, `max_context` the number of positions; `seed` rotates the directions, which
    are aligned with no coordinate. Raises UserError for sizes that are impossible.
    """
    if not 2 <= num_characters <= len(ALPHABET):
        raise UserError(f"num_characters={num_characters} is not between 2 and {len(ALPHABET)}")
    if max_context < 3:
        raise UserError(f"max_context={max_context} leaves no room for induction: use at least 3")
    import transformers

    vocabulary = num_characters + 1
    width = max(1 + vocabulary + max_context + 2 * num_characters, HEADS * max(max_context, vocabulary))
    width += width % HEADS
    size = width // HEADS  # of a head
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=max_context,
        n_embd=width,
        n_layer=2,
        n_head=HEADS,
        n_inner=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    circuit = InductionCircuit(_directions(width, vocabulary, max_context, seed), ALPHABET[:num_characters])
    token_WD, position_SD, previous_VD, prediction_VD = circuit.directions.values()
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)

    # What LayerNorm multiplies a sum of so many unit directions with.
    of_two, of_three, of_four = ((count / width + config.layer_norm_epsilon) ** -0.5 for count in (2, 3, 4))
    score = SHARPNESS * size**0.5  # attention divides by the root of the head's size
    base = model.transformer
    base.wte.weight.copy_(token_WD)
    base.wpe.weight.copy_(position_SD)

    head = _Head(base.h[0].attn, circuit.previous_token_head[1], size)
    head.query[:, : max_context - 1] = position_SD[1:].T * (score / of_two**2)
    head.key[:, : max_context - 1] = position_SD[:-1].T
    head.value[:, :num_characters] = token_WD[1:].T / of_two
    head.out[:num_characters] = previous_VD

    head = _Head(base.h[1].attn, circuit.induction_head[1], size)
    head.query[:, :num_characters] = token_WD[1:].T * (score / of_three**2)
    head.key[:, :num_characters] = previous_VD.T
    head.query_bias[-1] = score / of_two / 2  # every position looks for position 0, half as hard
    head.key[:, -1] = position_SD[0]
    head.value[:, :num_characters] = token_WD[1:].T / of_three
    head.out[:num_characters] = prediction_VD

    model.lm_head.weight[1:] = prediction_VD * (CONFIDENCE / of_four)
    return model, circuit


def save_induction_transformer(
    directory: str | Path, num_characters: int = 26, *, max_context: int = 64, seed: int = 0
) -> InductionCircuit:
    """Write the model and its tokenizer, one character per token, as a checkpoint directory that `load_lm` reads."""
    model, circuit = induction_transformer(num_characters, max_context=max_context, seed=seed)
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    vocabulary = {symbol: number for number, symbol in enumerate([BOS, *circuit.characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=BOS))  # no merges: one character, one token
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, unk_token=BOS).save_pretrained(directory)
    model.save_pretrained(directory)
    return circuit


class _Head:
    """Views of one head's part of the weights: `query`, `key`, `value` [D, size], `query_bias` [size] and `out` [size, D]."""

    def __init__(self, attention: Any, number: int, size: int):
        own = slice(number * size, (number + 1) * size)
        self.query, self.key, self.value = (part[:, own] for part in attention.c_attn.weight.data.chunk(3, 1))
        self.query_bias = attention.c_attn.bias.data[own]
        self.out = attention.c_proj.weight.data[own]


def _directions(width: int, vocabulary: int, positions: int, seed: int) -> dict[str, Tensor]:
    """Orthonormal rows, all orthogonal to the all-ones vector."""
    counts = {"token": vocabulary, "position": positions, "previous": vocabulary - 1, "prediction": vocabulary - 1}
    draw = torch.randn(width, 1 + sum(counts.values()), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draw[:, 0] = 1.0
    basis = torch.linalg.qr(draw).Q.T[1:].float()
    return dict(zip(counts, basis.split(list(counts.values())), strict=True))

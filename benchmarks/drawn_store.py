"""A feature store of any size without the time of encoding: a dictionary that draws its codes, over the bundled text repeated.

Densities are spread as those of trained dictionaries are, over three orders of magnitude; everything behind the encoder is the real thing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.activations.encoding import Encoded
from saebench.codes import SparseCodes
from saebench.dictionaries import TopK
from saebench.dictionaries.topk import TopKDictionary
from saebench.lm import Contexts, LanguageModel, builtin_text, pack

SITE = "blocks.2.hook_resid_post"
CONTEXT_SIZE = 128


class RepeatedText:
    """The bundled text as often as it takes; activations are the numbers of the contexts."""

    skip, ordered = 1, True

    def __init__(self, lm: LanguageModel, num_tokens: int):
        text = pack(builtin_text(), lm.tokenizer, CONTEXT_SIZE)
        self.num_contexts, self.context_size = max(1, num_tokens // CONTEXT_SIZE), CONTEXT_SIZE
        self.contexts: Contexts = text[torch.arange(self.num_contexts) % len(text)]
        self.widths = {SITE: lm.width(SITE)}
        self.identity = f"repeated-{self.num_contexts}"

    def check_sites(self, sites: list[str]) -> None:
        assert sites == [SITE]

    def fetch(self, contexts_N: Tensor, sites: list[str], out: dict | None = None) -> dict[str, Encoded]:
        return {SITE: Encoded(contexts_N[:, None, None].float().expand(-1, self.context_size, 1))}


class DrawnCodes(TopKDictionary):
    """Draws k latents a token, one from each of k groups, low numbers of a group far more often than high ones."""

    def encode_contexts(self, x_CSD: Tensor, skip: int = 1) -> SparseCodes:
        k, d_sae = self.config.k, self.config.d_sae
        tokens = len(x_CSD) * (x_CSD.shape[1] - skip)
        generator = torch.Generator().manual_seed(int(x_CSD[0, 0, 0]))
        group = d_sae // k
        places_BK = (torch.rand(tokens, k, generator=generator) ** 4 * group).long().clamp_max(group - 1)
        values_BK = torch.rand(tokens, k, generator=generator) ** 2 * 8 + 0.1
        return SparseCodes((places_BK * k + torch.arange(k)).int(), values_BK, d_sae)


def drawn_dictionary(lm: LanguageModel, d_sae: int, k: int = 32) -> DrawnCodes:
    """A dictionary with random weights whose codes are drawn. `k` divides `d_sae`."""
    config = TopK(d_sae=d_sae, k=k, d_in=lm.width(SITE), site=SITE, decoder="unit")
    dictionary = DrawnCodes(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for rows in (dictionary.W_enc_FD, dictionary.W_dec):
        rows.copy_(torch.nn.functional.normalize(torch.randn(rows.shape, generator=generator), dim=1))
    dictionary.folded = True
    return dictionary

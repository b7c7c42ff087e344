"""TopK sparse autoencoder with AuxK (Gao et al. 2024; methods.md T2): keeps the k largest pre-activations of every token.

Shape suffixes: `B` tokens, `D` d_in, `F` d_sae, `K` active latents.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.dictionaries.auxk import auxk_loss, default_k_aux
from saebench.dictionaries.base import Dictionary, KRule, Losses, register
from saebench.dictionaries.geometry import geometric_median, project_out, random_unit_rows, scale_to_unit
from saebench.kernels import encode_topk, sparse_decode


class TopK(KRule):
    """Configuration of a TopK sparse autoencoder."""

    architecture = "topk"

    k_aux: int | None = Field(default=None, gt=0)
    """Dead latents that reconstruct the residual in the auxiliary loss; default the power of two nearest d_in / 2."""
    aux_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of the auxiliary loss; 0 leaves it out."""

    @property
    def default_id(self) -> str:
        return f"topk-{self.d_sae}-k{self.k}"


@register(TopK)
class TopKDictionary(Dictionary):
    """z = (x - b_dec) W_enc + b_enc; f = ReLU(top k of z); x_hat = f W_dec + b_dec, decoder rows of unit length."""

    config: TopK

    def __init__(self, config: TopK):
        super().__init__(config)
        d_in, d_sae = config.d_in, config.d_sae
        assert d_in is not None
        self.W_enc_FD = nn.Parameter(torch.zeros(d_sae, d_in))  # by rows: the kernels gather and sum rows
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("variance", torch.ones(()))  # of the inputs per coordinate: makes the loss scale-free
        self.variance: Tensor
        self.k_aux = config.k_aux or default_k_aux(d_in)

    @property
    def W_enc(self) -> Tensor:
        """[d_in, d_sae]"""
        return self.W_enc_FD.T

    def encode(self, x_BD: Tensor) -> SparseCodes:
        return encode_topk(x_BD, self.W_enc_FD, self.b_enc, self.b_dec, self.config.k)

    def decode(self, codes: SparseCodes) -> Tensor:
        return sparse_decode(codes, self.W_dec) + self.b_dec

    @torch.no_grad()
    def initialise(self, sample_BD: Tensor, generator: torch.Generator) -> None:
        """Random unit decoder, tied encoder, b_dec at the geometric median; the encoder is scaled so that reconstructions of
        random unit vectors have unit length."""
        d_sae, d_in = self.W_dec.shape
        self.W_dec.copy_(random_unit_rows(d_sae, d_in, generator))
        self.W_enc_FD.copy_(self.W_dec)
        self.b_enc.zero_()
        self.b_dec.copy_(geometric_median(sample_BD))
        self.variance.copy_((sample_BD - sample_BD.mean(0)).square().mean())
        probe_BD = random_unit_rows(256, d_in, generator) + self.b_dec
        self.W_enc_FD /= (self(probe_BD) - self.b_dec).norm(dim=1).mean()

    def losses(self, x_BD: Tensor, dead_F: Tensor) -> Losses:
        """mean squared error / variance + aux_coefficient * AuxK."""
        codes = self.encode(x_BD)
        error_BD = self.decode(codes) - x_BD
        squared_error_B = error_BD.square().sum(1)
        reconstruction = squared_error_B.mean() / (x_BD.shape[1] * self.variance)
        aux = x_BD.new_zeros(())
        if self.config.aux_coefficient:
            aux = auxk_loss(x_BD, -error_BD.detach(), self.W_enc_FD, self.b_enc, self.b_dec, self.W_dec, dead_F, self.k_aux)
        total = reconstruction + self.config.aux_coefficient * aux
        return Losses(total, {"reconstruction": reconstruction.detach(), "auxk": aux.detach()}, codes, squared_error_B.detach())

    @torch.no_grad()
    def project_gradients(self) -> None:
        if self.W_dec.grad is not None:
            project_out(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def constrain(self) -> None:
        scale_to_unit(self.W_dec)

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """The decoder stays of unit length, so the latents take on the units of x: values and biases are divided by the scale."""
        self.b_enc /= scale
        self.b_dec /= scale
        self.variance /= scale**2

    def public_tensors(self) -> dict[str, Tensor]:
        return {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec, "variance": self.variance}

    @torch.no_grad()
    def load_public(self, tensors: dict[str, Tensor]) -> None:
        self.W_enc_FD.copy_(tensors["W_enc"].T)
        for name in ("W_dec", "b_enc", "b_dec", "variance"):
            getattr(self, name).copy_(tensors[name])

"""The metrics, defined once (methods.md 0.3). Sums over the whole evaluation set in float64, so that no figure depends on how the
tokens were cut into batches.

Shape suffixes: `B` tokens, `D` width of the site, `F` d_sae, `C` contexts, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.nearest_rows import nearest_rows

FORMULAS_VERSION = 1
NATS = ("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl_spliced", "kl_zero", "kl_mean")


@dataclass
class Reconstruction:
    """How well x_hat stands for x, summed up batch by batch."""

    width: int
    d_sae: int
    tokens: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict)

    def update(self, x_BD: Tensor, x_hat_BD: Tensor, codes: SparseCodes) -> None:
        """Add a batch of raw activations, their reconstructions and their codes."""
        x, y = x_BD.double(), x_hat_BD.double()
        error = x - y
        if not self._sums:
            self._shift_D = x.mean(0)  # sums are taken around it: no cancellation when the mean is large
        centred = x - self._shift_D
        lengths_x, lengths_y = x.norm(dim=1), y.norm(dim=1)
        news = {
            "error": error.square().sum(),
            "error_D": error.sum(0),
            "error_square_D": error.square().sum(0),
            "centred_D": centred.sum(0),
            "centred_square_D": centred.square().sum(0),
            "cosine": ((x * y).sum(1) / (lengths_x * lengths_y).clamp_min(1e-30)).sum(),
            "l2_ratio": (lengths_y / lengths_x.clamp_min(1e-30)).sum(),
            "y_square": y.square().sum(),
            "x_y": (x * y).sum(),
            "firings_F": codes.firings(),
            "l0": codes.l0().sum(),
        }
        for name, value in news.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self.tokens += len(x)

    def figures(self) -> dict[str, float]:
        """fvu, explained variance, its variance form, cosine, L2 ratio, relative reconstruction bias, L0, share of latents that
        never fired."""
        s, n = self._sums, self.tokens
        spread_D = s["centred_square_D"] - s["centred_D"].square() / n
        error_spread_D = s["error_square_D"] - s["error_D"].square() / n
        fvu = float(s["error"] / spread_D.sum())
        return {
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "explained_variance_of_residual": 1 - float(error_spread_D.sum() / spread_D.sum()),
            "mse": float(s["error"]) / (n * self.width),
            "cosine": float(s["cosine"]) / n,
            "l2_ratio": float(s["l2_ratio"]) / n,
            "relative_reconstruction_bias": float(s["y_square"] / s["x_y"]),
            "l0": float(s["l0"]) / n,
            "dead": float((s["firings_F"] == 0).double().mean()),
            "tokens": n,
        }

    def fvu_of(self, columns: slice) -> float:
        """FVU of some of the coordinates, such as one site of several."""
        s, n = self._sums, self.tokens
        spread_D = s["centred_square_D"] - s["centred_D"].square() / n
        return float(s["error_square_D"][columns].sum() / spread_D[columns].sum())

    @property
    def density_F(self) -> Tensor:
        """Share of tokens on which each latent fires: [F] float64."""
        return self._sums["firings_F"].double() / self.tokens


@dataclass
class SplicedLoss:
    """The model's loss with the reconstruction in place, per context so that intervals can be drawn. All in nats."""

    _rows: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in (*NATS, "tokens")})

    def update(self, targets_CS: Tensor, logits: dict[str, Tensor]) -> None:
        """Add contexts: `logits` has `clean`, `spliced`, `zero` and `mean`, each [C, S, V], for the tokens `targets` [C, S]."""
        clean = logits["clean"].float().log_softmax(-1)
        for name, values in logits.items():
            logp = clean if name == "clean" else values.float().log_softmax(-1)
            chosen = logp.gather(-1, targets_CS[..., None].long()).squeeze(-1)
            self._rows[f"ce_{name}"].append(-chosen.sum(1, dtype=torch.float64).cpu())
            if name != "clean":
                divergence = torch.nn.functional.kl_div(logp, clean, reduction="none", log_target=True).sum(-1)
                self._rows[f"kl_{name}"].append(divergence.sum(1, dtype=torch.float64).cpu())
        self._rows["tokens"].append(torch.full((len(targets_CS),), targets_CS.shape[1], dtype=torch.float64))

    def figures(self, weights_C: Tensor | None = None) -> dict[str, float]:
        """Means per token of the cross-entropies and divergences, and what of the damage of ablation is recovered; not clipped."""
        rows = {name: torch.cat(parts) for name, parts in self._rows.items()}
        weights = torch.ones_like(rows["tokens"]) if weights_C is None else weights_C
        tokens = float((rows["tokens"] * weights).sum())
        f = {name: float((rows[name] * weights).sum()) / tokens for name in NATS}
        f["ce_increase"] = f["ce_spliced"] - f["ce_clean"]
        for ablation in ("zero", "mean"):
            f[f"ce_recovered_{ablation}"] = recovered(f[f"ce_{ablation}"], f["ce_spliced"], f["ce_clean"])
            f[f"kl_recovered_{ablation}"] = recovered(f[f"kl_{ablation}"], f["kl_spliced"], 0.0)
        return f

    def intervals(self, samples: int = 500, seed: int = 0) -> dict[str, list[float]]:
        """95 % bootstrap intervals over contexts of every figure."""
        count = sum(len(part) for part in self._rows["tokens"])
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for _ in range(samples):
            picks = torch.randint(0, count, (count,), generator=generator)
            drawn.append(self.figures(torch.bincount(picks, minlength=count).double()))
        bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
        return {
            name: torch.quantile(torch.tensor([d[name] for d in drawn], dtype=torch.float64), bounds).tolist()
            for name in drawn[0]
        }


def recovered(ablated: float, spliced: float, clean: float) -> float:
    """(ablated - spliced) / (ablated - clean): 1 when splicing costs nothing, 0 when it is as bad as the ablation."""
    return (ablated - spliced) / (ablated - clean) if ablated != clean else float("nan")


def max_decoder_cosine(W_dec_FD: Tensor, block: int = 2048) -> Tensor:
    """For every latent the largest cosine of its decoder row with another's: [F]."""
    unit_FD = W_dec_FD / W_dec_FD.norm(dim=1, keepdim=True).clamp_min(1e-12)
    nearest_F, best_F = (found_F1[:, 0] for found_F1 in nearest_rows(unit_FD, 1))
    for alone_M in (nearest_F < 0).nonzero()[:, 0].split(block):  # no cosine is positive
        cosines_MF = unit_FD[alone_M] @ unit_FD.T
        cosines_MF[torch.arange(len(alone_M)), alone_M] = -torch.inf
        best_F[alone_M] = cosines_MF.amax(1)
    return best_F


def describe(figures: dict[str, Any]) -> str:
    """The main figures in one line, for people."""
    parts = (
        f"FVU {figures['fvu']:.4f}",
        f"L0 {figures['l0']:.1f}",
        f"dead {figures['dead']:.1%}",
        f"CE recovered {figures['ce_recovered_zero']:.4f} (zero), {figures['ce_recovered_mean']:.4f} (mean)",
        f"KL recovered {figures['kl_recovered_zero']:.4f}",
        f"loss {figures['ce_clean']:.4f} -> {figures['ce_spliced']:.4f}",
    )
    return "   ".join(parts)

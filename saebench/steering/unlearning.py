"""CRISP (Ashuach et al. 2025; methods.md I4): make a model forget a subject for good. The latents that the subject uses are
found, then a low-rank adapter is trained under which they fall silent. The result needs no dictionary when it is used (`adapters.py`).

    loss = (1 - beta) L_u + beta (L_r + gamma L_c)

    L_u  mean of the positive activations of the chosen latents on target text, averaged over dictionaries. Where a latent is active
         without the adapter, |alpha * mean of all pre-activations| is added to its own, with its gradient, so that it is pushed on when
         it has just fallen silent
    L_r  squared error of what the dictionaries read, with the adapter against without, on benign text
    L_c  the same of the last hidden state (behind the final norm), on coherence text

An activation counts where the rule keeps it, or kept it without the adapter, and where it exceeds its threshold after the shift.
For ReLU and thresholds this is the rule; for those that keep the k largest, latents are ranked before the shift. No gradient reaches a
dictionary, and nothing counts on the first token (BOS).
Shape suffixes: `S` positions of a text but the first, `D` width, `M` chosen latents, `F` d_sae.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from saebench.config import Config
from saebench.dictionaries import Dictionary, SparseAutoencoder
from saebench.dictionaries.fit import check_model
from saebench.dictionaries.gated import GatedDictionary
from saebench.errors import NotFinite, UserError
from saebench.features.prompts import text_pieces
from saebench.lm import LanguageModel
from saebench.progress import progress
from saebench.steering.activity import Activity, activity
from saebench.steering.adapters import (
    Adapter,
    adapter_tensors,
    detach,
    disabled,
    import_peft,
    inject,
    layer_of,
    parameters,
    projections,
)
from saebench.steering.chosen import Chosen
from saebench.steering.usage import relative_usage

SKIP = 1
NOTE_EVERY = 20


class CrispSettings(Config):
    """How latents are chosen and the adapter is trained. Defaults are those published, but for `lr`."""

    choose: Literal["crisp", "usage"] = "crisp"
    """By counts (methods.md I4), or by use relative to the benign texts (`usage.py`)."""
    count: int = Field(default=10, gt=0)
    """Latents of each dictionary."""
    ratio: float = Field(default=3.0, ge=0)
    """How many times as active a latent must be on the target, in sum; for `choose=crisp`."""
    alpha: float = Field(default=5.0, ge=0)
    """How far latents are pushed beyond falling silent; published: 5 for Gemma-2-2B, 30 for Llama-3.1-8B."""
    beta: float = Field(default=0.99, ge=0, le=1)
    """Weight of keeping everything else as it is."""
    gamma: float = Field(default=0.01, ge=0)
    """Weight of the last hidden state within it."""
    layers: tuple[int, ...] | None = None
    """Layers whose projections are changed; default all up to the deepest that a dictionary reads."""
    rank: int = Field(default=4, gt=0)
    """Rank of the change of each projection; it is scaled by 8 / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Of what the adapter reads, in training."""
    lr: float = Field(default=5e-4, gt=0)
    """Learning rate of AdamW (amsgrad); published for models of billions: 1e-5 to 4e-5. Measured on the bundled model with 120 short texts
    of import statements, activation that is gone and rise of the loss on held-out modules as they are: 3e-4 73 %, 0.5 %; 5e-4 89 %, 0.7 %;
    with 200 longer texts 3e-4 93 %, 1.6 %; 1e-3 99.9 %, 10 %."""
    epochs: int = Field(default=1, gt=0)
    """Passes through the target texts."""
    seed: int = 0
    """Of the first matrices, the order of texts and dropout."""


@dataclass(frozen=True)
class Unlearned:
    """What came of it. The model itself is as it was: `attached(lm, unlearned.adapter)` computes with the adapter."""

    adapter: Adapter
    chosen: tuple[Chosen, ...]
    """For each dictionary, in order."""
    losses: np.ndarray
    """L_u, L_r and L_c at every step: [steps, 3]."""
    seconds: float


def crisp_latents(target: Activity, benign: Activity, count: int = 10, pool: int = 10_000, ratio: float = 3.0) -> Chosen:
    """Rank by c_t - c_b, firings on the target less firings on benign text, keep the first `pool`, of those the ones with
    s_t / (s_b + 1) >= ratio, s being sums of activations, and take `count`.

    The published rule compares sets of one size. Here counts and sums of both are scaled to the tokens of the smaller one, so that the
    longer text does not win by its length; the 1 stands against sums in units of the dictionary. Scores are c_t - c_b. Raises UserError
    where no latent is left, and for activities of two dictionaries.
    """
    if len(target.firings_F) != len(benign.firings_F):
        raise UserError(
            f"target and benign are of {len(target.firings_F):,} and {len(benign.firings_F):,} latents: use one dictionary"
        )
    tokens = min(target.tokens, benign.tokens)
    part_t, part_b = tokens / max(1, target.tokens), tokens / max(1, benign.tokens)
    difference_F = part_t * target.firings_F - part_b * benign.firings_F
    ratio_F = part_t * target.sums_F / (part_b * benign.sums_F + 1)
    ranked = np.argsort(-difference_F, kind="stable")[:pool]
    kept = [int(latent) for latent in ranked if target.firings_F[latent] and ratio_F[latent] >= ratio][:count]
    return Chosen("crisp", tuple(kept), tuple(float(difference_F[latent]) for latent in kept))


def choose_latents(
    lm: LanguageModel, dictionaries: Sequence[Dictionary], target: Sequence[str], benign: Sequence[str], settings: CrispSettings
) -> tuple[Chosen, ...]:
    """The latents of each dictionary that stand for what is to be forgotten."""
    found = []
    for dictionary in dictionaries:
        used, kept = (activity(lm, dictionary, texts) for texts in (target, benign))
        if settings.choose == "usage":
            found.append(relative_usage(used, kept, count=settings.count))
        else:
            found.append(crisp_latents(used, kept, count=settings.count, ratio=settings.ratio))
    return tuple(found)


def unlearn(
    lm: LanguageModel,
    dictionaries: Dictionary | Sequence[Dictionary],
    target: Sequence[str],
    benign: Sequence[str],
    coherence: Sequence[str] | None = None,
    settings: CrispSettings | None = None,
) -> Unlearned:
    """Choose latents and train an adapter that silences them: one text piece of up to 128 tokens a step. `benign` is what stays known of
    related subjects, `coherence` any text, by default the benign one. The model is left as it was, also where training is interrupted.

    Raises UserError where a dictionary does not fit, no latent is found, a set of texts has fewer than two, or peft is missing.
    """
    import_peft()
    settings = settings or CrispSettings()
    dictionaries = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
    check_dictionaries(lm, dictionaries)
    sets = {"target": target, "benign": benign, "coherence": benign if coherence is None else coherence}
    for name, texts in sets.items():
        check_texts(name, texts)
    started = time.monotonic()
    with lm.edit({}):  # no other thread computes with an adapter in training
        chosen = choose_latents(lm, dictionaries, target, benign, settings)
        parts = [
            Suppressed(dictionary, chosen_one, settings.alpha, lm.device)
            for dictionary, chosen_one in zip(dictionaries, chosen, strict=True)
        ]
        pieces = [_pieces(lm, name, texts) for name, texts in sets.items()]
        config = lora_config(lm, dictionaries, settings)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(settings.seed)
                inject(lm, config)
                losses = _train(lm, parts, pieces, settings)
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in adapter_tensors(lm).items()}
        finally:
            detach(lm)
    trained = {
        "settings": settings.model_dump(mode="json"),
        "latents": [
            [dictionary.config.reads[0], list(one.latents)] for dictionary, one in zip(dictionaries, chosen, strict=True)
        ],
    }
    return Unlearned(Adapter(config, tensors, lm.fingerprint, trained), chosen, losses, time.monotonic() - started)


class Suppressed:
    """The chosen latents of one dictionary, as functions of what it reads."""

    def __init__(self, dictionary: Dictionary, chosen: Chosen, alpha: float, device: torch.device):
        assert isinstance(dictionary, SparseAutoencoder)
        self.dictionary, self.alpha, self.site = dictionary.to(device), alpha, dictionary.config.reads[0]
        self.latents_M = torch.tensor(chosen.latents, device=device)
        weights = dictionary.weights().held()
        self.W_MD, self.b_M = weights.W_enc_FD[self.latents_M].float(), weights.b_enc_F[self.latents_M].float()
        # the mean over latents of z is linear in x: no [S, F] matrix is needed
        self.mean_W_D, self.mean_b = weights.W_enc_FD.float().mean(0), weights.b_enc_F.float().mean()
        self.b_in_D = None if dictionary.b_in is None else dictionary.b_in.detach().float()
        threshold = getattr(dictionary, "threshold", torch.zeros((), device=device)).detach().clamp_min(0)
        self.threshold_M = threshold[self.latents_M] if threshold.ndim else threshold

    @torch.no_grad()
    def active(self, x_SD: Tensor) -> Tensor:
        """Where the rule keeps the chosen latents: [S, M]."""
        return self.dictionary.encode(x_SD).columns(self.latents_M) > 0

    def loss(self, x_SD: Tensor, active_before_SM: Tensor) -> Tensor:
        """L_u: the mean of the chosen latents' activations, shifted where they are active without the adapter; 0 where there is none."""
        centred_SD = x_SD if self.b_in_D is None else x_SD - self.b_in_D
        z_SM = centred_SD @ self.W_MD.T + self.b_M
        shift_S = (self.alpha * (centred_SD @ self.mean_W_D + self.mean_b)).abs()
        z_SM = z_SM + shift_S[:, None] * active_before_SM
        counted_SM = (active_before_SM | self.active(x_SD)) & (z_SM > self.threshold_M)
        return (z_SM * counted_SM).sum() / counted_SM.sum().clamp_min(1)


def _train(lm: LanguageModel, parts: list[Suppressed], pieces: list[list[Tensor]], settings: CrispSettings) -> np.ndarray:
    """Train the adapter in place. Returns L_u, L_r and L_c of every step: [steps, 3]."""
    trained = parameters(lm)
    optimiser = torch.optim.AdamW(trained, lr=settings.lr, amsgrad=True)
    lm.hf.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    for name, module in lm.hf.named_modules():
        module.training = "lora_dropout" in name  # the model's own dropout would be noise in what is compared
    target, benign, coherence = pieces
    sites = list(dict.fromkeys(part.site for part in parts))
    history: list[Tensor] = []
    with torch.enable_grad(), progress("unlearn", settings.epochs * len(target), "texts") as report:
        for _ in range(settings.epochs):
            for ids_1S in (target[i] for i in torch.randperm(len(target)).tolist()):
                ids_b, ids_c = (texts[int(torch.randint(len(texts), ()))] for texts in (benign, coherence))
                with torch.no_grad(), disabled(lm):
                    target_0, _ = hidden(lm, ids_1S, sites)
                    benign_0, _ = hidden(lm, ids_b, sites)
                    _, last_0 = hidden(lm, ids_c, [])
                target_1, _ = hidden(lm, ids_1S, sites)
                benign_1, _ = hidden(lm, ids_b, sites)
                _, last_1 = hidden(lm, ids_c, [])
                if unreached := [site for site in sites if not target_1[site].requires_grad]:
                    raise UserError(
                        f"no projection of the chosen layers comes before site {unreached[0]!r}: add an earlier layer"
                    )
                L_u = torch.stack([part.loss(target_1[part.site], part.active(target_0[part.site])) for part in parts]).mean()
                L_r = torch.stack([(benign_1[site] - benign_0[site]).square().mean() for site in sites]).mean()
                L_c = (last_1 - last_0).square().mean()
                loss = (1 - settings.beta) * L_u + settings.beta * (L_r + settings.gamma * L_c)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                history.append(torch.stack([L_u, L_r, L_c]).detach())
                report(1, _note(history) if len(history) % NOTE_EVERY == 0 else "")
    losses = torch.stack(history).double().cpu().numpy()
    if not np.isfinite(losses).all():
        raise NotFinite(f"the loss is not finite after step {int(np.isfinite(losses).all(1).sum())}: lower lr={settings.lr:g}")
    return losses


def _note(history: list[Tensor]) -> str:
    L_u, L_r, L_c = torch.stack(history[-NOTE_EVERY:]).mean(0).tolist()
    return f"target {L_u:.3g}, benign {L_r:.2g}, coherence {L_c:.2g}"


def hidden(lm: LanguageModel, ids_1S: Tensor, sites: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """What stands at some sites [S, D] each, and the last hidden state [S, D], without the first position; with a gradient where there is
    one."""
    seen: dict[str, Tensor] = {}
    with lm.edit({site: partial(seen.__setitem__, site) for site in sites}):
        last = lm.hf.base_model(ids_1S, use_cache=False).last_hidden_state
    return {site: seen[site][0, SKIP:].float() for site in sites}, last[0, SKIP:].float()


def lora_config(lm: LanguageModel, dictionaries: Sequence[Dictionary], settings: CrispSettings) -> object:
    """peft's configuration of an adapter on all projections of the layers."""
    last = lm.site_table.num_layers - 1
    deepest = [layer_of(dictionary.config.reads[0]) for dictionary in dictionaries]
    layers = settings.layers or range(max(last if layer is None else layer for layer in deepest) + 1)
    names, transposed = projections(lm, sorted(set(layers)))
    return import_peft().LoraConfig(
        r=settings.rank,
        lora_alpha=8,
        lora_dropout=settings.dropout,
        target_modules=names,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )


def check_dictionaries(lm: LanguageModel, dictionaries: Sequence[Dictionary]) -> None:
    """Raises UserError for dictionaries that cannot be used: of another model, of several sites, or whose pre-activations are not to be had
    token by token."""
    if not dictionaries:
        raise UserError("no dictionary is given: unlearning needs one at least, which says what is to fall silent")
    for dictionary in dictionaries:
        check_model(dictionary, lm)
        name = dictionary.config.architecture
        if not isinstance(dictionary, SparseAutoencoder) or isinstance(dictionary, GatedDictionary):
            raise UserError(
                f"a dictionary of architecture {name!r} has no pre-activations x W_enc + b_enc that its latents follow: "
                "use topk, batchtopk, jumprelu, relu or another of that family"
            )
        if len(dictionary.config.reads) > 1:
            raise UserError(f"a dictionary of {len(dictionary.config.reads)} sites cannot be used: give one for each site")
        if not dictionary.folded:
            raise UserError("the dictionary is still in training: save it and load it again")


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Raises UserError for a set of fewer than two texts."""
    if isinstance(texts, str) or len(texts) < 2:
        raise UserError(
            f"{name} is {'one text' if isinstance(texts, str) or texts else 'empty'}: give a list of several, tens at least"
        )


def _pieces(lm: LanguageModel, name: str, texts: Sequence[str]) -> list[Tensor]:
    pieces = [torch.tensor([ids], device=lm.device) for _, ids in text_pieces(lm, texts) if len(ids) > SKIP]
    if not pieces:
        raise UserError(f"the {name} texts have no tokens: give texts of a few words at least")
    return pieces

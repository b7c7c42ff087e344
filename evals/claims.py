"""What the papers claim, put to the test on the bundled model or on planted data, and reported as it comes out.

    python evals/claims.py                     # all; half an hour on two cores
    python evals/claims.py --only induction,transcoder

Run evals/architectures.py first: some claims are read off its results. Figures are kept in evals/results/claims.json, from which the
part of docs/architectures.md is written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import saebench as sb
from evals.architectures import builtin
from evals.page import PAGE, replace, values_of
from evals.shared import HERE, SEEDS, activations, architectures, differs, held_out, lm, timed, trained
from saebench.activations.angular import angular_distances
from saebench.evaluation.induction import head_induction_scores, induction_scores
from saebench.evaluation.metrics import Reconstruction
from saebench.evaluation.recovery import conditional_orthogonality, matched_cosine
from saebench.progress import say

RESULTS = HERE / "results" / "claims.json"
Rows = list[dict[str, Any]]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--only", default="", help="names, separated by commas")


def main() -> None:
    args = parser.parse_args()
    only = {name.strip() for name in args.only.split(",") if name.strip()}
    if unknown := only - set(CLAIMS):
        raise sb.UserError(f"--only {sorted(unknown)[0]!r} is no claim: they are {', '.join(CLAIMS)}")
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, (_, _, measure) in CLAIMS.items():
        if name in only or not (only or name in results):
            say(f"claim {name}")
            started = time.perf_counter()
            results[name] = measure()
            say(f"claim {name}: {time.perf_counter() - started:.0f} s")
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    parts = []
    for name, (title, claim, _) in CLAIMS.items():
        if name in results:
            parts.append(f"### {title}\n\nClaim: {claim}\n\n{table(results[name]['rows'])}\n\n{results[name]['verdict']}")
    PAGE.write_text(replace(PAGE.read_text(), "claims", "\n\n".join(parts)))


def table(rows: Rows) -> str:
    """Rows as a markdown table; a list of values becomes mean ± standard deviation over seeds."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    return "\n".join(lines + ["| " + " | ".join(shown(row[head]) for head in heads) + " |" for row in rows])


def shown(value: Any) -> str:
    if isinstance(value, list):
        spread = f" ± {statistics.stdev(value):.2g}" if len(value) > 1 else ""
        return f"{statistics.fmean(value):.4g}{spread}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def orthogonality() -> dict[str, Any]:
    results, plan = architectures(), tomllib.loads((HERE / "architectures.toml").read_text())
    rows: Rows = []
    figures = {
        "planted": ("recovered", "absorption", "composition", "max_decoder_cosine", "fvu"),
        "builtin": ("mean_max_decoder_cosine", "ce_recovered_zero", "fvu"),
    }
    said = []
    for data, names in figures.items():
        for figure in names:
            both = {name: values_of(results, data, name, plan[data]["l0s"][0], figure) for name in ("BatchTopK", "OrtSAE")}
            rows.append({"figure": f"{figure}, {data}", **both})
            said.append(f"{figure} on {data} data {differs(both['OrtSAE'], both['BatchTopK'])}")
    return {"rows": rows, "verdict": "Against BatchTopK, OrtSAE has: " + ", ".join(said) + "."}


def matching_pursuit() -> dict[str, Any]:
    """Trees of concepts, whose children are orthogonal to their parents; then fewer or more steps than in training."""
    truth = sb.PlantedDictionary(num_features=320, width=64, l0=8, tree_share=1.0, branching=4, depth=1, child_rate=0.4)
    x_eval, _ = truth.sample(16_384, seed=999)
    configs = {
        "MatchingPursuit": sb.MatchingPursuit(d_sae=320, steps=8),
        "TopK": sb.TopK(d_sae=320, k=8),
        "BatchTopK": sb.BatchTopK(d_sae=320, k=8),
    }
    found: dict[str, dict[str, list[float]]] = {name: {} for name in configs}
    for seed in range(SEEDS):
        source = sb.TensorSource({"planted": truth.sample(400_000, seed=seed)[0]})
        for name, sae in trained(configs, source, seed, num_tokens=400_000, batch_size=512).items():
            angles = conditional_orthogonality(
                sae.W_dec, truth.directions_FD, matched_cosine(sae.W_dec, truth.directions_FD), truth.parents_F
            )
            news = {
                "matched cosine": matched_cosine(sae.W_dec, truth.directions_FD).mean_matched_cosine,
                "parent-child cosine": angles["found"].parent_child,
                "unrelated cosine": angles["found"].unrelated,
            }
            for sparsity in (4, 8, 16):
                news[f"FVU at {sparsity}"] = fvu_at(sae, x_eval, sparsity)
            for key, value in news.items():
                found[name].setdefault(key, []).append(value)
    rows = [{"dictionary": name, **figures} for name, figures in found.items()]
    mp, topk = found["MatchingPursuit"], found["TopK"]
    said = (
        "Cosine of parents and children in matching pursuit's dictionary, against TopK's (truth: 0): "
        f"{differs(mp['parent-child cosine'], topk['parent-child cosine'])}. Error at twice the steps of training, against that at the "
        f"steps of training: {differs(mp['FVU at 16'], mp['FVU at 8'])}; the same of TopK and its k: "
        f"{differs(topk['FVU at 16'], topk['FVU at 8'])}."
    )
    return {"rows": rows, "verdict": said}


@torch.inference_mode()
def fvu_at(sae: Any, x_BD: torch.Tensor, sparsity: int) -> float:
    """FVU with another number of active latents than in training."""
    if isinstance(sae.config, sb.MatchingPursuit):
        codes = sae.encode(x_BD, steps=sparsity)
    elif "k" in type(sae.config).model_fields:
        other = sae.config.model_copy(
            update={"k": sparsity, **({"inference": "batch"} if hasattr(sae.config, "inference") else {})}
        )
        config, sae.config = sae.config, other
        codes = sae.encode(x_BD)
        sae.config = config
    quality = Reconstruction(x_BD.shape[1], sae.config.d_sae)
    quality.update(x_BD, sae.reconstruct(x_BD, codes), codes)
    return quality.figures()["fvu"]


def no_k() -> dict[str, Any]:
    """FVU of top-AFA beside TopK's and BatchTopK's with k the L0 that it chose."""
    results, plan = architectures(), tomllib.loads((HERE / "architectures.toml").read_text())
    settings = plan["builtin"]
    measured = {
        name: values_of(results, "builtin", "top-AFA", settings["l0s"][0], name) for name in ("l0", "fvu", "ce_recovered_zero")
    }
    k = round(statistics.fmean(measured["l0"]))
    configs = {rule.__name__: rule(d_sae=settings["d_sae"], k=k) for rule in (sb.TopK, sb.BatchTopK)}
    rows: Rows = [{"dictionary": "top-AFA", **measured}]
    measure, tokens = builtin(settings), settings["num_tokens"]
    for name, sae in trained(configs, measure.source(0, tokens), 0, num_tokens=tokens).items():
        figures = measure(sae)
        rows.append({"dictionary": f"{name}, k = {k}", **{key: figures[key] for key in measured}})
    ratio = statistics.fmean(measured["fvu"]) / min(row["fvu"] for row in rows[1:])
    return {
        "rows": rows,
        "verdict": (
            f"Without a k it chooses {k} active latents per token, and its FVU is {ratio:.2f} times that of the better rule with this k."
        ),
    }


def active_subspace() -> dict[str, Any]:
    """Dead latents of an SAE on attention outputs, many of them for a short run."""
    site = "blocks.3.hook_attn_out"
    source = activations(site)
    statistics_ = source.statistics(site)
    eigen = torch.linalg.eigvalsh(statistics_.covariance_DD).flip(0).clamp_min(0).cumsum(0)
    directions = int((eigen < 0.99 * eigen[-1]).sum()) + 1
    rows: Rows = []
    by: dict[str, dict[str, list[float]]] = {}
    for seed in range(SEEDS):
        configs = {
            f"{start}, {aux}": sb.TopK(d_sae=4096, k=32, initial_directions=start, aux_coefficient=coefficient)
            for start in ("random", "active_subspace")
            for aux, coefficient in (("no AuxK", 0.0), ("AuxK", 1 / 32))
        }
        for name, sae in trained(configs, source, seed).items():
            figures = sb.evaluate(sae, lm(), held_out())
            for key in ("dead", "fvu", "ce_recovered_mean"):
                by.setdefault(name, {}).setdefault(key, []).append(figures[key])
    rows = [{"first directions": name, **figures} for name, figures in by.items()]
    dead = {name: statistics.fmean(figures["dead"]) for name, figures in by.items()}
    return {
        "rows": rows,
        "verdict": (
            f"{directions} of {source.widths[site]} directions hold 99 % of the variance ({directions / source.widths[site]:.0%}). Without "
            f"AuxK, dead latents go from {dead['random, no AuxK']:.1%} to {dead['active_subspace, no AuxK']:.1%}; with AuxK from "
            f"{dead['random, AuxK']:.1%} to {dead['active_subspace, AuxK']:.1%}."
        ),
    }


def transcoder() -> dict[str, Any]:
    """A transcoder and an SAE at the same MLP, at the same k."""
    layer = 2
    read, write = f"blocks.{layer}.ln2.hook_out", f"blocks.{layer}.hook_mlp_out"
    source = activations(read, write)
    by: dict[str, dict[str, list[float]]] = {}
    for seed in range(SEEDS):
        configs = {
            "SAE on the MLP's output": sb.TopK(d_sae=2048, k=32, site=write),
            "transcoder": sb.Transcoder(d_sae=2048, k=32, site=read, target=write),
            "skip transcoder": sb.Transcoder(d_sae=2048, k=32, site=read, target=write, skip=True),
        }
        for name, dictionary in trained(configs, source, seed).items():
            figures = sb.evaluate(dictionary, lm(), held_out())
            for key in ("l0", "fvu", "ce_recovered_zero", "kl_recovered_zero", "dead"):
                by.setdefault(name, {}).setdefault(key, []).append(figures[key])
    sae = by["SAE on the MLP's output"]["ce_recovered_zero"]
    said = [f"the {name}'s is {differs(by[name]['ce_recovered_zero'], sae)}" for name in ("transcoder", "skip transcoder")]
    return {
        "rows": [{"dictionary": name, **figures} for name, figures in by.items()],
        "verdict": f"Faithfulness (CE recovered with the MLP replaced), against the SAE's at the same k: {', '.join(said)}.",
    }


def layer_groups() -> dict[str, Any]:
    """Four layers in two groups, against one SAE for each layer: training time, and quality at each layer."""
    sites = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]
    source = activations(*sites)
    distances = angular_distances(source, sites)
    groups = sb.layer_groups(source, sites, groups=2)
    own = [sb.TopK(d_sae=2048, k=32, site=site) for site in sites]
    common = [sb.LayerGroup(d_sae=2048, site=group, base={"architecture": "topk", "k": 32}) for group in groups]
    alone, seconds_alone = timed(lambda: [trained({"it": config}, source, 0)["it"] for config in own])
    shared, seconds_shared = timed(lambda: [trained({"it": config}, source, 0)["it"] for config in common])
    of_group = {site: part for dictionary in shared for site, part in dictionary.parts().items()}
    rows: Rows = []
    for sae, site in zip(alone, sites, strict=True):
        one, group = (sb.evaluate(dictionary, lm(), held_out()) for dictionary in (sae, of_group[site]))
        row: dict[str, Any] = {"layer": site}
        for key in ("fvu", "ce_recovered_zero"):
            row |= {f"{key}, own SAE": one[key], f"{key}, group's": group[key]}
        rows.append(row)
    worse = max(row["fvu, group's"] / row["fvu, own SAE"] for row in rows)
    names = "; ".join(" + ".join(site.split(".")[1] for site in group) for group in groups)
    return {
        "rows": rows,
        "verdict": (
            f"Angular distances of neighbours: {', '.join(f'{float(distances[i, i + 1]):.3f}' for i in range(3))}; the groups are layers "
            f"{names}. One SAE for each layer takes {seconds_alone / seconds_shared:.2f} times as long; FVU is at most {worse:.2f} "
            "times that of a layer's own SAE."
        ),
    }


def induction() -> dict[str, Any]:
    """Lorsa on the layer with the bundled model's induction head: do its heads attend where induction does?"""
    layer = 3
    read, write = f"blocks.{layer}.attn.hook_in", f"blocks.{layer}.hook_attn_out"
    host = head_induction_scores(lm())[layer]
    rows: Rows = [
        {"heads": f"the model's layer {layer}, head {head}", "induction attention": float(score)}
        for head, score in enumerate(host)
    ]
    source = activations(read, write, tokens=300_000)
    said = []
    for name, start in (("started from the model's queries and keys", "host"), ("started at random", "random")):
        config = sb.Lorsa(d_sae=512, k=16, site=read, target=write, initial=start)
        lorsa = trained({"lorsa": config}, source, 0, num_tokens=600_000, batch_size=1024, lr=None)["lorsa"]
        figures = sb.evaluate(lorsa, lm(), held_out())
        scores = induction_scores(lorsa, lm())
        best = scores.attention_F >= 0.5 * float(host.max())
        rows.append(
            {
                "heads": f"Lorsa, {name}",
                "induction attention": float(scores.attention_F.max()),
                "heads above half the model's best": f"{int(best.sum())} of {config.d_sae}",
                "their share of activity there": float(scores.weight_F[best].sum()),
                "FVU": figures["fvu"],
                "CE recovered": figures["ce_recovered_zero"],
                "dead": figures["dead"],
            }
        )
        said.append(
            f"{name}, the best Lorsa head puts {float(scores.attention_F.max()):.2f} of its attention on the place of induction"
        )
    heads = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{key: row.get(key, "") for key in heads} for row in rows]
    return {"rows": rows, "verdict": f"The model's best head puts {float(host.max()):.2f} there; " + "; ".join(said) + "."}


CLAIMS: dict[str, tuple[str, str, Callable[[], dict[str, Any]]]] = {
    "orthogonality": ("OrtSAE", "more distinct features, less absorption and composition.", orthogonality),
    "matching_pursuit": (
        "Matching pursuit",
        "hierarchical concepts come out conditionally orthogonal; sparsity can be changed after training.",
        matching_pursuit,
    ),
    "no_k": ("top-AFA", "no k to choose, on par with the best k.", no_k),
    "active_subspace": (
        "Active-subspace initialisation",
        "dead latents of SAEs on attention outputs fall from 87 % to below 1 %.",
        active_subspace,
    ),
    "layer_groups": ("Layer groups", "up to six times faster without compromising reconstruction.", layer_groups),
    "induction": ("Lorsa", "its heads find known behaviours, induction among them.", induction),
    "transcoder": ("Transcoder or SAE", "transcoders are at least as faithful as SAEs at equal sparsity.", transcoder),
}

if __name__ == "__main__":
    try:
        main()
    except sb.UserError as error:
        raise SystemExit(f"error: {error}") from None

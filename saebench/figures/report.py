"""The report of a run: one self-contained HTML page with its figures, curves, density and most characteristic features."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from saebench.features import Feature
from saebench.figures.plots import density_histogram, training_curves
from saebench.figures.tokens import headline, html_line
from saebench.files import replacing
from saebench.runs import Run
from saebench.trainer.logs import read_metrics

# key, heading, format, what it means
FIGURES = (
    ("fvu", "FVU", ".4f", "squared error as a share of the variance; 0 is perfect"),
    ("l0", "L0", ".1f", "active latents per token"),
    ("dead", "dead", ".1%", "latents that never fired on the held-out text"),
    ("ce_recovered_zero", "CE recovered", ".4f", "of the loss lost by zero ablation"),
    ("ce_recovered_mean", "CE recovered (mean)", ".4f", "of the loss lost by mean ablation"),
    ("kl_recovered_zero", "KL recovered", ".4f", "the same for the divergence of the predictions"),
    ("ce_increase", "loss increase", "+.4f", "nats per token when the reconstruction is spliced in"),
    ("cosine", "cosine", ".4f", "mean cosine of activation and reconstruction"),
    ("relative_reconstruction_bias", "bias gamma", ".4f", "1 is unbiased, less is shrinkage"),
)
RARE, MANY_DEAD = 1e-5, 0.1
STYLE = """
:root { color-scheme: light dark; --line: rgba(128,128,128,.3); --soft: rgba(128,128,128,.1); --dim: #7a7a7a; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } .dim { color: var(--dim); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: .75rem; margin: 1rem 0; }
.figure { background: var(--soft); border-radius: 8px; padding: .75rem 1rem; } .figure b { display: block; font-size: 1.4rem; }
.figure small { color: var(--dim); display: block; line-height: 1.3; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .75rem 1rem; min-width: 0; }
.card h3 { margin: 0; font-size: 1rem; } .card .tokens { font-family: ui-monospace, monospace; font-size: .8rem; color: var(--dim); }
pre { font: .85rem/1.7 ui-monospace, monospace; margin: .25rem 0; white-space: pre-wrap; overflow-wrap: anywhere; overflow: hidden; }
pre span { border-radius: 3px; } pre .focus { outline: 1px solid currentColor; } pre + .dim { font-size: .75rem; margin: 0 0 .4rem; }
table { border-collapse: collapse; } td { padding: .1rem 1rem .1rem 0; vertical-align: top; }
@media (max-width: 560px) { .cards { grid-template-columns: 1fr; } }
"""


def write_report(
    run: Run,
    evaluation: Mapping[str, Mapping[str, Any]],
    features: Mapping[str, Sequence[Feature]],
    text_of: Callable[[int], str],
) -> Path:
    """Write report.html into the run: figures and features by dictionary id, token text from `text_of`. Returns its path."""
    rows = read_metrics(run.path / "metrics.jsonl")
    sections = [f"<h1>{html.escape(run.record['name'])}</h1>", f'<p class="dim">{_provenance(run)}</p>']
    for name, figures in evaluation.items():
        sections.append(f"<h2>{html.escape(name)} at {html.escape(figures['site'])}</h2>")
        sections.append(_figures(figures))
        sections.append(f'<p class="dim">{html.escape(health(figures))}</p>')
        sections.append(_plot(density_histogram(figures["density"], figures["tokens"])))
        if shown := features.get(name):
            sections.append(f"<h2>{len(shown)} characteristic features</h2>")
            sections.append(
                '<p class="dim">Tokens are shaded by activation; hover for the value. The firing each line was picked for is outlined.</p>'
            )
            sections.append('<div class="cards">' + "".join(_card(feature, text_of) for feature in shown) + "</div>")
    if rows:
        sections += ["<h2>Training</h2>", _plot(training_curves(rows))]
    sections += ["<h2>How it was made</h2>", _facts(run)]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(run.record['name'])}: saebench report</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>{''.join(sections)}</body></html>\n"
    )
    path = run.path / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _plot(figure: Any) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})


def _figures(figures: Mapping[str, Any]) -> str:
    boxes = []
    intervals = figures.get("intervals_95", {})
    for key, heading, form, meaning in FIGURES:
        interval = f"<small>95 %: {intervals[key][0]:{form}} to {intervals[key][1]:{form}}</small>" if key in intervals else ""
        boxes.append(f'<div class="figure">{heading}<b>{figures[key]:{form}}</b><small>{meaning}</small>{interval}</div>')
    return f'<div class="figures">{"".join(boxes)}</div>'


def health(figures: Mapping[str, Any]) -> str:
    """Dead latents and gamma = ||mean|| / spread of what is read, in words, with what helps."""
    density = figures["density"]
    dead, rare = sum(d == 0 for d in density), sum(0 < d < RARE for d in density)
    tokens = f"{figures['tokens']:,} held-out tokens"
    text = f"{dead:,} of {len(density):,} latents never fired on {tokens}, {rare:,} on fewer than one in {1 / RARE:,.0f}."
    if gammas := figures.get("gamma"):
        text += f" gamma = ||mean|| / spread of the activations: {', '.join(f'{site} {gamma:.2f}' for site, gamma in gammas.items())}."
        if dead > MANY_DEAD * len(density):
            cure = (
                "centre = true"
                if max(gammas.values()) > 1
                else 'initial_directions = "active_subspace", or aux_coefficient above 0'
            )
            text += f" Many are dead: try {cure} in the recipe."
    return text


def _card(feature: Feature, text_of: Callable[[int], str]) -> str:
    lines = "".join(
        f'<pre>{html_line(example, feature.max_value, text_of)}</pre><p class="dim">{html.escape(example.document)}</p>'
        for example in feature.examples
    )
    facts = f"fires on {feature.density:.3%} of tokens, mean {feature.mean_value:.2f}, max {feature.max_value:.2f}"
    return (
        f'<div class="card"><h3>feature {feature.latent}</h3>'
        f'<div class="tokens">{html.escape(headline(feature, text_of))}</div><div class="dim">{facts}</div>{lines}</div>'
    )


def _provenance(run: Run) -> str:
    recipe = run.record["recipe"]
    model = html.escape(f"{recipe['model']['name']} ({run.record['model'].get('fingerprint', '?')})")
    return f"model {model}, text {html.escape(recipe['text']['source'])}, {recipe['training']['num_tokens']:,} training tokens"


def _facts(run: Run) -> str:
    record = run.record
    rows = {
        "started": record["started"],
        "seconds": ", ".join(f"{what} {seconds:,.0f}" for what, seconds in record["seconds"].items()),
        "activations": f"{record['activations'].get('tokens', 0):,} tokens, identity {record['activations'].get('identity', '?')}",
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    }
    cells = "".join(f"<tr><td class=dim>{name}</td><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{cells}</table>"

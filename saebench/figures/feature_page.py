"""One feature as one file: an HTML page that needs nothing else and no network, and its examples as a table.

Everything that is data is escaped; the page has no script.
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from saebench.features.examples import Example, ExampleGroup
from saebench.features.labelling.labels import Label
from saebench.features.store import Details, FeatureStore
from saebench.figures.features import position_rates, shade
from saebench.figures.plots import PALETTE
from saebench.figures.tokens import alone, html_example

STYLE = """
:root { color-scheme: light dark; --hot: 213, 94, 0; --cold: 0, 114, 178; --line: rgba(128,128,128,.3); --soft: rgba(128,128,128,.1); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h2 small, .dim { opacity: .7; font-weight: 400; font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: .6rem; margin: 1rem 0; }
.figures div { background: var(--soft); border-radius: 8px; padding: .5rem .8rem; } .figures b { display: block; font-size: 1.1rem; }
.figures small { opacity: .7; } .two { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 0 2rem; }
.row { display: grid; grid-template-columns: 4.2rem minmax(0, 1fr); gap: 0 .8rem; border-top: 1px solid var(--line); padding: .4rem 0; }
.row > b { text-align: right; font-variant-numeric: tabular-nums; } .row small { opacity: .65; font-size: .75rem; }
.sb-context { font: .85rem/1.75 ui-monospace, monospace; white-space: break-spaces; }
.sb-context i { font-style: normal; border-radius: 3px; position: relative; background: rgba(var(--hot), calc(.14 + .72 * var(--a))); }
.sb-context i.cold { background: rgba(var(--cold), calc(.14 + .72 * var(--a))); }
.sb-context i.focus { outline: 1.5px solid currentColor; }
.sb-context i:hover::after { content: "activation " attr(data-v) ", position " attr(data-p); position: absolute; left: 0; bottom: 1.7em;
  z-index: 1; white-space: pre; background: #1d2027; color: #f4f4f4; padding: .2rem .5rem; border-radius: 5px;
  font: .75rem system-ui, sans-serif; }
.chip { display: inline-block; border: 1px solid var(--line); border-radius: 1rem; padding: .05rem .55rem; margin: .12rem .1rem; }
.chip { font-size: .85rem; } .chip code { font-family: ui-monospace, monospace; white-space: pre; } .chip small { opacity: .7; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; opacity: .7; }
"""


def key_figures(store: FeatureStore, latent: int) -> list[tuple[str, str]]:
    """What is said of a latent in numbers: (name, value)."""
    row = {name: column[0] for name, column in store.latents.slice(latent, 1).to_pydict().items()}
    figures = [("fires on", f"{row['density']:.4%}"), ("firings", f"{row['count']:,}"), ("contexts", f"{row['contexts']:,}")]
    if row["count"]:
        figures += [
            ("largest value", f"{row['max']:.3f}"),
            ("mean value", f"{row['mean']:.3f}"),
            ("different tokens", f"{row['distinct_tokens']:,}"),
            ("share of top token", f"{row['top_token_share']:.1%}"),
        ]
    if row["min"] < 0:
        figures.append(("smallest value", f"{row['min']:.3f}"))
    return figures


def label_line(label: Label | None) -> str:
    """Where a label comes from and how good it is, in words."""
    if label is None:
        return "no label"
    source = {"own": "your label", "offline": "label from tokens and contexts", "endpoint": "label from an endpoint"}[
        label.source
    ]
    return source if label.score is None else f"{source}, score {label.score:.2f} on held-out contexts (0.5 is chance)"


def feature_page(
    store: FeatureStore,
    latent: int,
    *,
    name: str,
    examples: Sequence[Example],
    groups: Sequence[ExampleGroup],
    label: Label | None = None,
    note: str = "",
    labels: Mapping[int, str] | None = None,
) -> str:
    """The page of a feature; `name` says which run and dictionary it is of, `labels` what others are called."""
    details = store.details(latent)
    text_of = store.token_strings.__getitem__
    strongest = float(np.abs(details.edges).max())
    title = f"{latent}: {label.text}" if label else f"Feature {latent}"
    figures = "".join(
        f"<div><small>{html.escape(key)}</small><b>{html.escape(value)}</b></div>" for key, value in key_figures(store, latent)
    )
    model = f", model {store.config['model']}" if store.config["model"] else ""
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="dim">{html.escape(name)}, at {html.escape(", ".join(store.config["sites"]))}{html.escape(model)}, over '
        f"{store.num_tokens:,} tokens; {html.escape(label_line(label))}</p>",
        f'<p>{html.escape(note)}</p>' if note else "",
        f'<div class="figures">{figures}</div>',
    ]  # fmt: skip
    if details.histogram.sum():
        values = f"<h2>Activations <small>firings by value, logarithmic</small></h2>{_activations(details)}"
        places = f"<h2>Position in the context</h2>{_positions(details, store)}"
        parts.append(f'<div class="two"><div>{values}</div><div>{places}</div></div>')
    parts.append(f"<h2>Strongest contexts</h2>{_rows(examples, strongest, store)}")
    for group in groups:
        parts.append(f"<h2>{group.low:.3g} to {group.high:.3g} <small>{group.firings:,} firings</small></h2>")
        parts.append(_rows(group.examples, strongest, store))
    chips = lambda pairs: "".join(_chip(alone(text_of(token)), f"{figure:+.3f}") for token, figure in pairs)  # noqa: E731
    if details.promoted:
        parts.append(f'<div class="two"><div><h2>Promoted tokens</h2>{chips(details.promoted)}</div>'
                     f"<div><h2>Suppressed tokens</h2>{chips(details.suppressed)}</div></div>")  # fmt: skip
    parts.append(
        "<h2>Tokens it fires on</h2>" + "".join(_chip(alone(text_of(token)), f"{count:,}") for token, count, _ in details.tokens)
    )
    others = {
        "Writes nearly the same": [(other, f"cosine {cosine:.2f}") for other, cosine in details.neighbours],
        "Reads nearly the same": [(other, f"cosine {cosine:.2f}") for other, cosine in details.read_neighbours],
        "Fires together with": [(other, f"phi {phi:.2f}") for other, _, phi, _ in details.coactive],
    }
    for heading, pairs in others.items():
        if pairs:
            named = ((f"{other} {(labels or {}).get(other, '')}".strip(), aside) for other, aside in pairs)
            parts.append(f"<h2>{heading}</h2>" + "".join(_chip(text, aside, code=False) for text, aside in named))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _rows(examples: Iterable[Example], strongest: float, store: FeatureStore) -> str:
    rows = []
    for example in examples:
        line = html_example(example, strongest, store)
        document = html.escape(example.document)
        rows.append(
            f'<div class="row"><b>{example.values[example.focus]:.2f}</b><div>{line}<br><small>{document}</small></div></div>'
        )
    return "".join(rows)


def _chip(text: str, aside: str, code: bool = True) -> str:
    shown = f"<code>{html.escape(text)}</code>" if code else html.escape(text)
    return f'<span class="chip">{shown} <small>{html.escape(aside)}</small></span>'


def _activations(details: Details) -> str:
    middle = (details.edges[:-1] + details.edges[1:]) / 2
    largest = float(np.abs(details.edges).max()) or 1.0
    heights = np.log10(1 + details.histogram)
    says = [
        f"{low:.3g} to {high:.3g}: {count:,} firings"
        for low, high, count in zip(details.edges, details.edges[1:], details.histogram, strict=False)
    ]
    return _bars(
        heights,
        [shade(abs(float(value)) / largest) for value in middle],
        says,
        f"{details.edges[0]:.3g}",
        f"{details.edges[-1]:.3g}",
    )


def _positions(details: Details, store: FeatureStore) -> str:
    edges = store.position_edges()
    rates = position_rates(details, edges, store.num_contexts)
    says = [
        f"{low:.0f} to {high:.0f}: fires on {rate:.3%} of tokens"
        for low, high, rate in zip(edges, edges[1:], rates, strict=False)
    ]
    return _bars(rates, [PALETTE[0]] * len(rates), says, "0", f"{store.context_size - 1}")


def _bars(heights: np.ndarray, colours: Sequence[str], says: Sequence[str], left: str, right: str) -> str:
    """Bars as SVG, 500 by 120, with what each says when pointed at."""
    width, tallest = 500 / len(heights), float(heights.max()) or 1.0
    bars = "".join(
        f'<rect x="{i * width:.2f}" y="{110 - height:.2f}" width="{width * 0.94:.2f}" height="{height:.2f}" fill="{colour}">'
        f"<title>{html.escape(text)}</title></rect>"
        for i, (height, colour, text) in enumerate(zip((105 * heights / tallest).tolist(), colours, says, strict=True))
    )
    line = '<line x1="0" x2="500" y1="110.5" y2="110.5" stroke="currentColor" stroke-opacity=".4"/>'
    ends = "".join(
        f'<text x="{x}" y="126" font-size="12" text-anchor="{anchor}">{html.escape(text)}</text>'
        for x, anchor, text in ((0, "start", left), (500, "end", right))
    )
    return f'<svg viewBox="0 0 500 130" role="img">{bars}{line}{ends}</svg>'


CSV_HEADS = ("group", "value", "token_number", "context", "position", "document", "before", "token", "after")


def examples_csv(store: FeatureStore, groups: Mapping[str, Sequence[Example]]) -> str:
    """Examples as CSV, by the name of their group. Texts are JSON strings: white space is kept, and nothing is taken for a formula."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEADS)
    text_of = store.token_strings.__getitem__
    said = lambda ids: json.dumps("".join(map(text_of, ids)), ensure_ascii=False)  # noqa: E731
    for name, examples in groups.items():
        for example in examples:
            before, token, after = example.ids[: example.focus], example.ids[example.focus], example.ids[example.focus + 1 :]
            place = (
                example.token,
                example.context,
                example.token % store.context_size,
                json.dumps(example.document, ensure_ascii=False),
            )
            writer.writerow([name, f"{example.values[example.focus]:.6g}", *place, said(before), said([token]), said(after)])
    return out.getvalue()

"""Predicted against measured: what `verify` found about a graph, shown where the file holds it, and the button that measures it."""

from __future__ import annotations

import html

import address
import circuit_building
import layout
import streamlit as st
from circuit_files import Pruned
from circuit_nodes import Named
from opening import Opened

from saebench.commands.trace import VERIFIED
from saebench.errors import UserError
from saebench.figures.graph import node_name
from saebench.figures.graph_checks import HEADS, checks_table, effects_figure

MEANT = (
    f"Takes out the sources of the {VERIFIED} edges that carry most after the pruning above, one after the other, and compares what the "
    "graph foretells with what the model does."
)


def show(run: Opened, slug: str, pruned: Pruned, found: Named, nodes: float, edges: float) -> None:
    """The figure and the table, if there are any, and the button."""
    layout.heading("Predicted against measured", "each source taken out of the model itself")
    kept = pruned.whole.extra.get("verification")
    if kept:
        try:
            _kept(pruned, found, kept)
        except (UserError, KeyError, TypeError, IndexError) as error:
            said = (
                str(error)
                if isinstance(error, UserError)
                else "the verification that the graph holds is damaged: measure it again"
            )
            layout.problem(said)
    else:
        layout.empty("Not measured yet: no edge of this graph has been checked in the model.")
    label = "Measure again, pruned as above" if kept else "Measure"
    if circuit_building.busy(run):
        return
    if st.button(label, key="circuit-verify", icon=":material/fact_check:", help=MEANT):
        circuit_building.begin(run, slug, None, nodes=nodes, edges=edges)
        address.rerun()


def _kept(pruned: Pruned, found: Named, kept: dict) -> None:
    texts = {int(pruned.numbers[n]): text for n, text in found.names.items()}

    def name(number: int) -> str:
        if not 0 <= number < len(pruned.whole):
            return "a node that the graph lacks"
        return f"{node_name(pruned.whole, number, texts)} @ {pruned.whole.nodes.position_N[number]}"

    figure, rows = effects_figure(kept, name), checks_table(kept)
    left, right = st.columns([1.05, 1], gap="medium")
    with left:
        layout.plot(figure, key="circuit-effects")
    with right:
        cells = [[html.escape(row[head]).replace("   ", "&emsp;") for head in HEADS] for row in rows]
        layout.table(HEADS, cells, numbers=range(1, len(HEADS)))
        layout.show(
            '<span class="sb-dim">Spearman: rank correlation of predicted with measured. Calibration: measured per predicted; 1 where '
            "sizes are right too. Measured with the model's attention patterns held, as the graph has them, unless another thing is "
            "said.</span>"
        )

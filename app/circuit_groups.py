"""Supernodes of the graph on the page: found automatically, drawn as one node each, and edited. Edits are kept beside the graph."""

from __future__ import annotations

import html
from dataclasses import dataclass

import address
import circuit_files
import layout
import opening
import streamlit as st
from circuit_files import Pruned
from circuit_nodes import Named, chip_of
from opening import Opened

from saebench.circuits.graphs.graph import Graph
from saebench.circuits.graphs.graph_file import graph_path
from saebench.circuits.sets.groups import Supernodes
from saebench.circuits.sets.supernodes import load_supernodes, save_supernodes, supernodes, supernodes_path
from saebench.errors import UserError
from saebench.figures.graph_layout import GROUP

SAID = "circuit-groups-said"
LISTED, MEMBERS, LETTERS = 12, 5, 80
MEANT = (
    "Features that get the same from the same nodes, give the same to the same ones, and write alike are put together, by their edges at "
    "the default pruning and by their directions. Edits are kept beside the graph; rename, merge or remove what does not belong together."
)


@dataclass(frozen=True)
class Groups:
    """Supernodes in the numbers of the whole graph, and in those of the pruned one as far as it has them."""

    whole: Supernodes
    shown: Supernodes
    edited: bool


def of(run: Opened, slug: str, key: str, pruned: Pruned) -> Groups | None:
    """Those that are kept beside the graph, else automatic ones. None where they cannot be had, which is told."""
    path = graph_path(run.path, slug)
    try:
        kept = load_supernodes(path, pruned.whole)
        whole = kept if kept is not None else _automatic(key, run)
        return Groups(whole, whole.carried_over(pruned.whole, pruned.graph), kept is not None)
    except (UserError, OSError) as error:
        layout.problem(str(error))
        return None


@st.cache_resource(show_spinner="Grouping the nodes", max_entries=32)
def _automatic(key: str, _run: Opened) -> Supernodes:
    whole: Graph = circuit_files.graph(key)
    left, names = whole.prune(), {entry["name"] for entry in whole.dictionaries}
    written = {name: opening.dictionary(_run.entries[name]) for name in names if name in _run.entries}
    return supernodes(left, dictionaries=written if len(written) == len(names) else None).carried_over(left, whole)


# --- shown and edited ---


def show(run: Opened, slug: str, pruned: Pruned, found: Named, groups: Groups) -> None:
    """The list, and what can be done with it."""
    layout.heading("Supernodes", "edited" if groups.edited else "automatic")
    if problem := st.session_state.pop(SAID, ""):
        layout.problem(problem)
    shown = groups.shown
    if not len(shown):
        layout.empty("No two features of this graph are alike enough to be put together.")
    else:
        rows = []
        for group in shown.groups[:LISTED]:
            carried = sum(float(pruned.influence[n]) for n in group.members)
            chips = [chip_of(run, slug, pruned.graph, n, found.names) for n in group.members[:MEMBERS]]
            more = f" and {len(group.members) - MEMBERS} more" if len(group.members) > MEMBERS else ""
            link = layout.a(group.name, "circuit", run=run.name, graph=slug, node=f"{GROUP}/{group.name}", grouped=1)
            rows.append([link, f"{len(group.members)}", f"{carried:.3f}", f'<div class="sb-chips">{"".join(chips)}{more}</div>'])
        layout.table(("supernode", "nodes", "influence", ""), rows, numbers=(1, 2))
        if len(shown) > LISTED:
            layout.show(f'<span class="sb-dim">The {LISTED} of most influence, of {len(shown):,}.</span>')
    with st.expander("Edit supernodes", icon=":material/edit:"):
        _edit(run, slug, pruned, groups)
    layout.show(f'<span class="sb-dim">{html.escape(MEANT)}</span>')


def _edit(run: Opened, slug: str, pruned: Pruned, groups: Groups) -> None:
    """Changes are made to all supernodes, of nodes that pruning hides too."""
    names = groups.whole.names
    path = graph_path(run.path, slug)

    def change(make: object) -> None:
        try:
            save_supernodes(path, make(), pruned.whole)  # type: ignore[operator]
        except (UserError, OSError) as error:
            st.session_state[SAID] = str(error)

    def renamed() -> None:
        old, new = st.session_state["group-old"], st.session_state["group-new"]
        change(lambda: groups.whole.rename(old, new))
        if address.peek("node") == f"{GROUP}/{old}" and SAID not in st.session_state:
            address.put("node", f"{GROUP}/{new}", "")

    def merged() -> None:
        chosen, into = st.session_state["group-merged"], st.session_state["group-into"]
        change(lambda: groups.whole.merge(chosen, into.strip() or (chosen[0] if chosen else "")))

    def removed() -> None:
        gone = st.session_state["group-gone"]
        change(lambda: groups.whole.remove(gone))

    def moved() -> None:
        to = st.session_state["group-to"].strip()
        change(lambda: groups.whole.move(pruned.whole.find(address.peek("node")), to or None))

    def automatic() -> None:
        try:
            supernodes_path(path).unlink(missing_ok=True)
        except OSError as error:
            st.session_state[SAID] = f"the edits cannot be deleted: {error}"

    if names:
        with st.form("group-rename", border=False), _line():
            st.selectbox("Rename", names, key="group-old", width=300)
            st.text_input("to", key="group-new", max_chars=LETTERS, width=220)
            st.form_submit_button("Rename", on_click=renamed)
        with st.form("group-merge", border=False), _line():
            st.multiselect("Merge", names, key="group-merged", width=420)
            st.text_input("under the name", key="group-into", max_chars=LETTERS, width=220)
            st.form_submit_button("Merge", on_click=merged)
        with st.form("group-remove", border=False), _line():
            st.selectbox("Remove", names, key="group-gone", width=300)
            st.form_submit_button("Remove", on_click=removed)
    chosen = address.peek("node")
    if chosen and not chosen.startswith(f"{GROUP}/"):
        with st.form("group-move", border=False), _line():
            st.text_input(
                "Put the chosen node into",
                key="group-to",
                max_chars=LETTERS,
                width=300,
                help="A name, known or new; nothing takes it out.",
            )
            st.form_submit_button("Move", on_click=moved)
    if groups.edited:
        st.button("Discard the edits, back to the automatic ones", key="group-automatic", on_click=automatic)


def _line():  # type: ignore[no-untyped-def]
    return st.container(horizontal=True, vertical_alignment="bottom")

"""What supernodes are: groups of a graph's nodes under names, and how they are edited.

The value never changes; every edit gives another. Nodes in no group stand for themselves. Members are numbers of nodes of one graph, and
stay what they are only with it: `carried_over` takes them to another, such as the pruned one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from saebench.circuits.graphs.graph import Graph
from saebench.errors import UserError


@dataclass(frozen=True)
class Supernode:
    """One group."""

    name: str
    members: tuple[int, ...]
    """Numbers of nodes, ascending."""


@dataclass(frozen=True)
class Supernodes:
    """Groups of nodes. Raises UserError for a name that is empty or there twice, a group without members, and a node in two groups."""

    groups: tuple[Supernode, ...] = ()

    def __post_init__(self) -> None:
        ordered = tuple(replace(group, members=tuple(sorted(int(n) for n in group.members))) for group in self.groups)
        object.__setattr__(self, "groups", ordered)
        names: set[str] = set()
        taken: dict[int, str] = {}
        for group in self.groups:
            if not group.name.strip():
                raise UserError("a supernode's name is empty: give it one")
            if group.name in names:
                raise UserError(f"two supernodes are called {group.name!r}: give one another name")
            if not group.members:
                raise UserError(f"the supernode {group.name!r} has no node: remove it")
            names.add(group.name)
            for node in group.members:
                if node in taken:
                    raise UserError(f"node {node} is in the supernodes {taken[node]!r} and {group.name!r}: leave it in one")
                taken[node] = group.name

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> Supernode:
        """Raises UserError for an unknown name."""
        for group in self.groups:
            if group.name == name:
                return group
        raise UserError(f"there is no supernode {name!r}: there are {', '.join(repr(g.name) for g in self.groups) or 'none'}")

    @property
    def names(self) -> list[str]:
        return [group.name for group in self.groups]

    def as_dict(self) -> dict[str, list[int]]:
        """Members by name, as drawings take them."""
        return {group.name: list(group.members) for group in self.groups}

    def of(self, node: int) -> str | None:
        """The name of a node's group, None for a node in none."""
        return next((group.name for group in self.groups if node in group.members), None)

    # --- edits; each raises UserError for unknown groups and names that are taken ---

    def merge(self, names: Sequence[str], into: str) -> Supernodes:
        """Several groups as one, at the place of the first."""
        wanted = list(dict.fromkeys(names))
        groups = [self[name] for name in wanted]
        if len(groups) < 2:
            raise UserError(f"merging takes two supernodes at least, not {len(groups)}: name more")
        self._free(into, wanted)
        first = next(group.name for group in self.groups if group.name in wanted)
        merged = Supernode(into, tuple(n for group in groups for n in group.members))
        return Supernodes(tuple(merged if g.name == first else g for g in self.groups if g.name == first or g.name not in wanted))

    def rename(self, old: str, new: str) -> Supernodes:
        """The same groups, one under another name."""
        self._free(new, [self[old].name])
        return Supernodes(tuple(replace(group, name=new) if group.name == old else group for group in self.groups))

    def move(self, node: int, to: str | None) -> Supernodes:
        """A node in another group, which begins here where there is none of that name; None leaves the node in no group. A group that
        loses its last member is gone."""
        if node < 0:
            raise UserError(f"there is no node {node}: nodes are counted from 0")
        kept = [replace(group, members=tuple(n for n in group.members if n != node)) for group in self.groups]
        if to is not None and to not in self.names:
            kept.append(Supernode(to, ()))
        moved = [replace(group, members=(*group.members, node)) if group.name == to else group for group in kept]
        return Supernodes(tuple(group for group in moved if group.members))

    def split(self, name: str, members: Iterable[int], new: str) -> Supernodes:
        """Some members of a group as a group of their own, behind it."""
        group, apart = self[name], set(members)
        if wrong := sorted(apart.difference(group.members)):
            raise UserError(f"node {wrong[0]} is not in the supernode {name!r}: split off some of its members")
        if not apart or len(apart) == len(group.members):
            raise UserError(f"splitting {len(apart)} of the {len(group.members)} nodes of {name!r} leaves one part empty")
        self._free(new, [])
        parts = (
            replace(group, members=tuple(n for n in group.members if n not in apart)),
            Supernode(new, tuple(apart)),
        )
        return Supernodes(tuple(part for each in self.groups for part in (parts if each.name == name else (each,))))

    def remove(self, name: str) -> Supernodes:
        """Without a group; its nodes stand for themselves."""
        gone = self[name]
        return Supernodes(tuple(group for group in self.groups if group is not gone))

    def _free(self, name: str, own: Sequence[str]) -> None:
        if name in self.names and name not in own:
            raise UserError(f"there is a supernode {name!r} already: take another name, or merge the two")

    # --- with graphs ---

    def check(self, graph: Graph) -> None:
        """Raises UserError for nodes that the graph lacks."""
        for group in self.groups:
            if group.members[-1] >= len(graph) or group.members[0] < 0:
                wrong = group.members[-1] if group.members[0] >= 0 else group.members[0]
                raise UserError(f"the supernode {group.name!r} has node {wrong}, of {len(graph):,}: it is of another graph")

    def carried_over(self, graph: Graph, other: Graph) -> Supernodes:
        """The same groups of another graph of the prompt, such as the pruned one: nodes that it lacks are left out, and groups of which
        nothing is left."""
        self.check(graph)
        numbers = {other.id(n): n for n in range(len(other))}
        found = [
            Supernode(group.name, tuple(numbers[name] for n in group.members if (name := graph.id(n)) in numbers))
            for group in self.groups
        ]
        return Supernodes(tuple(group for group in found if group.members))

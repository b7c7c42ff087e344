"""Circuits: why the model wrote this token, as a graph of features of which every edge can be checked."""

from saebench.circuits.graphs.graph import KINDS, Graph, Node, Nodes
from saebench.circuits.graphs.graph_file import graph_path, load_graph, save_graph
from saebench.circuits.graphs.influence import Scores, prune, scores
from saebench.circuits.graphs.interventions import Intervention, intervene
from saebench.circuits.graphs.replacement import LocalModel
from saebench.circuits.graphs.targets import Difference, Direction, Feature, Logit
from saebench.circuits.graphs.tracing import trace
from saebench.circuits.graphs.verification import Agreement, EdgeCheck, NodeCheck, Verification, verify
from saebench.circuits.sets.graph_sets import GraphSet, difference
from saebench.circuits.sets.supernodes import Supernode, Supernodes, collapse, supernodes
from saebench.circuits.sets.tracing_many import trace_many
from saebench.circuits.weights.connections import Connection, Connections, TokenWeight
from saebench.circuits.weights.contributions import Contribution, Contributions, contributions
from saebench.circuits.weights.paths import Only, Path, Route, greedy_paths, routes

__all__ = [
    "trace",
    "trace_many",
    "Logit",
    "Difference",
    "Feature",
    "Direction",
    "Graph",
    "Nodes",
    "Node",
    "KINDS",
    "GraphSet",
    "difference",
    "Supernode",
    "Supernodes",
    "supernodes",
    "collapse",
    "Scores",
    "scores",
    "prune",
    "verify",
    "Verification",
    "EdgeCheck",
    "NodeCheck",
    "Agreement",
    "intervene",
    "Intervention",
    "LocalModel",
    "Connections",
    "Connection",
    "TokenWeight",
    "contributions",
    "Contributions",
    "Contribution",
    "greedy_paths",
    "Path",
    "Only",
    "routes",
    "Route",
    "graph_path",
    "save_graph",
    "load_graph",
]

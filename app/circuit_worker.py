"""The process that traces a prompt, or checks a graph in the model, for the Circuit page: `python circuit_worker.py ORDER`, ORDER as JSON.

It says what it does on standard error, a line at a time; a refusal is its last line. The graph is written when it is whole.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from saebench import progress
from saebench.commands.trace import FEATURES, KEEP, VERIFIED, chosen
from saebench.errors import UserError

if TYPE_CHECKING:
    from saebench.circuits.graphs.targets import Target


@dataclass(frozen=True)
class Order:
    """What is to be done."""

    run: str
    path: str
    """Of the graph."""
    asked: dict[str, Any]
    """`circuit_state.Asked`, to trace; nothing to check the graph that is there."""
    nodes: float = 0.8
    edges: float = 0.98
    verify: int = VERIFIED

    def __str__(self) -> str:
        return json.dumps(asdict(self))


def main(text: str) -> None:
    import torch

    from saebench.circuits.graphs.graph_file import load_graph
    from saebench.circuits.graphs.tracing import trace
    from saebench.circuits.graphs.verification import verify
    from saebench.lm import load_lm
    from saebench.pipeline import dictionaries as dictionaries_of
    from saebench.runs import Run

    order = Order(**json.loads(text))
    progress.LINE_EVERY_SECONDS = 0.3
    progress.say("opening the model and the dictionaries")
    run = Run.open(order.run)
    model = run.record["recipe"]["model"]
    lm = load_lm(model["name"], dtype=getattr(torch, model["dtype"]))
    if order.asked:
        dictionaries = chosen(run, None)
        progress.say("running the model on the prompt")
        graph = trace(lm, dictionaries, order.asked["prompt"], targets=targets(order.asked), max_features=FEATURES, keep=KEEP)
        graph.save(order.path)  # whoever stops the checks has it
    else:
        graph = load_graph(order.path)
        names = [dictionary["name"] for dictionary in graph.dictionaries]
        every = dictionaries_of(run)
        if missing := sorted(set(names) - set(every)):
            raise UserError(f"the graph is of {missing[0]}, which {order.run} does not have: trace the prompt again")
        dictionaries = {name: every[name] for name in names}
    progress.say(f"checking the {order.verify} edges that carry most in the model")
    pruned = graph.prune(order.nodes, order.edges)
    try:
        found = verify(lm, dictionaries, pruned, order.verify, model=pruned.origin)
    except UserError:
        if not order.asked:
            raise
        return  # nothing can be checked in it, but it can be looked at
    graph.extra["verification"] = found.as_dict(pruned.numbers_in(graph))
    graph.save(order.path)


def targets(asked: dict[str, Any]) -> list[Target] | None:
    from saebench.circuits.graphs.targets import Difference, Feature, Logit

    if asked["explain"] == "token":
        return [Logit(asked["token"])]
    if asked["explain"] == "difference":
        return [Difference(asked["token"], asked["against"])]
    if asked["explain"] == "feature":
        return [Feature(asked["dictionary"], asked["place"], asked["latent"])]
    return None


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (UserError, OSError) as error:
        sys.exit(" ".join(str(error).split()))
    except Exception as error:
        import traceback

        traceback.print_exc()
        sys.exit(f"it stopped at an error ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
    except KeyboardInterrupt:
        sys.exit("stopped")

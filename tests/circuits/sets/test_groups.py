"""Editing supernodes: every edit gives another value, and what cannot be is one line."""

import pytest

from saebench.circuits.sets.groups import Supernode, Supernodes
from saebench.errors import UserError


def test_edits():
    one = Supernodes((Supernode("a", (4, 2)), Supernode("b", (7,)), Supernode("c", (1, 9, 3))))
    assert (
        one["a"].members == (2, 4) and one.names == ["a", "b", "c"] and len(one) == 3 and one.of(9) == "c" and one.of(5) is None
    )
    merged = one.merge(["c", "a"], "new")
    assert merged.as_dict() == {"new": [1, 2, 3, 4, 9], "b": [7]}
    assert one.merge(["a", "b"], "b").names == ["b", "c"]
    assert one.rename("b", "d").names == ["a", "d", "c"] and one.rename("b", "b") == one
    assert one.move(9, "a").as_dict() == {"a": [2, 4, 9], "b": [7], "c": [1, 3]}
    assert one.move(7, "a").names == ["a", "c"] and one.move(7, None).names == ["a", "c"]
    assert one.move(5, "e").as_dict()["e"] == [5] and one.move(2, "a") == one
    assert one.split("c", [9, 1], "d").as_dict() == {"a": [2, 4], "b": [7], "c": [3], "d": [1, 9]}
    assert one.remove("b").names == ["a", "c"]
    assert one.names == ["a", "b", "c"]


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda s: s.merge(["a"], "b"), "takes two supernodes at least"),
        (lambda s: s.merge(["a", "x"], "b"), "there is no supernode 'x': there are 'a', 'b', 'c'"),
        (lambda s: s.merge(["a", "b"], "c"), "there is a supernode 'c' already"),
        (lambda s: s.rename("a", "b"), "there is a supernode 'b' already"),
        (lambda s: s.rename("a", " "), "name is empty"),
        (lambda s: s.move(-1, "a"), "there is no node -1"),
        (lambda s: s.split("c", [1, 2], "d"), "node 2 is not in the supernode 'c'"),
        (lambda s: s.split("c", [1, 3, 9], "d"), "leaves one part empty"),
        (lambda s: s.split("c", [], "d"), "leaves one part empty"),
        (lambda s: s.split("c", [1], "a"), "there is a supernode 'a' already"),
        (lambda s: s.remove("x"), "there is no supernode 'x'"),
        (lambda s: Supernodes((*s.groups, Supernode("d", (7,)))), "node 7 is in the supernodes 'b' and 'd'"),
        (lambda s: Supernodes((Supernode("d", (7, 7)),)), "node 7 is in the supernodes 'd' and 'd'"),
        (lambda s: Supernodes((Supernode("d", ()),)), "has no node"),
        (lambda s: Supernodes((Supernode("a", (1,)), Supernode("a", (2,)))), "two supernodes are called 'a'"),
    ],
)
def test_edits_that_cannot_be_are_refused_in_one_line(edit, message):
    with pytest.raises(UserError, match=message) as caught:
        edit(Supernodes((Supernode("a", (4, 2)), Supernode("b", (7,)), Supernode("c", (1, 9, 3)))))
    assert "\n" not in str(caught.value)

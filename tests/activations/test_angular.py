"""Angles between layers and how they are grouped (methods.md T16)."""

import math

import pytest
import torch

import saebench as sb
from saebench.activations import ActivationStream, TensorSource
from saebench.activations.angular import amad, angular_distances, group_layers
from saebench.errors import UserError

BLOCKS = [0, 0, 0, 1, 1, 2, 2, 2]  # planted groups of eight layers


def planted_distances(seed=0):
    """Near within a block, far between blocks."""
    noise = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.02
    blocks = torch.tensor(BLOCKS)
    distances = (blocks[:, None] - blocks).abs() * 0.2 + 0.05 + noise + noise.T
    return distances.fill_diagonal_(0)


def planted_source(tokens=500):
    """Layers of one block share a direction per token, to which each adds a little of its own."""
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(3, tokens, 16, generator=generator).cumsum(0)
    return TensorSource(
        {f"{n}": (1 + n) * (shared[block] + 0.1 * torch.randn(tokens, 16, generator=generator)) for n, block in enumerate(BLOCKS)}
    )


def test_an_eighth_of_a_turn():
    source = TensorSource(
        {"a": torch.tensor([[1.0, 0]]), "b": torch.tensor([[1.0, 1]]) / math.sqrt(2), "c": torch.tensor([[-3.0, 0]])}
    )
    expected = torch.tensor([[0, 0.25, 1], [0.25, 0, 0.75], [1, 0.75, 0]], dtype=torch.float64)
    torch.testing.assert_close(angular_distances(source, ["a", "b", "c"]), expected, atol=1e-6, rtol=0)


def test_distances_are_the_mean_arccosine():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 300, 9, generator=generator)
    x[1] = x[0] + 1e-4 * x[1]
    source = TensorSource(dict(zip("abc", x, strict=True)))
    found = angular_distances(source, list("abc"))
    unit = torch.nn.functional.normalize(x.double(), dim=2)
    expected = torch.einsum("ltd,mtd->lmt", unit, unit).clamp(-1, 1).arccos().mean(2) / math.pi
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(found, found.T) and torch.equal(found.diagonal(), torch.zeros(3, dtype=torch.float64))
    assert 0 < found[0, 1] < 1e-3 and found.max() <= 1
    torch.testing.assert_close(angular_distances(source, list("abc"), 100)[0, 2], found[0, 2], atol=0.03, rtol=0)
    assert not torch.equal(angular_distances(source, list("abc"), 100), angular_distances(source, list("abc"), 100, seed=1))


@pytest.mark.parametrize("seed", range(3))
def test_planted_blocks_are_found(seed):
    assert group_layers(planted_distances(seed), 3) == [[0, 1, 2], [3, 4], [5, 6, 7]]
    assert group_layers(planted_distances(seed), 8) == [[n] for n in range(8)]
    assert group_layers(planted_distances(seed), 1) == [list(range(8))]


def test_groups_are_stretches_even_where_distant_layers_are_alike():
    distances = torch.tensor([[0, 0.5, 0.01, 0.5], [0.5, 0, 0.5, 0.02], [0.01, 0.5, 0, 0.4], [0.5, 0.02, 0.4, 0]])
    assert group_layers(distances, 2) == [[0, 1], [2, 3]]  # 2 and 3 first, then 0 and 1, at 0.5 like any other
    assert group_layers(distances, 3) == [[0], [1], [2, 3]]


def test_complete_linkage_goes_by_the_farthest_members():
    position = torch.tensor([0, 1, 2.2, 3.5])
    distances = (position[:, None] - position).abs() / 10
    assert group_layers(distances, 3) == [[0, 1], [2], [3]]
    # single linkage would join 2 to 1, 1.2 away; the farthest of that group is 2.2 away, 3 only 1.3
    assert group_layers(distances, 2) == [[0, 1], [2, 3]]


def test_amad_is_the_mean_of_the_widest_distances():
    distances = planted_distances()
    cut = [[0, 1, 2], [3, 4], [5, 6, 7]]
    expected = sum(max(float(distances[a, b]) for a in group for b in group) for group in cut) / 3
    assert amad(distances, cut) == pytest.approx(expected)
    assert amad(distances, [[n] for n in range(8)]) == 0
    values = [amad(distances, group_layers(distances, count)) for count in range(1, 9)]
    assert values == sorted(values, reverse=True)


def test_amad_can_fall_with_a_merge():
    """Two narrow pairs that lie side by side count twice; as one group, hardly wider, they count once."""
    distances = torch.full((8, 8), 1.0)
    distances[:4, :4] = 0.101
    distances[:2, :2] = distances[2:4, 2:4] = 0.1
    distances.fill_diagonal_(0)
    assert group_layers(distances, 6)[:2] == [[0, 1], [2, 3]] and group_layers(distances, 5)[0] == [0, 1, 2, 3]
    assert amad(distances, group_layers(distances, 5)) < amad(distances, group_layers(distances, 6))


def test_layer_groups_by_number_and_by_threshold():
    source = planted_source()
    sites = [f"{n}" for n in range(8)]
    blocks = [("0", "1", "2"), ("3", "4"), ("5", "6", "7")]
    assert sb.layer_groups(source, sites, groups=3) == blocks
    distances = angular_distances(source, sites)
    values = {count: amad(distances, group_layers(distances, count)) for count in (2, 3)}
    assert sb.layer_groups(source, sites, threshold=(values[2] + values[3]) / 2) == blocks
    assert sb.layer_groups(source, sites, threshold=1.0) == [tuple(sites)]
    assert len(sb.layer_groups(source, sites, threshold=0.0)) == 8


def test_a_real_model(builtin_lm):
    contexts = sb.pack(sb.builtin_text(), builtin_lm.tokenizer, 64, 64 * 40)
    sites = [f"blocks.{n}.hook_resid_post" for n in range(4)]
    stream = ActivationStream(builtin_lm, contexts, sites)
    distances = angular_distances(stream, sites, 1000)
    assert distances[0, 1] < distances[0, 3] and distances.max() < 0.6
    values = [amad(distances, group_layers(distances, count)) for count in range(1, 5)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        (["0", "1"], {}, "give either groups"),
        (["0", "1"], {"groups": 1, "threshold": 0.1}, "give either groups"),
        (["0", "1"], {"groups": 3}, "groups=3 must be between 1 and the number of layers, 2"),
        (["0", "1"], {"threshold": -1.0}, "threshold=-1.0 must not be negative"),
        (["0", "nine"], {"groups": 1}, "'nine' is not among the activations"),
        (["0", "0"], {"groups": 1}, "named once each"),
        ([], {"groups": 1}, "at least one: none given"),
    ],
)
def test_bad_input_is_told_in_one_line(sites, options, message):
    with pytest.raises(UserError, match=message):
        sb.layer_groups(planted_source(20), sites, **options)


def test_widths_must_agree():
    source = TensorSource({"a": torch.ones(3, 2), "b": torch.ones(3, 4)})
    with pytest.raises(UserError, match="these sites differ: a 2, b 4"):
        angular_distances(source, ["a", "b"])

"""The discrete SAE: codes are the argmax, and heads that separate two classes rank first."""

import pytest
import torch
from test_matching_pursuit import normal, unit_rows

import saebench as sb
from saebench.dictionaries.discrete import edge_scores, equal_heads, head_scores
from saebench.trainer import TrainConfig


def built(d_sae=30, d_in=6):
    dictionary = sb.Discrete(d_sae=d_sae, d_in=d_in).build()
    x = normal(300, d_in)
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    return dictionary


def test_the_code_is_the_strongest_latent():
    dictionary, x = built(), normal(50, 6, seed=3)
    codes = dictionary.codes_of(x)
    assert codes.dtype == torch.int64
    active = dictionary.encode(x).l0() > 0
    assert torch.equal(codes, torch.where(active, dictionary.encode(x).to_dense().argmax(1), 30))
    assert active.sum() > 40
    assert torch.equal(dictionary.codes_of(x.view(5, 10, 6)), codes.view(5, 10))


def test_no_active_latent_is_a_code_of_its_own_and_ties_go_to_the_lowest():
    dictionary = sb.Discrete(d_sae=5, d_in=2).build()
    with torch.no_grad():
        dictionary.W_enc_FD.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 1], [-1, 0], [0, 0.5]]))
        dictionary.b_enc.fill_(-0.5)
    x = torch.tensor([[0.2, 0.3], [0.0, 2.0], [3.0, 2.0], [-1.0, 0.0]])
    assert dictionary.codes_of(x).tolist() == [5, 1, 0, 3]


def test_scores_are_the_share_of_codes_that_only_positives_show():
    positive = torch.tensor([[1, 1, 7], [2, 1, 8], [3, 2, 7]])
    negative = torch.tensor([[4, 1, 8], [3, 1, 8]])
    torch.testing.assert_close(head_scores(positive, negative), torch.tensor([2 / 3, 1 / 2, 1 / 2]))
    edges = edge_scores(positive, negative)
    expected = torch.tensor([[2, 0, 1], [0, 1, 1], [1, 1, 2]]) / 3
    torch.testing.assert_close(edges, expected)


def heads(examples=10, count=8, width=16, separating=(2, 5), seed=0):
    """Outputs of heads [examples, heads, width] for positives and negatives: a head attends to one of three things at random, but the
    separating ones to things that depend on the class."""
    generator = torch.Generator().manual_seed(seed)
    things = unit_rows(6 * count, width, seed).view(count, 6, width)
    outputs = []
    for positive in (True, False):
        choice = torch.randint(3, (examples, count), generator=generator)
        choice[:3] = torch.arange(3)[:, None]  # everything occurs in both classes
        if positive:
            choice[:, list(separating)] += 3
        noise = 0.05 * torch.randn(examples, count, width, generator=generator)
        outputs.append((things[torch.arange(count), choice] + noise) * torch.logspace(-1, 1, count)[:, None])
    return outputs


@pytest.mark.parametrize("seed", [0, 1])
def test_the_two_heads_that_separate_the_classes_rank_first(seed):
    both = equal_heads(torch.cat(heads(seed=seed)))
    torch.testing.assert_close(both.square().sum(2).mean(0), torch.ones(8))
    vectors = both.flatten(0, 1)
    training = TrainConfig(num_tokens=160 * 250, batch_size=160, lr=3e-3, seed=seed)
    dictionary = sb.train(sb.Discrete(d_sae=64), sb.TensorSource({"heads": vectors}), training)
    mean_error = (vectors - vectors.mean(0)).square().sum()
    assert (dictionary(vectors) - vectors).square().sum() < 0.6 * mean_error
    codes = dictionary.codes_of(both)
    positive, negative = codes[:10], codes[10:]
    scores = head_scores(positive, negative)
    assert set(scores.topk(2).indices.tolist()) == {2, 5}
    assert scores[[2, 5]].min() > scores[[0, 1, 3, 4, 6, 7]].max() + 0.3
    edges = edge_scores(positive, negative).fill_diagonal_(0)
    assert divmod(int(edges.argmax()), 8) == (2, 5)
    assert head_scores(positive, positive).tolist() == [0] * 8
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(head_scores(positive[order], negative[order.flip(0)]), scores)
    torch.testing.assert_close(edge_scores(positive[order], negative[order.flip(0)]).fill_diagonal_(0), edges)


def test_a_silent_head_stays_silent():
    outputs = normal(5, 3, 4)
    outputs[:, 1] = 0
    assert equal_heads(outputs)[:, 1].abs().max() == 0 and equal_heads(outputs).isfinite().all()


def test_saved_and_folded_codes_are_the_same(tmp_path):
    x = normal(200, 6) * 7
    training = TrainConfig(num_tokens=50 * 20, batch_size=50, lr=5e-3)
    dictionary = sb.train(sb.Discrete(d_sae=30, target_l0=3), sb.TensorSource({"a": x}), training)
    dictionary.save(tmp_path / "it")
    loaded = sb.load(tmp_path / "it")
    assert torch.equal(loaded.codes_of(x), dictionary.codes_of(x))
    assert loaded.config.target_l0 == 3 and sb.Discrete(d_sae=30).target_l0 == 4

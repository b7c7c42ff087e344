import itertools
import math

import pytest
import torch
from scipy.optimize import nnls

from saebench.codes import SparseCodes
from saebench.evaluation.recovery import (
    absorption_rate,
    composition_rate,
    conditional_orthogonality,
    firing_scores,
    matched_cosine,
)
from saebench.synthetic.planted import PlantedDictionary


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def fires(dense):
    return SparseCodes.from_dense(torch.as_tensor(dense).float())


class TestMatching:
    def test_the_truth_itself_in_another_order_and_scale(self):
        true = randn(50, 16)
        order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
        found = true[order] * torch.linspace(0.1, 9, 50)[:, None]
        m = matched_cosine(found, true)
        assert torch.equal(order[m.found_G], torch.arange(50))
        assert (m.mean_matched_cosine, m.recovered, m.mean_max_cosine) == (pytest.approx(1), 1.0, pytest.approx(1))

    @pytest.mark.parametrize(("found_count", "true_count"), [(6, 6), (7, 5), (4, 6)])
    def test_against_all_permutations(self, found_count, true_count):
        larger, smaller = max(found_count, true_count), min(found_count, true_count)
        choices = torch.tensor(list(itertools.permutations(range(larger), smaller)))
        for seed in range(10):
            found, true = randn(found_count, 4, seed=seed), randn(true_count, 4, seed=100 + seed)
            cosines = unit(true) @ unit(found).T
            table = cosines if found_count >= true_count else cosines.T
            best = table[torch.arange(smaller), choices].sum(1).max()
            m = matched_cosine(found, true)
            assert m.mean_matched_cosine * true_count == pytest.approx(float(best), abs=1e-5)
            assert m.mean_max_cosine == pytest.approx(float(cosines.amax(1).mean()), abs=1e-6)
            kept = m.found_G[m.found_G >= 0]
            assert len(kept) == len(kept.unique()) == min(found_count, true_count)
            assert torch.allclose(m.cosine_G[m.found_G >= 0], cosines[m.found_G >= 0, kept], atol=1e-6)

    def test_noise_of_known_size(self):
        basis = torch.eye(40)
        found = basis[:20] + 0.5 * basis[20:]
        m = matched_cosine(found, basis[:20])
        assert m.mean_matched_cosine == pytest.approx(1 / math.sqrt(1.25), abs=1e-6)
        assert m.recovered == 0
        assert matched_cosine(found, basis[:20], threshold=0.89).recovered == 1

    def test_a_direction_with_the_wrong_sign_is_not_found(self):
        true = torch.eye(4)
        m = matched_cosine(-true, true)
        assert m.mean_matched_cosine == 0
        assert m.mean_max_cosine == 0

    def test_one_latent_for_two_features_counts_once(self):
        m = matched_cosine(torch.eye(3)[[0, 2]], torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]]))
        assert m.mean_max_cosine == 1
        assert m.mean_matched_cosine == pytest.approx(2 / 3)
        assert sorted(m.found_G.tolist()) == [-1, 0, 1]


class TestFiring:
    def test_the_true_codes_score_one(self):
        p = PlantedDictionary(num_features=40, width=40, l0=4)
        _, codes = p.sample(3000)
        scores = firing_scores(codes, codes, matched_cosine(p.directions_FD, p.directions_FD))
        assert scores.precision == scores.recall == scores.f1 == scores.weighted_f1 == 1

    def test_against_the_dense_formulas(self):
        true = (randn(500, 7, seed=1) > 1).float()
        true[:, 3] = 0  # never fires: in no mean
        found = (
            (randn(500, 9, seed=2) > 1.2) | (torch.cat([true, true[:, :2]], 1).bool() & (randn(500, 9, seed=3) > -0.5))
        ).float()
        found[:, 5] = 0  # its latent never fires: zeros
        m = matched_cosine(torch.eye(9)[:, :7] + 0.01 * randn(9, 7), torch.eye(7))
        expected, weights = [], []
        for g in [0, 1, 2, 4, 5, 6]:
            f, t = found[:, m.found_G[g]].bool(), true[:, g].bool()
            both = int((f & t).sum())
            precision, recall = both / max(1, int(f.sum())), both / int(t.sum())
            expected.append((precision, recall, 2 * precision * recall / (precision + recall) if both else 0.0))
            weights.append(int(t.sum()))
        scores = firing_scores(fires(found), fires(true), m)
        table, weight = torch.tensor(expected).double(), torch.tensor(weights).double()
        assert scores.features == 6
        assert (scores.precision, scores.recall, scores.f1) == pytest.approx(tuple(table.mean(0).tolist()), rel=1e-6)
        means = tuple(((table * weight[:, None]).sum(0) / weight.sum()).tolist())
        assert (scores.weighted_precision, scores.weighted_recall, scores.weighted_f1) == pytest.approx(means, rel=1e-6)

    def test_a_feature_without_a_latent_scores_zero(self):
        m = matched_cosine(torch.eye(3)[:1], torch.eye(3)[:2])
        scores = firing_scores(fires([[1], [1], [1.0]]), fires([[1, 0], [1, 1], [1, 1]]), m)
        assert (scores.precision, scores.recall, scores.f1, scores.weighted_f1) == (0.5, 0.5, 0.5, 0.6)

    def test_padding_of_fixed_k_codes_is_no_firing(self):
        codes = SparseCodes(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1.0, 0], [1, 2]]), 2)
        scores = firing_scores(codes, fires([[1, 0], [1, 1]]), matched_cosine(torch.eye(2), torch.eye(2)))
        assert scores.f1 == 1

    def test_a_latent_chosen_twice_on_a_token_fires_once(self):
        codes = SparseCodes(torch.tensor([[0, 0], [0, 1]]), torch.tensor([[1.0, 1], [1, 2]]), 2)
        scores = firing_scores(codes, fires([[1, 0], [0, 1]]), matched_cosine(torch.eye(2), torch.eye(2)))
        assert scores.precision == 0.75

    def test_codes_of_other_tokens_are_refused(self):
        m = matched_cosine(torch.eye(2), torch.eye(2))
        with pytest.raises(ValueError, match="codes of 2 and of 3 tokens"):
            firing_scores(fires(torch.ones(2, 2)), fires(torch.ones(3, 2)), m)


class TestConditionalOrthogonality:
    def test_the_planted_dictionary_and_a_copy_that_mixes_in_the_parent(self):
        p = PlantedDictionary(num_features=200, width=512, l0=4, tree_share=1, branching=3, depth=2, sibling_cosine=0.5)
        true, parents = p.directions_FD, p.parents_F
        found = true.clone()
        leaves = torch.arange(200)[(parents >= 0) & ~torch.isin(torch.arange(200), parents)]
        found[leaves] = 0.8 * true[leaves] + 0.6 * true[parents[leaves]]
        angles = conditional_orthogonality(found, true, matched_cosine(found, true), parents)
        assert angles["true"].parent_child == pytest.approx(0, abs=1e-6)
        assert angles["true"].siblings == pytest.approx(0.5, abs=0.03)
        # of random directions: E|cos| = sqrt(2 / (pi D)), up to terms in 1 / D
        assert angles["true"].unrelated == pytest.approx(math.sqrt(2 / (math.pi * 512)), rel=0.1)
        children = int((parents >= 0).sum())
        assert angles["found"].parent_child == pytest.approx(0.6 * len(leaves) / children, abs=1e-5)
        assert angles["found"].siblings > angles["true"].siblings

    def test_by_hand_with_an_unmatched_feature(self):
        # 0 is the parent of 1, 2, 3; 4 stands alone; latents for all but 3
        true = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0.6, 0.8, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        parents = torch.tensor([-1, 0, 0, 0, -1])
        found = true[[4, 2, 1, 0]].clone()
        angles = conditional_orthogonality(found, true, matched_cosine(found, true), parents)
        for dictionary in ("true", "found"):
            assert angles[dictionary].parent_child == 0
            assert angles[dictionary].siblings == pytest.approx(0.6)
            assert angles[dictionary].unrelated == 0
        lone = conditional_orthogonality(found, true, matched_cosine(found, true), torch.full((5,), -1))
        assert math.isnan(lone["true"].parent_child)

    def test_drawing_pairs_estimates_the_mean_over_all(self):
        p = PlantedDictionary(num_features=310, width=16, l0=4, tree_share=1, branching=30, depth=1)
        m = matched_cosine(p.directions_FD, p.directions_FD)
        exact = conditional_orthogonality(p.directions_FD, p.directions_FD, m, p.parents_F)["true"]
        drawn = conditional_orthogonality(p.directions_FD, p.directions_FD, m, p.parents_F, pairs=2000)["true"]
        assert drawn.siblings == pytest.approx(exact.siblings, rel=0.1)


class TestAbsorption:
    PARENTS = torch.tensor([-1, 0, -1])
    TRUE = torch.eye(3)

    def scenario(self, child_row):
        """100 tokens: the child fires on 40, its parent's latent is silent on 34 of them, where its own fires on 30."""
        true = torch.zeros(100, 3)
        true[:70, 0] = true[:40, 1] = true[50:, 2] = 1
        found = true.clone()
        found[:34, 0] = 0
        found[30:34, 1] = 0
        found[60:65, 0] = 0  # a miss where no child fires is none of absorption's business
        directions = torch.stack([self.TRUE[0], torch.tensor(child_row), self.TRUE[2]])
        order = torch.tensor([2, 0, 1])
        m = matched_cosine(directions[order], self.TRUE)
        assert order[m.found_G].tolist() == [0, 1, 2]
        return absorption_rate(fires(found[:, order]), fires(true), m, self.PARENTS, directions[order], self.TRUE)

    def test_exactly_the_known_share(self):
        a = self.scenario([1.0, 1, 0])
        assert (a.rate, a.missed, a.firings, a.absorbing_pairs) == (30 / 40, 34 / 40, 40, 1)
        assert a.share_of_misses == pytest.approx(30 / 34)

    def test_a_child_that_does_not_carry_its_parent_absorbs_nothing(self):
        a = self.scenario([0.2, 1, 0])
        assert (a.rate, a.share_of_misses, a.missed, a.absorbing_pairs) == (0, 0, 34 / 40, 0)

    def test_planted_hierarchy_with_a_known_share_absorbed(self):
        p = PlantedDictionary(
            num_features=84, width=128, l0=6, tree_share=1, branching=3, depth=1, child_rate=0.3, exclusive=True
        )
        _, codes = p.sample(4000)
        true, parents = p.directions_FD, p.parents_F
        m = matched_cosine(true, true)
        perfect = absorption_rate(codes, codes, m, parents, true, true)
        assert (perfect.rate, perfect.missed, perfect.absorbing_pairs) == (0, 0, 0)
        assert math.isnan(perfect.share_of_misses)
        dense = codes.to_dense()
        firings = (dense[:, parents >= 0] > 0).sum().item()
        absorbing = torch.arange(84)[parents >= 0][::2]
        found = true.clone()
        found[absorbing] += true[parents[absorbing]]
        for child in absorbing:  # on even tokens the child's latent speaks for both
            dense[::2, parents[child]] *= dense[::2, child] == 0
        expected = (codes.to_dense()[::2, absorbing] > 0).sum().item() / firings
        a = absorption_rate(fires(dense), codes, m, parents, found, true)
        assert a.rate == pytest.approx(expected)
        assert a.share_of_misses == 1
        assert a.absorbing_pairs == 0.5 + 0.5 * (len(absorbing) * 2 - 63) / 63

    def test_pairs_without_latents_are_not_counted(self):
        m = matched_cosine(torch.eye(3)[1:], torch.eye(3))  # none for the parent
        a = absorption_rate(fires([[1.0, 0]]), fires([[1.0, 1, 0]]), m, self.PARENTS, torch.eye(3)[1:], torch.eye(3))
        assert a.firings == 0
        assert math.isnan(a.rate)


class TestComposition:
    def test_by_hand(self):
        e = torch.eye(12)
        rows = [e[0], 3 * e[1], e[2] + e[3], e[4] + 0.5 * e[5], e[0] + 0.2 * e[1], e[0] + e[1] + e[2], e[:6].sum(0), e[0] + e[11]]
        c = composition_rate(torch.stack(rows), e[:8])
        assert c.rate == pytest.approx(4 / 8)  # the sums of 2, of 1 and 0.5, of 3 and of 6; e[11] is no feature
        ones = [1, 1, 1 / 2, 1 / 1.25, 1 / 1.04, 1 / 3, 1 / 6, 1 / 2]
        twos = [1, 1, 1, 1, 1, 2 / 3, 1 / 3, 1 / 2]
        assert c.explained_by_one == pytest.approx(sum(ones) / 8, abs=1e-6)
        assert c.explained_by_two == pytest.approx(sum(twos) / 8, abs=1e-6)

    def test_thresholds(self):
        e = torch.eye(4)
        row = (e[0] + 0.5 * e[1])[None]  # gain 0.2, share 1/3
        assert composition_rate(row, e).rate == 1
        assert composition_rate(row, e, gain=0.21).rate == 0
        assert composition_rate(row, e, share=0.34).rate == 0
        assert composition_rate(e[:4].sum(0)[None], e, explained=0.51).rate == 0

    def test_the_truth_is_not_composed_and_noise_is_not_either(self):
        p = PlantedDictionary(num_features=500, width=128, l0=5)
        assert composition_rate(p.directions_FD, p.directions_FD).rate == 0
        assert composition_rate(randn(300, 128, seed=5), p.directions_FD).rate < 0.02
        pairs = p.directions_FD[:250] + p.directions_FD[250:]
        assert composition_rate(pairs, p.directions_FD).rate > 0.99

    def test_fits_are_non_negative_least_squares(self):
        true, rows = unit(randn(30, 8)), unit(randn(40, 8, seed=1))
        total = 0.0
        for row in rows.double():
            t = true.double()
            j = int((t @ row).argmax())
            rest = t @ (row - (t[j] @ row) * t[j])
            rest[j] = -torch.inf
            weights, _ = nnls(t[[j, int(rest.argmax())]].T.numpy(), row.numpy())
            fit = torch.from_numpy(weights) @ t[[j, int(rest.argmax())]]
            total += float(fit.square().sum())
        assert composition_rate(rows, true).explained_by_two == pytest.approx(total / 40, rel=1e-5)

    def test_dead_rows_and_a_single_feature(self):
        c = composition_rate(torch.zeros(2, 4), torch.eye(4))
        assert (c.rate, c.explained_by_one, c.explained_by_two) == (0, 0, 0)
        assert composition_rate(torch.ones(1, 4), torch.eye(4)[:1]).rate == 0

"""Heads from discrete codes: the planted ones rank first, what must not matter does not, and the bundled model's heads beside ablation."""

import time

import pytest
import torch

from saebench.circuits.discovery.discrete import DiscreteCircuit, discrete_circuit, head_outputs
from saebench.circuits.discovery.model_edges import Components
from saebench.circuits.discovery.ranking import precision_recall, roc_auc
from saebench.circuits.discovery.tasks import induction_task
from saebench.errors import UserError
from saebench.lm import load_lm
from saebench.synthetic import save_induction_transformer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy") / "induction"
    circuit = save_induction_transformer(directory, 26, max_context=24, seed=1)
    return load_lm(directory, device="cpu"), circuit


def pairs(count=8, length=9, seed=0):
    """Texts whose last letter has occurred before, and the same with another letter there."""
    generator = torch.Generator().manual_seed(seed)
    positives, negatives = [], []
    for _ in range(count):
        letters = [LETTERS[i] for i in torch.randperm(26, generator=generator)[: length + 1]]
        positives.append("".join([*letters[:length], letters[2]]))
        letters[2], again = letters[length], letters[2]
        negatives.append("".join([*letters[:length], again]))
    return positives, negatives


def truth_of(circuit):
    truth = torch.zeros(2, 2, dtype=torch.bool)
    truth[circuit.previous_token_head] = truth[circuit.induction_head] = True
    return truth


def test_what_heads_write_adds_up_to_what_attention_writes(tiny_lm, contexts):
    ids = contexts.ids_NS[:3].long()
    heads, _ = head_outputs(tiny_lm, ids, torch.full((3,), 15))
    for layer in range(3):
        site = f"blocks.{layer}.hook_attn_out"
        bias = tiny_lm.hf.transformer.h[layer].attn.c_proj.bias
        own = heads[:, :, 4 * layer : 4 * layer + 4].sum(2) + bias
        torch.testing.assert_close(own, tiny_lm.read(ids, [site])[site], rtol=1e-4, atol=1e-4)


def test_on_the_planted_transformer_both_heads_rank_first(planted):
    lm, circuit = planted
    started = time.perf_counter()
    found = discrete_circuit(lm, *pairs(), aligned=True, d_sae=64, seeds=2)
    assert time.perf_counter() - started < 30
    truth = truth_of(circuit)
    assert roc_auc(found.scores_LH, truth) == 1.0
    agreed = precision_recall(found.scores_LH, truth)
    assert (agreed.precision, agreed.recall) == (1.0, 1.0)
    assert {(layer, head) for layer, head, _ in found.ranked()[:2]} == {circuit.previous_token_head, circuit.induction_head}
    # The previous-token head writes where the induction head looks, not where it reads: the edge shows though they differ at other places.
    assert found.edges_GG[0, 3] >= 0.5 and found.edges_GG[0, 1] == found.edges_GG[1, 3] == 0
    # At the last position only the induction head differs; the other head of the circuit has done its part earlier in the text.
    last = discrete_circuit(lm, *pairs(), d_sae=64, seeds=1)
    assert last.ranked()[0][:2] == circuit.induction_head
    assert last.scores_LH[circuit.induction_head] > 0.5 and last.scores_LH[circuit.previous_token_head] == 0
    assert last.edges_GG.argmax() == 3 * 4 + 3 and last.edges_GG.shape == (4, 4)


def test_equal_classes_score_nothing_and_the_order_of_examples_changes_nothing(tiny_lm, contexts):
    ids = contexts.ids_NS[:8].long()
    same = discrete_circuit(tiny_lm, ids[:4], ids[:4], d_sae=16, seeds=1)
    assert same.scores_LH.shape == (3, 4) and same.scores_LH.abs().max() == 0 and same.edges_GG.abs().max() == 0
    one = discrete_circuit(tiny_lm, ids[:4], ids[4:], d_sae=16, seeds=1)
    two = discrete_circuit(tiny_lm, ids[[2, 0, 3, 1]], ids[[7, 6, 4, 5]], d_sae=16, seeds=1)
    assert torch.equal(one.by_seed_KLH, two.by_seed_KLH) and torch.equal(one.edges_GG, two.edges_GG)
    assert one.scores_LH.max() > 0 and one.scores_LH.max() <= 1


def test_scores_are_means_over_seeds_and_their_spread_is_told():
    found = DiscreteCircuit(torch.tensor([[[0.0, 1.0]], [[0.5, 1.0]]]), torch.zeros(2, 2), 5, 5)
    assert found.scores_LH.tolist() == [[0.25, 1.0]] and found.spread_LH.tolist() == [[0.25, 0.0]]
    assert found.ranked() == [(0, 1, 1.0), (0, 0, 0.25)]


def test_bad_input_is_one_line(tiny_lm, contexts):
    ids = contexts.ids_NS[:4].long()
    for build, message in (
        (lambda: discrete_circuit(tiny_lm, [], ["x"]), "there are no positives"),
        (lambda: discrete_circuit(tiny_lm, ["x"], []), "there are no negatives"),
        (lambda: discrete_circuit(tiny_lm, ["x"], [""]), "a prompt is empty"),
        (lambda: discrete_circuit(tiny_lm, ["x"], ["x y z"], aligned=True), "the same number of tokens"),
        (lambda: discrete_circuit(tiny_lm, ids[:2, :1], ids[2:]), "fewer than 2 tokens"),
        (lambda: discrete_circuit(tiny_lm, ids[:2], ids[2:], seeds=0), "make no dictionary"),
        (lambda: discrete_circuit(tiny_lm, ids[0], ids[1]), "give token ids .examples, positions., or texts"),
        (lambda: discrete_circuit(tiny_lm, ids[:2], ids[2:] - 10**6), "not in the model's vocabulary"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            build()
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_on_the_bundled_model_aligned_codes_agree_with_exhaustive_ablation(builtin_lm):
    examples = induction_task(builtin_lm.hf.config.vocab_size - 1)
    components = Components(builtin_lm, examples)
    exact = components.effects("exact")
    everything = torch.ones(len(exact.effect_N), dtype=torch.bool)
    done = components.metric_of(everything) - components.metric_of(~everything)
    truth = exact.heads_LH.abs() > 0.05 * abs(done)
    started = time.process_time()
    found = discrete_circuit(builtin_lm, examples.ids_BS[:8], examples.patch_BS[:8], aligned=True)
    assert time.process_time() - started < 60  # of processor time: 30 s on two cores
    assert roc_auc(found.scores_LH, truth) > 0.85
    last = discrete_circuit(builtin_lm, examples.ids_BS[:8], examples.patch_BS[:8])
    assert {divmod(int(i), 8)[0] for i in last.scores_LH.flatten().topk(3).indices} == {3}  # what it sees there is the last layer

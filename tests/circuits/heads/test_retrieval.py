"""Retrieval scores of a model whose copying head is known, beside a loop; and what is lost without it."""

import pytest
import torch

import saebench as sb
from saebench.circuits.heads.retrieval import ablate, needles, retrieval_scores, without_heads
from saebench.errors import UserError
from saebench.lm.attention import attention_input, attention_weights
from saebench.synthetic.toy_transformer import save_induction_transformer


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A model of 80 characters, and prompts whose text has none of those of the needle."""
    directory = tmp_path_factory.mktemp("toy") / "model"
    circuit = save_induction_transformer(directory, 80)
    lm = sb.load_lm(directory)
    return lm, circuit, needles(lm, torch.zeros(8, 60, dtype=torch.int64), length=10)


def test_needles_are_where_they_are_said_to_be(toy):
    _, _, prompts = toy
    assert prompts.starts_C.tolist() == [1, 10, 19, 28] * 2 and prompts.targets_T.tolist() == list(range(54, 60))
    for ids_S, start, needed_T in zip(prompts.ids_CS, prompts.starts_C, prompts.needed_CT, strict=True):
        assert torch.equal(ids_S[start : start + 10], ids_S[50:]) and len(set(ids_S[50:].tolist())) == 10
        assert torch.equal(ids_S[needed_T], ids_S[prompts.targets_T]) and int(needed_T[0]) == int(start) + 4
        assert int((ids_S != 0).sum()) == 20


def test_the_induction_head_retrieves_and_nothing_is_copied_without_it(toy):
    lm, circuit, prompts = toy
    found = retrieval_scores(lm, prompts)
    assert found.copied == 1 and found.loss < 1e-2
    assert found.strongest(1) == [circuit.induction_head]
    assert float(found.score_LH[circuit.induction_head]) == 1 and float(found.score_LH.sum()) <= 1.1
    lost = ablate(lm, prompts, [circuit.induction_head], draws=6)
    assert lost.copied < 0.1 and lost.loss > 2  # what it guesses then, rounding decides: one of 48 may be right
    # of the other heads, that of the previous token is needed too, and two do nothing
    assert set(lost.random_copied.tolist()) <= {0.0, 1.0} and 1.0 in lost.random_copied.tolist()
    assert ((lost.random_loss < 1e-2) == (lost.random_copied == 1)).all()


def test_scores_are_those_of_a_loop(tiny_lm, contexts):
    prompts = needles(tiny_lm, contexts.ids_NS[:5, :16].repeat(1, 2), length=8, depths=3, cue=2, seed=1)
    # so that there are right ones, what the model would say is put where the copy is
    logits = tiny_lm.logits(prompts.ids_CS)
    for t in prompts.targets_T[::2].tolist():
        prompts.ids_CS[:, t] = logits[:, t - 1].argmax(-1)
        logits = tiny_lm.logits(prompts.ids_CS)
    found = retrieval_scores(tiny_lm, prompts)
    hits, right = torch.zeros(3, 4), 0
    logits = tiny_lm.logits(prompts.ids_CS)
    for c, ids_S in enumerate(prompts.ids_CS):
        for i, t in enumerate(prompts.targets_T.tolist()):
            if int(logits[c, t - 1].argmax()) != int(ids_S[t]):
                continue
            right += 1
            for layer in range(3):
                x = tiny_lm.read(ids_S[None], [attention_input(layer)])[attention_input(layer)]
                looked_H = attention_weights(tiny_lm, layer).pattern(x)[0, :, t - 1].argmax(-1)
                hits[layer] += looked_H == int(prompts.starts_C[c]) + 2 + i
    assert right >= 15 and found.copied == pytest.approx(right / 30)
    torch.testing.assert_close(found.score_LH, hits / right)


def test_silent_heads_write_nothing(tiny_lm, contexts):
    ids, host = contexts.ids_NS[:1], attention_weights(tiny_lm, 1)
    sites = [attention_input(1), "blocks.1.hook_attn_out"]
    x_CSD, before_CSD = tiny_lm.read(ids, sites).values()
    with tiny_lm.edit(without_heads([(1, 0), (1, 2)], 4)):
        after_CSD = tiny_lm.read(ids, sites)[sites[1]]
    z_CHSE = host.pattern(x_CSD) @ host.values(x_CSD)
    written_HCSD = torch.einsum("chse,hed->hcsd", z_CHSE, host.W_O_HED)
    torch.testing.assert_close(before_CSD - after_CSD, written_HCSD[0] + written_HCSD[2], rtol=1e-3, atol=1e-4)


def test_bad_input(tiny_lm, contexts, toy):
    with pytest.raises(UserError, match="needles of 8 tokens with 4 given do not fit into texts of 16"):
        needles(tiny_lm, contexts.ids_NS[:2], length=8)
    with pytest.raises(UserError, match="with 8 given"):
        needles(tiny_lm, contexts.ids_NS[:2].repeat(1, 3), length=8, cue=8)
    lm, _, prompts = toy
    with pytest.raises(UserError, match=r"head \(2, 0\) is not one of the 2 layers of 2 heads"):
        ablate(lm, prompts, [(2, 0)])
    with pytest.raises(UserError, match="3 of 4 heads cannot be held against as many others"):
        ablate(lm, prompts, [(0, 0), (0, 1), (1, 0)])

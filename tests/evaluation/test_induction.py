"""Induction scores against a model whose induction head is known, and against the bundled model's card."""

import pytest
import torch

import saebench as sb
from saebench.dictionaries.lorsa import Lorsa
from saebench.errors import UserError
from saebench.evaluation.induction import head_induction_scores, induction_scores
from saebench.lm.attention import attention_weights
from saebench.lm.random_tokens import repeated_random

READ, WRITE = "blocks.3.attn.hook_in", "blocks.3.hook_attn_out"


def host_lorsa(lm, head_order=range(8)):
    """A group for each of layer 3's heads, in some order, with one Lorsa head per coordinate of its values."""
    host = attention_weights(lm, 3)
    order = list(head_order)
    lorsa = Lorsa(d_sae=256, k=256, score="abs", num_qk=8, site=READ, target=WRITE, d_in=256, d_out=256).for_lm(lm).build()
    with torch.no_grad():
        for name in ("W_Q", "b_Q", "W_K", "b_K"):
            getattr(lorsa, name).copy_(getattr(host, name + ("_HDE" if name[0] == "W" else "_HE"))[order])
        lorsa.W_V_FD.copy_(host.W_V_HDE[order].transpose(1, 2).flatten(0, 1))
    return lorsa.requires_grad_(False)


def test_heads_of_the_bundled_model(builtin_lm):
    scores_LH = head_induction_scores(builtin_lm)
    assert scores_LH.shape == (4, 8)
    assert divmod(int(scores_LH.argmax()), 8) == (3, 0)
    assert float(scores_LH[3, 0]) == pytest.approx(
        0.771, abs=0.03
    )  # the card: tokens of its first copy may repeat, ours are different
    ids = repeated_random(builtin_lm)
    assert torch.equal(ids[:, 1:61], ids[:, 61:]) and (ids[:, 0] == builtin_lm.tokenizer.bos_token_id).all()


def test_a_dictionary_with_the_models_queries_and_keys_scores_as_the_model(builtin_lm):
    order = [3, 0, 1, 2, 4, 5, 6, 7]
    scores = induction_scores(host_lorsa(builtin_lm, order), builtin_lm)
    torch.testing.assert_close(scores.attention_F[::32], head_induction_scores(builtin_lm)[3, order], rtol=1e-4, atol=1e-5)
    assert (scores.active_F == 1).all()
    assert float(scores.weight_F.sum()) == pytest.approx(1)
    by_group = scores.share_F.view(8, 32).mean(1)
    assert torch.equal(by_group.argsort()[-4:].sort().values, scores.attention_F[::32].argsort()[-4:].sort().values)
    assert float(by_group[1]) > 0.5 and float(by_group.min()) < 0.1


def test_the_share_is_that_of_the_z_pattern(builtin_lm):
    lorsa, length = host_lorsa(builtin_lm), 10
    scores = induction_scores(lorsa, builtin_lm, count=2, length=length, seed=3)
    x_CSD = builtin_lm.read(repeated_random(builtin_lm, 2, length, 3), [READ])[READ]
    for head in (5, 77):
        above = below = 0.0
        for x_SD in x_CSD:
            pattern = lorsa.z_pattern(x_SD, head).detach()
            for t in range(length + 1, 2 * length + 1):
                weight = float(pattern[t].sum().abs())
                above += weight * float(pattern[t, t - length + 1].abs() / pattern[t].abs().sum())
                below += weight
        assert float(scores.share_F[head]) == pytest.approx(above / below, rel=1e-3)


def test_other_dictionaries_and_long_contexts_are_refused(builtin_lm):
    with pytest.raises(UserError, match="'topk' has none, use a lorsa dictionary"):
        induction_scores(sb.TopK(d_sae=8, k=2, d_in=4).build(), builtin_lm)
    with pytest.raises(UserError, match="exceeds the 512 positions"):
        head_induction_scores(builtin_lm, length=300)

"""Roles of heads: of a model whose heads are known, of even and of random attention, by hand, and of the bundled model."""

import pytest
import torch

import saebench as sb
from saebench.circuits.heads.roles import (
    LEAST,
    ON_TEXT,
    ROLES,
    even_scores,
    head_roles,
    repeat_places,
    roles_of_patterns,
    text_places,
)  # fmt: skip
from saebench.errors import UserError
from saebench.evaluation.induction import head_induction_scores
from saebench.lm.random_tokens import repeated_random, usual_tokens
from saebench.synthetic.toy_transformer import save_induction_transformer


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy") / "model"
    circuit = save_induction_transformer(directory)
    return sb.load_lm(directory), circuit


def random_text(lm, count=6, size=40, seed=0):
    ids = torch.randint(1, lm.hf.config.vocab_size, (count, size), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    return ids


def test_the_heads_of_the_hand_built_model(toy):
    lm, circuit = toy
    found = head_roles(lm, random_text(lm))
    assert found.of(*circuit.previous_token_head) == ("previous",)
    assert found.of(*circuit.induction_head)[0] == "induction"
    assert found.heads("previous") == [circuit.previous_token_head] and found.heads("induction") == [circuit.induction_head]
    assert float(found.score_LHR[0, 0, ROLES.index("previous")]) == pytest.approx(1, abs=1e-4)
    assert float(found.score_LHR[1, 1, ROLES.index("induction")]) == pytest.approx(1, abs=1e-4)
    for idle in ((0, 1), (1, 0)):  # they look at everything alike
        assert found.of(*idle) == ()
        torch.testing.assert_close(found.score_LHR[idle], found.even_R, rtol=1e-4, atol=1e-5)
    row = found.table()[3]
    assert (row["layer"], row["head"]) == (1, 1) and row["induction"] == pytest.approx(1, abs=1e-4)


def test_parts_of_a_text_are_disjoint_and_all(tiny_lm, contexts):
    places = text_places(30)
    assert places.shape == (5, 20, 30)
    t, s = torch.arange(10, 30)[:, None], torch.arange(30)[None]
    assert torch.equal(places.sum(0), (s <= t).long())
    assert places.any(2).all()  # every row has every part
    found = head_roles(tiny_lm, contexts.ids_NS[:6])
    torch.testing.assert_close(found.score_LHR[..., : len(ON_TEXT)].sum(-1), torch.ones(3, 4))
    assert float(found.even_R[: len(ON_TEXT)].sum()) == pytest.approx(1)


@pytest.mark.parametrize("role", ROLES)
def test_a_head_that_does_one_thing_has_that_role(role):
    """Every pattern by its definition, row by row."""
    size, length = 41, 20
    ids = torch.cat([torch.zeros(1), torch.arange(1, 21), torch.arange(1, 21)])
    pattern = torch.eye(size)
    for t in range(1, size):
        pattern[t] = 0
        first = next((s for s in range(1, t) if ids[s] == ids[t]), None)
        if role == "sink":
            pattern[t, 0] = 1
        elif role == "self":
            pattern[t, t] = 1
        elif role == "previous":
            pattern[t, t - 1] = 1
        elif role == "short":
            pattern[t, max(0, t - 8) : max(1, t - 1)] = 1 / len(range(max(0, t - 8), max(1, t - 1)))
        elif role == "long":
            pattern[t, max(0, min(1, t - 9)) : max(1, t - 8)] = 1
            pattern[t] /= pattern[t].sum()
        else:
            pattern[t, 0 if first is None else first + (role == "induction")] = 1
    score_R = roles_of_patterns(pattern[None, None], pattern[None, None])[0]
    even_R = even_scores(size, size)
    excess = dict(zip(ROLES, ((score_R - even_R) / (1 - even_R)).tolist(), strict=True))
    assert excess[role] == pytest.approx(1, abs=0.12 if role == "short" else 1e-5)
    if role in ("induction", "duplicate"):
        assert [name for name in ROLES[5:] if excess[name] >= LEAST] == [role]
    else:
        assert [name for name in ON_TEXT if excess[name] >= LEAST] == [role]
    assert repeat_places(length).sum(2).eq(1).all()


def test_random_attention_has_no_copying_role(tiny_lm, contexts):
    generator = torch.Generator().manual_seed(0)
    random = [
        torch.randn(8, 16, s, s, generator=generator).masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf).softmax(-1)
        for s in (64, 41)
    ]
    even_R = even_scores(64, 41)
    excess_HR = (roles_of_patterns(*random) - even_R) / (1 - even_R)
    assert float(excess_HR[:, [0, 1, 2, 3, 5, 6]].abs().max()) < 0.05 and float(excess_HR[:, 4].abs().max()) < 0.1
    found = head_roles(tiny_lm, contexts.ids_NS[:6])
    assert found.heads("induction") == [] and found.heads("previous") == []


def test_repeated_tokens_are_different_and_usual(tiny_lm):
    ids = repeated_random(tiny_lm, 3, 20)
    assert ids.shape == (3, 41) and torch.equal(ids[:, 1:21], ids[:, 21:])
    assert all(len(set(row.tolist())) == 20 for row in ids[:, 1:21])
    assert not set(ids[:, 1:].flatten().tolist()) & set(tiny_lm.tokenizer.all_special_ids)
    assert repeated_random(tiny_lm).shape[1] == 63 and len(usual_tokens(tiny_lm)) == tiny_lm.hf.config.vocab_size - 1


def test_bad_input(tiny_lm, contexts, toy):
    with pytest.raises(UserError, match="contexts of 10 tokens have no long range: use at least 11"):
        head_roles(tiny_lm, contexts.ids_NS[:2, :10])
    with pytest.raises(UserError, match="exceeds the 64 positions"):
        head_roles(tiny_lm, contexts.ids_NS[:2], length=40)
    with pytest.raises(UserError, match="length=30 exceeds the 26 tokens"):
        repeated_random(toy[0], length=30)
    with pytest.raises(UserError, match="role 'copy' is unknown: use one of sink, self"):
        head_roles(tiny_lm, contexts.ids_NS[:2]).heads("copy")


@pytest.mark.slow
def test_the_bundled_model(builtin_lm):
    text = sb.pack(sb.load_text("builtin:held_out"), builtin_lm.tokenizer, 128, 4096)
    found = head_roles(builtin_lm, text.ids_NS)
    known = head_induction_scores(builtin_lm)
    torch.testing.assert_close(found.score_LHR[..., ROLES.index("induction")], known, rtol=0, atol=0.04)
    assert set(found.heads("induction")) == {divmod(i, 8) for i in (known.flatten() > 0.4).nonzero()[:, 0].tolist()}
    assert found.heads("induction")[0] == (3, 0) and found.heads("previous") == [(2, 6)]

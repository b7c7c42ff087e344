"""Roles of latents: against a loop over firings, heads and positions; of the hand-built model; of Lorsa heads made from known heads."""

import pytest
import torch

import saebench as sb
from saebench.circuits.heads.feature_roles import dominating, feature_roles, feature_sources, polysemanticity
from saebench.circuits.heads.roles import ON_TEXT, head_roles, repeat_places, text_places
from saebench.dictionaries.attention_output import head_shares, source_attribution
from saebench.dictionaries.lorsa import Lorsa
from saebench.errors import UserError
from saebench.lm.attention import attention_weights
from saebench.lm.random_tokens import repeated_random
from saebench.synthetic.toy_transformer import save_induction_transformer


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy") / "model"
    circuit = save_induction_transformer(directory)
    return sb.load_lm(directory), circuit


def attention_sae(lm, layer: int, d_sae: int = 24, k: int = 5, seed: int = 0) -> sb.Dictionary:
    site = f"blocks.{layer}.attn.hook_z"
    sae = sb.TopK(d_sae=d_sae, k=k, d_in=lm.width(site), site=site).build().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for weight in (sae.W_enc_FD, sae.W_dec):
        weight.copy_(torch.nn.functional.normalize(torch.randn(weight.shape, generator=generator), dim=1))
    sae.b_enc.copy_(0.1 * torch.randn(d_sae, generator=generator))
    sae.folded = True
    return sae


def lorsa_of(lm, layer: int, k: int) -> sb.Dictionary:
    """One Lorsa head for each coordinate of each head of the model: group g is head g."""
    host, site = attention_weights(lm, layer), f"blocks.{layer}.attn.hook_in"
    count, width = host.num_heads, host.num_heads * host.d_head
    config = Lorsa(
        d_sae=width, k=k, score="abs", num_qk=count, site=site, target=f"blocks.{layer}.hook_attn_out", d_in=width, d_out=width
    )
    made = config.for_lm(lm).build().requires_grad_(False)
    for name in ("W_Q", "b_Q", "W_K", "b_K"):
        getattr(made, name).copy_(getattr(host, name + ("_HDE" if name[0] == "W" else "_HE")))
    made.W_V_FD.copy_(host.W_V_HDE.transpose(1, 2).flatten(0, 1))
    made.b_V.copy_(host.b_V_HE.flatten())
    return made


def test_scores_are_those_of_a_loop_over_firings(tiny_lm, contexts):
    sae, ids = attention_sae(tiny_lm, 1), contexts.ids_NS[:2, :14]
    found = feature_roles(sae, tiny_lm, ids, count=2, length=6)
    repeats = repeated_random(tiny_lm, 2, 6)
    for texts, places, first, roles in (
        (ids, text_places(14), 10, slice(0, 5)),
        (repeats, repeat_places(6), 7, slice(5, 7)),
    ):
        for latent in (0, 3, 11):
            parts = source_attribution(sae, tiny_lm, texts, latent).by_head_CHTS.abs()
            codes_CS = sae.encode(tiny_lm.read(texts, sae.config.reads)[sae.config.reads[0]].flatten(0, 1)).to_dense()[:, latent]
            codes_CS = codes_CS.view(texts.shape)
            mass_HR = torch.zeros(4, len(places))
            for c in range(len(texts)):
                for t in range(first, texts.shape[1]):
                    for r, place_TS in enumerate(places):
                        there_H = (parts[c, :, t] * place_TS[t - first]).sum(1)
                        mass_HR[:, r] += codes_CS[c, t] * there_H / parts[c, :, t].sum()
            torch.testing.assert_close(found.mass_FHR[latent][:, roles], mass_HR, rtol=1e-4, atol=1e-5)
            total = codes_CS[:, first:].sum()
            kind = 0 if len(places) == 5 else 1
            assert float(found.through_FHP[latent, :, kind].sum()) == pytest.approx(float(total), rel=1e-4, abs=1e-6)
    fires = found.through_FHP[..., 0].sum(1) > 0
    torch.testing.assert_close(found.score_FR[fires][:, : len(ON_TEXT)].sum(1), torch.ones(int(fires.sum())))
    torch.testing.assert_close(found.share_FH[fires].sum(1), torch.ones(int(fires.sum())))


def test_lorsa_scores_are_those_of_the_z_pattern(tiny_lm, contexts):
    lorsa, ids = lorsa_of(tiny_lm, 1, k=6), contexts.ids_NS[:2, :14]
    found = feature_roles(lorsa, tiny_lm, ids, count=1, length=5)
    places, expected = text_places(14), torch.zeros(32, 5)
    for ids_S in ids:
        x_SD = tiny_lm.read(ids_S[None], lorsa.config.reads)[lorsa.config.reads[0]][0]
        z_SF = lorsa.encode(x_SD[None]).to_dense().abs()
        for head in range(32):
            share_TS = lorsa.z_pattern(x_SD, head).abs()
            share_TS = share_TS / share_TS.sum(1, keepdim=True)
            expected[head] += torch.einsum("ts,rts,t->r", share_TS[10:], places.float(), z_SF[10:, head])
    torch.testing.assert_close(found.mass_FHR[:, 0, :5], expected, rtol=1e-4, atol=1e-5)


def test_features_tell_the_roles_of_the_hand_built_models_heads(toy):
    lm, circuit = toy
    ids = torch.randint(1, 27, (6, 40), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    for layer, (number, role) in ((0, (0, "previous")), (1, (1, "induction"))):
        assert (layer, number) in (circuit.previous_token_head, circuit.induction_head)
        sae = attention_sae(lm, layer, d_sae=60, seed=layer)
        sae.b_enc.zero_()
        found = feature_roles(sae, lm, ids)
        assert found.of_head(number)[0] == role
        fires = found.through_FHP[:, :, 1].sum(1) > 0
        assert fires.sum() > 5 and all(role in found.of(latent) for latent in fires.nonzero()[:, 0].tolist())
        families = found.families()
        assert next(iter(families[number])) == role and families[1 - number] == {}  # all that fires is of the head that writes
        assert bool((dominating(found.share_FH)[found.through_FHP[..., 0].sum(1) > 0] == number).all())


def test_lorsa_heads_have_the_roles_of_the_heads_they_were_made_from(toy):
    lm, _ = toy
    ids = torch.randint(1, 27, (4, 40), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 0
    for layer, (number, role) in ((0, (0, "previous")), (1, (1, "induction"))):
        lorsa = lorsa_of(lm, layer, k=4)
        found = feature_roles(lorsa, lm, ids)
        fires = (found.through_FHP[:, 0, 1] > 1e-3).nonzero()[:, 0].tolist()
        assert fires and all(latent // lorsa.group_size == number and role in found.of(latent) for latent in fires)
        assert role in head_roles(lm, ids).of(layer, number)


def test_polysemanticity_by_hand():
    share_FH = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    found = polysemanticity(share_FH)
    assert found.dominated_H.tolist() == [3, 1, 0]
    expected = [3.1**2 / (1 + 1 + 0.36 + 0.25), 1.9**2 / (0.16 + 0.25 + 1), 0.0]
    assert found.effective_H.tolist() == pytest.approx(expected)
    weighted = polysemanticity(share_FH, torch.tensor([1.0, 0, 0, 0, 2]))
    assert weighted.effective_H.tolist() == pytest.approx([1, 1, 0])
    assert polysemanticity(torch.full((6, 2), torch.nan)).dominated_H.tolist() == [0, 0]


def test_weights_alone_give_shares(tiny_lm):
    shares = head_shares(attention_sae(tiny_lm, 0), 4)
    found = polysemanticity(shares)
    assert found.dominated_H.sum() <= 24 and (found.effective_H > 10).all()


def test_sources_add_up_to_the_value(tiny_lm, contexts):
    sae, ids = attention_sae(tiny_lm, 1), contexts.ids_NS[0, :12].tolist()
    z_SD = tiny_lm.read(torch.tensor([ids]), sae.config.reads)[sae.config.reads[0]][0]
    found = feature_sources(tiny_lm, sae, ids, 5)
    expected = float((z_SD[-1] - sae.b_in) @ sae.W_enc_FD[5] + sae.b_enc[5])
    assert found.value == pytest.approx(expected, abs=1e-4) and found.by_head_HS.shape == (4, 12)
    with pytest.raises(UserError, match="latent 24 is not one of the 24"):
        feature_sources(tiny_lm, sae, ids, 24)


def test_other_dictionaries_are_refused(tiny_lm, contexts):
    resid = sb.TopK(d_sae=8, k=2, d_in=32, site="blocks.0.hook_resid_post").build()
    for ask in (
        lambda: feature_roles(resid, tiny_lm, contexts.ids_NS[:1]),
        lambda: feature_sources(tiny_lm, resid, [0, 1], 0),
    ):
        with pytest.raises(UserError, match="does not read along a context"):
            ask()
    dead = attention_sae(tiny_lm, 0)
    dead.W_enc_FD.zero_()
    dead.b_enc.fill_(-1)
    with pytest.raises(UserError, match="no latent fires"):
        feature_roles(dead, tiny_lm, contexts.ids_NS[:1])

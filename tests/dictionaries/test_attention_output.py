"""Attribution of attention-output latents: whatever they are taken apart into adds up to their pre-activation, for shared and for
separate values, and does not depend on how heads are numbered."""

import copy

import pytest
import torch

import saebench as sb
from saebench.dictionaries.attention_output import component_attribution, head_attribution, head_shares, source_attribution
from saebench.errors import UserError
from saebench.lm import LanguageModel, load_lm

LAYER, HEADS, WIDTH = 2, 4, 32


def dictionary_of(lm, contexts, layer=LAYER, **options):
    """An untrained dictionary of hook_z with biases and a decoder of its own."""
    site = f"blocks.{layer}.attn.hook_z"
    x = lm.read(contexts.ids_NS[:20], [site])[site].flatten(0, 1).clone()
    sae = sb.TopK(d_sae=48, k=6, d_in=x.shape[1], site=site, **options).build()
    generator = torch.Generator().manual_seed(layer)
    sae.initialise(x, x, generator)
    with torch.no_grad():
        sae.b_enc.normal_(generator=generator)
        sae.W_dec += 0.1 * torch.randn(sae.W_dec.shape, generator=generator)
    return sae.requires_grad_(False)


def pre_activations(sae, x):
    """z of all latents by plain algebra."""
    weights = sae.weights().folded()
    return (x if sae.b_in is None else x - sae.b_in) @ weights.W_enc_FD.T + weights.b_enc_F


@pytest.fixture(scope="module")
def shared_values_lm(tmp_path_factory, tiny_lm_directory) -> LanguageModel:
    """A Llama whose four heads share the values of two, with root-mean-square norms and rotary positions."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("models") / "llama"
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_directory)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return load_lm(directory)


@pytest.fixture(params=["tiny_lm", "shared_values_lm"])
def lm(request) -> LanguageModel:
    return request.getfixturevalue(request.param)


def test_shares_are_lengths_of_head_blocks():
    sae = sb.TopK(d_sae=2, k=1, d_in=6).build()
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[3.0, 4, 0, 0, 5, 0], [0, 0, 2, 0, 0, 0]]))
    torch.testing.assert_close(head_shares(sae, 3), torch.tensor([[0.5, 0, 0.5], [0, 1, 0]]))


def test_shares_sum_to_one(tiny_lm, contexts):
    shares = head_shares(dictionary_of(tiny_lm, contexts), HEADS)
    assert shares.shape == (48, HEADS)
    torch.testing.assert_close(shares.sum(1), torch.ones(48))
    with pytest.raises(UserError, match="5 heads do not divide a width of 32"):
        head_shares(dictionary_of(tiny_lm, contexts), 5)


@pytest.mark.parametrize("options", [{}, {"subtract_b_dec": False}, {"decoder": "free"}])
def test_heads_and_sources_sum_to_the_pre_activation(lm, contexts, options):
    sae = dictionary_of(lm, contexts, **options)
    ids = contexts.ids_NS[:3]
    z_CSD = lm.read(ids, [sae.config.site])[sae.config.site]
    expected_CSF = pre_activations(sae, z_CSD)
    for latent in (0, 17, 47):
        by_head = head_attribution(sae, z_CSD.flatten(0, 1), latent, HEADS).unflatten(0, ids.shape)
        bias = sae.weights().folded().b_enc_F[latent]
        torch.testing.assert_close(by_head.sum(2) + bias, expected_CSF[..., latent], atol=1e-4, rtol=1e-4)
        found = source_attribution(sae, lm, ids, latent)
        assert found.by_head_CHTS.shape == (3, HEADS, 16, 16)
        torch.testing.assert_close(found.pre_activation_CT, expected_CSF[..., latent], atol=1e-4, rtol=1e-4)
        assert found.by_head_CHTS.triu(1).abs().max() == 0  # nothing from positions that come later
        shared_out = (
            0 if sae.b_in is None else (sae.b_in * sae.weights().folded().W_enc_FD[latent]).unflatten(0, (HEADS, -1)).sum(1)
        )
        torch.testing.assert_close(found.by_head_CHTS.sum(3).transpose(1, 2) - shared_out, by_head, atol=1e-4, rtol=1e-4)


def test_the_values_that_a_source_carries_are_what_is_attributed(tiny_lm, contexts):
    """Without what one position contributes, the pre-activation is less by exactly that."""
    sae = dictionary_of(tiny_lm, contexts)
    ids, latent, source = contexts.ids_NS[:1], 5, 3
    found = source_attribution(sae, tiny_lm, ids, latent)
    with torch.no_grad():
        _, cache = tiny_lm.bridge.run_with_cache(ids.long(), names_filter=[f"blocks.{LAYER}.attn.hook_pattern"])
        pattern = cache[f"blocks.{LAYER}.attn.hook_pattern"]
    attention = tiny_lm.site(f"blocks.{LAYER}.attn.hook_in").module(tiny_lm.hf)
    v_weight, v_bias = attention.c_attn.weight[:, 2 * WIDTH :], attention.c_attn.bias[2 * WIDTH :]
    x = tiny_lm.read(ids, [f"blocks.{LAYER}.attn.hook_in"])[f"blocks.{LAYER}.attn.hook_in"]
    v = (x @ v_weight + v_bias).unflatten(-1, (HEADS, -1))
    v[:, source] = 0
    z_without = torch.einsum("chts,cshe->cthe", pattern, v).flatten(2)
    z = tiny_lm.read(ids, [sae.config.site])[sae.config.site]
    drop = (pre_activations(sae, z) - pre_activations(sae, z_without))[..., latent]
    torch.testing.assert_close(found.by_source_CTS[..., source], drop, atol=1e-4, rtol=1e-4)


def test_renumbered_heads_change_nothing_but_their_order(tiny_lm, contexts):
    """Heads permuted in the model, blocks permuted in the dictionary."""
    sae = dictionary_of(tiny_lm, contexts)
    order = torch.tensor([2, 0, 3, 1])
    columns = torch.arange(WIDTH).unflatten(0, (HEADS, -1))[order].flatten()
    hf = copy.deepcopy(tiny_lm.hf)
    other_lm = LanguageModel(tiny_lm.name, hf, tiny_lm.tokenizer, "permuted")
    attention = other_lm.site(f"blocks.{LAYER}.attn.hook_in").module(hf)
    qkv = torch.cat([columns + part * WIDTH for part in range(3)])
    with torch.no_grad():
        attention.c_attn.weight.copy_(attention.c_attn.weight[:, qkv])
        attention.c_attn.bias.copy_(attention.c_attn.bias[qkv])
        attention.c_proj.weight.copy_(attention.c_proj.weight[columns])
        other = copy.deepcopy(sae)
        for name in ("W_enc_FD", "W_dec"):
            getattr(other, name).copy_(getattr(sae, name)[:, columns])
        other.b_dec.copy_(sae.b_dec[columns])
    ids = contexts.ids_NS[:2]
    torch.testing.assert_close(other_lm.logits(ids), tiny_lm.logits(ids), atol=1e-4, rtol=1e-4)
    site = sae.config.site
    codes = [d.encode(m.read(ids, [site])[site].flatten(0, 1)) for d, m in ((sae, tiny_lm), (other, other_lm))]
    torch.testing.assert_close(codes[1].to_dense(), codes[0].to_dense(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head_shares(other, HEADS), head_shares(sae, HEADS)[:, order])
    found, moved = (source_attribution(d, m, ids, 7).by_head_CHTS for d, m in ((sae, tiny_lm), (other, other_lm)))
    torch.testing.assert_close(moved, found[:, order], atol=1e-4, rtol=1e-4)


def test_components_of_the_residual_stream_sum_to_the_pre_activation(lm, contexts):
    ids, position, latent = contexts.ids_NS[4], 9, 11
    saes = {layer: dictionary_of(lm, contexts, layer) for layer in (0, 1, 2)}
    mlp = dictionary_of(lm, contexts, 1).config.model_copy(update={"site": "blocks.1.hook_mlp_out"}).build()
    mlp.load_state_dict(saes[1].state_dict())
    expected = pre_activations(saes[2], lm.read(ids[None], [saes[2].config.site])[saes[2].config.site])[0, position, latent]
    coarse = component_attribution(saes[2], lm, ids, latent, position)
    fine = component_attribution(saes, lm, ids, latent, position, writers={"blocks.1.hook_mlp_out": mlp}, depth=3, branches=2)
    for parts in (coarse, fine):
        assert sum(part.value for part in parts) == pytest.approx(float(expected), abs=2e-4)
        assert all(part.position is None or part.position <= position for part in parts)
        assert [abs(part.value) for part in parts] == sorted((abs(part.value) for part in parts), reverse=True)
    assert all(part.latent is None for part in coarse)
    sites = {part.site for part in fine if part.latent is not None}
    assert sites == {"blocks.0.attn.hook_z", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"}
    sum_of = lambda parts, site, s: sum(p.value for p in parts if p.site == site and p.position == s)  # noqa: E731
    for s in (0, 4, 9):  # latents and the rest of a component are together the component
        together = sum_of(fine, "blocks.1.attn.hook_z", s) + sum_of(fine, "blocks.1.hook_attn_out", s)
        assert together == pytest.approx(sum_of(coarse, "blocks.1.hook_attn_out", s), abs=1e-4)
    taken = [part for part in fine if part.parts]
    assert len(taken) == 2
    for part in taken:
        layer = int(part.site.split(".")[1])
        z = lm.read(ids[None], [part.site])[part.site]
        below = pre_activations(saes[layer], z)[0, part.position, part.latent]
        assert sum(p.value for p in part.parts) == pytest.approx(float(below), abs=2e-4)


def test_wrong_dictionaries_are_named(tiny_lm, contexts):
    sae = dictionary_of(tiny_lm, contexts)
    ids = contexts.ids_NS[:1]
    with pytest.raises(UserError, match="latent 48 is not one of the 48"):
        source_attribution(sae, tiny_lm, ids, 48)
    elsewhere = sb.TopK(d_sae=4, k=1, d_in=32, site="blocks.1.hook_resid_post").build()
    with pytest.raises(UserError, match="reads blocks.1.hook_resid_post: this is for one blocks.N.attn.hook_z"):
        source_attribution(elsewhere, tiny_lm, ids, 0)
    with pytest.raises(UserError, match="position 16 is outside the 16 tokens"):
        component_attribution(sae, tiny_lm, ids[0], 0, 16)
    with pytest.raises(UserError, match="writes blocks.1.hook_resid_post"):
        component_attribution(sae, tiny_lm, ids[0], 0, 5, writers={"blocks.1.hook_mlp_out": elsewhere})

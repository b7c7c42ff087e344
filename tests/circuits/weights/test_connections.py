"""Connections by weights against the same numbers put together from the Hugging Face modules by hand, in float64."""

import numpy as np
import pytest
import torch
from mixes import TEXT, clt, lorsa, make, topk, transcoder
from torch.utils._python_dispatch import TorchDispatchMode

from saebench.circuits.graphs.replacement import LocalModel
from saebench.circuits.graphs.targets import Direction, Feature, Logit
from saebench.circuits.weights import connections as weights
from saebench.circuits.weights.connections import Connections
from saebench.circuits.weights.contributions import contributions
from saebench.circuits.weights.paths import routes
from saebench.codes import SparseCodes
from saebench.errors import UserError
from saebench.features.effects import LogitEffects

HEADS, E = 4, 8


def layer_of(lm, n):
    """Gain (centring with it) before attention, before the MLP, values and outputs by head, of one layer, as plain float64 arrays."""
    if hasattr(lm.hf, "transformer"):
        block = lm.hf.transformer.h[n]
        first, second = block.ln_1.weight, block.ln_2.weight
        W_V = block.attn.c_attn.weight[:, 64:]
        W_O, centred, post = block.attn.c_proj.weight, True, torch.ones(32)
    else:
        block = lm.hf.model.layers[n]
        gemma = hasattr(block, "pre_feedforward_layernorm")
        first = block.input_layernorm.weight + gemma
        second = block.pre_feedforward_layernorm.weight + 1 if gemma else block.post_attention_layernorm.weight
        post = block.post_attention_layernorm.weight + 1 if gemma else torch.ones(32)
        W_V = block.self_attn.v_proj.weight.T.unflatten(1, (2, E)).repeat_interleave(2, 1).flatten(1)  # one for two heads
        W_O, centred = block.self_attn.o_proj.weight.T, False
    array = lambda t: t.detach().double().numpy()  # noqa: E731
    return array(first), array(second), array(W_V), array(W_O), array(post), centred


def normed(x, gain, centred):
    return (x - x.mean(-1, keepdims=True) if centred else x) * gain


def by_hand(lm, d_ID, w_JD, reads, head=None):
    """c of directions written in the stream with what reads behind the norm before the MLP of layer `reads`."""
    x_ID = d_ID.double().numpy()
    if head is not None:
        gain, _, W_V, W_O, post, centred = layer_of(lm, head[0])
        part = slice(head[1] * E, (head[1] + 1) * E)
        x_ID = normed(x_ID, gain, centred) @ W_V[:, part] @ W_O[part] * post
    _, gain, *_, centred = layer_of(lm, reads)
    return normed(x_ID, gain, centred) @ w_JD.double().numpy().T


def close(found, expected, tolerance=1e-5):
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@pytest.fixture(params=["gpt2", "llama", "gemma"])
def name(request):
    return request.param


@pytest.fixture
def three(models, mixed, name):
    lm, dictionaries = models[name], mixed[name, "transcoders"]
    return lm, dictionaries, Connections(lm, dict(zip("abc", dictionaries, strict=True)))


def test_c_is_decoder_row_times_encoder_row_behind_the_gain(three):
    lm, (a, _, c), connections = three
    found_IJ = connections.between("a", "c", [3, 60, 7], [0, 63])
    close(found_IJ, by_hand(lm, a.W_dec[[3, 60, 7]], c.W_enc_FD[[0, 63]], 2))
    assert not connections.between("c", "a", [0, 1], [0, 1]).any()  # what is written later is not read


@pytest.mark.parametrize("head", [(1, 0), (1, 3), (2, 2)])
def test_c_through_a_head_goes_by_its_values_and_outputs(three, head):
    lm, (a, _, c), connections = three
    found_IJ = connections.between(0, 2, range(5), range(64), head=head)
    close(found_IJ, by_hand(lm, a.W_dec[:5], c.W_enc_FD, 2, head))
    assert not connections.between("b", "c", [0], [0], head=(1, 0)).any()  # the source is written behind the head


def test_twice_the_direction_is_twice_the_connection(models):
    lm = models["llama"]
    pair = make(lm, [transcoder(0), transcoder(1)])
    before = [Connections(lm, pair).between(0, 1, [5, 6], [1, 2], head=head).clone() for head in (None, (1, 1))]
    pair[0].W_dec[5] *= 2
    after = [Connections(lm, pair).between(0, 1, [5, 6], [1, 2], head=head) for head in (None, (1, 1))]
    for one, two in zip(before, after, strict=True):
        assert torch.allclose(two, one * torch.tensor([[2.0], [1.0]]), rtol=1e-4)
        assert one.abs().min() > 0


def test_a_cross_layer_transcoder_connects_by_all_that_it_writes_before(models, mixed):
    lm, (clt_,) = models["gpt2"], mixed["gpt2", "clt"]
    connections = Connections(lm, {"clt": clt_})
    found_IJ = connections.between("clt", "clt", [3, 45, 100], [2, 50, 110])
    d_D = (clt_.decoder(0, 0)[3] + clt_.decoder(0, 1)[3])[None]
    close(found_IJ[0, 2], by_hand(lm, d_D, clt_.W_enc_FD[[110]], 2)[0, 0])
    close(found_IJ[0, 1], by_hand(lm, clt_.decoder(0, 0)[[3]], clt_.W_enc_FD[[50]], 1)[0, 0])
    close(found_IJ[1, 2], by_hand(lm, clt_.decoder(1, 1)[[5]], clt_.W_enc_FD[[110]], 2)[0, 0])
    assert not found_IJ[:, 0].any() and not found_IJ[1, 1] and not found_IJ[2].any()
    numbers_FK, _ = connections.strongest("clt", "clt", 4, head=(2, 0))
    assert (numbers_FK[:80] == -1).all()  # the first two layers are not behind the head
    assert ((numbers_FK[80:] >= 0) & (numbers_FK[80:] < 80)).all()


def test_lorsa_reads_before_its_layer_and_attention_latents_through_heads(models, mixed):
    lm, dictionaries = models["gpt2"], mixed["gpt2", "lorsa"]
    connections = Connections(lm, dictionaries)
    gain, _, W_V, W_O, _, centred = layer_of(lm, 1)
    d_ID, reader = dictionaries[0].W_dec.double().numpy(), dictionaries[4]
    expected_IJ = normed(d_ID, gain, centred) @ reader.W_V_FD[:7].double().numpy().T
    close(connections.between(0, 4, range(64), range(7)), expected_IJ)
    z, out, _ = heads = mixed["gpt2", "heads"]
    connections = Connections(lm, [*heads[:2], dictionaries[0]])
    part = slice(2 * E, 3 * E)
    values_IE = normed(d_ID, gain, centred) @ W_V[:, part]
    close(connections.between(2, 0, range(64), range(9), head=(1, 2)), values_IE @ z.W_enc_FD[:9, part].double().numpy().T)
    gain, _, W_V, W_O, *_ = layer_of(lm, 2)
    values_ID = normed(d_ID, gain, centred) @ W_V[:, part] @ W_O[part]
    close(connections.between(2, 1, range(64), range(9), head=(2, 2)), values_ID @ out.W_enc_FD[:9].double().numpy().T)
    # a latent of the heads' outputs writes through the output matrix
    written_ID = z.W_dec[:5].double().numpy() @ layer_of(lm, 1)[3]
    expected = by_hand(lm, torch.tensor(written_ID), dictionaries[1].W_enc_FD[:5], 1)
    close(Connections(lm, [z, dictionaries[1]]).between(0, 1, range(5), range(5)), expected)


# --- rankings ---


@pytest.mark.parametrize("head", [None, (2, 1)])
def test_the_first_connections_are_the_largest_of_all(three, head):
    _, _, connections = three
    c_IJ = torch.cat([connections.between(n, "c", range(64), range(64), head=head) for n in "ab"])
    into = connections.into(Feature("c", 0, 9), head=head, count=10)
    expected = c_IJ[:, 9].abs().sort(descending=True).indices[:10].tolist()
    assert [(x.dictionary, x.latent) for x in into] == [("ab"[i // 64], i % 64) for i in expected]
    close([x.weight for x in into], c_IJ[expected, 9])
    assert all(x.score == x.weight for x in into)
    out = connections.out_of("a", 7, head=head, count=300)
    to_c = {x.latent: x.weight for x in out if x.dictionary == "c"}
    close([to_c[j] for j in range(64)], c_IJ[7])
    assert [abs(x.score) for x in out] == sorted((abs(x.score) for x in out), reverse=True)
    assert {x.dictionary for x in out} == ({"b", "c"} if head is None else {"c"})
    numbers_FK, weights_FK = connections.strongest("b", "c", 5, head=head)
    brute = c_IJ[64:].T
    order = brute.abs().sort(dim=1, descending=True).indices[:, :5]
    assert torch.equal(numbers_FK, order)
    close(weights_FK, brute.gather(1, order))


def test_fewer_connections_than_asked_for_are_filled_up(three):
    _, _, connections = three
    numbers_FK, weights_FK = connections.strongest("a", "b", 70)
    assert numbers_FK.shape == (64, 70) or (numbers_FK >= 0).sum(1).min() >= 60
    assert (weights_FK[numbers_FK < 0] == 0).all()
    nothing, _ = connections.strongest("c", "a", 3)
    assert (nothing == -1).all() and nothing.shape == (64, 3)


def test_targets_that_are_no_latents(three):
    _, (a, *_), connections = three
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    found = connections.into(Direction("blocks.2.hook_resid_pre", direction), count=64)
    weight = {x.latent: x.weight for x in found if x.dictionary == "a"}
    assert weight
    close(list(weight.values()), [float(a.W_dec[i] @ direction) for i in weight])
    logit = connections.into(Logit(7), count=200)
    effects = connections.to_logits("a", 3)
    (weight,) = (x.weight for x in logit if x.dictionary == "a" and x.latent == 3)
    assert weight == pytest.approx(float(effects[7]), rel=1e-4)


def codes_of(dense):
    return [SparseCodes.from_dense(x) for x in dense]


def test_with_codes_connections_count_where_both_are_active(three):
    _, _, connections = three
    draw = torch.Generator().manual_seed(0)
    dense = [torch.rand(200, 64, generator=draw) * (torch.rand(200, 64, generator=draw) < 0.1) for _ in range(3)]
    expected_IJ = torch.cat(dense[:2], 1).T @ (dense[2] > 0).float() / 200
    c_IJ = torch.cat([connections.between(n, "c", range(64), range(64)) for n in "ab"])
    codes = dict(zip("abc", codes_of(dense), strict=True))
    found = connections.into(Feature("c", 0, 9), codes=codes, count=8)
    scores_I = expected_IJ[:, 9] * c_IJ[:, 9]
    order = scores_I.abs().sort(descending=True).indices[:8].tolist()
    assert [(x.dictionary, x.latent) for x in found] == [("ab"[i // 64], i % 64) for i in order]
    close([x.score for x in found], scores_I[order])
    close([x.activity for x in found], expected_IJ[order, 9])
    out = connections.out_of("b", 5, codes=codes_of(dense), count=4)
    scores_J = expected_IJ[64 + 5] * c_IJ[64 + 5]
    order = scores_J.abs().sort(descending=True).indices[:4].tolist()
    assert [(x.dictionary, x.latent) for x in out] == [("c", j) for j in order]
    close([x.score for x in out], scores_J[order])
    of_token = connections.into(Logit(7), codes=codes, count=1)[0]
    mean = dense["abc".index(of_token.dictionary)][:, of_token.latent].mean()
    assert of_token.activity == pytest.approx(float(mean), rel=1e-5)
    plain = connections.into(Feature("c", 0, 9), count=8)
    assert [x.latent for x in plain] != [x.latent for x in found]


def test_codes_of_a_cross_layer_transcoder_are_of_its_layers(models, mixed):
    connections = Connections(models["llama"], {"clt": mixed["llama", "clt"][0]})
    dense = torch.rand(50, 120, generator=torch.Generator().manual_seed(1)).relu() * (torch.arange(120) % 3 == 0)
    for found in connections.into(Feature("clt", 0, 102), codes={"clt": SparseCodes.from_dense(dense)}, count=5):
        assert found.latent % 3 == 0 and found.latent < 80
        assert found.activity == pytest.approx(float(dense[:, found.latent].mean()), rel=1e-5)


# --- tokens ---


def test_de_embeddings_are_what_latents_read_of_the_embedding_alone(three, name):
    """The stream before the norm is replaced by the embedding of one token."""
    lm, (_, b, _), connections = three
    found_V = connections.de_embedding(Feature("b", 0, 11))
    W_E_VD = lm.hf.get_input_embeddings().weight.detach() * (32**0.5 if name == "gemma" else 1)
    ids_BS = torch.tensor([[1, 5, 9, 33, 200, 300]])
    with lm.edit({"blocks.1.hook_resid_mid": lambda x: W_E_VD[ids_BS]}):
        read = lm.read(ids_BS, ["blocks.1.mlp.hook_in"])["blocks.1.mlp.hook_in"][0].clone()
    with lm.edit({"blocks.1.hook_resid_mid": lambda x: torch.zeros_like(x)}):
        nothing = lm.read(ids_BS, ["blocks.1.mlp.hook_in"])["blocks.1.mlp.hook_in"][0].clone()
    close(found_V[ids_BS[0]], (read - nothing) @ b.W_enc_FD[11])
    assert found_V.shape == (len(W_E_VD),)
    high, low = connections.tokens(found_V, 3)
    assert [t.token for t in high] == found_V.sort(descending=True).indices[:3].tolist()
    assert low[0].weight == pytest.approx(float(found_V.min())) and low[0].text == lm.token_strings[low[0].token]


def test_de_embeddings_through_a_head_that_looks_at_the_token(models, mixed):
    """With one token in the context every head looks at it."""
    lm, dictionaries = models["gpt2"], mixed["gpt2", "transcoders"]
    found_V = Connections(lm, dictionaries).de_embedding(Feature(2, 0, 4), head=(1, 3))
    W_E_VD = lm.hf.get_input_embeddings().weight.detach()
    site, part = "blocks.1.attn.hook_z", slice(3 * E, 4 * E)
    values = []
    for token in (2, 50, 311):
        with lm.edit({"blocks.1.hook_resid_pre": lambda x, token=token: W_E_VD[token].expand_as(x)}):
            read = lm.read(torch.tensor([[0]]), [site])[site][0, 0].clone()
        with lm.edit({"blocks.1.hook_resid_pre": lambda x: torch.zeros_like(x)}):
            values.append((read - lm.read(torch.tensor([[0]]), [site])[site][0, 0]).reshape(-1)[part])
    W_O = torch.tensor(layer_of(lm, 1)[3][part])
    gain = layer_of(lm, 2)[1]
    out = normed((torch.stack(values).double() @ W_O).numpy(), gain, True)
    close(found_V[[2, 50, 311]], out @ dictionaries[2].W_enc_FD[4].double().numpy())


def test_effects_on_logits_are_those_of_feature_pages(three):
    lm, (a, _, c), connections = three
    effects = LogitEffects(c, lm)
    close(connections.to_logits("c", 9), effects.rows_FD[9] @ effects.W_U_VD.T)
    for head in [(1, 1), (2, 3)]:
        gain, _, W_V, W_O, post, centred = layer_of(lm, head[0])
        part = slice(head[1] * E, (head[1] + 1) * E)
        d_D = normed(a.W_dec[4].double().numpy(), gain, centred) @ W_V[:, part] @ W_O[part] * post
        close(connections.to_logits("a", 4, head=head), d_D @ effects.W_U_VD.double().numpy().T)
    assert not connections.to_logits("c", 9, head=(1, 0)).any()


# --- with a prompt ---


def test_the_first_factor_of_a_prompt_is_the_connection(models, mixed, name):
    lm, dictionaries = models[name], mixed[name, "transcoders"]
    model, connections = LocalModel(lm, dictionaries, TEXT), Connections(lm, dictionaries)
    reader, writer = model.parts[2], model.parts[0]
    position = 7
    target = Feature(2, position, int(reader.latents_N[reader.positions_N == position][0]))
    found = contributions(model, target)
    rows = [row for row in map(found.__getitem__, found.top(len(found))) if row.kind == "feature"]
    assert rows
    for row in rows:
        c = connections.between(row.dictionary, 2, [row.latent], [target.latent])
        assert row.weight == pytest.approx(float(c), rel=1e-4, abs=1e-5)
    latent = int(writer.latents_N[writer.positions_N == 4][0])
    found = 0
    for way in routes(model, target, Feature(0, 4, latent))[0]:
        if way.through is not None:
            c = connections.between(0, 2, [latent], [target.latent], head=(way.through.layer, way.through.head))
            assert way.weight == pytest.approx(float(c), rel=1e-3, abs=1e-5)
            found += 1
    assert found >= 4


def test_gains_of_one_are_not_read_as_gains_of_two(tiny_lm):
    """Some models keep 1 + gain: where all are equal, the size of the scale tells."""
    connections = Connections(tiny_lm, make(tiny_lm, [transcoder(0)]))
    assert all(torch.equal(norm.gain_D, torch.ones(32)) for norm in connections.invariant.norms)


# --- memory ---


class Largest(TorchDispatchMode):
    """Watches for the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_all_pairs_of_large_dictionaries_never_exist(models, monkeypatch):
    lm = models["gpt2"]
    pair = make(lm, [transcoder(0, d_sae=3000), transcoder(1, d_sae=3000)])
    connections = Connections(lm, pair)
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1 << 20)
    with Largest() as largest:
        numbers_FK, _ = connections.strongest(0, 1, 4)
        connections.into(Feature(1, 0, 2000))
        connections.out_of(0, 2000)
    assert largest.numbers <= 300_000 < 3000 * 3000 / 20  # a block, or rows of the weights: 3000 x 32
    brute = connections.between(0, 1, range(3000), [2999])[:, 0].abs().sort(descending=True).indices[:4]
    assert torch.equal(numbers_FK[2999], brute)


# --- what cannot be ---


def refused(match, call, *args, **options):
    with pytest.raises(UserError, match=match) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)


def test_bad_input_is_refused_in_one_line(models, mixed):
    lm = models["gpt2"]
    own = dict(zip(["a", "b", "c"], mixed["gpt2", "transcoders"], strict=True))
    connections = Connections(lm, own)
    refused("latent 64 is not one of the 64 of a", connections.between, "a", "b", [1, 64], [0])
    refused("latent -1 is not one of", connections.out_of, "a", -1)
    refused("latent 700 is not one of the 64 of c", connections.into, Feature("c", 0, 700))
    refused("there is no dictionary 'd': use one of a, b, c", connections.between, "d", "b", [1], [0])
    refused("there is no dictionary 3", connections.strongest, 3, "b")
    refused("too many to hold", connections.between, "a", "b", range(5000), range(5000))
    refused("no head 4 in layer 1: the model has 3 layers of 4 heads", connections.into, Feature("c", 0, 7), head=(1, 4))
    refused("no head 0 in layer 3", connections.to_logits, "a", 0, head=(3, 0))
    refused("not behind head 0 of layer 2: name an earlier", connections.into, Feature("b", 0, 7), head=(2, 0))
    refused("count=0 asks for nothing", connections.into, Feature("b", 0, 7), count=0)
    refused("vocabulary has no token 9999", connections.into, Logit(9999))
    refused("needs 32 finite numbers", connections.de_embedding, Direction("blocks.1.hook_resid_pre", torch.ones(5)))
    refused("is given", Connections, lm, [])


def test_codes_that_do_not_fit_are_refused_in_one_line(models, mixed):
    lm = models["gpt2"]
    connections = Connections(lm, dict(zip(["a", "b", "c"], mixed["gpt2", "transcoders"], strict=True)))
    good = codes_of([torch.ones(5, 64)] * 3)
    into = lambda codes, **options: connections.into(Feature("c", 0, 7), codes=codes, **options)  # noqa: E731
    refused("no codes of b", into, {"a": good[0], "c": good[2]})
    refused("2 codes for 3 dictionaries", into, good[:2])
    refused("over 63 latents, not its 64", into, [*good[:2], SparseCodes.from_dense(torch.ones(5, 63))])
    refused(r"different numbers of tokens \(5, 5, 6\)", into, [*good[:2], SparseCodes.from_dense(torch.ones(6, 64))])
    refused("over no token", into, codes_of([torch.ones(0, 64)] * 3))
    refused("a head joins", into, good, head=(1, 0))
    mixed_lorsa = Connections(lm, make(lm, [transcoder(0), lorsa(1)]))
    codes = [good[0], SparseCodes.from_dense(torch.ones(5, 32))]
    refused("reads other tokens than its own", mixed_lorsa.into, Feature(1, 0, 3), codes=codes)
    assert not mixed_lorsa.out_of(0, 3, codes=codes)


def test_attention_latents_need_a_head_of_their_layer(models, mixed):
    connections = Connections(models["gpt2"], mixed["gpt2", "heads"])
    refused("what the heads of layer 1 write: name one", connections.into, Feature(0, 0, 3))
    refused("heads of layer 1 write, not head 0 of layer 2", connections.into, Feature(0, 0, 3), head=(2, 0))


def test_an_embedding_behind_a_norm_is_refused(models, mixed, monkeypatch):
    lm = models["llama"]
    connections = Connections(lm, mixed["llama", "first_only"])
    embed = lm.hf.model.embed_tokens
    forward = type(embed).forward
    monkeypatch.setattr(embed, "forward", lambda ids: torch.nn.functional.normalize(forward(embed, ids), dim=-1))
    refused("more than a factor", connections.de_embedding, Feature(0, 0, 3))


def test_dictionaries_of_one_place_are_refused(models):
    lm = models["gpt2"]
    refused("both write", Connections, lm, make(lm, [transcoder(0), clt([0, 1])]))
    assert Connections(lm, make(lm, [topk("blocks.0.hook_resid_post"), transcoder(1)])).out_of(0, 3)

import copy

import pytest
import torch

from saebench.errors import UserError
from saebench.lm import load_lm
from saebench.synthetic.toy_transformer import InductionCircuit, induction_transformer, save_induction_transformer

SITES = [
    "hook_embed",
    "blocks.0.hook_resid_pre",
    "blocks.0.hook_attn_out",
    "blocks.0.hook_resid_mid",
    "blocks.0.hook_resid_post",
    "blocks.1.hook_resid_pre",
    "blocks.1.hook_attn_out",
    "blocks.1.hook_resid_mid",
    "blocks.1.hook_resid_post",
]


@pytest.fixture(scope="module")
def toy():
    return induction_transformer(seed=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy") / "induction"
    circuit = save_induction_transformer(directory, seed=1)
    return load_lm(directory, device="cpu"), circuit


def repeated(contexts=50, length=20, seed=0):
    """BOS, then the same `length` distinct characters twice."""
    generator = torch.Generator().manual_seed(seed)
    once = torch.stack([1 + torch.randperm(26, generator=generator)[:length] for _ in range(contexts)])
    return torch.cat([torch.zeros(contexts, 1, dtype=torch.int64), once, once], 1)


def arbitrary(contexts=6, length=63, seed=0):
    """BOS, then random characters with repetitions, and here and there BOS again."""
    ids = torch.randint(0, 27, (contexts, 1 + length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    return ids


def right(model, ids_BS, length=20):
    """Probability of the true next token where a token has been seen before: the least and the mean."""
    probabilities = model(ids_BS).logits.softmax(-1)[:, length + 1 : -1]
    chosen = probabilities.gather(-1, ids_BS[:, length + 2 :, None])
    return chosen.min().item(), chosen.mean().item()


def without(model, head):
    """The model with one head knocked out: what it writes is zero."""
    layer, number = head
    model = copy.deepcopy(model)
    projection = model.transformer.h[layer].attn.c_proj.weight
    size = len(projection) // model.config.n_head
    projection[number * size : (number + 1) * size] = 0
    return model


def test_it_predicts_the_repeated_token(toy):
    model, _ = toy
    assert right(model, repeated())[0] > 0.999
    assert right(model, repeated(length=5), 5)[0] > 0.999


def test_before_the_repetition_it_knows_nothing(toy):
    probabilities = toy[0](repeated()).logits.softmax(-1)[:, :20]
    assert torch.allclose(probabilities, torch.tensor(1 / 27), atol=1e-4)


def test_either_head_knocked_out_destroys_it(toy):
    model, circuit = toy
    for head in (circuit.previous_token_head, circuit.induction_head):
        assert right(without(model, head), repeated())[1] < 0.06
    for idle in ((0, 1), (1, 0)):
        assert right(without(model, idle), repeated())[0] > 0.999


def test_heads_attend_where_they_should(toy):
    model, circuit = toy
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    ids_BS = repeated(contexts=4)
    attentions = model(ids_BS, output_attentions=True).attentions
    positions = torch.arange(1, 41)
    layer, head = circuit.previous_token_head
    assert (attentions[layer][:, head, positions, positions - 1] > 1 - 1e-6).all()
    layer, head = circuit.induction_head
    second = torch.arange(21, 41)
    assert (attentions[layer][:, head, second, second - 19] > 1 - 1e-6).all()
    assert (attentions[layer][:, head, 1:20, 0] > 1 - 1e-6).all()


@pytest.mark.parametrize("site", SITES)
def test_activations_are_the_true_codes_of_known_directions(saved, site):
    lm, circuit = saved
    ids_BS = arbitrary()
    codes = circuit.codes(ids_BS, site)
    directions_FD = circuit.directions_at(site)
    assert len(codes) == ids_BS.numel()
    assert len(circuit.names_at(site)) == len(directions_FD) == codes.d_sae
    x_BSD = lm.read(ids_BS, [site])[site]
    assert torch.allclose(x_BSD.flatten(0, 1), codes.to_dense() @ directions_FD, atol=2e-5)


def test_directions_are_orthonormal_without_mean_and_not_aligned(toy):
    d = toy[1].directions_at("blocks.1.hook_resid_post")
    assert torch.allclose(d @ d.T, torch.eye(len(d)), atol=1e-5)
    assert d.sum(1).abs().max() < 1e-5
    assert d.abs().max() < 0.6


def test_names_and_codes_by_hand(toy):
    circuit = toy[1]
    site = "blocks.1.hook_resid_post"
    names = circuit.names_at(site)
    ids = torch.tensor([[0, 1, 2, 1, 3, 1]])  # BOS a b a c a
    codes = circuit.codes(ids, site)
    said = [
        {names[i]: v for i, v in zip(c.indices.tolist(), c.values.tolist(), strict=True)}
        for c in (codes[0:1], codes[1:2], codes[5:6])
    ]
    assert said[0] == {"token <bos>": 1, "position 0": 1}
    assert said[1] == {"token a": 1, "position 1": 1}
    assert said[2] == {"token a": 1, "position 5": 1, "previous c": 1, "prediction b": 0.5, "prediction c": 0.5}


def test_the_saved_checkpoint_is_an_ordinary_model(saved, toy):
    lm, circuit = saved
    ids_BS = repeated(contexts=3)
    assert torch.equal(lm.logits(ids_BS), toy[0](ids_BS).logits)
    assert isinstance(circuit, InductionCircuit)
    assert set(SITES) <= set(lm.sites()) | {"blocks.1.hook_resid_pre"}
    assert lm.max_context == 64
    assert lm.generate("qwertyuiopq", 9) == "wertyuiop"
    assert lm.token_strings[1:4] == ["a", "b", "c"]
    with lm.edit({"blocks.0.hook_attn_out": torch.zeros_like}):
        assert lm.logits(ids_BS)[:, 21:-1].softmax(-1).max() < 0.06


@pytest.mark.parametrize(("characters", "context"), [(2, 3), (5, 100), (94, 16)])
def test_other_sizes(characters, context):
    model, circuit = induction_transformer(characters, max_context=context)
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.zeros(20, 1).long(), torch.randint(1, characters + 1, (20, context - 1), generator=generator)], 1)
    hidden = model.transformer(ids, output_hidden_states=True).hidden_states
    expected = circuit.codes(ids, "blocks.1.hook_resid_pre").to_dense() @ circuit.directions_at("blocks.1.hook_resid_pre")
    assert torch.allclose(hidden[1].flatten(0, 1), expected, atol=2e-6)
    predicted = model(ids).logits @ torch.eye(characters + 1)[:, 1:]
    certain = circuit.codes(ids, "blocks.1.hook_attn_out").to_dense().view(20, context, -1)
    sure = certain.amax(-1) == 1
    assert torch.equal(predicted.argmax(-1)[sure], certain.argmax(-1)[sure])


def test_what_is_impossible_is_refused(toy):
    with pytest.raises(UserError, match="num_characters=95 is not between 2 and 94"):
        induction_transformer(95)
    with pytest.raises(UserError, match="max_context=2"):
        induction_transformer(max_context=2)
    with pytest.raises(UserError, match=r"site 'blocks.0.attn.hook_z' has no known features: use one of hook_embed"):
        toy[1].directions_at("blocks.0.attn.hook_z")
    with pytest.raises(UserError, match="does not begin with the BOS token"):
        toy[1].codes(torch.ones(1, 4), "hook_embed")

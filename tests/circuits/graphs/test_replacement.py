import pytest
import torch
from mixes import MIXES, TEXT, clt, lorsa, make, topk, transcoder

from saebench.circuits.graphs.replacement import LocalModel, prompt_ids
from saebench.errors import UserError
from saebench.lm import load_lm


@pytest.fixture(params=["gpt2", "llama", "gemma"])
def name(request):
    return request.param


@pytest.mark.parametrize("mix", MIXES)
def test_the_frozen_model_gives_the_models_own_logits(models, mixed, name, mix):
    lm = models[name]
    model = LocalModel(lm, mixed[name, mix], TEXT)
    logits_SV = lm.logits(torch.tensor([model.ids]))[0]
    assert (model.logits(model.run()) - logits_SV).abs().max() < 1e-4 * logits_SV.abs().max()
    assert sum(map(len, model.parts)) >= 5 * (model.size - 1) * 0.5


@pytest.mark.parametrize("mix", MIXES)
def test_the_frozen_model_is_linear_in_every_node(models, mixed, name, mix):
    """For values that the prompt never gives: f(a + b) - f(b) does not depend on b, and doubles with a."""
    model = LocalModel(models[name], mixed[name, mix], TEXT)
    draw = torch.Generator().manual_seed(0)

    def drawn():
        values = {i: torch.randn(len(part), generator=draw) for i, part in enumerate(model.parts)}
        errors = {w.place.site: torch.randn(w.error_SD.shape, generator=draw) for w in model.replaced()}
        return values, errors, torch.randn(model.stream[0].shape, generator=draw)

    def final(nodes):
        return model.run(*nodes).after[-1].double()

    def plus(one, other, times=1.0):
        add = lambda a, b: {key: a[key] + times * b[key] for key in a}  # noqa: E731
        return add(one[0], other[0]), add(one[1], other[1]), one[2] + times * other[2]

    a, b, c = drawn(), drawn(), drawn()
    moved = final(plus(b, a)) - final(b)
    size = moved.abs().max()
    assert size > 0.1
    assert (final(plus(c, a)) - final(c) - moved).abs().max() < 1e-4 * size
    assert (final(plus(b, a, 2.0)) - final(b) - 2 * moved).abs().max() < 1e-4 * size


def test_bos_has_no_latents_and_no_errors_and_other_first_tokens_have(models, mixed):
    lm = models["gpt2"]
    model = LocalModel(lm, mixed["gpt2", "lorsa"], TEXT)
    assert all(int(part.positions_N.min()) == 1 for part in model.parts)
    assert all(not written.error_SD[0].any() for written in model.replaced())
    without = LocalModel(lm, mixed["gpt2", "lorsa"], model.ids[1:])
    assert all(int(part.positions_N.min()) == 0 for part in without.parts)
    assert all(written.error_SD[0].any() for written in without.replaced())


def test_an_mlp_without_dictionary_is_all_error(models, mixed):
    model = LocalModel(models["gpt2"], mixed["gpt2", "first_only"], TEXT)
    written = model.lm.read(torch.tensor([model.ids]), ["blocks.2.hook_mlp_out"])["blocks.2.hook_mlp_out"][0]
    assert torch.allclose(model.steps[5].error_SD[1:], written[1:], atol=1e-4)
    assert model.steps[4] is None


def test_a_perfect_transcoder_leaves_no_error(tiny_lm_directory):
    """A ReLU MLP is a transcoder: encoder and decoder are its own matrices."""
    from transformers import GPT2LMHeadModel

    hf = GPT2LMHeadModel.from_pretrained(tiny_lm_directory, activation_function="relu").eval().requires_grad_(False)
    plain = load_lm(tiny_lm_directory)
    lm = type(plain)("relu", hf, plain.tokenizer, "relu")
    spec = {"architecture": "relu", "d_sae": 128, "site": "blocks.1.mlp.hook_in", "target": "blocks.1.hook_mlp_out"}
    (dictionary,) = make(lm, [spec])
    mlp = hf.transformer.h[1].mlp
    dictionary.W_enc_FD.copy_(mlp.c_fc.weight.T)
    dictionary.b_enc.copy_(mlp.c_fc.bias)
    dictionary.W_dec.copy_(mlp.c_proj.weight)
    dictionary.b_dec.copy_(mlp.c_proj.bias)
    model = LocalModel(lm, [dictionary], TEXT)
    written = lm.read(torch.tensor([model.ids]), ["blocks.1.hook_mlp_out"])["blocks.1.hook_mlp_out"]
    assert model.steps[3].error_SD.abs().max() < 1e-4 * written.abs().max()


def refused(lm, specs, match, prompt=TEXT):
    dictionaries = make(lm, specs) if specs and isinstance(specs[0], dict) else specs
    with pytest.raises(UserError, match=match) as caught:
        LocalModel(lm, dictionaries, prompt)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused_in_one_line(models, builtin_lm):
    lm = models["gpt2"]
    refused(lm, [], "no dictionary is given.*train transcoders")
    refused(lm, [transcoder(0)], "the prompt is empty", "")
    refused(lm, [transcoder(0)], "exceeds the model's 64 positions: shorten it", TEXT * 10)
    refused(lm, [transcoder(0)], "token id 5000 is not in the model's vocabulary", [0, 5000])
    refused(lm, [transcoder(0), transcoder(0)], "both write blocks.0.hook_mlp_out")
    refused(lm, [transcoder(0), clt([0, 1])], "both write")
    refused(lm, [topk("blocks.1.hook_mlp_out")], "not linear in what stands before it")
    refused(lm, [transcoder(1, site="blocks.2.hook_resid_pre")], "not linear in what stands before it")
    refused(
        lm,
        [{"architecture": "crosscoder", "d_sae": 64, "k": 4, "site": ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]}],
        "several sites",
    )
    refused(lm, [topk("blocks.1.mlp.hook_post")], "not a place of a graph")
    refused(lm, [transcoder(0, site="blocks.0.attn.hook_z", skip=True)], "bypass")
    refused(
        lm,
        [{"architecture": "matching_pursuit", "d_sae": 64, "steps": 4, "site": "blocks.0.hook_resid_post"}],
        "of no kind that graphs",
    )
    refused(builtin_lm, make(lm, [transcoder(0)]), "wrong model")
    refused(lm, make(builtin_lm, [transcoder(3)]), "model has layers 0 to 2|unknown site")


def test_outputs_before_a_norm_are_refused(models):
    for site in ("attn.hook_out", "mlp.hook_out"):
        refused(models["gemma"], [transcoder(1, target=f"blocks.1.{site}")], "a norm comes between")


def test_parallel_blocks_are_refused(tiny_lm):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from saebench.lm import LanguageModel

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=len(tiny_lm.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    lm = LanguageModel("neox", GPTNeoXForCausalLM(config).eval().requires_grad_(False), tiny_lm.tokenizer, "neox")
    refused(lm, [transcoder(0)], "GPT-2 and Llama")


def test_prompt_ids_are_behind_bos(tiny_lm):
    ids, text = prompt_ids(tiny_lm, TEXT)
    assert ids[0] == tiny_lm.tokenizer.bos_token_id and text == TEXT
    assert prompt_ids(tiny_lm, ids) == (ids, TEXT)
    assert lorsa(0)["d_sae"] == 32

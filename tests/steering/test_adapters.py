"""Adapters: on and off to the last bit, sites and edits on top of them, the directory that peft reads, what is refused."""

import json
import re
import shutil

import pytest
import torch
import transformers

from saebench.errors import UserError
from saebench.lm import load_lm
from saebench.steering.adapters import (
    Adapter,
    adapter_tensors,
    attach,
    attached,
    detach,
    inject,
    load_adapter,
    parameters,
    projections,
)
from saebench.steering.edits import add
from saebench.steering.hooks import steer

SITE = "blocks.1.hook_resid_post"


@pytest.fixture
def ids_BS(tiny_lm):
    return torch.randint(len(tiny_lm.tokenizer), (3, 20), generator=torch.Generator().manual_seed(1))


def drawn(lm, layers=(0, 1), seed=0):
    """An adapter with random matrices on all projections of some layers."""
    import peft

    names, transposed = projections(lm, layers)
    config = peft.LoraConfig(
        r=2, lora_alpha=8, lora_dropout=0.05, target_modules=names, fan_in_fan_out=transposed, task_type="CAUSAL_LM"
    )
    inject(lm, config)
    try:
        torch.manual_seed(seed)
        for parameter in parameters(lm):
            torch.nn.init.normal_(parameter, std=0.1)
        return Adapter(config, {name: tensor.detach().clone() for name, tensor in adapter_tensors(lm).items()}, lm.fingerprint)
    finally:
        detach(lm)


@pytest.fixture(scope="module")
def adapter(tiny_lm):
    return drawn(tiny_lm)


@pytest.fixture
def saved(adapter, tmp_path):
    adapter.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_on_and_off_to_the_last_bit(tiny_lm, adapter, saved, ids_BS):
    module, before = tiny_lm.hf.transformer.h[0].mlp.c_fc, tiny_lm.logits(ids_BS)
    attach(tiny_lm, adapter)
    with_it = tiny_lm.logits(ids_BS)
    assert not torch.allclose(with_it, before)
    detach(tiny_lm)
    detach(tiny_lm)
    assert tiny_lm.hf.transformer.h[0].mlp.c_fc is module and not hasattr(tiny_lm.hf, "peft_config")
    assert torch.equal(tiny_lm.logits(ids_BS), before)
    with attached(tiny_lm, saved):
        assert torch.equal(tiny_lm.logits(ids_BS), with_it)
        assert not any(parameter.requires_grad for parameter in tiny_lm.hf.parameters())
    with pytest.raises(ZeroDivisionError), attached(tiny_lm, str(saved)):
        _ = 1 / 0
    assert torch.equal(tiny_lm.logits(ids_BS), before)


def test_an_adapter_is_base_plus_product(tiny_lm, adapter):
    x_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    name = "transformer.h.1.mlp.c_fc"
    module = tiny_lm.hf.get_submodule(name)
    A, B = (adapter.tensors[f"{name}.lora_{side}.weight"] for side in "AB")
    expected = x_TD @ module.weight + module.bias + 8 / 2 * x_TD @ A.T @ B.T
    with attached(tiny_lm, adapter), torch.no_grad():
        assert torch.allclose(tiny_lm.hf.get_submodule(name)(x_TD), expected, atol=1e-5)


def test_sites_generation_and_edits_work_on_top(tiny_lm, adapter, kinds, ids_BS):
    before = tiny_lm.read(ids_BS, [SITE])[SITE]
    edit = add(kinds["topk"], 3, strength=4.0)
    with attached(tiny_lm, adapter):
        inside = tiny_lm.read(ids_BS, [SITE])[SITE]
        with torch.no_grad():
            states = tiny_lm.hf(ids_BS, output_hidden_states=True).hidden_states
        assert torch.equal(inside, states[2]) and not torch.allclose(inside, before)
        text = tiny_lm.generate("def value", 12)
        with steer(tiny_lm, edit):
            moved = tiny_lm.read(ids_BS, [SITE])[SITE]
            assert tiny_lm.generate_ids(ids_BS, 4, whole=True).shape == (3, 4)
        assert torch.allclose(moved[:, 1:] - inside[:, 1:], (4.0 * edit.vectors[0][0]).expand_as(moved[:, 1:]), atol=1e-4)
        mlp = tiny_lm.read(ids_BS, ["blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out"])
        projection = tiny_lm.hf.transformer.h[0].mlp.c_proj
        with torch.no_grad():
            assert torch.allclose(projection(mlp["blocks.0.mlp.hook_post"]), mlp["blocks.0.hook_mlp_out"], atol=1e-5)
    assert text != tiny_lm.generate("def value", 12)


def test_peft_reads_the_directory(tiny_lm, tiny_lm_directory, saved, ids_BS):
    import peft

    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_lm_directory)
    theirs = peft.PeftModel.from_pretrained(plain, saved).eval()
    with attached(tiny_lm, saved), torch.no_grad():
        assert torch.equal(tiny_lm.logits(ids_BS), theirs(ids_BS, use_cache=False).logits)


def test_a_directory_that_peft_wrote_is_attached(tiny_lm, tiny_lm_directory, saved, tmp_path, ids_BS):
    import peft

    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_lm_directory)
    peft.PeftModel.from_pretrained(plain, saved).save_pretrained(tmp_path / "theirs")
    with attached(tiny_lm, saved):
        expected = tiny_lm.logits(ids_BS)
    with attached(tiny_lm, tmp_path / "theirs"):
        assert torch.equal(tiny_lm.logits(ids_BS), expected)


def test_the_directory_is_as_documented(adapter, saved, tiny_lm):
    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["format"] == "saebench-adapter" and manifest["model"] == tiny_lm.fingerprint
    read = load_adapter(saved)
    assert all(torch.equal(tensor, adapter.tensors[name]) for name, tensor in read.tensors.items())
    assert read.parameters == sum(2 * (i + o) for i, o in [(32, 96), (32, 32), (32, 128), (128, 32)]) * 2
    with pytest.raises(UserError, match="exists already"):
        adapter.save(saved)


def test_a_llama_has_projections_too(tiny_lm_directory, tmp_path, ids_BS):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_lm_directory / name, tmp_path / "llama")
    lm = load_lm(tmp_path / "llama")
    names, transposed = projections(lm, [1])
    kinds = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert names == [f"model.layers.1.{kind}" for kind in kinds] and not transposed
    before = lm.logits(ids_BS)
    with attached(lm, drawn(lm, [1])):
        assert not torch.allclose(lm.logits(ids_BS), before)
        assert lm.read(ids_BS, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"].shape == (3, 20, 32)
    assert torch.equal(lm.logits(ids_BS), before)


def test_refuses_what_does_not_fit_and_leaves_the_model_alone(tiny_lm, adapter, saved, tmp_path, ids_BS):
    before = tiny_lm.logits(ids_BS)
    name = next(iter(adapter.tensors))

    def other(**changes):
        return Adapter(**{"config": adapter.config, "tensors": adapter.tensors} | changes)

    def directory(file, content):
        path = tmp_path / f"bad-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(saved, path)
        (path / "manifest.json").unlink()
        (path / file).write_text(content)
        return path

    def config_with(**changes):
        return directory("adapter_config.json", json.dumps(json.loads((saved / "adapter_config.json").read_text()) | changes))

    damaged = tmp_path / "damaged"
    shutil.copytree(saved, damaged)
    (damaged / "adapter_model.safetensors").write_bytes(b"x")
    refused = [
        (tmp_path / "nowhere", "is not an adapter: it has no adapter_config.json"),
        (damaged, "is damaged"),
        (directory("adapter_model.safetensors", "x"), "is damaged"),
        (directory("adapter_config.json", "{}"), "is an adapter of type None, and only LORA can be attached"),
        (directory("adapter_config.json", "not json"), "is not the configuration of a peft adapter"),
        (config_with(peft_type="IA3"), "only LORA can be attached"),
        (config_with(target_modules=["nothing.like.it"]), "the adapter does not fit model"),
        (other(model="0123"), "trained on a model with other weights (0123)"),
        (other(tensors={name: adapter.tensors[name]}), "is missing for model"),
        (other(tensors={**adapter.tensors, "more": torch.ones(1)}), "tensor 'more' of the adapter is unknown"),
        (other(tensors={**adapter.tensors, name: torch.ones(2, 5)}), "wrong model?"),
    ]
    for one, message in refused:
        with pytest.raises(UserError, match=re.escape(message)) as error:
            attach(tiny_lm, one)
        assert "\n" not in str(error.value)
        assert torch.equal(tiny_lm.logits(ids_BS), before), message
    with attached(tiny_lm, adapter), pytest.raises(UserError, match="an adapter is attached to the model already"):
        attach(tiny_lm, adapter)
    with pytest.raises(UserError, match="layer 3 is unknown: model .* has layers 0 to 2"):
        projections(tiny_lm, [3])
    assert torch.equal(tiny_lm.logits(ids_BS), before)

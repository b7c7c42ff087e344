import shutil

import pytest
import torch

from saebench.errors import UserError
from saebench.lm import load_lm


@pytest.fixture
def ids(tiny_lm):
    return torch.randint(0, len(tiny_lm.tokenizer), (3, 20), generator=torch.Generator().manual_seed(0))


def test_logits_equal_hugging_face_and_the_bridge(tiny_lm, tiny_lm_directory, ids):
    from transformers import AutoModelForCausalLM

    hugging_face = AutoModelForCausalLM.from_pretrained(tiny_lm_directory, local_files_only=True).eval()
    with torch.inference_mode():
        expected = hugging_face(ids).logits
        torch.testing.assert_close(tiny_lm.logits(ids), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(tiny_lm.bridge(ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "builtin", "stories260k", "austen-gpt2"])
def test_sites_equal_those_of_transformer_lens(name, request, tiny_lm):
    if name in ("tiny", "builtin"):
        lm = tiny_lm if name == "tiny" else request.getfixturevalue("builtin_lm")
    else:
        lm = load_lm(request.getfixturevalue("shared_data") / name)
    ids = torch.randint(0, len(lm.tokenizer), (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        _, cache = lm.bridge.run_with_cache(ids)
    sites = lm.sites()
    assert {"blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_mid", "blocks.1.attn.hook_z"} <= set(sites)
    for site, value in lm.read(ids, sites).items():
        torch.testing.assert_close(
            value, cache[site].reshape(value.shape), rtol=1e-4, atol=1e-4, msg=lambda m, site=site: f"{site}: {m}"
        )
        assert lm.width(site) == value.shape[-1]


def test_reading_stops_behind_the_deepest_site(tiny_lm, ids):
    ran = []
    handles = [block.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, block in enumerate(tiny_lm.hf.transformer.h)]
    tiny_lm.read(ids, ["blocks.0.hook_resid_post", "blocks.1.hook_attn_out"])
    for handle in handles:
        handle.remove()
    assert ran == [0]


def test_editing_replaces_and_leaves_no_trace(tiny_lm, ids):
    before = tiny_lm.logits(ids)
    x = tiny_lm.read(ids, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"]
    for site in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"):  # the same place, from both sides
        with tiny_lm.edit({site: lambda _, x=x: x + 1.0}):
            changed = tiny_lm.logits(ids)
        assert not torch.allclose(changed, before)
        with tiny_lm.edit({site: lambda value: value.clone()}):
            assert torch.equal(tiny_lm.logits(ids), before)
    with pytest.raises(RuntimeError, match="inside"), tiny_lm.edit({"blocks.0.hook_mlp_out": lambda value: value * 0}):
        raise RuntimeError("inside")
    assert torch.equal(tiny_lm.logits(ids), before)


def test_zeroing_attention_and_mlp_leaves_the_stream_unchanged(tiny_lm, ids):
    zero = torch.zeros_like
    with tiny_lm.edit({"blocks.0.hook_attn_out": zero, "blocks.0.hook_mlp_out": zero}):
        read = tiny_lm.read(ids, ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"])
    torch.testing.assert_close(read["blocks.0.hook_resid_pre"], read["blocks.0.hook_resid_post"])


def test_generation_equals_step_by_step_argmax(tiny_lm):
    prompt = "def value"
    new = tiny_lm.generate(prompt, max_new_tokens=8)
    ids = [tiny_lm.tokenizer.bos_token_id, *tiny_lm.tokenizer(prompt)["input_ids"]]
    start = len(ids)
    for _ in range(8):
        ids.append(int(tiny_lm.logits(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == tiny_lm.tokenizer.eos_token_id:
            break
    assert new == tiny_lm.tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert tiny_lm.generate(prompt, 8, temperature=1.0, seed=3) == tiny_lm.generate(prompt, 8, temperature=1.0, seed=3)


def test_edits_hold_while_generating(tiny_lm):
    with tiny_lm.edit({"blocks.2.hook_resid_post": torch.zeros_like}):
        edited = tiny_lm.generate("def value", max_new_tokens=5)
    assert edited != tiny_lm.generate("def value", max_new_tokens=5)


def test_unknown_sites_list_the_valid_ones(tiny_lm):
    with pytest.raises(
        UserError,
        match=r"unknown site 'blocks.7.hook_resid_post': the model has layers 0 to 2; valid sites are blocks.N.hook_resid_pre",
    ):
        tiny_lm.site("blocks.7.hook_resid_post")
    with pytest.raises(UserError, match="unknown site 'residual'"):
        tiny_lm.width("residual")


def test_contexts_beyond_the_positions_are_refused(tiny_lm):
    with pytest.raises(UserError, match="context_size=65 exceeds the 64 positions"):
        tiny_lm.logits(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(UserError, match="exceed the model's 64 positions"):
        tiny_lm.generate("x", max_new_tokens=100)


def test_models_that_cannot_be_loaded_are_named(tmp_path):
    for name, message in {
        "./nowhere": "does not exist",
        "no-such-model-here": "from the hub",
        str(tmp_path): "no config.json",
    }.items():
        with pytest.raises(UserError, match=message):
            load_lm(name)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no .safetensors weights"):
        load_lm(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match="has no tokenizer"):
        load_lm(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load"):
        load_lm(tmp_path)


def test_truncated_weights_and_missing_devices_are_named(tiny_lm_directory, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_lm_directory, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot load a language model from"):
        load_lm(copy)
    for device in ("abacus", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(UserError, match=f"device '{device}' is not to be had here"):
            load_lm(tiny_lm_directory, device=device)


def test_threads_do_not_see_each_others_sites(tiny_lm):
    from concurrent.futures import ThreadPoolExecutor

    batches = [torch.randint(0, len(tiny_lm.tokenizer), (4, 16), generator=torch.Generator().manual_seed(n)) for n in range(24)]
    sites = ["blocks.0.hook_resid_post", "blocks.2.hook_mlp_out"]
    expected = [tiny_lm.read(ids, sites[n % 2 :]) for n, ids in enumerate(batches)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda pair: tiny_lm.read(pair[1], sites[pair[0] % 2 :]), enumerate(batches)))
    for result, single in zip(results, expected, strict=True):
        assert result.keys() == single.keys()
        for site, value in single.items():
            torch.testing.assert_close(result[site], value)

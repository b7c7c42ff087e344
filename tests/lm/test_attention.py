"""Attention layers read as plain tensors give what the model's own modules give."""

import pytest
import torch

from saebench.errors import UserError
from saebench.lm import LanguageModel, load_lm
from saebench.lm.attention import attention_input, attention_weights

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def random_model(kind: str, tokenizer, **options) -> LanguageModel:
    """A tiny model of a Hugging Face kind with random weights, biases included."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3, generator=generator)
    model.config._name_or_path = kind  # what the bridge calls it
    return LanguageModel(kind, model, tokenizer, kind)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("Llama", {"num_key_value_heads": 2}, {"keys": 2, "rotated": 8}),
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": 5}, {"keys": 2, "rotated": 8, "window": 5}),
        ("Qwen2", {"num_key_value_heads": 1}, {"keys": 1, "rotated": 8, "biased": True}),
        (
            "Gemma2",
            {
                "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 16,
                "attn_logit_softcapping": 2.0, "attn_implementation": "eager",
            },
            {"keys": 2, "rotated": 8, "window": 5, "cap": 2.0, "scale": 0.25},
        ),
        ("GPTNeoX", {}, {"rotated": 2, "biased": True}),
    ],
)  # fmt: skip
def test_the_output_is_the_models(kind, options, expected, builtin_lm):
    lm = random_model(kind, builtin_lm.tokenizer, **options)
    ids = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(1))
    for layer in range(2):
        weights = attention_weights(lm, layer)
        x, y = lm.read(ids, [attention_input(layer), f"blocks.{layer}.attn.hook_out"]).values()
        torch.testing.assert_close(weights.output(x), y, rtol=0, atol=1e-5)
    rule = attention_weights(lm, 0).rule
    assert weights.num_key_heads == expected.get("keys", 4)
    assert 2 * len(rule.frequencies_R) == expected["rotated"]
    assert (rule.window, rule.soft_cap) == (expected.get("window"), expected.get("cap"))
    assert rule.scale == pytest.approx(expected.get("scale", 8**-0.5))
    assert bool((weights.b_Q_HE != 0).any()) == expected.get("biased", False)


@pytest.mark.parametrize("name", ["tiny", "builtin"])
def test_pattern_and_output_of_gpt2(name, request):
    lm = request.getfixturevalue(f"{name}_lm")
    ids = torch.randint(0, lm.hf.config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        _, cache = lm.bridge.run_with_cache(ids)
    for layer in range(lm.hf.config.n_layer):
        weights = attention_weights(lm, layer)
        x = lm.read(ids, [attention_input(layer)])[attention_input(layer)]
        torch.testing.assert_close(weights.pattern(x), cache[f"blocks.{layer}.attn.hook_pattern"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights.output(x), cache[f"blocks.{layer}.hook_attn_out"], rtol=1e-5, atol=2e-5)
    assert weights.num_heads * weights.d_head == lm.hf.config.n_embd
    assert len(weights.rule.frequencies_R) == 0


def test_attention_of_another_kind_is_refused(builtin_lm):
    lm = random_model("Qwen3", builtin_lm.tokenizer, num_key_value_heads=2, head_dim=8)  # normalises queries and keys
    with pytest.raises(UserError, match="layer 1 of model 'Qwen3' .* works in a way that is not known"):
        attention_weights(lm, 1)
    with pytest.raises(UserError, match="the model has layers 0 to 3"):
        attention_weights(builtin_lm, 4)


def test_a_model_of_few_positions(shared_data):
    lm = load_lm(shared_data / "gpt-nano-sort")
    assert lm.max_context < 12
    assert attention_weights(lm, 0).num_heads == lm.hf.config.n_head

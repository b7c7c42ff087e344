"""Small models of two kinds, and dictionaries for them."""

import pytest
import torch
from mixes import make, mixes, prepared
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from saebench.lm import LanguageModel, load_lm


def bumpy(name, hf, tokenizer) -> LanguageModel:
    """A model whose norms have gains that are not 1."""
    hf.eval().requires_grad_(False)
    for own, weight in hf.named_parameters():
        if "norm" in own:
            weight.data += 0.3 * torch.randn(weight.shape)
    return LanguageModel(name, hf, tokenizer, name)


@pytest.fixture(scope="session")
def tiny_llama(tiny_lm) -> LanguageModel:
    """A Llama with random weights, 3 layers, 4 heads on 2 key heads, and the tiny model's tokens."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tiny_lm.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return bumpy("tiny-llama", LlamaForCausalLM(config), tiny_lm.tokenizer)


@pytest.fixture(scope="session")
def tiny_gemma(tiny_lm) -> LanguageModel:
    """A Gemma 2 with random weights: norms behind attention and MLPs too, bounds on attention scores and logits."""
    torch.manual_seed(4)
    config = Gemma2Config(
        vocab_size=len(tiny_lm.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        final_logit_softcapping=5.0,
    )  # fmt: skip
    return bumpy("tiny-gemma", Gemma2ForCausalLM(config), tiny_lm.tokenizer)


@pytest.fixture(scope="session")
def bumpy_lm(tiny_lm_directory) -> LanguageModel:
    """The tiny GPT-2 with gains and biases that are not 1 and 0."""
    lm = load_lm(tiny_lm_directory)
    torch.manual_seed(2)
    for weight in lm.hf.parameters():
        if weight.ndim == 1:
            weight.data += 0.3 * torch.randn(weight.shape)
    return lm


@pytest.fixture(scope="session")
def models(bumpy_lm, tiny_llama, tiny_gemma):
    return {"gpt2": bumpy_lm, "llama": tiny_llama, "gemma": tiny_gemma}


@pytest.fixture(scope="session")
def mixed(models):
    """By model and name of the mix: dictionaries."""
    return {(name, key): make(lm, prepared(specs)) for name, lm in models.items() for key, specs in mixes(3).items()}

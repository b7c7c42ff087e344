"""Shared fixtures. Seeds are fixed; tests that need ../shared/data skip themselves when it is absent."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # to be set before triton is first imported

from helpers import SITES, small_text

from saebench.activations import harvest
from saebench.lm import LanguageModel, load_lm, pack

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def tiny_lm_directory(tmp_path_factory) -> Path:
    """A GPT-2 checkpoint directory with random weights: 3 layers, width 32, 64 positions, about 400 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((document.text for document in small_text()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(fast),
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_lm(tiny_lm_directory) -> LanguageModel:
    return load_lm(tiny_lm_directory)


@pytest.fixture(scope="session")
def builtin_lm() -> LanguageModel:
    return load_lm("builtin")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED_DATA


@pytest.fixture(scope="session")
def contexts(tiny_lm):
    """90-odd contexts of 16 tokens."""
    return pack(small_text(), tiny_lm.tokenizer, 16)


@pytest.fixture
def make_store(tiny_lm, contexts, tmp_path, monkeypatch):
    """Harvest into a directory, with shards of 16 contexts."""
    monkeypatch.setattr("saebench.activations.harvesting.SHARD_BYTES", 16 * 16 * 64 * 4)

    def make(name="store", storage="float32", **options):
        return harvest(tiny_lm, contexts, SITES, tmp_path / name, storage=storage, batch_size=8, **options)

    return make

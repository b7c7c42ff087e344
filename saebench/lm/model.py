"""A language model: load it, read its sites, replace what stands there, generate.

The model itself is the plain Hugging Face one, so its logits are Hugging Face's; names come from TransformerLens (`sites.py`).
Shape suffixes: `B` contexts in a batch, `S` positions, `D` width of a site, `V` vocabulary.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from saebench.errors import UserError
from saebench.lm.sites import Site, SiteTable, hooked, read_sites
from saebench.lm.unembedding import direct_unembedding

BUILTIN = Path(__file__).parent / "builtin"
ENDS_HASHED = 1 << 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")


def load_lm(name: str | Path = "builtin", *, device: str = "auto", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Load a causal language model: `builtin`, a Hugging Face checkpoint directory, or the name of a model on the hub.

    `device` is `auto` (CUDA where there is one), `cpu`, `cuda` or any torch device. Only safetensors weights are read.
    Raises UserError when the model is not found, incomplete, or the hub cannot be reached.
    """
    name, place = str(name), _device(device)
    directory = BUILTIN if name == "builtin" else Path(name).expanduser()
    local = name == "builtin" or directory.exists()
    if local:
        _check_checkpoint(directory)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model directory {name} does not exist: give builtin, a checkpoint directory, or a hub name")
    source = str(directory) if local else name

    import transformers

    quiet = transformers.utils.logging
    verbosity = quiet.get_verbosity()
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, local_files_only=local
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        if local:
            raise UserError(f"cannot load a language model from {directory}: {reason}") from error
        raise UserError(
            f"cannot load model {name!r} from the hub ({reason}): check the name and the network, or give a local directory"
        ) from error
    finally:
        quiet.set_verbosity(verbosity)
    fingerprint = fingerprint_of(directory) if local else getattr(model.config, "_commit_hash", None) or "unknown"
    return LanguageModel(name, model.eval().requires_grad_(False).to(place), tokenizer, fingerprint)


def _device(name: str) -> torch.device:
    """The device of that name, if this machine has it. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not to be had here ({str(error).splitlines()[0]}): use cpu, or auto") from None


def _check_checkpoint(directory: Path) -> None:
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: a local model is a Hugging Face checkpoint directory")
    if not (directory / "config.json").exists():
        raise UserError(f"{directory} has no config.json: a local model is a Hugging Face checkpoint directory")
    if not list(directory.glob("*.safetensors")):
        raise UserError(f"{directory} has no .safetensors weights: convert them first (pickled weights are never read)")
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        raise UserError(f"{directory} has no tokenizer: it needs one of {', '.join(TOKENIZER_FILES)}")


def fingerprint_of(directory: Path) -> str:
    """A hash of a checkpoint: its config, and the name, size, first and last MiB of every weight file."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(ENDS_HASHED))
            file.seek(max(0, size - ENDS_HASHED))
            digest.update(file.read(ENDS_HASHED))
    return digest.hexdigest()[:16]


class LanguageModel:
    """A causal language model with its tokenizer. `hf` is the Hugging Face model, `bridge` TransformerLens' view of it."""

    def __init__(self, name: str, hf: Any, tokenizer: Any, fingerprint: str):
        self.name, self.hf, self.tokenizer, self.fingerprint = name, hf, tokenizer, fingerprint
        self._widths: dict[str, int] = {}
        self._ahead = False
        self._alone = threading.RLock()  # hooks belong to the module, not to a thread: one thread at a time

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def max_context(self) -> int | None:
        """The most tokens the model's positions allow, or None where nothing limits them."""
        return getattr(self.hf.config, "max_position_embeddings", None)

    @cached_property
    def site_table(self) -> SiteTable:
        os.environ.setdefault("TRANSFORMERLENS_DISABLE_TELEMETRY", "1")
        from transformer_lens.model_bridge import TransformerBridge

        def boot(twin: Any) -> Any:
            source = str(BUILTIN) if self.name == "builtin" else self.name
            return TransformerBridge.boot_transformers(source, hf_model=twin, tokenizer=self.tokenizer, device=str(self.device))

        return SiteTable(self.hf, boot)

    @property
    def bridge(self) -> Any:
        """TransformerLens' `TransformerBridge` of this model, sharing its weights."""
        return self.site_table.bridge

    def sites(self) -> list[str]:
        """The names of the common sites, in the order in which the model computes them."""
        return self.site_table.names()

    def site(self, name: str) -> Site:
        """Resolve a TransformerLens name. Raises UserError with the valid names."""
        return self.site_table[name]

    def width(self, site: str) -> int:
        """Numbers per token at a site. Raises UserError where the site does not hold one vector per token."""
        if site not in self._widths:
            value = self.read(torch.zeros(2, 3, dtype=torch.int64), [site])[site]
            if value.ndim != 3 or value.shape[:2] != (2, 3):
                raise UserError(f"site {site!r} holds a tensor of shape {tuple(value.shape)}, not one vector per token")
            self._widths[site] = value.shape[2]
        return self._widths[site]

    @torch.inference_mode()
    def read(self, ids_BS: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
        """The activations at some sites, [B, S, D] each; the model runs to the deepest of them and stops."""
        ids_BS = self._checked(ids_BS)
        base = self.hf.base_model  # without the unembedding, which no site but the logits needs
        with self._alone:
            return read_sites(
                self.hf, [self.site(name) for name in sites], lambda: base(ids_BS, use_cache=False), lambda: self._ahead
            )

    @contextmanager
    def running_ahead(self) -> Iterator[None]:
        """A forward pass in this block, made inside another before it begins, is not the one that `read` reads."""
        self._ahead = True
        try:
            yield
        finally:
            self._ahead = False

    @torch.inference_mode()
    def logits(self, ids_BS: Tensor) -> Tensor:
        """Next-token logits: [B, S, V]."""
        with self._alone:
            return self.hf(self._checked(ids_BS), use_cache=False).logits

    @contextmanager
    def edit(self, functions: dict[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
        """Replace sites while the block runs: each function gets the [B, S, D] tensor of its site and returns the one to go on
        with, or None to leave it. Holds for every forward pass inside, generation with a cache included; other
        threads wait."""
        with self._alone, hooked(self.hf, {self.site(name): function for name, function in functions.items()}):
            yield

    @contextmanager
    def watching(self, sites: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """What stands at some sites in the last forward pass of the block, behind the edits that are in place already: [B, S, D] each,
        copied, in the order in which the model computes them. For passes that are wanted whole; `read` runs no further than it must."""
        seen: dict[str, Tensor] = {}

        def keeper(site: str) -> Callable[[Tensor], None]:
            return lambda value: seen.update({site: value.clone()})

        with self.edit({site: keeper(site) for site in sites}):
            yield seen

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 50,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Continue a prompt, with a key-value cache; greedy at temperature 0, sampled with `seed` otherwise. Returns the new text;
        `on_text` gets it piece by piece as it is written. Raises UserError for a prompt without tokens, or too long a one."""
        ids = self.continue_prompt(prompt, max_new_tokens, temperature=temperature, seed=seed, on_text=on_text)
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def continue_prompt(
        self,
        prompt: str,
        max_new_tokens: int = 50,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> list[int]:
        """As `generate`, and returns the new tokens."""
        start = self.prompt_ids(prompt)
        written = _Written(self.tokenizer, on_text) if on_text is not None else None
        ids_BS = self.generate_ids(torch.tensor([start]), max_new_tokens, temperature=temperature, seed=seed, streamer=written)
        return ids_BS[0].tolist()

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt, behind BOS where the tokenizer has one. Raises UserError where there is none at all."""
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        if self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id, *ids]
        if not ids:
            raise UserError("the prompt is empty and the tokenizer has no BOS token: give at least one token")
        return ids

    def check_generation(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Raises UserError where a prompt and what is to follow do not fit the model's positions, or nothing is to follow."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} writes nothing: use at least 1")
        if self.max_context is not None and prompt_tokens + max_new_tokens > self.max_context:
            raise UserError(
                f"prompt of {prompt_tokens} tokens and {max_new_tokens} new ones exceed the model's {self.max_context} positions: "
                "shorten the prompt, or ask for fewer"
            )

    @torch.inference_mode()
    def generate_ids(
        self,
        ids_BS: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        whole: bool = False,
        streamer: Any = None,
    ) -> Tensor:
        """Continue prompts of equal length [B, S], each by itself, with a key-value cache: the new tokens [B, up to max_new_tokens]. A text
        that ends is filled with the token that ends texts; with `whole` no text ends, and all have max_new_tokens."""
        self.check_generation(ids_BS.shape[1], max_new_tokens)
        ids_BS = ids_BS.to(self.device, dtype=torch.int64)
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {"do_sample": False}
        )
        if whole:
            sampling["min_new_tokens"] = max_new_tokens
        with self._alone, torch.random.fork_rng():
            torch.manual_seed(seed)
            out_BS = self.hf.generate(
                ids_BS,
                attention_mask=torch.ones_like(ids_BS),
                max_new_tokens=max_new_tokens,
                use_cache=True,
                pad_token_id=self.tokenizer.eos_token_id,
                streamer=streamer,
                **sampling,
            )
        return out_BS[:, ids_BS.shape[1] :]

    @cached_property
    def direct_unembedding_VD(self) -> Tensor:
        """What a vector in the residual stream adds to the logits through the final norm, its scale taken as 1: [V, D] float32, in memory.
        Raises UserError for a model without one final norm."""
        return direct_unembedding(self.hf, self.site("ln_final.hook_in").module(self.hf))

    @cached_property
    def token_strings(self) -> list[str]:
        """The text of every token of the vocabulary."""
        return self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])

    def check_context(self, context_size: int) -> None:
        """Raises UserError where contexts of this size are longer than the model's positions."""
        if self.max_context is not None and context_size > self.max_context:
            raise UserError(
                f"context_size={context_size} exceeds the {self.max_context} positions of model {self.name!r}: lower it"
            )

    def _checked(self, ids_BS: Tensor) -> Tensor:
        self.check_context(ids_BS.shape[1])
        return ids_BS.to(self.device, dtype=torch.int64)


class _Written:
    """What `generate` tells of the text while it is written: whole words and signs, never half a character."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] | None = None
        self.told = 0

    def put(self, ids: Tensor) -> None:
        if self.ids is None:
            self.ids = []  # the first call brings the prompt
            return
        self.ids += ids.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._tell(text)

    def end(self) -> None:
        self._tell(self.tokenizer.decode(self.ids or [], skip_special_tokens=True))

    def _tell(self, text: str) -> None:
        if len(text) > self.told:
            self.on_text(text[self.told :])
            self.told = len(text)

"""A small run with hostile texts, for the tests of pages: a tiny model, three dictionaries, and stores of two of them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from helpers import SENTENCE

import saebench as sb
from saebench.activations import ActivationStream
from saebench.features import index
from saebench.features.labelling.notes import Notes
from saebench.lm import Document, LanguageModel, Text, load_lm, pack
from saebench.runs import Run

APP = Path(__file__).parent.parent.parent / "app"
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
SCRIPT = "<script>document.title='taken'</script>"
NAME = "*bold* [link](http://outside.example/) <b onmouseover=alert(1)>"
SITE = "blocks.1.hook_resid_post"
LABELLED = 3
"""The latent of both indexed dictionaries that has a hostile label."""
DICTIONARIES = {
    "a": sb.TopK(d_sae=48, k=5, site=SITE),
    "b": sb.JumpReLU(d_sae=40, target_l0=6, site=SITE, seed=1),
    "other": sb.Transcoder(d_sae=32, k=4, site="blocks.1.ln2.hook_out", target="blocks.1.hook_mlp_out"),
}


def hostile_model(tiny: Path, out: Path) -> LanguageModel:
    """The tiny model with a token more, whose text is markup."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer.add_tokens([HOSTILE])
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    return load_lm(out)


def hostile_text(documents: int = 24) -> Text:
    """Documents about two themes, by name, with markup in names and text."""

    def documents_of() -> list[Document]:
        found = []
        for i in range(documents):
            theme = "sums" if i % 2 else f"markup {NAME}"
            body = SENTENCE.format(i, i * i % 17) * 4 if i % 2 else f"{HOSTILE} {SCRIPT} {i}\n" * 8
            found.append(Document(f"{theme}/{i}", body))
        return found

    return Text("hostile", documents_of)


def make_run(path: Path, lm: LanguageModel, tokens: int = 32 * 60) -> Run:
    """A finished run whose dictionaries a and b are indexed over the same tokens; `other` is not."""
    contexts = pack(hostile_text(), lm.tokenizer, 16)
    sites = list(dict.fromkeys(site for config in DICTIONARIES.values() for site in config.sites))
    stream = ActivationStream(lm, contexts, sites)
    recipe = {
        "model": {"name": lm.name, "dtype": "float32"},
        "text": {"source": "hostile"},
        "training": {"num_tokens": tokens},
    }
    run = Run.begin(path, recipe)
    run.record["model"] = {"name": lm.name, "fingerprint": lm.fingerprint}
    run.record["activations"] = {"identity": stream.identity, "tokens": stream.num_tokens, "path": ""}
    run.save()
    trained = sb.train(DICTIONARIES, stream, sb.TrainConfig(num_tokens=tokens, batch_size=32, lr=5e-3), out=path)
    run.record["finished"] = True
    run.save()
    for name, dictionary in zip(DICTIONARIES, trained, strict=True):
        if name == "other":
            continue
        store = index(dictionary, stream, run.features(name), lm=lm)
        Notes.open(store).change(LABELLED, label=f"{HOSTILE} {NAME}")
    run.write_evaluation("core", {name: {"l0": 5.0, "fvu": 0.25, "ce_recovered_zero": 0.9} for name in ("a", "b")})
    return run


def add_app_to_path() -> None:
    """As `streamlit run` does for the script's directory."""
    if str(APP) not in sys.path:
        sys.path.insert(0, str(APP))


def settle(page) -> None:
    """Wait until the script of a page in a browser has run to its end."""
    page.wait_for_selector(".sb-title")
    page.wait_for_timeout(300)
    page.wait_for_selector("[data-test-script-state=notRunning]")


def dense(store) -> np.ndarray:
    """Values of all latents on all tokens of a store: [T, F]."""
    dense_TF = np.zeros((store.num_contexts * store.context_size, store.d_sae))
    starts, latents, values = store.codes(0, len(dense_TF))
    dense_TF[np.repeat(np.arange(len(dense_TF)), np.diff(starts)), latents] = values
    return dense_TF

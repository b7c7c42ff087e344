"""SAEDashboard's `NeuronpediaRunner`, which makes the dashboards of all latents of an SAE that people see on Neuronpedia.

It runs as installed, feature batch by feature batch, as its `start_batch` and `end_batch` let anyone run it, with its default settings but
for what the comparison fixes: tokens, length of a prompt, CPU, float32. Four things had to be arranged so that it runs without a hub:

- **The model.** It hands the model's name to TransformerLens, which takes only names of its own table, but prefers a directory of that
  name. So the bundled model lies in the working directory as `gpt2`, with two entries in its JSON files that newer transformers leave out
  or call differently (`n_ctx`, the tokenizer's class).
- **Centring.** TransformerLens subtracts from what is written to the residual stream its mean over coordinates, unless told not to. The
  runner passes on `model_from_pretrained_kwargs` from the SAE's configuration, where sae-lens 6 no longer keeps them, so that every SAE
  trained on activations as they are gets others than it was trained on. `Runner` puts back what sae-lens trains with by default.
- **The tokens.** It reads them from the file that it keeps for restarts, where there is one; the data set is only opened.
- **The SAE.** A TopK must say that it selects by values times the decoder's norms, or the runner stops when it folds them; with rows of
  length 1, as they are exported here, this changes nothing. Values are checked against ours before anything is timed.

Parts are timed by wrapping its own functions: what a part calls that is timed itself is not counted in it.
"""

import json
import os
import platform
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_dashboard import sae_vis_runner
from sae_dashboard.feature_data_generator import FeatureDataGenerator
from sae_dashboard.neuronpedia import neuronpedia_runner
from sae_dashboard.neuronpedia.neuronpedia_runner import NeuronpediaRunner
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_dashboard.sequence_data_generator import SequenceDataGenerator
from sae_dashboard.transformer_lens_wrapper import TransformerLensWrapper
from sae_dashboard.utils_fns import FeatureStatistics, HistogramData
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors
from torch import Tensor

from benchmarks.machine import peak_rss_mib
from benchmarks.workers.common import answer_requests
from benchmarks.workers.parts import Parts

PACKAGES = ("torch", "sae-dashboard", "sae-lens", "transformer-lens", "transformers", "numpy", "pyarrow")
NAME = "gpt2"  # one that TransformerLens knows
PROBES = 4  # contexts on which its codes must be ours
TOLERANCE = 1e-4  # of a code's value, as a share of it or of 1
SWAPPED = 1e-3  # share of codes that may be others: the last ones that TopK takes, where rounding decides
DENSITY_ROUNDING, VALUE_ROUNDING = 0.5e-5, 0.5e-3  # of what its JSON says: shares in percent and values with three digits


class Runner(NeuronpediaRunner):
    def _initialize_model(self) -> None:
        self.sae_from_pretrained_kwargs = {"center_writing_weights": False}
        super()._initialize_model()


class Dashboard:
    """Answers requests about one run of the runner; every method but the constructor is a request."""

    def init(self, *, folder: str, model: str, dictionary: str, tokens: str, exact: str, site: str, threads: int) -> dict:
        """Build the runner in `folder`, which gets everything that it writes, and compare its codes with `exact`."""
        torch.set_num_threads(threads)
        ids_NS = load_file(tokens)["ids"].long()
        prompts, context_size = ids_NS.shape
        os.chdir(folder)  # where it keeps its cache, and where TransformerLens looks for a directory `NAME`
        link_model(Path(model), Path(NAME))
        export_topk(Path(dictionary), Path("sae"), site, context_size)
        Path("corpus").mkdir()
        rows = [json.dumps({"tokens": row}) for row in ids_NS[:PROBES].tolist()]
        Path("corpus", "train.jsonl").write_text("\n".join(rows))
        start = time.perf_counter()
        self.runner = Runner(
            NeuronpediaRunnerConfig(
                sae_set="bench",
                sae_path="sae",
                from_local_sae=True,
                outputs_dir="out",
                huggingface_dataset_path="corpus",
                n_prompts_total=prompts,
                n_tokens_in_prompt=context_size,
                sae_dtype="float32",
                model_dtype="float32",
                sae_device="cpu",
                model_device="cpu",
                activation_store_device="cpu",
            )
        )
        start_seconds = time.perf_counter() - start
        self.out = Path(self.runner.cfg.outputs_dir)
        torch.save(ids_NS, self.out / f"tokens_{prompts}.pt")
        agreement = self._compare(ids_NS[:PROBES], load_file(exact))
        self._wrap()
        tokenizer = self.runner.model.tokenizer
        return {
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "start_seconds": start_seconds,
            "batches": -(-self.runner.sae.cfg.d_sae // self.runner.cfg.n_features_at_a_time),
            "features_in_batch": self.runner.cfg.n_features_at_a_time,
            "agreement": agreement,
            "rule": {
                "ignored_ids": sorted({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}),
                "ignored_positions": [],
                "num_tokens": ids_NS.numel(),  # what it takes shares of
                "density_rounding": DENSITY_ROUNDING,
                "value_rounding": [VALUE_ROUNDING, 0.0],
            },
        }

    def batch(self, *, number: int, numbers: str) -> dict:
        """Make the dashboards of one feature batch as its own loop does; the file `numbers` gets what they say of each latent."""
        self.runner.cfg.start_batch = self.runner.cfg.end_batch = number
        self.runner.activations_store = None  # `run` deletes it, and so could not be called twice
        cpu, wall = time.process_time(), time.perf_counter()
        self.runner.run()
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        written = self.out / f"batch-{number}.json"
        save_file(self._numbers(json.loads(written.read_text())["features"]), numbers)
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "parts": self.parts.of(seconds),
            "bytes": written.stat().st_size,
            "peak_rss_mib": peak_rss_mib(),
        }

    def _wrap(self) -> None:
        parts = self.parts = Parts()
        parts.wrap("model", TransformerLensWrapper, "forward")
        parts.wrap("cache of activations", FeatureDataGenerator, "get_model_acts")
        parts.wrap("encode", self.runner.sae, "encode")
        parts.wrap("correlations", FeatureDataGenerator, "update_rolling_coefficients")
        parts.wrap("quantiles", FeatureStatistics, "create")
        parts.wrap("histograms", HistogramData, "from_data")
        parts.wrap("tables", sae_vis_runner, "get_features_table_data", "get_logits_table_data")
        parts.wrap("sequences", SequenceDataGenerator, "get_sequences_data")
        convert = neuronpedia_runner.NeuronpediaConverter.convert_to_np_json

        def convert_and_keep(model: Any, data: Any, *rest: Any) -> str:
            self.data = data.feature_data_dict  # the JSON does not say which prompt an example is from
            return convert(model, data, *rest)

        neuronpedia_runner.NeuronpediaConverter.convert_to_np_json = parts.timed("json", convert_and_keep)

    def _numbers(self, features: list[dict]) -> dict[str, np.ndarray]:
        """What the written dashboards say, rounded as they are: share of tokens, largest value, values and places of examples."""
        found = defaultdict(list)
        for feature in features:
            tops = [example for example in feature["activations"] if example["bin_min"] == -1]
            places = self.data[feature["feature_index"]].sequence_data.seq_group_data[0].seq_data
            found["latents"].append(feature["feature_index"])
            found["density"].append(feature["frac_nonzero"])
            found["max"].append(tops[0]["bin_max"])
            found["top_values"].append([example["values"][example["qualifying_token_index"]] for example in tops])
            width = self.runner.cfg.n_tokens_in_prompt
            found["top_tokens"].append([place.original_index * width + place.qualifying_token_index for place in places])
        self.data = None
        found["top_latents"] = found["latents"]
        return {name: np.array(column) for name, column in found.items()}

    @torch.no_grad()
    def _compare(self, ids_PS: Tensor, exact: dict[str, Tensor]) -> dict:
        """Its codes on some contexts beside those by brute force. Raises ValueError where they are of another model or dictionary."""
        hook = self.runner.hook_name
        x_PSD = self.runner.model.run_with_cache(ids_PS, names_filter=[hook])[1][hook]
        theirs_TF = self.runner.sae.encode(x_PSD).flatten(0, 1)
        within = exact["tokens"] < len(theirs_TF)
        ours_TF = torch.zeros_like(theirs_TF)
        ours_TF[exact["tokens"][within].long(), exact["latents"][within].long()] = exact["values"][within]
        both = (theirs_TF > 0) & (ours_TF > 0)
        difference = ((theirs_TF - ours_TF).abs() / ours_TF.clamp_min(1))[both].max().item()
        swapped = ((theirs_TF > 0) != (ours_TF > 0)).sum().item() / (2 * both.sum().item())
        if not (difference <= TOLERANCE and swapped <= SWAPPED):
            raise ValueError(f"its codes differ from ours by up to {difference:.2g}, {swapped:.2%} are of other latents")
        return {"codes_differ_by": difference, "codes_swapped": swapped}


def link_model(source: Path, target: Path) -> None:
    """The model's directory under a name of TransformerLens' table, readable by the transformers that it is installed with."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix in {".json", ".safetensors"}:
            (target / path.name).symlink_to(path.resolve())
    changes = {"config.json": {}, "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    config = json.loads((source / "config.json").read_text())
    changes["config.json"] = {"n_ctx": config["n_positions"]}
    for name, changed in changes.items():
        content = json.loads((source / name).read_text()) | changed
        (target / name).unlink()
        (target / name).write_text(json.dumps(content))


def export_topk(source: Path, target: Path, site: str, context_size: int) -> None:
    """A TopK of ours (docs/formats.md, "Dictionary") in sae-lens' format: the same codes, decoder rows of length 1."""
    manifest = json.loads((source / "config.json").read_text())
    config = manifest["config"]
    if manifest["architecture"] != "topk" or config["target"] is not None or config["skip"]:
        raise ValueError(f"{source} is not a TopK autoencoder")
    weights = load_file(source / "weights.safetensors")
    d_in, d_sae = weights["W_enc"].shape
    weights = {name: weights[name].float() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    weights["W_dec"] = torch.nn.functional.normalize(weights["W_dec"], dim=1)
    target.mkdir()
    save_tensors({name: tensor.contiguous() for name, tensor in weights.items()}, target / "sae_weights.safetensors")
    metadata = {"model_name": NAME, "hook_name": site, "context_size": context_size, "prepend_bos": True}
    settings = {
        "architecture": "topk",
        "d_in": d_in,
        "d_sae": d_sae,
        "k": config["k"],
        "rescale_acts_by_decoder_norm": True,
        "apply_b_dec_to_input": config["subtract_b_dec"],
        "normalize_activations": "none",
        "dtype": "float32",
        "device": "cpu",
        "metadata": metadata | {"sae_lens_version": version("sae-lens")},
    }
    (target / "cfg.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    answer_requests(Dashboard())

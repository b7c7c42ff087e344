"""circuit-tracer's `attribute` on its TransformerLens backend, with transcoders loaded from local files by its own loader.

Its own ways to a model know names on the hub only. So the model is built from a configuration with weights that TransformerLens' own code
converts, as its `from_pretrained_and_transcoders` does afterwards: no norm folded, nothing centred.
"""

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from circuit_tracer import Graph, attribute
from circuit_tracer.frontend.graph_models import Model
from circuit_tracer.graph import compute_graph_scores
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from circuit_tracer.utils.create_graph_files import create_graph_files
from safetensors.torch import save_file
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import anonymous_mib
from benchmarks.workers.common import answer_requests
from benchmarks.workers.measured import measured

PACKAGES = ("circuit-tracer", "torch", "transformer-lens", "transformers")
LOGITS = 1e-4  # what a converted model's may differ by
READ, WRITTEN = "mlp.hook_in", "hook_mlp_out"


class CircuitTracer:
    """Answers requests about graphs; every method but the constructor is a request."""

    def init(self, *, folder: str, threads: int, batch: int) -> dict:
        torch.set_num_threads(threads)
        self.folder, self.batch = Path(folder), batch
        self.prompts = json.loads((self.folder / "prompts.json").read_text())
        return {"versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}}

    def load(self, *, model: str) -> dict:
        """The model that the next requests are about; answers by how much its logits differ from Hugging Face's."""
        place = self.folder / model
        source = AutoModelForCausalLM.from_pretrained(str(place / "model"), local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(str(place / "model"), local_files_only=True)
        paths = {int(path.stem.split("_")[1]): str(path) for path in place.glob("layer_*.safetensors")}
        transcoders = load_transcoder_set(
            paths, model, READ, WRITTEN, device=torch.device("cpu"), lazy_encoder=False, lazy_decoder=False
        )
        self.model = hooked(source, tokenizer, str(place / "model"))
        self.model._configure_replacement_model(transcoders)
        ids = self._prompt(min(map(int, self.prompts)))
        with torch.no_grad():
            difference = float((self.model(ids[None]) - source(ids[None]).logits).abs().max())
        if difference > LOGITS:
            raise ValueError(f"the converted model's logits differ by {difference:.1g}")
        return {"logits_differ_by": difference, "loaded_mib": anonymous_mib()}

    def trace(self, *, length: int, features: int) -> dict:
        """Time and memory of one graph of at most so many features."""
        graph, cost = measured(lambda: self._attribute(length, features))
        edges = int((graph.adjacency_matrix != 0).sum())
        replacement, completeness = compute_graph_scores(graph)
        scores = {"replacement": replacement, "completeness": completeness}
        return cost | {
            "active": len(graph.active_features),
            "nodes": len(graph.adjacency_matrix),
            "edges": edges,
            "scores": scores,
        }

    def whole(self, *, length: int, out: str) -> dict:
        """A graph of all active features and all edges: OUT.safetensors, once more with the embeddings of positions counted among
        tokens where the model has such, and the file that circuit-tracer writes of it, OUT.json."""
        graph = self._attribute(length, None)
        tensors = {
            "features": graph.active_features[graph.selected_features],
            "activations": graph.activation_values[graph.selected_features],
            "adjacency": graph.adjacency_matrix,
            "logit_tokens": graph.logit_token_ids,
            "logit_probabilities": graph.logit_probabilities,
        }
        with self._positions_in_tokens():
            tensors["adjacency_with_positions"] = self._attribute(length, None).adjacency_matrix
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, f"{out}.safetensors")
        folder, name = Path(out).parent, Path(out).name
        create_graph_files(graph, name, str(folder), scan=self.model.scan)
        return {"replacement_completeness": list(compute_graph_scores(graph))}

    def accepts(self, *, path: str) -> dict:
        """Whether its own classes take a file: nodes and links of it."""
        found = Model.model_validate(json.loads(Path(path).read_text()))
        return {"nodes": len(found.nodes), "links": len(found.links)}

    @contextmanager
    def _positions_in_tokens(self) -> Iterator[None]:
        """Token nodes are what the stream begins with, not the embeddings of tokens alone."""
        made = self.model.setup_attribution

        def with_positions(inputs):
            context = made(inputs)
            if hasattr(self.model, "pos_embed"):
                context.token_vectors = context.token_vectors + self.model.pos_embed.W_pos[: len(context.token_vectors)]
            return context

        self.model.setup_attribution = with_positions
        try:
            yield
        finally:
            del self.model.setup_attribution

    def _prompt(self, length: int) -> torch.Tensor:
        return torch.tensor(self.prompts[str(length)])

    def _attribute(self, length: int, features: int | None) -> Graph:
        return attribute(self._prompt(length), self.model, batch_size=self.batch, max_feature_nodes=features)


def hooked(source, tokenizer, name: str) -> TransformerLensReplacementModel:
    """The same model as circuit-tracer takes it, no transcoders yet."""
    found = source.config
    heads, width = found.num_attention_heads, found.hidden_size
    common = {
        "n_layers": found.num_hidden_layers, "d_model": width, "n_ctx": found.max_position_embeddings, "n_heads": heads,
        "d_head": width // heads, "d_vocab": found.vocab_size, "device": "cpu", "tokenizer_name": name, "model_name": name,
    }  # fmt: skip
    if found.model_type == "llama":
        own = {
            "d_mlp": found.intermediate_size, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "final_rms": True,
            "eps": found.rms_norm_eps, "positional_embedding_type": "rotary", "rotary_dim": width // heads, "rotary_base": 10000,
            "rotary_adjacent_pairs": False, "n_key_value_heads": None, "original_architecture": "LlamaForCausalLM",
        }  # fmt: skip
        convert = convert_llama_weights
    else:
        own = {
            "d_mlp": 4 * width, "act_fn": "gelu_new", "normalization_type": "LN", "eps": found.layer_norm_epsilon,
            "original_architecture": "GPT2LMHeadModel",
        }  # fmt: skip
        convert = convert_gpt2_weights
    config = HookedTransformerConfig(**common, **own)
    model = TransformerLensReplacementModel(config, tokenizer=tokenizer)
    model.load_and_process_state_dict(
        convert(source, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


if __name__ == "__main__":
    answer_requests(CircuitTracer())

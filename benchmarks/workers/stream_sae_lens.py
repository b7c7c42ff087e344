"""sae-lens from language model to dictionary: its `LanguageModelSAETrainingRunner`, halted where it asks for the next batch.

`how` chooses the model class, both of which its configuration offers: `HookedTransformer`, its default, with the weights of the bundled
model converted by TransformerLens' own code, or `AutoModelForCausalLM`, the Hugging Face model with a hook.
Its settings are its defaults but for what the comparison fixes: tokens, batch, warm-up, decay, silence of dead latents.
"""

from collections.abc import Iterator

import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig, TopKTrainingSAEConfig
from sae_lens.load_model import HookedProxyLM
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.workers.common import answer_requests
from benchmarks.workers.contexts import CONTEXT_SIZE, FORWARD_BATCH, LAYERS, MODEL, PROBES, SITE, SKIP, Tokens
from benchmarks.workers.sae_lens import DEFAULT_LR, published
from benchmarks.workers.streaming import END, Halting, StreamJob, StreamServer, StreamWorker

PROXY_SITE = f"transformer.h.{LAYERS - 1}"


class HaltingRunner(LanguageModelSAETrainingRunner):
    """Its signal handlers can be set in the main thread only; everything else is as it is."""

    halting: Halting

    def run_trainer_with_interruption_handling(self, trainer):
        trainer.data_provider = self._halted(trainer.data_provider)
        return trainer.fit()

    def _halted(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        self.halting.passed(0)
        for batch in batches:
            yield batch
            self.halting.passed(len(batch))


class StreamSaeLens(StreamWorker):
    packages = ("sae-lens", "transformer-lens", "transformers", "datasets")

    def __init__(self, job: StreamJob, tokens: Tokens):
        super().__init__(job, tokens)
        self.hooked = job.how == "HookedTransformer"
        self.site = SITE if self.hooked else PROXY_SITE
        self.model = hooked_transformer() if self.hooked else HookedProxyLM(*bundled_model(), hook_names=[self.site])
        with torch.no_grad():
            self.difference = tokens.check_logits(self.model(tokens.held_out_MS[:PROBES]))
        self.halting = Halting()

    def versions(self) -> dict[str, str]:
        return {"logits differ by": f"{self.difference:.1g}"}

    def begin(self) -> None:
        job = self.job
        d_in = self._activations(self.tokens.held_out_MS[:1]).shape[-1]
        config = LanguageModelSAERunnerConfig(
            sae=TopKTrainingSAEConfig(d_in=d_in, d_sae=job.d_sae, k=job.k),
            model_name="bundled",
            model_class_name=job.how,
            hook_name=self.site,
            dataset_path="bundled",
            streaming=False,
            context_size=CONTEXT_SIZE,
            seqpos_slice=(SKIP, None),
            store_batch_size_prompts=FORWARD_BATCH,
            training_tokens=job.num_tokens,
            train_batch_size_tokens=job.batch_size,
            lr=DEFAULT_LR if job.lr is None else job.lr,
            lr_warm_up_steps=job.warmup_steps,
            lr_decay_steps=job.decay_steps,
            dead_feature_window=job.dead_steps,
            checkpoint_path=None,
            output_path=None,
            logger=LoggingConfig(log_to_wandb=False),
            seed=job.seed,
        )
        dataset = Dataset.from_dict({"tokens": self.tokens.train_NS.numpy()})
        runner = HaltingRunner(config, override_dataset=dataset, override_model=self.model)
        runner.halting = self.halting

        def run() -> None:
            self.trained = runner.run()

        self.halting.start(run)

    def run(self, tokens: int) -> int:
        return self.halting.go_on(tokens)

    def finish(self):
        self.halting.go_on(END)
        rows_RD = self._activations(self.tokens.held_out_MS)[:, SKIP:].flatten(0, 1)
        sae = published(self.trained)
        return rows_RD, sae.encode, sae.decode, sae.W_dec.detach()

    @torch.no_grad()
    def _activations(self, ids_BS: Tensor) -> Tensor:
        return self.model.run_with_cache(ids_BS, names_filter=[self.site])[1][self.site]


def bundled_model():
    """The bundled model and its tokenizer as Hugging Face loads them."""
    model = AutoModelForCausalLM.from_pretrained(str(MODEL), local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(str(MODEL), local_files_only=True)


def hooked_transformer() -> HookedTransformer:
    """The same as a `HookedTransformer`, whose `from_pretrained` knows names on the hub only."""
    model, tokenizer = bundled_model()
    found = model.config
    config = HookedTransformerConfig(
        n_layers=found.n_layer,
        d_model=found.n_embd,
        n_ctx=found.n_positions,
        n_heads=found.n_head,
        d_head=found.n_embd // found.n_head,
        d_mlp=found.n_inner or 4 * found.n_embd,
        d_vocab=found.vocab_size,
        act_fn="gelu_new",  # the same function as gelu_pytorch_tanh
        eps=found.layer_norm_epsilon,
        normalization_type="LN",
        original_architecture="GPT2LMHeadModel",
        device="cpu",
    )
    hooked = HookedTransformer(config, tokenizer=tokenizer)
    hooked.load_and_process_state_dict(
        convert_gpt2_weights(model, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return hooked.eval()


if __name__ == "__main__":
    answer_requests(StreamServer(StreamSaeLens))

"""The bundled model's forward pass alone, over the contexts that the others train on: the ceiling of streaming training.

`how` is `read`, our own way to a site, which stops there; `plain`, Hugging Face's modules up to the same site with nothing kept; or
`whole`, Hugging Face's forward pass with all layers and logits.
"""

import torch

import saebench as sb
from benchmarks.workers.common import answer_requests
from benchmarks.workers.contexts import FORWARD_BATCH, LAYERS, PROBES, SITE, SKIP, Tokens
from benchmarks.workers.streaming import StreamJob, StreamServer, StreamWorker


class StreamForward(StreamWorker):
    packages = ("transformers",)

    def __init__(self, job: StreamJob, tokens: Tokens):
        super().__init__(job, tokens)
        self.lm = sb.load_lm("builtin", device="cpu")
        tokens.check_logits(self.lm.logits(tokens.held_out_MS[:PROBES]))
        self.first = 0

    def begin(self) -> None:
        self.lm.read(self.tokens.train_NS[:1], [SITE])
        if self.job.how == "plain":
            self.lm.hf.transformer.h = self.lm.hf.transformer.h[:LAYERS]

    @torch.inference_mode()
    def run(self, tokens: int) -> int:
        """Tokens are counted as in training: without the first position of each context."""
        forward = {
            "read": lambda ids_BS: self.lm.read(ids_BS, [SITE]),
            "plain": lambda ids_BS: self.lm.hf.transformer(ids_BS, use_cache=False),
            "whole": lambda ids_BS: self.lm.hf(ids_BS, use_cache=False),
        }[self.job.how]
        done, (count, length) = 0, self.tokens.train_NS.shape
        while done < tokens:
            which_B = (self.first + torch.arange(FORWARD_BATCH)) % count
            forward(self.tokens.train_NS[which_B])
            self.first += FORWARD_BATCH
            done += FORWARD_BATCH * (length - SKIP)
        return done


if __name__ == "__main__":
    answer_requests(StreamServer(StreamForward))

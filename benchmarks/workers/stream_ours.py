"""saebench from language model to dictionary: `train` on an `ActivationStream`, halted where it reports progress."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch

import saebench as sb
from benchmarks.workers.common import WARMUP_FRACTION, answer_requests
from benchmarks.workers.contexts import SITE, SKIP, Tokens
from benchmarks.workers.ours import decode, encode, kernels
from benchmarks.workers.streaming import END, Halting, StreamJob, StreamServer, StreamWorker
from saebench.lm import Contexts
from saebench.trainer import loop


class StreamOurs(StreamWorker):
    def __init__(self, job: StreamJob, tokens: Tokens):
        super().__init__(job, tokens)
        self.lm = sb.load_lm("builtin", device="cpu")
        documents_NS = torch.zeros_like(tokens.train_NS, dtype=torch.int32)
        contexts = Contexts(tokens.train_NS.int(), documents_NS, documents_NS, ["text"])
        self.stream = sb.ActivationStream(self.lm, contexts, [SITE])
        self.halting = Halting()

    def versions(self) -> dict[str, str]:
        return kernels()

    def begin(self) -> None:
        job = self.job
        training = sb.TrainConfig(
            num_tokens=job.num_tokens,
            batch_size=job.batch_size,
            lr=job.lr,
            seed=job.seed,
            warmup=WARMUP_FRACTION,
            decay=job.decay,
        )

        @contextmanager
        def progress(*_: object) -> Iterator[object]:
            self.halting.passed(0)
            yield lambda amount, note="": self.halting.passed(amount)

        patch.object(loop, "progress", progress).start()

        def run() -> None:
            self.dictionary = sb.train(sb.TopK(d_sae=job.d_sae, k=job.k), self.stream, training)

        self.halting.start(run)

    def run(self, tokens: int) -> int:
        return self.halting.go_on(tokens)

    def finish(self):
        self.halting.go_on(END)
        rows_RD = self.lm.read(self.tokens.held_out_MS, [SITE])[SITE][:, SKIP:].flatten(0, 1)
        return rows_RD, partial(encode, self.dictionary), partial(decode, self.dictionary), self.dictionary.W_dec


if __name__ == "__main__":
    answer_requests(StreamServer(StreamOurs))

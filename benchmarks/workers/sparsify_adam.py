"""sparsify with Adam: at one `--lr` for all, sign descent cannot be compared with trainers that use Adam."""

from benchmarks.workers.common import serve
from benchmarks.workers.sparsify import Sparsify


class SparsifyAdam(Sparsify):
    packages = ("eai-sparsify", "transformers")
    optimizer = "adam"


if __name__ == "__main__":
    serve(SparsifyAdam)

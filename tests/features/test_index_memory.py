"""Memory of building a store does not grow with the corpus: the peak of anonymous memory in a process of its own, for two lengths."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, tempfile, threading
from pathlib import Path
import numpy as np, torch
from saebench.activations.encoding import Encoded
from saebench.codes import SparseCodes
from saebench.dictionaries import TopK
from saebench.dictionaries.topk import TopKDictionary
from saebench.features import building, index, layout
from saebench.lm import Contexts

torch.set_num_threads(1)
building.CHUNK_TOKENS, building.RANGE_ENTRIES, layout.TOKENS_GROUP = 1 << 13, 1 << 16, 1 << 14
SIZE, folder = 256, Path(sys.argv[1])

class Drawn(TopKDictionary):
    def encode_contexts(self, x_CSD, skip=1):
        generator = torch.Generator().manual_seed(int(x_CSD[0, 0, 0]))
        indices_BK = torch.randint(0, 128, (len(x_CSD) * (SIZE - skip), 1), generator=generator)
        return SparseCodes(indices_BK.int(), torch.ones(indices_BK.shape), 128)

class Source:
    skip, ordered, context_size, widths, identity = 1, True, SIZE, {"site": 8}, "drawn"
    def __init__(self, name, tokens):
        self.num_contexts = tokens // SIZE
        shape = (self.num_contexts, SIZE)
        columns = [np.memmap(folder / f"{name}-{i}", dtype=np.int32, mode="w+", shape=shape) for i in range(3)]
        self.contexts = Contexts(*map(torch.from_numpy, columns), ["document"])
    def check_sites(self, sites): pass
    def fetch(self, contexts_N, sites, out=None):
        return {"site": Encoded(contexts_N[:, None, None].float().expand(-1, SIZE, 8))}

def now():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon:"))

def peak(name, tokens):
    found, ended = [now()], threading.Event()
    def watch():
        while not ended.wait(0.002):
            found.append(now())
    watching = threading.Thread(target=watch)
    watching.start()
    index(dictionary, Source(name, tokens), folder / f"{name}.store")
    ended.set()
    watching.join()
    return max(found)

dictionary = Drawn(TopK(d_sae=128, k=1, d_in=8, site="site", decoder="unit")).requires_grad_(False)
dictionary.folded = True
peak("first", 1 << 17)  # what is loaded and kept once
print(peak("short", 1 << 18), peak("long", 1 << 21))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what memory is anonymous")
def test_eight_times_the_tokens_take_no_more_memory(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    short, long = map(float, done.stdout.split())
    assert long < short + 24, (
        f"{long:.0f} MiB for 2 M tokens, {short:.0f} for 0.26 M: {2**20 * (long - short) / 1.8e6:.0f} bytes a token"
    )

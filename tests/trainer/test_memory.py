"""How much memory training takes, in processes of their own."""

import subprocess
import sys

import pytest

TRAINING = """
import torch
import saebench as sb
from saebench.activations import TensorSource

def peak():
    return next(int(line.split()[1]) / 2**20 for line in open("/proc/self/status") if line.startswith("VmHWM"))

x = torch.randn(2048, 768)
sae = sb.train(sb.TopK(d_sae=131072, k=32), TensorSource({"x": x}), sb.TrainConfig(num_tokens=1536, batch_size=512))
assert sae.W_dec.shape == (131072, 768)
print(peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_131072_latents_train_within_4_gib():
    done = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 4

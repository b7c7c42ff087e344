"""Long commands that are killed, interrupted or run out of disk: the same command again ends with the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import SENTENCE

from saebench.activations.store import FIELDS, FORMAT, VERSION
from saebench.files import check_files, read_manifest

pytestmark = pytest.mark.slow

SITE, STEPS = "blocks.1.hook_resid_post", 400
RECIPE = f"""
name = "crash"
[model]
name = "MODEL"
[text]
source = "TEXT"
[activations]
sites = ["{SITE}"]
context_size = 16
path = "ACTS"
[[dictionaries]]
architecture = "topk"
id = "sae"
d_sae = 8192
k = 4
[training]
num_tokens = {STEPS * 64}
batch_size = 64
lr = 0.01
log_every = 1
checkpoint_every = 10
"""
SAEBENCH = [sys.executable, "-m", "saebench"]
SMALL_SHARDS = (
    "import sys; from saebench.activations import harvesting; harvesting.SHARD_BYTES = 1 << 16; "
    "from saebench.cli import main; sys.exit(main())"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_lm_directory) -> Path:
    """A folder with a text, a store, a recipe for it, and an uninterrupted run in `whole`."""
    place = tmp_path_factory.mktemp("crash")
    (place / "text.txt").write_text("".join(SENTENCE.format(i, i * i % 17) for i in range(1500)))
    finish(start(place, *harvest_command(tiny_lm_directory, place / "acts")))
    recipe = RECIPE.replace("MODEL", str(tiny_lm_directory)).replace("TEXT", str(place / "text.txt"))
    (place / "recipe.toml").write_text(recipe.replace("ACTS", str(place / "acts")))
    finish(start(place, *train_command("whole")))
    return place


def harvest_command(model, out):
    options = ["--text", "text.txt", "--sites", SITE, "--context-size", 16, "--batch-size", 4, "--out", out]
    return [sys.executable, "-c", SMALL_SHARDS, "harvest", "--model", model, *options]


def train_command(out):
    return [*SAEBENCH, "train", "recipe.toml", "--out", out]


def start(place, *command):
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=place,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )


def finish(process, code=0):
    """Wait for the end; returns standard error."""
    try:
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "Traceback" not in err
    return err


def wait_until(process, condition):
    """Poll closely; the process must still be running when the condition comes true."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail("waited in vain for the moment to stop the process")
        time.sleep(0.001)


def last_step(run):
    """The step of the last whole line of metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True) if (run / "metrics.jsonl").exists() else []
    return next((json.loads(line)["step"] for line in reversed(lines) if line.endswith(b"\n")), 0)


def results(run):
    """The weights byte for byte, and the metrics."""
    return (run / "dictionaries" / "sae" / "weights.safetensors").read_bytes(), (run / "metrics.jsonl").read_text()


def bytes_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def partials(directory):
    return [path for path in directory.rglob("*.partial")]


def test_training_killed_at_random_points_ends_with_the_same_bytes(place):
    run, chance = place / "killed", random.Random(3)
    for target in sorted(chance.sample(range(5, STEPS - 40), 5)):
        process = start(place, *train_command("killed"))
        wait_until(process, lambda target=target: last_step(run) >= target)
        time.sleep(chance.random() * 0.05)
        assert process.poll() is None
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert "continuing at step" in finish(start(place, *train_command("killed")))
    assert results(run) == results(place / "whole")


def test_training_killed_inside_a_checkpoint_ends_with_the_same_bytes(place):
    run = place / "torn"
    for steps in (30, 200):
        process = start(place, *train_command("torn"))
        wait_until(process, lambda steps=steps: last_step(run) >= steps and partials(run / "checkpoint"))
        process.kill()
        process.communicate()
        assert partials(run / "checkpoint")
    finish(start(place, *train_command("torn")))
    assert results(run) == results(place / "whole")
    assert not partials(run)


def test_harvest_killed_between_shards_ends_with_the_same_bytes(place, tiny_lm_directory):
    out, chance = place / "acts-killed", random.Random(4)
    for shards in (0, 5, 20):
        process = start(place, *harvest_command(tiny_lm_directory, out))
        wait_until(process, lambda shards=shards: (out / f"shard-{shards:05d}.safetensors").exists())
        time.sleep(chance.random() * 0.02)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(start(place, *harvest_command(tiny_lm_directory, out)))
    assert bytes_of(out) == bytes_of(place / "acts")


def test_ctrl_c_during_a_harvest(place, tiny_lm_directory):
    out = place / "acts-stopped"
    process = start(place, *harvest_command(tiny_lm_directory, out))
    wait_until(process, lambda: (out / "shard-00005.safetensors").exists())
    process.send_signal(signal.SIGINT)
    assert finish(process, 130).splitlines()[-1] == "interrupted; run the same command again to continue"
    assert "continuing at token" in finish(start(place, *harvest_command(tiny_lm_directory, out)))
    assert bytes_of(out) == bytes_of(place / "acts")


def test_ctrl_c_during_training(place):
    run = place / "stopped"
    process = start(place, *train_command("stopped"))
    wait_until(process, lambda: last_step(run) >= 123)
    process.send_signal(signal.SIGINT)
    line = finish(process, 130).splitlines()[-1]
    assert line.startswith("stopped at step 1") and line.endswith(f" of {STEPS}; run the same command again to continue")
    step = int(line.split()[3])
    assert (run / "checkpoint" / f"step-{step:08d}").is_dir()
    assert f"continuing at step {step} of {STEPS}" in finish(start(place, *train_command("stopped")))
    assert results(run) == results(place / "whole")


SMALL_PARTS = (
    "import sys; from saebench.features import building; building.CHUNK_TOKENS = 1 << 11; building.RANGE_ENTRIES = 1 << 13; "
    "from saebench.cli import main; sys.exit(main())"
)


def index_command(run):
    return [sys.executable, "-c", SMALL_PARTS, "index", run]


def entered(run):
    """How many files of the store in the making are entered in its manifest."""
    manifest = run / "features" / ".sae.building" / "manifest.json"
    try:
        return len(json.loads(manifest.read_text())["files"])
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module")
def features(place):
    """The files of an uninterrupted index of the run in `whole`."""
    finish(start(place, *index_command("whole")))
    return bytes_of(place / "whole" / "features" / "sae")


def test_indexing_killed_or_stopped_at_random_points_ends_with_the_same_bytes(place, features):
    run, chance = place / "indexed", random.Random(5)
    shutil.copytree(place / "whole", run)
    shutil.rmtree(run / "features")
    last = len(features) + 20
    for number, target in enumerate(sorted(chance.sample(range(1, last // 3), 4))):
        target = max(target, entered(run) + 1)  # at work again, not still starting
        process = start(place, *index_command("indexed"))
        wait_until(process, lambda target=target: entered(run) >= target)
        time.sleep(chance.random() * 0.005)
        process.send_signal(signal.SIGKILL if number % 2 else signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (-signal.SIGKILL if number % 2 else 130)
        assert number % 2 or err.splitlines()[-1] == "interrupted; run the same command again to continue"
        assert not (run / "features" / "sae").exists()
    assert "going on with what a stopped build left" in finish(start(place, *index_command("indexed")))
    assert bytes_of(run / "features" / "sae") == features
    assert sorted(path.name for path in (run / "features").iterdir()) == [".sae.labels.lock", "sae", "sae.labels.parquet"]


@pytest.fixture
def small_disk(place):
    """Mount a tmpfs of a size; calling it again changes the size. Skips where that is not allowed."""
    disk = place / "disk"
    disk.mkdir()
    mounted = False

    def mount(size):
        nonlocal mounted
        options = f"remount,size={size}" if mounted else f"size={size}"
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("a small disk is mounted by root only")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
        mounted = True
        return disk

    yield mount
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)
    disk.rmdir()


def out_of_space(err):
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "no space left" in line
    assert line.endswith("free some space and run the same command again to continue") or "run the command again" in line
    assert err.splitlines()[-1] == line
    return line


def test_full_disk_during_a_harvest(place, tiny_lm_directory, small_disk):
    out = small_disk("1m") / "acts"
    out_of_space(finish(start(place, *harvest_command(tiny_lm_directory, out)), 2))
    assert not partials(out)
    manifest = read_manifest(out, FORMAT, VERSION, FIELDS)
    assert not manifest["complete"]
    check_files(out, manifest["files"])
    small_disk("64m")
    finish(start(place, *harvest_command(tiny_lm_directory, out)))
    assert bytes_of(out) == bytes_of(place / "acts")


@pytest.mark.parametrize("size", ["10m", "13m"])
def test_full_disk_during_training(place, small_disk, size):
    run = small_disk(size) / "run"
    out_of_space(finish(start(place, *train_command(run)), 2))
    assert not partials(run)
    kept = sorted((run / "checkpoint").iterdir())
    assert kept
    for path in kept:
        check_files(path, json.loads((path / "manifest.json").read_text())["files"])
    small_disk("64m")
    assert "continuing at step" in finish(start(place, *train_command(run)))
    assert results(run) == results(place / "whole")


def test_full_disk_during_indexing(place, features, small_disk):
    run = small_disk("8m") / "run"
    shutil.copytree(place / "whole", run, ignore=shutil.ignore_patterns("features", "checkpoint"))
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    small_disk(f"{(size >> 10) + 300}k")
    out_of_space(finish(start(place, *index_command(run)), 2))
    assert not partials(run)
    small_disk("64m")
    finish(start(place, *index_command(run)))
    assert bytes_of(run / "features" / "sae") == features


def test_no_space_for_even_the_first_file(place, tiny_lm_directory, small_disk):
    disk = small_disk("16k")
    (disk / "filler").write_bytes(b"x" * (12 << 10))
    out_of_space(finish(start(place, *train_command(disk / "run")), 2))
    out_of_space(finish(start(place, *harvest_command(tiny_lm_directory, disk / "acts")), 2))
    assert not partials(disk)
    (disk / "filler").unlink()
    small_disk("64m")
    finish(start(place, *train_command(disk / "run")))
    assert results(disk / "run") == results(place / "whole")

"""The compiled kernels: built on first use by the machine's own C++ compiler and kept in the user's cache.

The key is a hash over sources, flags, compiler and processor, so a new version, compiler or machine builds anew and nothing stale is ever
loaded. SAEBENCH_CACHE names another place than ~/.cache/saebench; CXX another compiler.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
TIMEOUT_S = 300


class BuildError(Exception):
    """Why there are no compiled kernels, in one line."""


def load() -> ctypes.CDLL:
    """The kernels' library, compiled where it is not in the cache. Raises BuildError."""
    if platform.system() not in ("Linux", "Darwin"):
        raise BuildError(f"compiled kernels are for Linux and macOS, and this is {platform.system()}")
    compiler = find_compiler()
    flags = [*FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]
    path = cache() / f"kernels-{_key(compiler, flags)}.so"
    if not path.exists():
        compile_to(path, compiler, flags)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded ({error}): remove it to build it anew") from None


def find_compiler() -> list[str]:
    """The command of the C++ compiler. Raises BuildError where there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    if named:
        raise BuildError(f"the compiler that CXX names, {named[0]}, is not there")
    raise BuildError("there is no C++ compiler: install g++ or clang, or name one in CXX")


def cache() -> Path:
    """Where compiled kernels are kept."""
    named = os.environ.get("SAEBENCH_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saebench"


def compile_to(path: Path, compiler: list[str], flags: list[str]) -> None:
    """Compile all sources into a library that is there as a whole or not at all. Raises BuildError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [*compiler, *flags, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
            if done.returncode:
                words = (
                    [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
                )
                raise BuildError(f"{compiler[0]} failed on the kernels: {words[0].strip()[:300]}")
            made.replace(path)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{compiler[0]} took longer than {TIMEOUT_S} s on the kernels") from None
    except OSError as error:
        raise BuildError(f"the kernels cannot be kept in {path.parent} ({error}): name another place in SAEBENCH_CACHE") from None


def _key(compiler: list[str], flags: list[str]) -> str:
    parts = [*compiler, *flags, _output([*compiler, "--version"]), platform.machine(), _processor()]
    parts += [file.read_text() for file in sorted(SOURCES.glob("*.cpp")) + sorted(SOURCES.glob("*.h"))]
    return sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What the compiler adapts its code to: the processor's features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "model name", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""

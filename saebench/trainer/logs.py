"""Where training metrics go: metrics.jsonl always, wandb and tensorboard when asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saebench.errors import UserError
from saebench.files import identity


class MetricsLog:
    """Appends one JSON object a line to metrics.jsonl. On resume the file is cut back to what the checkpoint had seen."""

    def __init__(self, path: Path, resume_at: int = 0, loggers: list[str] | None = None, run_name: str = ""):
        """`resume_at` is the length in bytes to keep. Raises UserError where a logger is not installed."""
        self.path = path
        path.touch()
        with path.open("r+b") as file:
            file.truncate(min(resume_at, path.stat().st_size))  # a power cut may have taken lines that a checkpoint had counted
        self._sinks = [_SINKS[name](path.parent, run_name) for name in loggers or []]

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def write(self, row: dict[str, Any]) -> None:
        """`row` has `step`, `dictionary` and numbers."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for sink in self._sinks:
            sink.write(row)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class _Tensorboard:
    def __init__(self, directory: Path, run_name: str):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "training.loggers names tensorboard, which is not installed: pip install 'saebench[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(directory / "tensorboard"))

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(f"{row['dictionary']}/{name}", value, row["step"])

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, directory: Path, run_name: str):
        try:
            import wandb
        except ImportError:
            raise UserError("training.loggers names wandb, which is not installed: pip install 'saebench[wandb]'") from None
        self._run = wandb.init(
            project="saebench", name=run_name, dir=str(directory), id=identity(str(directory.resolve())), resume="allow"
        )

    def write(self, row: dict[str, Any]) -> None:
        values = {
            f"{row['dictionary']}/{name}": value
            for name, value in row.items()
            if isinstance(value, int | float) and name != "step"
        }
        self._run.log(values, step=row["step"])

    def close(self) -> None:
        self._run.finish()


_SINKS: dict[str, type[_Tensorboard] | type[_Wandb]] = {"tensorboard": _Tensorboard, "wandb": _Wandb}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []

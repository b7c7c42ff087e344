"""The trainer: one loop for any set of dictionaries from any source of activations."""

from saebench.trainer.config import TrainConfig
from saebench.trainer.loop import train
from saebench.trainer.member import Member

__all__ = ["train", "TrainConfig", "Member"]

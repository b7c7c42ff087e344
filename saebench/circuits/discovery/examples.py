"""Examples of a task, and what is measured on them: prompts with the token that should follow, perhaps one that should not, and perhaps a
counterfactual prompt, alike but for what the answer depends on, whose activations stand in for those that are taken away.

Prompts of different length are filled up behind their end: what a causal model computes up to there does not depend on it.
Shape suffixes: `B` examples, `S` positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.lm import LanguageModel

Metric = Callable[[Tensor, "Examples"], Tensor]
"""From logits [B, S, V] and the examples that they belong to, to one number each [B]."""


@dataclass(frozen=True)
class Examples:
    """Prompts as token ids, with what should follow them."""

    ids_BS: Tensor
    ends_B: Tensor
    """The last position of each prompt, which its answer is predicted at."""
    answers_B: Tensor
    others_B: Tensor | None = None
    """Answers that the right ones are compared with, if any."""
    patch_BS: Tensor | None = None
    """The counterfactual prompts, token for token in the places of `ids_BS`, if any."""

    def __len__(self) -> int:
        return len(self.ids_BS)

    def take(self, which: slice | Tensor) -> Examples:
        """Some of them, in the order given."""
        others_B = None if self.others_B is None else self.others_B[which]
        patch_BS = None if self.patch_BS is None else self.patch_BS[which]
        return Examples(self.ids_BS[which], self.ends_B[which], self.answers_B[which], others_B, patch_BS)

    def batches(self, size: int) -> Iterator[Examples]:
        """All of them, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    @property
    def same_length(self) -> bool:
        """Whether all prompts have the same number of tokens, so that a position means the same in all."""
        return bool((self.ends_B == self.ends_B[0]).all())

    def inside(self, skip: int) -> Tensor:
        """Which positions from `skip` on belong to the prompts: [B, S - skip], bool."""
        return torch.arange(skip, self.ids_BS.shape[1], device=self.ids_BS.device) <= self.ends_B[:, None]


def on_model(lm: LanguageModel, examples: Examples) -> Examples:
    """The same where the model is. Raises UserError for none, for prompts longer than the model's positions, ids that its vocabulary lacks,
    and parts that do not fit together."""
    if not len(examples):
        raise UserError("there are no examples: give at least one prompt with its answer")
    lm.check_context(examples.ids_BS.shape[1])
    count, size = examples.ids_BS.shape
    for name in ("ends_B", "answers_B", "others_B"):
        part_B = getattr(examples, name)
        if part_B is not None and part_B.shape != (count,):
            raise UserError(f"{count} prompts come with {len(part_B)} {name.removesuffix('_B')}: give one for each")
    if examples.patch_BS is not None and examples.patch_BS.shape != (count, size):
        raise UserError(
            f"prompts are {count} x {size} tokens and counterfactuals {' x '.join(map(str, examples.patch_BS.shape))}: they must stand "
            "token for token in each other's places"
        )
    if not 0 <= int(examples.ends_B.min()) <= int(examples.ends_B.max()) < size:
        raise UserError(f"the end of a prompt is not one of its {size} positions: count them from 0")
    for ids in (examples.ids_BS, examples.answers_B, examples.others_B, examples.patch_BS):
        if ids is not None:
            check_ids(lm, ids)
    place = lambda t: None if t is None else t.to(lm.device)  # noqa: E731
    others_B, patch_BS = place(examples.others_B), place(examples.patch_BS)
    return Examples(place(examples.ids_BS), place(examples.ends_B), place(examples.answers_B), others_B, patch_BS)


def check_ids(lm: LanguageModel, ids: Tensor) -> None:
    """Raises UserError for token ids that the model lacks."""
    rows = len(lm.hf.get_input_embeddings().weight)
    if not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise UserError(f"token id {wrong} is not in the model's vocabulary of {rows:,}: give ids of its own tokenizer")


def examples_of(
    lm: LanguageModel,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    others: Sequence[str] | None = None,
    counterfactuals: Sequence[str] | None = None,
) -> Examples:
    """Examples from texts. An answer is the text of one token, with the space before it where it has one.

    Raises UserError for no prompt, an empty one, one longer than the model's positions, an answer that is not one token of the vocabulary,
    lists of different length, and counterfactuals with another number of tokens than their prompts.
    """
    if not prompts:
        raise UserError("no prompt is given: give at least one, with its answer")
    for name, texts in (("answers", answers), ("others", others), ("counterfactuals", counterfactuals)):
        if texts is not None and len(texts) != len(prompts):
            raise UserError(f"{len(prompts)} prompts have {len(texts)} {name}: give one for each")
    ids = [_prompt(lm, text) for text in prompts]
    patches = None if counterfactuals is None else [_prompt(lm, text) for text in counterfactuals]
    for number, (own, patch) in enumerate(zip(ids, patches or ids, strict=True)):
        if len(own) != len(patch):
            raise UserError(
                f"prompt {number} has {len(own)} tokens and its counterfactual {len(patch)}: they must stand token for token in each "
                "other's places"
            )
    return Examples(
        _rows(ids, lm),
        _ends(ids, lm),
        _answers(lm, answers),
        None if others is None else _answers(lm, others),
        None if patches is None else _rows(patches, lm),
    )


def _prompt(lm: LanguageModel, text: str) -> list[int]:
    ids = lm.prompt_ids(text)
    if not text:
        raise UserError("a prompt is empty: give text that the answer follows")
    if lm.max_context is not None and len(ids) > lm.max_context:
        raise UserError(f"a prompt of {len(ids)} tokens exceeds the {lm.max_context} positions of model {lm.name!r}: shorten it")
    return ids


def prompt_rows(lm: LanguageModel, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Prompts without answers: ids [B, S] and the last position of each [B]. Raises UserError as `examples_of`."""
    if not texts:
        raise UserError("no prompt is given: give at least one")
    ids = [_prompt(lm, text) for text in texts]
    return _rows(ids, lm), _ends(ids, lm)


def _ends(ids: Sequence[Sequence[int]], lm: LanguageModel) -> Tensor:
    return torch.tensor([len(own) - 1 for own in ids], device=lm.device)


def _rows(ids: Sequence[Sequence[int]], lm: LanguageModel) -> Tensor:
    size = max(map(len, ids))
    return torch.tensor([[*own, *[own[-1]] * (size - len(own))] for own in ids], device=lm.device)


def _answers(lm: LanguageModel, answers: Sequence[str]) -> Tensor:
    found = []
    for text in answers:
        ids = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1 or lm.tokenizer.decode(ids) != text:
            raise UserError(
                f"answer {text!r} is not one token of model {lm.name!r}, but {len(ids)}: give one, with its leading space if it has one"
            )
        found.append(ids[0])
    return torch.tensor(found, device=lm.device)


# --- what is measured ---


def _at_end(logits_BSV: Tensor, examples: Examples) -> Tensor:
    return logits_BSV[torch.arange(len(examples), device=logits_BSV.device), examples.ends_B].float()


def logit_difference(logits_BSV: Tensor, examples: Examples) -> Tensor:
    """Logit of the answer less that of the other one: [B]. Raises UserError where the examples have no other answers."""
    if examples.others_B is None:
        raise UserError("a logit difference needs what answers are compared with: give others, or measure answer_log_probability")
    rows_BV = _at_end(logits_BSV, examples)
    return (rows_BV.gather(1, examples.answers_B[:, None]) - rows_BV.gather(1, examples.others_B[:, None]))[:, 0]


def answer_log_probability(logits_BSV: Tensor, examples: Examples) -> Tensor:
    """Log-probability of the answer, the loss on it negated: [B], in nats."""
    return _at_end(logits_BSV, examples).log_softmax(-1).gather(1, examples.answers_B[:, None])[:, 0]


def default_metric(examples: Examples) -> Metric:
    """The logit difference where there is something to compare with, or else the log-probability of the answer."""
    return answer_log_probability if examples.others_B is None else logit_difference


def measure(lm: LanguageModel, examples: Examples, metric: Metric) -> Tensor:
    """The metric of the model as it runs, edits in place included, with gradient where there is any: [B]."""
    logits_BSV = lm.hf(examples.ids_BS, use_cache=False).logits
    value_B = metric(logits_BSV, examples)
    if value_B.shape != (len(examples),):
        raise UserError(
            f"the metric gives a tensor of shape {tuple(value_B.shape)} for {len(examples)} examples: it must give one number each"
        )
    return value_B

"""Tasks with a known answer, by hand and by what they promise."""

import pytest
import torch

from saebench.circuits.discovery.tasks import induction_task, sorting_task
from saebench.errors import UserError


def test_what_comes_again_is_followed_by_the_answer_and_in_the_counterfactual_by_nothing():
    examples = induction_task(40, 12, length=9, first=2)
    for ids, end, answer, other, patch in zip(
        examples.ids_BS.tolist(),
        examples.ends_B.tolist(),
        examples.answers_B.tolist(),
        examples.others_B.tolist(),
        examples.patch_BS.tolist(),
        strict=True,
    ):
        assert ids[0] == 0 and end == len(ids) - 1 == 10
        assert ids[-1] == ids[3] and ids[4] == answer and ids[7] == other and len(set(ids[1:-1])) == 9
        assert [place for place in range(11) if ids[place] != patch[place]] == [3] and patch[-1] not in patch[:-1]
    again = induction_task(40, 12, length=9, first=2)
    assert torch.equal(examples.ids_BS, again.ids_BS)


def test_the_next_letter_is_right_and_the_other_one_is_that_of_the_counterfactual():
    examples = sorting_task(20)
    for ids, patch, answer, other in zip(
        examples.ids_BS.tolist(), examples.patch_BS.tolist(), examples.answers_B.tolist(), examples.others_B.tolist(), strict=True
    ):
        assert ids[6:] == sorted(ids[:6])[:2] == patch[6:] and answer == sorted(ids[:6])[2] != other == sorted(patch[:6])[2]
        assert sum(a != b for a, b in zip(ids, patch, strict=True)) == 1


@pytest.mark.parametrize(("given", "said"), [({"first": 12}, "leaves no room"), ({"vocabulary": 16}, "no 17 distinct")])
def test_what_cannot_be_is_one_line(given, said):
    with pytest.raises(UserError, match=said):
        induction_task(**{"vocabulary": 100, **given})

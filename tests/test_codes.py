import pytest
import torch

from saebench.codes import SparseCodes
from saebench.kernels.latent_order import latent_order


@pytest.fixture
def dense() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    dense = torch.rand(9, 12, generator=generator)
    dense[dense < 0.6] = 0
    dense[4] = 0
    return dense


def test_round_trip_through_ragged_codes(dense):
    codes = SparseCodes.from_dense(dense)
    assert torch.equal(codes.to_dense(), dense)
    assert len(codes) == 9


def test_counts_equal_the_dense_matrix(dense):
    for codes in (SparseCodes.from_dense(dense), SparseCodes(*reversed(dense.topk(12)), 12)):
        assert torch.equal(codes.l0(), (dense != 0).sum(1))
        assert torch.equal(codes.firings(), (dense != 0).sum(0))
        tokens, latents, values = codes.nonzero()
        rebuilt = torch.zeros_like(dense).index_put((tokens, latents), values)
        assert torch.equal(rebuilt, dense)


@pytest.mark.parametrize("rows", [slice(0, 9), slice(3, 6), slice(4, 5), slice(7, 7), slice(-2, None)])
def test_slices_are_the_rows_of_the_matrix(dense, rows):
    for codes in (SparseCodes.from_dense(dense), SparseCodes(*reversed(dense.topk(12)), 12)):
        assert torch.equal(codes[rows].to_dense(), dense[rows])


def test_order_lists_entries_latent_by_latent_in_token_order(dense):
    order = latent_order(SparseCodes.from_dense(dense))
    rows, columns = dense.T.nonzero(as_tuple=True)
    assert order.tokens_by_latent_N.tolist() == columns.tolist()
    assert order.by_latent[1].tolist() == [int((rows < f).sum()) for f in range(13)]


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        SparseCodes(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2), 5)
    with pytest.raises(ValueError, match="offsets"):
        SparseCodes(torch.zeros(3, dtype=torch.int64), torch.zeros(3), 5)
    with pytest.raises(ValueError, match="contiguous"):
        SparseCodes(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3), 5)[::2]


def test_side_by_side_and_split_are_blocks_of_columns(dense):
    ragged = [SparseCodes.from_dense(dense[:, :5]), SparseCodes.from_dense(dense[:, 5:])]
    fixed = [SparseCodes(*reversed(part.topk(3)), part.shape[1]) for part in (dense[:, :5], dense[:, 5:])]
    for parts in (ragged, fixed, [ragged[0], fixed[1]]):
        joint = SparseCodes.side_by_side(parts)
        assert torch.equal(joint.to_dense(), torch.cat([part.to_dense() for part in parts], 1))
        assert joint.tokens.diff().min() >= 0
        for part, back in zip(parts, joint.split([5, 7]), strict=True):
            assert torch.equal(back.to_dense(), part.to_dense())
            assert (back.values != 0).all()
    with pytest.raises(ValueError, match="do not make up"):
        joint.split([5, 6])

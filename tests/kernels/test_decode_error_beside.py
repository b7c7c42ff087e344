"""Two codes over the same entries, decoded at once, beside dense float64 algebra under autograd."""

import pytest
import torch

from saebench.codes import SparseCodes
from saebench.kernels import decode_error, decode_error_beside, use_implementation

TOKENS, WIDTH, LATENTS = 37, 53, 600


def problem(kind):
    """Codes, values beside, decoder, bias and target, float32; some values are 0."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    k = {"fixed": 7, "ragged": 9, "crowded": 250}[kind]
    indices = torch.stack([torch.randperm(LATENTS, generator=generator)[:k] for _ in range(TOKENS)]).int()
    values = draw(TOKENS, k).abs() * (draw(TOKENS, k) > -1)
    codes = SparseCodes(indices, values, LATENTS)
    if kind == "ragged":
        kept = draw(TOKENS, k) > 0
        kept[5] = False  # a token without entries
        rows = torch.arange(TOKENS)[:, None].expand(TOKENS, k)
        codes = SparseCodes.ragged(rows[kept], indices[kept], values[kept], TOKENS, LATENTS)
    return codes, draw(*codes.values.shape), draw(LATENTS, WIDTH), draw(WIDTH), draw(TOKENS, WIDTH)


def dense(codes, values):
    """[B, F] in float64, differentiable in the values."""
    rows = codes.tokens if codes.offsets is not None else torch.arange(TOKENS).repeat_interleave(codes.indices.shape[1])
    made = torch.zeros(TOKENS, LATENTS, dtype=torch.float64)
    return made.index_put((rows, codes.indices.reshape(-1).long()), values.reshape(-1))


@pytest.mark.parametrize("implementation", ["auto", "stock", "reference"])
@pytest.mark.parametrize("kind", ["fixed", "ragged", "crowded"])
def test_both_are_decoded_and_only_the_first_moves_the_decoder(kind, implementation):
    codes, beside, *rest = problem(kind)
    ours = [t.clone().requires_grad_() for t in (codes.values, beside, *rest)]
    theirs = [t.double().requires_grad_() for t in (codes.values, beside, *rest)]
    weights_B = torch.linspace(0.5, 2, TOKENS)

    with use_implementation(implementation):
        error_BD, squares_B, other_B = decode_error_beside(codes.replaced(ours[0]), *ours[1:])
        ((squares_B + 3 * other_B) * weights_B).sum().backward()

    own_BD = dense(codes, theirs[0]) @ theirs[2] + theirs[3] - theirs[4]
    held_BD = dense(codes, theirs[1]) @ theirs[2].detach() + theirs[3].detach() - theirs[4].detach()
    wanted = own_BD.square().sum(1), held_BD.square().sum(1)
    ((wanted[0] + 3 * wanted[1]) * weights_B).sum().backward()

    torch.testing.assert_close(error_BD.double(), own_BD, rtol=1e-4, atol=1e-4)
    for found, expected in zip((squares_B, other_B), wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", ["fixed", "ragged"])
def test_the_first_has_the_bits_of_decoding_alone(kind):
    codes, beside, *rest = problem(kind)
    for found, alone in zip(decode_error_beside(codes, beside, *rest), decode_error(codes, *rest), strict=False):
        assert torch.equal(found, alone)

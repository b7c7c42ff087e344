"""Operations on a stack of dictionaries beside dense algebra on each of them."""

import pytest
import torch

from saebench.kernels import decode_error, encode_topk, use_implementation
from saebench.kernels.latent_gradient import collect
from saebench.kernels.primitives import Term
from saebench.kernels.stacked import unstacked
from saebench.kernels.stock import sums

N, B, D, F = 3, 7, 5, 40
KS = [2, 4, 1]


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "W_enc": draw(N, F, D),
        "W_dec": draw(N, F, D),
        "b_enc": draw(N, F),
        "b_dec": draw(N, D),
        "scale": draw(N, F).abs() + 0.1,
    }, draw(N, B, D)


def dense_losses(p, x_nBD, with_b_in):
    """Codes [n, B, F] and the loss of each dictionary, in float64 and dense."""
    codes, losses = [], []
    for i, k in enumerate(KS):
        centred = x_nBD[i] - p["b_dec"][i] if with_b_in else x_nBD[i]
        z_BF = (centred @ p["W_enc"][i].T + p["b_enc"][i]) * p["scale"][i]
        kept = torch.zeros_like(z_BF).scatter(1, z_BF.topk(k, dim=1).indices, 1.0)
        codes.append((z_BF * kept).relu())
        error_BD = (codes[-1] / p["scale"][i]) @ p["W_dec"][i] + p["b_dec"][i] - x_nBD[i]
        losses.append(error_BD.square().sum(1).mean() * (i + 1))
    return torch.stack(codes), torch.stack(losses)


@pytest.mark.parametrize("with_b_in", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "stock"])
@pytest.mark.parametrize("shared_x", [True, False])
def test_codes_errors_and_gradients_are_those_of_each_dictionary(kernels, with_b_in, shared_x):
    plain, x_nBD = parameters()
    if shared_x:
        x_nBD = x_nBD[:1].expand(N, -1, -1)
    exact = {name: p.double().requires_grad_() for name, p in plain.items()}
    codes_nBF, losses_n = dense_losses(exact, x_nBD.double(), with_b_in)
    losses_n.sum().backward()

    flat = {name: (p if name == "b_dec" else p.flatten(0, 1)).clone().requires_grad_() for name, p in plain.items()}
    with use_implementation(kernels):
        codes = encode_topk(x_nBD, flat["W_enc"], flat["b_enc"], flat["b_dec"] if with_b_in else None, KS, flat["scale"])
        norms = flat["scale"].index_select(0, codes.indices.reshape(-1)).view(codes.values.shape)
        error_BD, squares_B = decode_error(codes.replaced(codes.values / norms), flat["W_dec"], flat["b_dec"], x_nBD)
        (squares_B.view(N, B).mean(1) * torch.arange(1, N + 1)).sum().backward()
    assert codes.d_sae == N * F and codes.indices.shape == (N * B, max(KS))
    blocks = codes.to_dense().view(N, B, N, F)
    for i in range(N):
        torch.testing.assert_close(blocks[i, :, i].double(), codes_nBF[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(blocks[i].sum(), blocks[i, :, i].sum())  # no latent of another
    torch.testing.assert_close(squares_B, error_BD.square().sum(1), rtol=1e-5, atol=1e-5)
    rounding = 1e-6 * max(float(p.grad.abs().max()) for p in exact.values())  # those of the scale cancel each other
    for name, p in flat.items():
        torch.testing.assert_close(p.grad.view(exact[name].shape).double(), exact[name].grad, rtol=1e-4, atol=max(1e-4, rounding))


@pytest.mark.parametrize("kernels", ["auto", "stock"])
def test_terms_of_a_stack_fall_apart_into_those_of_its_dictionaries(kernels):
    plain, x_nBD = parameters(1)
    W_enc = plain["W_enc"].flatten(0, 1).requires_grad_()
    terms = collect(W_enc).terms
    with use_implementation(kernels):
        codes = encode_topk(x_nBD, W_enc, plain["b_enc"].flatten(), plain["b_dec"], KS)
        codes.values.square().sum().backward()
        if not terms:  # so many are active that the sum was made at once
            terms.append(Term(codes.replaced(2 * codes.values.detach()), (x_nBD - plain["b_dec"][:, None]).flatten(0, 1)))
        whole_FD = torch.zeros(N * F, D).index_add_(
            0,
            terms[0].codes.indices.reshape(-1).long(),
            (terms[0].codes.values[..., None] * terms[0].rows_BD[:, None]).flatten(0, 1),
        )
        (parts,) = unstacked(terms, N)
        for i, part in enumerate(parts):
            assert part.codes.d_sae == F and int(part.codes.indices.max()) < F and len(part.codes) == B
            torch.testing.assert_close(sums(part.codes, part.rows_BD), whole_FD[i * F : (i + 1) * F], rtol=1e-5, atol=1e-5)
            order = part.codes.order  # as if it had been sorted anew
            fresh = torch.sort(order.indices_N, stable=True)
            assert torch.equal(order.by_latent[0].long(), fresh.indices)
            assert torch.equal(order.by_latent[1].diff(), torch.bincount(order.indices_N, minlength=F))
            assert torch.equal(order.tokens_by_latent_N.long(), order.tokens_N[fresh.indices])

"""Edits on a running model, against the same thing computed by hand, in whole passes and under a key-value cache."""

import pytest
import torch

from saebench.errors import UserError
from saebench.evaluation.splice import splice
from saebench.lm import load_lm
from saebench.steering.edits import ablate, add, affine, cap, clamp, edit, latent_rows, orthogonal, scale, swap
from saebench.steering.hooks import steer
from saebench.steering.positions import Positions

IDS = torch.tensor([[0, 40, 50, 60, 70, 80, 45, 55], [0, 41, 51, 60, 71, 81, 46, 56]])
SITE = "blocks.1.hook_resid_post"


def read(lm, ids=IDS, site=SITE):
    return lm.read(ids, [site])[site].clone()


def f_of(lm, dictionary, ids=IDS):
    """Dense codes of all positions but the first: [B, S - 1, F]."""
    seen = lm.read(ids, list(dictionary.config.reads))
    x_BSD = torch.cat([seen[site] for site in dictionary.config.reads], -1)
    return dictionary.encode_contexts(x_BSD).to_dense().view(len(ids), ids.shape[1] - 1, -1)


def active(lm, dictionary, count=2):
    """The latents that fire most often on the text."""
    return (f_of(lm, dictionary) != 0).flatten(0, 1).sum(0).topk(count).indices.tolist()


def hooks_of(lm):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.hf.modules())


def cached_logits(lm, ids_BS, prompt):
    """Logits of all positions with a cache: the prompt in one pass, then token by token."""
    from transformers import DynamicCache

    with torch.inference_mode():
        cache = DynamicCache(config=lm.hf.config)
        parts = [lm.hf(ids_BS[:, :prompt], past_key_values=cache, use_cache=True).logits]
        for place in range(prompt, ids_BS.shape[1]):
            parts.append(lm.hf(ids_BS[:, place : place + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, 1)


# --- nothing where nothing is asked for ---


def test_zero_strength_hooks_nothing_and_changes_no_bit(tiny_lm, kinds):
    clean, before = tiny_lm.logits(IDS), hooks_of(tiny_lm)
    for dictionary in kinds.values():
        for one in (add(dictionary, 3, 0.0), clamp(dictionary, 3, 5.0, strength=0.0), ablate(dictionary, 3, strength=0)):
            with steer(tiny_lm, one):
                assert hooks_of(tiny_lm) == before
                assert torch.equal(tiny_lm.logits(IDS), clean)
    text = tiny_lm.generate("def value", 12)
    with steer(tiny_lm, add(kinds["topk"], 3, 0.0)):
        assert tiny_lm.generate("def value", 12) == text


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "transcoder", "skip", "lorsa", "crosscoder", "clt"])
def test_an_inactive_latent_ablated_and_a_factor_of_one_change_no_bit(kind, tiny_lm, kinds):
    dictionary, clean = kinds[kind], tiny_lm.logits(IDS)
    silent = int((f_of(tiny_lm, dictionary) != 0).flatten(0, 1).sum(0).argmin())
    assert not f_of(tiny_lm, dictionary)[..., silent].any()
    for one in (ablate(dictionary, silent), scale(dictionary, active(tiny_lm, dictionary), 1.0)):
        with steer(tiny_lm, one):
            assert torch.equal(tiny_lm.logits(IDS), clean)


def test_no_hook_is_left_when_the_block_raises(tiny_lm, kinds):
    before, clean = hooks_of(tiny_lm), tiny_lm.logits(IDS)
    with pytest.raises(RuntimeError, match="in the middle"), steer(tiny_lm, clamp(kinds["crosscoder"], 3, 9.0)):
        assert hooks_of(tiny_lm) > before
        raise RuntimeError("in the middle")
    assert hooks_of(tiny_lm) == before
    with pytest.raises(UserError), steer(tiny_lm, add(torch.ones(5), site=SITE)):
        pass
    assert hooks_of(tiny_lm) == before
    assert torch.equal(tiny_lm.logits(IDS), clean)


# --- the primitives, by hand ---


def test_directions(tiny_lm):
    x = read(tiny_lm)
    u = torch.nn.functional.normalize(torch.randn(x.shape[2], generator=torch.Generator().manual_seed(1)), dim=0)
    others = torch.randn(3, x.shape[2], generator=torch.Generator().manual_seed(2))
    others = torch.cat([others, others[:1] + others[1:2]])  # the fourth depends on two of them

    def after(one):
        with steer(tiny_lm, one):
            found = read(tiny_lm)
        assert torch.equal(found[:, 0], x[:, 0])  # BOS
        return found[:, 1:]

    x = x.clone()
    rest = x[:, 1:]
    torch.testing.assert_close(after(add(7.0 * u, strength=3.0, unit=0.5, site=SITE)), rest + 1.5 * u)
    torch.testing.assert_close(
        after(add(u, strength=6.0, unit=0.5, site=SITE)) - rest, 2 * (after(add(u, strength=3.0, unit=0.5, site=SITE)) - rest)
    )
    assert (after(orthogonal(others, site=SITE)) @ others.T).abs().max() < 1e-4
    torch.testing.assert_close(after(orthogonal(u, site=SITE, strength=2.0)), rest - 2 * (rest @ u)[..., None] * u)
    middle = float((rest @ u).median())
    capped = after(cap(3 * u, site=SITE, value=middle))
    torch.testing.assert_close(capped @ u, (rest @ u).clamp_max(middle))
    torch.testing.assert_close(capped - (capped @ u)[..., None] * u, rest - (rest @ u)[..., None] * u)
    moved = after(affine(u, site=SITE, value=2.5))
    torch.testing.assert_close(moved @ u, torch.full_like(moved @ u, 2.5))
    torch.testing.assert_close(moved - (moved @ u)[..., None] * u, rest - (rest @ u)[..., None] * u)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "transcoder", "lorsa"])
def test_latents(kind, tiny_lm, kinds):
    """What is written is x + (f' - f) W_dec for each primitive, with f by a dense encoding."""
    dictionary = kinds[kind]
    site = dictionary.config.writes[0]
    y, f = read(tiny_lm, site=site)[:, 1:], f_of(tiny_lm, dictionary)
    one, other = active(tiny_lm, dictionary)
    W = dictionary.W_dec

    def after(*edits):
        with steer(tiny_lm, list(edits)):
            return read(tiny_lm, site=site)[:, 1:]

    def expected(change):
        g = f.clone()
        change(g)
        return y + (g - f) @ W

    def set_to(value):
        return lambda g: g[..., one].fill_(value)

    def swapped(g):
        g[..., [one, other]] = g[..., [other, one]]

    close = lambda found, change: torch.testing.assert_close(found, expected(change), rtol=1e-4, atol=1e-4)  # noqa: E731
    close(after(clamp(dictionary, one, 4.0)), set_to(4.0))
    close(after(ablate(dictionary, one)), set_to(0.0))
    close(after(scale(dictionary, one, -2.0)), lambda g: g[..., one].mul_(-2.0))
    close(after(swap(dictionary, one, other)), swapped)
    close(after(clamp(dictionary, one, 4.0, strength=0.25)), lambda g: g[..., one].mul_(0.75).add_(1.0))
    if kind != "lorsa":  # a second edit reads what the first one left: rows are of unit length, so adding is clamping to f + a
        torch.testing.assert_close(after(add(dictionary, one, 1.5)), y + 1.5 * W[one] / W[one].norm(), rtol=1e-4, atol=1e-4)
    both = after(ablate(dictionary, [one, other]))
    torch.testing.assert_close(both, after(ablate(dictionary, one)) + after(ablate(dictionary, other)) - y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "transcoder", "skip", "lorsa"])
def test_without_the_error_a_factor_of_one_is_the_splice(kind, tiny_lm, kinds):
    dictionary = kinds[kind]
    seen = tiny_lm.read(IDS, list(dictionary.config.sites))
    with tiny_lm.edit(splice(dictionary, seen)):
        spliced = tiny_lm.logits(IDS)
    with steer(tiny_lm, scale(dictionary, 3, 1.0, keep_error=False)):
        torch.testing.assert_close(tiny_lm.logits(IDS), spliced, rtol=1e-4, atol=1e-4)
    assert not torch.equal(spliced, tiny_lm.logits(IDS))


def test_a_crosscoder_writes_all_its_sites_from_the_untouched_readings(tiny_lm, kinds):
    dictionary = kinds["crosscoder"]
    sites = list(dictionary.config.sites)
    latent = active(tiny_lm, dictionary, 1)[0]
    f = f_of(tiny_lm, dictionary)[..., latent]
    clean = {site: read(tiny_lm, site=site) for site in sites}
    first, second = latent_rows(dictionary, [latent])[0].split(list(dictionary.config.blocks_out))
    with steer(tiny_lm, clamp(dictionary, latent, 3.0)):
        torch.testing.assert_close(read(tiny_lm, site=sites[0])[:, 1:], clean[sites[0]][:, 1:] + (3.0 - f)[..., None] * first)
        both = read(tiny_lm, site=sites[1])
    with tiny_lm.edit({sites[0]: lambda x: torch.cat([x[:, :1], x[:, 1:] + (3.0 - f)[..., None] * first], 1)}):
        downstream = read(tiny_lm, site=sites[1])
    torch.testing.assert_close(both[:, 1:], downstream[:, 1:] + (3.0 - f)[..., None] * second, rtol=1e-4, atol=1e-4)


# --- under a cache, and where in the text ---


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "3-6", "after:="])
@pytest.mark.parametrize("kind", ["topk", "transcoder", "crosscoder", "clt", "lorsa"])
def test_with_a_cache_as_in_one_pass(kind, positions, tiny_lm, kinds):
    """The same text in one pass and token by token: an edit that knows where it is gives the same logits. What belongs to the prompt and
    what to the text after it is said to the single pass as a span. Readings ahead of a crosscoder are of the text as it was
    steered before."""
    dictionary, prompt, size = kinds[kind], 4, IDS.shape[1]
    token = tiny_lm.token_strings[int(IDS[0, 2])] if positions.startswith("after") else None
    said = positions if token is None else f"after:{token}"
    in_one = {"prompt": f"1-{prompt}", "generated": f"{prompt}-{size}"}.get(said, said)
    late = kind in ("crosscoder", "clt")
    for how, value in (("add", None), ("clamp", 4.0)):
        one = edit(how, dictionary, 5, strength=2.0, value=value, positions=said)
        with steer(tiny_lm, one):
            found = cached_logits(tiny_lm, IDS, prompt)
        assert not torch.allclose(found, tiny_lm.logits(IDS))
        if late and how == "clamp":
            expected = _ahead_by_hand(tiny_lm, dictionary, 5, value, in_one)
        else:
            with steer(tiny_lm, edit(how, dictionary, 5, strength=2.0, value=value, positions=in_one)):
                expected = tiny_lm.logits(IDS)
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def _ahead_by_hand(lm, dictionary, latent, value, positions):
    """Token by token, without a cache: the codes of each position are read with all positions before it steered and itself not."""
    rows = latent_rows(dictionary, [latent])[0].split(list(dictionary.config.blocks_out))
    spec, size, prompt = Positions.parse(positions), IDS.shape[1], 4
    deltas = {site: torch.zeros(len(IDS), size, len(row)) for site, row in zip(dictionary.config.writes, rows, strict=True)}

    def edits(upto):
        return {
            site: lambda x, d=delta: x + torch.cat([d[:, :upto], torch.zeros_like(d[:, upto:])], 1)
            for site, delta in deltas.items()
        }

    behind = torch.zeros(len(IDS), size, dtype=torch.bool)
    if spec.kind == "after":
        behind = (spec.token_id(lm) == IDS).cumsum(1) - (spec.token_id(lm) == IDS).long() > 0
    groups = [list(range(1, prompt)), *([place] for place in range(prompt, size))]
    for places in groups:
        with lm.edit(edits(places[0])):
            seen = lm.read(IDS, list(dictionary.config.reads))
        x = torch.cat([seen[site] for site in dictionary.config.reads], -1)
        f = dictionary.encode_contexts(x).to_dense().view(len(IDS), size - 1, -1)[..., latent]
        for place in places:
            if spec.part(place, 1) is None:
                continue
            here = torch.ones(len(IDS), dtype=torch.bool) if spec.kind != "after" else behind[:, place]
            for site, row in zip(dictionary.config.writes, rows, strict=True):
                deltas[site][here, place] = 2.0 * (value - f[here, place - 1])[:, None] * row
    with lm.edit(edits(size)):
        return lm.logits(IDS)


@pytest.mark.parametrize(
    ("said", "changed"),
    [
        ("all", [1, 2, 3, 4, 5, 6, 7]),
        ("prompt", [1, 2, 3, 4, 5, 6, 7]),
        ("generated", []),
        ("last", [7]),
        ("2-4", [2, 3]),
        ("0-2", [1]),
        ("6-99", [6, 7]),
    ],
)
def test_positions_in_one_pass(said, changed, tiny_lm, kinds):
    with steer(tiny_lm, add(kinds["topk"], 3, 5.0, positions=said)):
        found = read(tiny_lm)
    assert (found != read(tiny_lm)).any(-1)[0].nonzero()[:, 0].tolist() == changed


def test_after_a_token_is_told_for_each_text(tiny_lm, kinds):
    token = tiny_lm.token_strings[60]
    ids = torch.tensor([[0, 40, 60, 41, 60, 42], [0, 40, 41, 42, 43, 60], [0, 1, 2, 3, 4, 5]])
    with steer(tiny_lm, add(kinds["topk"], 3, 5.0, positions=f"after:{token}")):
        found = read(tiny_lm, ids)
    assert [(row.nonzero()[:, 0].tolist()) for row in (found != read(tiny_lm, ids)).any(-1)] == [[3, 4, 5], [], []]


def test_generation_with_a_cache_is_that_without(tiny_lm, kinds):
    for kind in ("topk", "lorsa", "crosscoder"):
        one = add(kinds[kind], 3, 40.0)
        with steer(tiny_lm, one):
            ids = tiny_lm.generate_ids(IDS[:, :4], 6, whole=True)
            text = torch.cat([IDS[:, :4], ids], 1)
            assert torch.equal(tiny_lm.logits(text)[:, 3:-1].argmax(-1)[:, 0], ids[:, 0])
            greedy = tiny_lm.logits(text)[:, 3:-1].clone()
            greedy[..., tiny_lm.tokenizer.eos_token_id] = float("-inf")
            assert torch.equal(greedy.argmax(-1), ids)


# --- several at once, of several dictionaries at several layers ---


def test_edits_add_up_in_their_order(tiny_lm, kinds):
    topk, jumprelu = kinds["topk"], kinds["jumprelu"]
    latent = active(tiny_lm, jumprelu, 1)[0]
    with steer(tiny_lm, [add(topk, 3, 2.0), clamp(jumprelu, latent, 1.0)]):
        found = read(tiny_lm)[:, 1:]
    x = read(tiny_lm)[:, 1:] + 2.0 * topk.W_dec[3] / topk.W_dec[3].norm()
    f = jumprelu.encode(x.flatten(0, 1)).to_dense()[:, latent].view(x.shape[:2])
    torch.testing.assert_close(found, x + (1.0 - f)[..., None] * jumprelu.W_dec[latent], rtol=1e-4, atol=1e-4)
    with steer(tiny_lm, add(topk, 3, 2.0)), steer(tiny_lm, add(kinds["transcoder"], 4, 2.0)):
        nested = tiny_lm.logits(IDS)
    with steer(tiny_lm, [add(kinds["transcoder"], 4, 2.0), add(topk, 3, 2.0)]):
        torch.testing.assert_close(tiny_lm.logits(IDS), nested)


# --- wrong input ---


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d: add(d, 64), "latent 64 is not one of the 64, counted from 0"),
        (lambda d: add(d, -1), "latent -1 is not one of"),
        (lambda d: add(d, ()), "names no latent"),
        (lambda d: add(d, [3, 3]), "repeat"),
        (lambda d: add(d, 3, float("nan")), "strength is nan: give a finite number"),
        (lambda d: add(d, 3, float("inf")), "strength is inf"),
        (lambda d: clamp(d, 3, float("nan")), "value of clamp is nan"),
        (lambda d: edit("clamp", d, 3), "clamp needs a value"),
        (lambda d: edit("ablate", d, 3, value=1.0), "takes no value"),
        (lambda d: edit("push", d, 3), "unknown primitive 'push'"),
        (lambda d: add(d, 3, positions="middle"), "positions 'middle' are unknown: use all, prompt, generated, last"),
        (lambda d: add(d, 3, positions="9-4"), "holds no position"),
        (lambda d: swap(d, 3, 3), "repeat"),
        (lambda d: edit("swap", d, 3), "swap exchanges two latents"),
        (lambda d: cap(d, [1, 2], value=1.0), "cap is of one direction"),
        (lambda d: add(torch.zeros(32), site=SITE), "a direction is zero"),
        (lambda d: add(torch.full((32,), float("nan")), site=SITE), "not finite"),
        (lambda d: add(torch.ones(32)), "needs the site"),
        (lambda d: edit("ablate", torch.ones(32), site=SITE), "changes latents"),
        (lambda d: add(d, [1, 2], weights=[1.0]), "2 latents have 1 weights"),
    ],
)
def test_wrong_edits_are_one_line(make, said, kinds):
    with pytest.raises(UserError, match=said) as error:
        make(kinds["topk"])
    assert "\n" not in str(error.value)


def test_what_does_not_fit_the_model_is_one_line(tiny_lm, kinds, builtin_lm, tmp_path):
    with pytest.raises(UserError, match="wrong model"), steer(builtin_lm, add(kinds["topk"], 3)):
        pass
    with pytest.raises(UserError, match="unknown site"), steer(tiny_lm, add(torch.ones(32), site="blocks.9.hook_resid_post")):
        pass
    with pytest.raises(UserError, match="32 wide"), steer(tiny_lm, add(torch.ones(5), site=SITE)):
        pass
    with (
        pytest.raises(UserError, match="'def value' is .* tokens"),
        steer(tiny_lm, add(kinds["topk"], 3, positions="after:def value")),
    ):
        pass


def test_other_weights_of_the_same_shape_are_told(tiny_lm_directory, kinds, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_lm_directory, other)
    tensors = load_file(other / "model.safetensors")
    tensors["transformer.wte.weight"] += 1.0
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="trained on a model with other weights"), steer(load_lm(other), add(kinds["topk"], 3)):
        pass

"""Feature circuits against what they must be: algebra where the model is linear, the model itself run again, and a planted circuit."""

import pytest
import torch

import saebench as sb
from saebench.circuits.discovery.examples import Examples, answer_log_probability, examples_of, logit_difference
from saebench.circuits.discovery.patching import Patching
from saebench.circuits.discovery.ranking import roc_auc
from saebench.circuits.discovery.tasks import induction_task, sorting_task
from saebench.errors import UserError
from saebench.lm import load_lm
from saebench.lm.sites import hooked
from saebench.synthetic import save_induction_transformer

RESID = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
MLP = ("blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out")
HEADS = "blocks.1.attn.hook_z"


def random_examples(lm, count=3, length=7, seed=0):
    """Random tokens behind BOS; counterfactuals with two of them replaced."""
    draw = lambda *shape: torch.randint(1, lm.hf.config.vocab_size, shape, generator=generator)  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    clean, patch = torch.zeros(count, 1 + length, dtype=torch.int64), None
    clean[:, 1:] = draw(count, length)
    patch = clean.clone()
    patch[:, 2], patch[:, length - 1] = draw(count), draw(count)
    return Examples(clean, torch.full((count,), length), draw(count), draw(count), patch)


def sae_at(lm, site, *, target=None, d_sae=48, k=6, seed=0, **options):
    """An untrained dictionary with weights, biases and a decoder of its own."""
    config = sb.Transcoder if target else sb.TopK
    widths = {"d_in": lm.width(site), "d_out": lm.width(target or site)}
    sae = config(d_sae=d_sae, k=k, site=site, target=target, normalise="none", **widths, **options).build()
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(200, width, generator=generator) for width in widths.values())
    sae.initialise(x, x if target is None else y, generator)
    with torch.no_grad():
        sae.b_enc.normal_(generator=generator)
        sae.b_dec.normal_(generator=generator)
        sae.W_dec += 0.1 * torch.randn(sae.W_dec.shape, generator=generator)
        if options.get("skip"):
            sae.W_skip.normal_(generator=generator).mul_(0.1)
    return sae.settled().requires_grad_(False)


def linear_readout(site, lm, seed=1):
    """A metric that is linear in what stands at a site: it reads it off the running model instead of its logits."""
    w = torch.randn(64, lm.width(site), generator=torch.Generator().manual_seed(seed))
    kept = {}
    hooks = hooked(lm.hf, {lm.site(site): lambda value: kept.update(x=value)})
    hooks.__enter__()  # never left: the model is this test's own

    def metric(_logits, _examples, hooks=hooks):
        return (kept["x"] * w[: kept["x"].shape[1]]).sum((1, 2))

    return metric


def same(a, b, tolerance=2e-4):
    assert torch.equal(a.site_N, b.site_N) and torch.equal(a.latent_N, b.latent_N) and torch.equal(a.position_N, b.position_N)
    torch.testing.assert_close(a.effect_N, b.effect_N, rtol=tolerance, atol=tolerance * float(b.effect_N.abs().max()))


@pytest.mark.parametrize("patch", ["zero", "mean", "resample"])
@pytest.mark.parametrize("kind", ["stream", "skip", "heads"])
def test_where_the_metric_is_linear_all_methods_give_the_change_times_the_direction(tiny_lm_directory, kind, patch):
    lm = load_lm(tiny_lm_directory)
    sae = {
        "stream": lambda: sae_at(lm, RESID[1]),
        "skip": lambda: sae_at(lm, MLP[0], target=MLP[1], skip=True),
        "heads": lambda: sae_at(lm, HEADS),
    }[kind]()
    # What the site adds to the stream at once is linear in it: the output of the block, or of attention.
    readout = linear_readout("blocks.1.hook_attn_out" if kind == "heads" else "blocks.2.hook_resid_pre", lm)
    examples = random_examples(lm)
    patching = Patching(lm, [sae], examples, metric=readout, patch=patch, batch_size=2)
    exact = patching.effects("exact")
    assert exact.effect_N.abs().max() > 0.1
    for method in ("first_order", "latents_only", "integrated"):
        same(patching.effects(method, steps=3), exact)
    if kind == "stream" and patch == "zero":  # by hand: f_i * (d_i . w), signed minus, summed over positions, mean over examples
        x = lm.read(examples.ids_BS, [RESID[1]])[RESID[1]][:, 1:]
        w = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))[1:8]
        f = sae.encode(x.flatten(0, 1)).to_dense().view(3, 7, 48)
        expected = -(f * (w @ sae.W_dec.T)).sum((0, 1)) / 3
        found = torch.zeros(48)
        latents = exact.latent_N >= 0
        found[exact.latent_N[latents]] = exact.effect_N[latents]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch", ["zero", "resample"])
def test_integrated_effects_of_a_submodule_add_up_to_what_patching_all_of_it_does(tiny_lm, patch):
    saes = [sae_at(tiny_lm, RESID[0]), sae_at(tiny_lm, MLP[0], target=MLP[1], seed=1)]
    examples = random_examples(tiny_lm, seed=3)
    patching = Patching(tiny_lm, saes, examples, patch=patch, keep_positions=True)
    effects = patching.effects("integrated", steps=200)
    with torch.no_grad():
        clean = logit_difference(tiny_lm.logits(examples.ids_BS), examples).mean()
    for number, sae in enumerate(saes):
        site = sae.config.writes[0]
        if patch == "resample":
            other = tiny_lm.read(examples.patch_BS, [site])[site]
        else:
            seen = tiny_lm.read(examples.ids_BS, [site])[site]
            other = torch.cat([seen[:, :1], sae.b_dec.expand(3, 7, -1)], 1)
        with tiny_lm.edit({site: lambda value, other=other: torch.cat([value[:, :1], other[:, 1:]], 1)}):
            patched = logit_difference(tiny_lm.logits(examples.ids_BS), examples).mean()
        total = effects.effect_N[effects.site_N == number].sum()
        assert float(total) == pytest.approx(float(patched - clean), rel=0.01, abs=1e-3)
    steps = patching.effects("integrated", steps=1)
    same(steps, patching.effects("first_order"), 1e-4)


def test_exact_effects_are_those_of_the_model_run_again_with_one_node_changed(tiny_lm):
    sae, examples = sae_at(tiny_lm, RESID[0]), random_examples(tiny_lm)
    patching = Patching(tiny_lm, [sae], examples, keep_positions=True)
    exact = patching.effects("exact")
    x = tiny_lm.read(examples.ids_BS, [RESID[0]])[RESID[0]]
    y = tiny_lm.read(examples.patch_BS, [RESID[0]])[RESID[0]]
    f, g = (sae.encode(v.flatten(0, 1)).to_dense().view(3, 8, 48) for v in (x, y))
    clean = logit_difference(tiny_lm.logits(examples.ids_BS), examples)
    for node in exact.order()[[0, 1, 2, 20]].tolist():
        latent, t = int(exact.latent_N[node]), int(exact.position_N[node])
        new = x.clone()
        if latent >= 0:
            new[:, t] += (g - f)[:, t, latent, None] * sae.W_dec[latent]
        else:
            new[:, t] += (y - g @ sae.W_dec - x + f @ sae.W_dec)[:, t]
        with tiny_lm.edit({RESID[0]: lambda _value, new=new: new}):
            expected = (logit_difference(tiny_lm.logits(examples.ids_BS), examples) - clean).mean()
        assert float(exact.effect_N[node]) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)
    # A guess that is no truth: of the same sign mostly, and not the same.
    guess = patching.effects("first_order")
    assert torch.corrcoef(torch.stack([guess.effect_N, exact.effect_N]))[0, 1] > 0.5
    assert (guess.effect_N - exact.effect_N).abs().max() > 1e-3


def identity_at(lm, site):
    """A dictionary that says every vector exactly: 2 D latents, plus and minus each coordinate."""
    width = lm.width(site)
    sae = sb.ReLU(d_sae=2 * width, d_in=width, site=site, normalise="none").build()
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    with torch.no_grad():
        sae.W_enc_FD.copy_(both)
        sae.W_dec.copy_(both)
    return sae.settled().requires_grad_(False)


def test_a_dictionary_that_errs_nowhere_has_error_nodes_without_effect_and_latents_that_carry_all(tiny_lm):
    saes = [identity_at(tiny_lm, site) for site in RESID]
    patching = Patching(tiny_lm, saes, random_examples(tiny_lm))
    for method in ("first_order", "latents_only", "integrated"):
        effects = patching.effects(method, steps=4)
        errors = effects.effect_N[effects.latent_N == -1]
        assert len(errors) == 2 and errors.abs().max() < 1e-5 and effects.effect_N.abs().max() > 1e-2
    same(patching.effects("first_order"), patching.effects("latents_only"), 1e-4)
    # A lossy dictionary in between carries less: holding its error changes the effects before it, and not its own.
    lossy = Patching(tiny_lm, [saes[0], sae_at(tiny_lm, RESID[1])], random_examples(tiny_lm))
    straight, held = lossy.effects("first_order"), lossy.effects("latents_only")
    before = straight.site_N == 0
    assert (straight.effect_N - held.effect_N)[before].abs().max() > 1e-2
    torch.testing.assert_close(straight.effect_N[~before], held.effect_N[~before], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch", ["zero", "mean", "resample"])
@pytest.mark.parametrize("keep", [False, True])
def test_all_nodes_are_the_model_and_none_is_all_of_it_patched(tiny_lm, patch, keep):
    saes = [sae_at(tiny_lm, RESID[0]), sae_at(tiny_lm, HEADS, seed=2), sae_at(tiny_lm, MLP[0], target=MLP[1], seed=1)]
    examples = random_examples(tiny_lm)
    patching = Patching(tiny_lm, saes, examples, patch=patch, keep_positions=keep, batch_size=2)
    effects = patching.effects("first_order")
    curve = patching.curve(effects, [0, 5, len(effects)])
    assert curve.faithfulness_K[0] == 0 and curve.faithfulness_K[-1] == pytest.approx(1, abs=1e-4)
    assert curve.completeness_K[0] == pytest.approx(1, abs=1e-4) and curve.completeness_K[-1] == 0
    clean = logit_difference(tiny_lm.logits(examples.ids_BS), examples).mean()
    assert curve.full == pytest.approx(float(clean), abs=1e-4)
    if patch == "resample":  # all sites patched, the last of them decides with what the first positions and other heads add
        other = {sae.config.writes[0]: tiny_lm.read(examples.patch_BS, [sae.config.writes[0]]) for sae in saes}
        edits = {s: lambda v, o=o[s]: torch.cat([v[:, :1], o[:, 1:]], 1) for s, o in other.items()}
        with tiny_lm.edit(edits):
            none = logit_difference(tiny_lm.logits(examples.ids_BS), examples).mean()
        assert curve.none == pytest.approx(float(none), abs=1e-4)


def test_what_is_kept_runs_live(tiny_lm):
    """With only the error of an early site patched, a later submodule that is kept sees the change."""
    saes = [sae_at(tiny_lm, RESID[0]), identity_at(tiny_lm, RESID[1])]
    examples = random_examples(tiny_lm, length=30)
    patching = Patching(tiny_lm, saes, examples, patch="zero")
    effects = patching.effects("first_order")
    kept = ~((effects.site_N == 0) & (effects.latent_N == -1))
    x = tiny_lm.read(examples.ids_BS, [RESID[0]])[RESID[0]]
    with tiny_lm.edit({RESID[0]: lambda value: torch.cat([x[:, :1], saes[0](x[:, 1:].flatten(0, 1)).view(3, 30, 32)], 1)}):
        expected = logit_difference(tiny_lm.logits(examples.ids_BS), examples).mean()
    live = {int(i) for i in effects.latent_N[effects.site_N == 1]}
    assert len(live) == 65  # all latents of the second are nodes, so that nothing of it is patched
    full = patching.metric_of(effects, torch.ones_like(kept))
    assert abs(full - float(expected)) > 0.05
    assert patching.metric_of(effects, kept) == pytest.approx(float(expected), abs=1e-3)


def test_prompts_of_different_length_give_the_mean_of_each_alone(tiny_lm):
    texts, answers = ["def value", "return x * 2", "x"], ["x", "y", "z"]
    sae = sae_at(tiny_lm, RESID[0])
    together = Patching(tiny_lm, [sae], examples_of(tiny_lm, texts, answers))
    assert together.metric is answer_log_probability and together.patch == "zero"
    effects = together.effects("integrated", steps=3)
    total = {}
    for text, answer in zip(texts, answers, strict=True):
        alone = Patching(tiny_lm, [sae], examples_of(tiny_lm, [text], [answer])).effects("integrated", steps=3)
        for latent, effect in zip(alone.latent_N.tolist(), alone.effect_N.tolist(), strict=True):
            total[latent] = total.get(latent, 0) + effect / 3
    assert {*total} == {*effects.latent_N.tolist()}
    for latent, effect in zip(effects.latent_N.tolist(), effects.effect_N.tolist(), strict=True):
        assert effect == pytest.approx(total[latent], rel=1e-3, abs=1e-5)


def test_a_trained_lorsa_is_a_submodule_too(tiny_lm, kinds_of_lorsa):
    examples = random_examples(tiny_lm)
    patching = Patching(tiny_lm, [kinds_of_lorsa, sae_at(tiny_lm, RESID[1])], examples)
    same(patching.effects("integrated", steps=1), patching.effects("first_order"), 1e-3)
    curve = patching.curve(patching.effects("latents_only"), [0, 10])
    assert curve.faithfulness_K[0] == 0


@pytest.fixture(scope="module")
def kinds_of_lorsa(tiny_lm, contexts):
    from saebench.activations import ActivationStream

    sites = ["blocks.1.ln1.hook_out", "blocks.1.hook_attn_out"]
    config = sb.Lorsa(d_sae=64, k=4, site=sites[0], target=sites[1])
    training = sb.TrainConfig(num_tokens=32 * 10, batch_size=32, lr=5e-3)
    return sb.train(config, ActivationStream(tiny_lm, contexts[:12], sites), training, lm=tiny_lm)


# --- the planted circuit ---


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy") / "induction"
    circuit = save_induction_transformer(directory, 26, max_context=24, seed=1)
    return load_lm(directory, device="cpu"), circuit


def true_dictionary(circuit, site):
    """The planted directions of a site as an autoencoder."""
    directions = circuit.directions_at(site)
    sae = sb.ReLU(d_sae=len(directions), d_in=directions.shape[1], site=site, normalise="none", target_l0=4).build()
    with torch.no_grad():
        sae.W_enc_FD.copy_(directions)
        sae.W_dec.copy_(directions)
        sae.b_enc.fill_(-1e-3)
    return sae.settled().requires_grad_(False)


def induction_prompts():
    """a...b: `...xy...x` asks for y; the counterfactual has another letter instead of the first x."""
    words = ["gxyhklx", "abcdefghb", "qwertyuiw", "mnopqrsto"]
    answers = ["y", "c", "e", "p"]
    patches = ["gzyhklx", "axcdefghb", "qaertyuiw", "mnzpqrsto"]
    return words, answers, patches


def test_on_the_planted_transformer_the_nodes_of_the_circuit_rank_first(planted):
    lm, circuit = planted
    words, answers, patches = induction_prompts()
    sites = ["blocks.0.hook_attn_out", "blocks.1.hook_attn_out"]
    saes = [true_dictionary(circuit, site) for site in sites]
    for word, answer, patch in zip(words, answers, patches, strict=True):
        examples = examples_of(lm, [word], [answer], counterfactuals=[patch])
        patching = Patching(lm, saes, examples, keep_positions=True)
        index = {letter: number for number, letter in enumerate(circuit.characters)}
        place, end = word.index(answer) + 1, len(word)  # behind BOS
        before = word[word.index(answer) - 1]
        wanted = {(0, place, index[before]), (1, end, index[answer])}
        for method in ("integrated", "exact"):
            effects = patching.effects(method)
            nodes = list(zip(effects.site_N.tolist(), effects.position_N.tolist(), effects.latent_N.tolist(), strict=True))
            truth = torch.tensor([node in wanted for node in nodes])
            assert truth.sum() == 2
            assert roc_auc(effects.effect_N.abs(), truth) == 1.0
            kept = truth
            assert patching.metric_of(effects, kept) == pytest.approx(
                patching.metric_of(effects, torch.ones_like(kept)), abs=0.02
            )


def test_a_model_without_bos_has_nodes_at_its_first_token_where_none_is_skipped(shared_data):
    lm = load_lm(shared_data / "gpt-nano-sort", device="cpu")
    saes = [identity_at(lm, f"blocks.{layer}.attn.hook_z") for layer in (0, 2)]
    patching = Patching(lm, saes, sorting_task(4), skip=0, batch_size=32)
    exact, guess = patching.effects("exact"), patching.effects("integrated")
    assert Patching(lm, saes, sorting_task(4), skip=0, keep_positions=True).effects("first_order").position_N.min() == 0
    truth = exact.effect_N.abs() > exact.effect_N.abs().max() / 5
    assert 3 <= truth.sum() <= len(truth) / 4
    assert roc_auc(guess.effect_N.abs(), truth) > 0.9


@pytest.mark.slow
def test_on_the_bundled_model_integrated_gradients_rank_nodes_of_induction_as_ablating_each_does(builtin_lm):
    from saebench.activations import ActivationStream

    sites = [f"blocks.{layer}.attn.hook_z" for layer in (1, 3)]
    contexts = sb.pack(sb.builtin_text(), builtin_lm.tokenizer, 128)[:300]
    configs = [sb.TopK(d_sae=256, k=8, site=site) for site in sites]
    training = sb.TrainConfig(num_tokens=30_000, batch_size=256)
    saes = sb.train(configs, ActivationStream(builtin_lm, contexts, sites), training, lm=builtin_lm)
    patching = Patching(builtin_lm, saes, induction_task(builtin_lm.hf.config.vocab_size - 1, 4))
    exact, found = patching.effects("exact"), patching.effects("integrated")
    curve = patching.curve(found, [0, len(found) // 2, len(found)])
    truth = exact.effect_N.abs() > 0.02 * abs(curve.full - curve.none)
    assert truth.sum() >= 5 and roc_auc(found.effect_N.abs(), truth) > 0.9
    assert curve.faithfulness_K[1] > 0.8


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda lm, e: Patching(lm, [], e), "needs dictionaries"),
        (lambda lm, e: Patching(lm, [sae_at(lm, RESID[0])] * 2, e), "two dictionaries write"),
        (lambda lm, e: Patching(lm, [sae_at(lm, RESID[0])], e, patch="median"), "patch 'median' is unknown"),
        (lambda lm, e: Patching(lm, [sae_at(lm, RESID[0])], e).effects("guess"), "method 'guess' is unknown"),
        (lambda lm, e: Patching(lm, [sae_at(lm, RESID[0])], e).effects(steps=0), "steps=0"),
        (
            lambda lm, e: Patching(lm, [sae_at(lm, RESID[0])], e, metric=lambda logits, _e: logits.sum()).effects(),
            "the metric gives",
        ),
        (lambda lm, e: examples_of(lm, [], []), "no prompt is given"),
        (lambda lm, e: Patching(lm, [sae_at(lm, RESID[0])], e.take(slice(0, 0))), "there are no examples"),
        (lambda lm, e: Patching(lm, [sae_at(lm, RESID[0])], random_examples(lm, length=80)), "context_size=81 exceeds"),
        (lambda lm, e: examples_of(lm, [""], ["x"]), "a prompt is empty"),
        (lambda lm, e: examples_of(lm, ["x"], ["never one token"]), "is not one token"),
        (lambda lm, e: examples_of(lm, ["x"], ["x", "y"]), "1 prompts have 2 answers"),
        (lambda lm, e: examples_of(lm, ["x"], ["x"], counterfactuals=["x y z"]), "prompt 0 has"),
        (lambda lm, e: examples_of(lm, ["x y" * 60], ["x"]), "exceeds the 64 positions"),
        (
            lambda lm, e: Patching(lm, [sae_at(lm, RESID[0])], examples_of(lm, ["x"], ["x"]), patch="resample"),
            "have none: use zero",
        ),
        (
            lambda lm, e: Patching(lm, [sae_at(lm, RESID[0])], examples_of(lm, ["x", "x y"], ["x", "x"]), keep_positions=True),
            "the same number of tokens",
        ),
    ],
)
def test_bad_input_is_one_line(tiny_lm, build, message):
    with pytest.raises(UserError, match=message) as caught:
        build(tiny_lm, random_examples(tiny_lm))
    assert "\n" not in str(caught.value)

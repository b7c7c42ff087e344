"""One step back adds up to the model's own numbers; paths against a model built by hand, all ways counted out, and edges of `trace`."""

from math import sqrt

import pytest
import torch
from mixes import MIXES, TEXT, make, transcoder
from transformers import GPT2Config, GPT2LMHeadModel

from saebench.circuits.graphs.attribution import Rows, Sources
from saebench.circuits.graphs.replacement import LocalModel
from saebench.circuits.graphs.targets import Difference, Direction, Feature, Logit, rows_of
from saebench.circuits.graphs.tracing import trace
from saebench.circuits.weights.contributions import Steps, contributions
from saebench.circuits.weights.paths import Only, greedy_paths, routes
from saebench.errors import UserError
from saebench.lm import LanguageModel

SHORT = "def value"


@pytest.fixture(params=["gpt2", "llama", "gemma"])
def name(request):
    return request.param


def adds_up(found, value, tolerance=1e-5):
    assert found.total == pytest.approx(value, abs=tolerance * max(abs(value), float(found.value_N.abs().sum())))


@pytest.mark.parametrize("mix", MIXES)
def test_contributions_add_up_to_what_the_encoder_says(models, mixed, name, mix):
    """Of latents of every part; and of each way that goes on (a head at a token, a look, a bypass)."""
    dictionaries = mixed[name, mix]
    model = LocalModel(models[name], dictionaries, TEXT)
    steps, seen = Steps(model), set()
    for number, part in enumerate(model.parts):
        for n in range(0, len(part), max(1, len(part) // 5)):
            position, latent = int(part.positions_N[n]), int(part.latents_N[n])
            found = contributions(model, Feature(part.number, position, latent + part.first))
            adds_up(found, float(part.values_N[n]))
            reader = steps.latent(number, position, latent)
            for k in found.top(12):
                seen.add(found[k].kind)
                onwards = steps.follow(reader, found, k)
                if found[k].kind in ("head", "look", "skip"):
                    adds_up(steps.of(onwards), found[k].value)
                elif found[k].kind != "feature":
                    assert onwards is None
    expected = {"lorsa": {"look", "feature"}, "skip": {"skip", "head"}, "transcoders": {"head", "token"}, "heads": {"head"}}
    assert expected.get(mix, set()) <= seen


def test_bypasses_of_attention_and_mlp_of_one_layer_are_told_apart(models):
    attention = transcoder(1, site="blocks.1.attn.hook_in", target="blocks.1.hook_attn_out", skip=True)
    model = LocalModel(models["llama"], make(models["llama"], [attention, transcoder(1, skip=True), transcoder(2)]), TEXT)
    latent = int(model.parts[-1].latents_N[-1])
    steps = Steps(model)
    reader = steps.latent(len(model.parts) - 1, model.size - 1, latent)
    found = steps.of(reader)
    skips = [n for n in range(len(found)) if found[n].kind == "skip"]
    assert {found[n].id.split("/")[1] for n in skips} == {"blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"}
    for n in skips:
        adds_up(steps.of(steps.follow(reader, found, n)), found[n].value)


def test_contributions_to_logits_and_directions_add_up(models, mixed, name):
    lm = models[name]
    model = LocalModel(lm, mixed[name, "clt"], TEXT)
    logits_V = lm.logits(torch.tensor([model.ids]))[0, -1]
    if name == "gemma":
        logits_V = 5 * (logits_V / 5).atanh()  # targets are logits before the bound
    tolerance = 1e-4 if name == "gemma" else 1e-5
    adds_up(contributions(model, Logit(7)), float(logits_V[7] - logits_V.mean()), tolerance)
    adds_up(contributions(model, Difference(7, 9)), float(logits_V[7] - logits_V[9]), tolerance)
    for site in ("blocks.1.hook_resid_mid", "blocks.2.attn.hook_in", "blocks.1.hook_attn_out", "blocks.1.attn.hook_z"):
        x_D = lm.read(torch.tensor([model.ids]), [site])[site][0, 5]
        v_D = torch.randn(len(x_D), generator=torch.Generator().manual_seed(3))
        adds_up(contributions(model, Direction(site, v_D, 5)), float(v_D @ x_D))


def test_an_inactive_latent_has_contributions_too(models, mixed):
    model = LocalModel(models["gpt2"], mixed["gpt2", "transcoders"], TEXT)
    x_SD, encoder = model.seen["blocks.2.mlp.hook_in"], model.dictionaries[2]
    z_F = encoder.W_enc_FD @ x_SD[6] + encoder.b_enc
    latent = int(z_F.argmin())
    adds_up(contributions(model, Feature(2, 6, latent)), float(z_F[latent]))
    assert z_F[latent] < 0


# --- against the edges of graphs ---


def edges_of(graph):
    """The features, by dictionary, position, latent, and {(target, source): weight} of the edges between them."""
    named = lambda n: (graph.node(n).dictionary, graph.node(n).position, graph.node(n).latent)  # noqa: E731
    features = graph.is_kind("feature")
    numbers = [n for n in range(len(graph)) if features[n]]
    edges = {(named(t), named(s)): w for t in numbers for s, w in graph.edges_into(t) if features[s]}
    return set(map(named, numbers)), edges


@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_the_product_of_both_factors_is_the_edge_of_the_graph(models, mixed, name):
    """With Lorsa in every layer there is one way between two features: straight, or by the look of the reader."""
    lm, dictionaries = models[name], mixed[name, "lorsa"]
    model = LocalModel(lm, dictionaries, SHORT)
    nodes, edges = edges_of(trace(lm, dictionaries, SHORT, keep=1.0, model=model))
    size = max(map(abs, edges.values()))
    found = {}
    steps = Steps(model)
    for number, part in enumerate(model.parts):
        for position, latent in zip(part.positions_N.tolist(), part.latents_N.tolist(), strict=True):
            target = (part.number, position, latent)
            reader = steps.latent(number, position, latent)
            one = steps.of(reader)
            looks = [steps.of(steps.follow(reader, one, n)) for n in range(len(one)) if one[n].kind == "look"]
            for table in [one, *looks]:
                for row in (table[n] for n in table.top(len(table))):
                    if row.kind == "feature":
                        key = target, (row.dictionary, row.position, row.latent)
                        found[key] = found.get(key, 0.0) + row.weight * row.input
    assert len(edges) > 50
    assert any(target not in nodes for target, _ in found)  # nothing of the answer comes through them
    both = {(target, source) for target, source in set(edges) | set(found) if target in nodes and source in nodes}
    assert len({dictionary for target, _ in both for dictionary in target[:1]}) >= 4
    for key in both:
        assert found.get(key, 0.0) == pytest.approx(edges.get(key, 0.0), abs=1e-5 * size)


def ways_between(steps, reader, source):
    """All ways from a source to a reader that pass no other latent, by how many heads and bypasses they go through."""
    found = steps.of(reader)
    values = {}
    for n in range(len(found)):
        row = found[n]
        if row.kind == "feature" and (row.dictionary, row.position, row.latent) == source:
            values[0] = values.get(0, 0.0) + row.value
        elif row.kind in ("head", "look", "skip") and row.value:
            for length, value in ways_between(steps, steps.follow(reader, found, n), source).items():
                values[length + 1] = values.get(length + 1, 0.0) + value
    return values


@pytest.mark.parametrize(("name", "mix"), [("gpt2", "transcoders"), ("llama", "skip"), ("gemma", "clt")])
def test_all_ways_through_heads_together_are_the_edge(models, mixed, name, mix):
    """Every chain of heads counted out."""
    model = LocalModel(models[name], mixed[name, mix], "def x")
    steps = Steps(model)
    reads = next(i for i, part in enumerate(model.parts) if part.place.point == 5)
    reader, last = model.parts[reads], model.size - 1
    latent = int(reader.latents_N[reader.positions_N == last][0])
    target = Feature(reader.number, last, latent + reader.first)
    rows = Rows(Sources(model))
    (row_N,), _ = rows.of_latents(reads, torch.tensor([last]), torch.tensor([latent]))
    writer = model.parts[0]
    for n in (0, len(writer) - 1):
        position, i = int(writer.positions_N[n]), int(writer.latents_N[n]) + writer.first
        edge = float(row_N[rows.sources.of_parts[0] + n])
        ways = ways_between(steps, steps.latent(reads, last, latent), (writer.number, position, i))
        assert sum(ways.values()) == pytest.approx(edge, rel=1e-4, abs=1e-5)
        found, longer = routes(model, target, Feature(writer.number, position, i))
        assert sum(way.value for way in found if way.through is None) == pytest.approx(ways.get(0, 0.0), abs=1e-5)
        assert sum(way.value for way in found if way.through) == pytest.approx(ways.get(1, 0.0), rel=1e-4, abs=1e-5)
        assert longer == pytest.approx(sum(v for k, v in ways.items() if k > 1), rel=1e-3, abs=1e-4)
        assert [abs(way.value) for way in found] == sorted((abs(way.value) for way in found), reverse=True)
    assert ways.get(0) and ways.get(1) and ways.get(2)


# --- a model with one path ---

A, B, C, D = (torch.tensor([0.0] * (2 * i) + [1.0, -1.0] + [0.0] * (6 - 2 * i)) for i in range(4))
UNKNOWN, NAMED, ANSWER = 6, 5, 9


@pytest.fixture(scope="module")
def one_path(tiny_lm):
    """Token 5 -> latent 3 of layer 0 -> head 1 of layer 1, which looks everywhere alike -> latent 7 of layer 1 -> token 9; MLPs are what
    the transcoders are."""
    config = GPT2Config(
        vocab_size=len(tiny_lm.tokenizer), n_positions=64, n_embd=8, n_layer=2, n_head=2, n_inner=16, activation_function="relu",
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hf = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for own, weight in hf.named_parameters():
        if "ln_" not in own:
            weight.zero_()
    hf.transformer.wte.weight[NAMED] = 3 * A
    hf.lm_head.weight[ANSWER] = D
    attention = hf.transformer.h[1].attn
    attention.c_attn.weight[:, 16 + 4] = B  # the first coordinate of head 1's values
    attention.c_proj.weight[4] = C
    for layer, latent, reads, bias, writes in ((0, 3, A, -0.5, B), (1, 7, C, -0.1, D)):
        mlp = hf.transformer.h[layer].mlp
        mlp.c_fc.weight[:, latent], mlp.c_fc.bias[latent], mlp.c_proj.weight[latent] = reads, bias, writes
    lm = LanguageModel("one-path", hf, tiny_lm.tokenizer, "one-path")
    spec = {"architecture": "relu", "d_sae": 16, "target_l0": 4}
    sites = [{"site": f"blocks.{n}.mlp.hook_in", "target": f"blocks.{n}.hook_mlp_out"} for n in range(2)]
    dictionaries = make(lm, [spec | site for site in sites])
    for layer, dictionary in enumerate(dictionaries):
        mlp = hf.transformer.h[layer].mlp
        dictionary.W_enc_FD.copy_(mlp.c_fc.weight.T)
        dictionary.b_enc.copy_(mlp.c_fc.bias)
        dictionary.W_dec.copy_(mlp.c_proj.weight)
        dictionary.b_dec.zero_()
    return LocalModel(lm, dict(zip("uv", dictionaries, strict=True)), [0, NAMED, UNKNOWN, UNKNOWN])


def scale_of(*lengths):
    """1 / sigma of a stream that is some multiples of A to D."""
    return 1 / sqrt(2 * sum(x * x for x in lengths) / 8 + 1e-5)


def test_of_a_model_with_one_path_it_is_found(one_path):
    paths = greedy_paths(one_path, Logit(ANSWER), num_iters=4)
    first, *others = paths
    assert [node.id for node in first.nodes] == ["feature/v/3/7", "head/1.1/1", "feature/u/1/3", "token/1"]
    assert str(first) == " <- ".join([f"logit/3/{one_path.lm.token_strings[ANSWER]}", *(node.id for node in first.nodes)])
    assert all(abs(path.score) < 1e-5 for path in others)
    feature, head, source, token = first.nodes
    z = 6 * scale_of(3)  # A . 3 A, behind the norm
    f = z - 0.5
    gathered = 2 * f * scale_of(3, f) / 4  # B . f B, by one of four places
    answer = 2 * gathered * scale_of(gathered)
    wrote = (answer - 0.1) * 2 * scale_of(gathered, answer - 0.1) * (1 - 1 / len(one_path.logits_V))
    assert feature.value == pytest.approx(wrote, rel=1e-5)
    assert (head.value, source.value) == pytest.approx((answer, answer), rel=1e-5)
    assert source.weight == pytest.approx(4.0)  # B . B times C . C: by weights alone
    assert source.input == pytest.approx(f * scale_of(3, f) / 4 * scale_of(gathered), rel=1e-5)
    assert (token.weight, token.input) == pytest.approx((6.0, scale_of(3)), rel=1e-5)
    through = wrote * answer / (answer - 0.1)
    assert first.attribution == pytest.approx(through * z / f, rel=1e-4)
    assert first.score == pytest.approx(
        wrote, rel=1e-4
    )  # both shares are above 1, so that nothing is left but what the latent gives


def test_taking_the_source_out_costs_the_score_not_the_attribution(one_path):
    """The score is a bound: without the token the whole path is gone."""
    lm = one_path.lm
    logits_V = lm.logits(torch.tensor([[0, UNKNOWN, UNKNOWN, UNKNOWN]]))[0, -1]
    lost = float(one_path.logits_V[ANSWER] - one_path.logits_V.mean() - logits_V[ANSWER] + logits_V.mean())
    path = greedy_paths(one_path, Logit(ANSWER), num_iters=4)[0]
    assert path.score == pytest.approx(lost, rel=1e-4)
    assert path.attribution > 1.1 * lost


def test_paths_of_a_latent_end_where_nothing_adds(one_path):
    first = greedy_paths(one_path, Feature("v", -1, 7), num_iters=9, branches=1)
    assert [str(path) for path in first] == ["feature/v/3/7 <- head/1.1/1 <- feature/u/1/3 <- token/1"]


# --- search ---


def test_all_paths_together_are_the_target_less_biases(models, mixed):
    """With enough branches nothing is left out: what paths give adds up to the linear model's value without the biases on the way."""
    model = LocalModel(models["llama"], mixed["llama", "lorsa"], SHORT)
    reads = max(range(len(model.parts)), key=lambda i: model.parts[i].place.point)
    part, steps = model.parts[reads], Steps(model)
    position, latent = int(part.positions_N[-1]), int(part.latents_N[-1])
    target = Feature(part.number, position, latent)
    every = {"branches": 10**6, "top": 10**6}
    paths = greedy_paths(model, target, **every)
    reader = steps.latent(reads, position, latent)
    found = steps.of(reader)
    expected = 0.0
    for n in range(len(found)):
        row = found[n]
        if row.kind in ("token", "error"):
            expected += row.value
        elif row.kind != "bias":
            own = steps.of(steps.follow(reader, found, n))
            expected += row.value * float(own.value_N[own.kind_N != 6].double().sum()) / own.total
    assert sum(path.attribution for path in paths) == pytest.approx(expected, rel=1e-3)
    ids = [tuple(node.id for node in path.nodes) for path in paths]
    assert len(set(ids)) == len(ids) > 100
    assert not any(own == other[: len(own)] for own in set(ids) for other in set(ids) if len(own) < len(other))
    scores = [abs(path.score) for path in paths]
    assert scores == sorted(scores, reverse=True)
    few = greedy_paths(model, target, branches=5, top=4)
    assert len(few) == 4
    one = greedy_paths(model, target, num_iters=1, branches=3)
    values = sorted((row.value for row in map(found.__getitem__, range(len(found))) if row.kind != "bias"), key=abs)
    assert [path.attribution for path in one] == pytest.approx(values[:-4:-1])
    assert all(path.score == path.attribution and len(path.nodes) == 1 for path in one)


def test_no_path_scores_more_than_what_a_latent_on_it_gives(models, mixed):
    """Each latent on a path bounds it by what that latent gives the target, which is its activation times what one unit of it gives."""
    model = LocalModel(models["gpt2"], mixed["gpt2", "lorsa"], TEXT)
    part = model.parts[-1]
    capped = 0
    for n in range(0, len(part), 7):
        target = Feature(part.number, int(part.positions_N[n]), int(part.latents_N[n]))
        for path in greedy_paths(model, target, num_iters=3):
            if all(node.value > 0 for node in path.nodes):
                given, activation = 1.0, None
                for node in path.nodes:
                    if node.kind == "feature":
                        given *= node.value if activation is None else min(node.value, activation) / activation
                        activation = activation_of(model, node)
                        assert path.score <= given * (1 + 1e-5)
                capped += path.score < path.attribution * (1 - 1e-3)
    assert capped > 5


def activation_of(model, node):
    part = next(p for p in model.parts if p.number == node.dictionary)
    return float(part.values_N[(part.positions_N == node.position) & (part.latents_N == node.latent)])


# --- filters ---


@pytest.fixture(scope="module")
def searched(models, mixed):
    model = LocalModel(models["llama"], mixed["llama", "transcoders"], TEXT)
    part = model.parts[-1]
    return model, Feature(part.number, int(part.positions_N[-1]), int(part.latents_N[-1]))


def nodes_of(paths):
    return [node for path in paths for node in path.nodes]


def test_filters_by_kind_layer_head_position_and_latent(searched):
    model, target = searched
    options = {"branches": 20, "top": 400}
    free = nodes_of(greedy_paths(model, target, **options))
    assert {node.kind for node in free} == {"head", "token", "feature", "error"}
    kept = nodes_of(greedy_paths(model, target, only=Only(kinds=["head", "feature"]), **options))
    assert {node.kind for node in kept} == {"head", "feature"}
    kept = nodes_of(greedy_paths(model, target, only=Only(layers=[0]), **options))
    assert {node.layer for node in kept if node.kind != "token"} == {0} and any(node.kind == "token" for node in kept)
    kept = nodes_of(greedy_paths(model, target, only=Only(heads=[(1, 3), (2, 0)]), **options))
    assert {(node.layer, node.head) for node in kept if node.kind == "head"} == {(1, 3), (2, 0)}
    assert {node.kind for node in kept} > {"head"}
    kept = nodes_of(greedy_paths(model, target, only=Only(positions=[3, -1]), **options))
    assert {node.position for node in kept} == {3, model.size - 1}
    chosen = next(node for node in free if node.kind == "feature")
    kept = nodes_of(greedy_paths(model, target, only=Only(latents=[(chosen.dictionary, chosen.latent)]), **options))
    assert {(n.dictionary, n.latent) for n in kept if n.kind == "feature"} == {(chosen.dictionary, chosen.latent)}
    by_name = Only(latents=[(model.names[chosen.dictionary], chosen.latent)])
    assert nodes_of(greedy_paths(model, target, only=by_name, **options)) == kept


def test_filters_step_by_step(searched):
    model, target = searched
    paths = greedy_paths(model, target, only=[Only(kinds=["head"]), Only(kinds=["feature"])])
    assert paths and all([node.kind for node in path.nodes] == ["head", "feature"] for path in paths if len(path.nodes) == 2)
    assert not greedy_paths(model, target, only=Only(kinds=[]))


# --- what cannot be ---


def test_bad_input_is_refused_in_one_line(searched):
    model, target = searched

    def refused(match, call, *args, **options):
        with pytest.raises(UserError, match=match) as caught:
            call(*args, **options)
        assert "\n" not in str(caught.value)

    for call in (contributions, greedy_paths):
        refused("latent 64 is not one of the 64 of", call, model, Feature(0, 1, 64))
        refused("there is no dictionary 'layer-7': use one of", call, model, Feature("layer-7", 1, 0))
        refused("there is no dictionary 3", call, model, Feature(3, 1, 0))
        refused("position 99 of a target is outside the prompt's", call, model, Feature(0, 99, 0))
        refused("position -50 of a target is outside", call, model, Logit(4, -50))
        refused("vocabulary has no token", call, model, Logit(10**6))
    refused("num_iters=0 finds nothing", greedy_paths, model, target, num_iters=0)
    refused("branches=0 finds nothing", greedy_paths, model, target, branches=0)
    refused("3 filters for 2 steps", greedy_paths, model, target, only=[Only()] * 3)
    refused("no kind of node 'neuron' on paths: use feature", greedy_paths, model, target, only=Only(kinds=["neuron"]))
    refused("no layer 3: the model has 3", greedy_paths, model, target, only=Only(layers=[3]))
    refused("no layer 8", greedy_paths, model, target, only=Only(heads=[(8, 0)]))
    refused("no head 4 in layer 1", greedy_paths, model, target, only=Only(heads=[(1, 4)]))
    refused("position 60 of a filter is outside", greedy_paths, model, target, only=Only(positions=[60]))
    refused("latent 99 is not one of the 64", greedy_paths, model, target, only=Only(latents=[(0, 99)]))
    refused("there is no dictionary 'x'", greedy_paths, model, target, only=Only(latents=[("x", 1)]))
    silent = next(i for i in range(64) if not ((model.parts[0].positions_N == 2) & (model.parts[0].latents_N == i)).any())
    refused("is not active in the prompt", routes, model, target, Feature(0, 2, silent))
    assert rows_of(model, [target])

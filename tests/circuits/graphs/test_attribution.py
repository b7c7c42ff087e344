"""Edges against autograd on the Hugging Face model itself, with its norms' scales and attention weights detached."""

from contextlib import ExitStack

import pytest
import torch
from mixes import MIXES, TEXT
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from saebench.circuits.graphs.attribution import Rows, Sources
from saebench.circuits.graphs.parts import Place
from saebench.circuits.graphs.replacement import LocalModel
from saebench.dictionaries.lorsa import LorsaDictionary


class Twin:
    """The model with what dictionaries write, errors and tokens each multiplied by a factor of 1 that has a gradient."""

    def __init__(self, lm, dictionaries, ids, patch):
        self.lm, self.dictionaries, self.ids_BS = lm, dictionaries, torch.tensor([ids])
        self.patch = patch
        sites = {site for d in dictionaries for site in d.config.sites}
        outs = [f"blocks.{n}.hook_mlp_out" for n in range(3)]
        self.clean = {k: v.clone() for k, v in lm.read(self.ids_BS, [*sites, *outs]).items()}
        self.codes, self.factors, self.errors = [], [], {}
        self.tokens_S = torch.ones(len(ids), requires_grad=True)
        for dictionary in dictionaries:
            x_CSD = torch.cat([self.clean[site] for site in dictionary.config.reads], -1)
            codes = dictionary.encode(x_CSD if dictionary.config.sequential else x_CSD[0])
            self.codes.append(codes)
            self.factors.append(torch.ones_like(codes.values, requires_grad=True))
        for site in [*outs, *(site for d in dictionaries for site in d.config.writes)]:
            self.errors[site] = torch.ones(len(ids), requires_grad=True)
        self.seen = {}

    def write(self, site, x_BSD):
        if site in {s for d in self.dictionaries for s in d.config.reads}:
            self.seen[site] = x_BSD
        clean_SD = self.clean.get(site)
        if site not in self.errors:
            return None
        said_SD = self.said(site, clean=False)
        with torch.no_grad():
            missed_SD = clean_SD[0] - self.said(site, clean=True)
        out_SD = said_SD + self.errors[site][:, None] * missed_SD
        return torch.cat([clean_SD[0, :1], out_SD[1:]])[None]

    def said(self, site, clean):
        for dictionary, codes, factor in zip(self.dictionaries, self.codes, self.factors, strict=True):
            if site in dictionary.config.writes:
                decoded_SD = dictionary.decode(codes if clean else codes.replaced(codes.values * factor))
                widths = list(dictionary.config.blocks_out)
                y_SD = decoded_SD.split(widths, 1)[dictionary.config.writes.index(site)]
                if getattr(dictionary.config, "skip", False):
                    (read,) = dictionary.config.reads
                    y_SD = y_SD + (self.clean if clean else self.seen)[read][0] @ dictionary.W_skip
                return y_SD
        return torch.zeros_like(self.clean[site][0])

    def run(self):
        lm = self.lm
        sites = dict.fromkeys([*(s for d in self.dictionaries for s in d.config.sites), *self.errors])
        functions = {site: lambda x, site=site: self.write(site, x) for site in sites}
        functions["blocks.0.hook_resid_pre"] = lambda x: x * self.tokens_S[:, None]
        with ExitStack() as stack:
            stack.enter_context(lm.edit(functions))
            for module in lm.hf.modules():
                if isinstance(module, nn.LayerNorm):
                    self.patch.setattr(module, "forward", lambda x, m=module: layer_norm(x, m))
                elif isinstance(module, LlamaRMSNorm):
                    self.patch.setattr(module, "forward", lambda x, m=module: rms_norm(x, m))
            softmax = nn.functional.softmax
            self.patch.setattr(nn.functional, "softmax", lambda *a, **k: softmax(*a, **k).detach())
            lm.hf.set_attn_implementation("eager")
            try:
                self.logits_V = lm.hf(self.ids_BS, use_cache=False).logits[0, -1]
            finally:
                lm.hf.set_attn_implementation("sdpa")
                self.patch.undo()

    def pre_activation(self, dictionary, position, latent):
        if isinstance(dictionary, LorsaDictionary):
            (site,) = dictionary.config.reads
            pattern_SS = dictionary.attention_pattern(self.clean[site], [latent])[0, 0].detach()
            value_S = self.seen[site][0] @ dictionary.W_V_FD[latent] + dictionary.b_V[latent]
            return (pattern_SS @ value_S)[position]
        layer = 0
        if len(dictionary.config.reads) > 1:
            layer = latent // dictionary.config.per_layer
        x_D = self.seen[dictionary.config.reads[layer]][0, position]
        return dictionary.W_enc_FD[latent] @ x_D + dictionary.b_enc[latent]

    def edges(self, value):
        leaves = [*self.factors, *self.errors.values(), self.tokens_S]
        found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        found = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
        edges = {}
        for number, codes in enumerate(self.codes):
            rows = zip(codes.tokens.tolist(), codes.indices.reshape(-1).tolist(), strict=True)
            gradients = zip(rows, codes.values.reshape(-1).tolist(), found[number].reshape(-1).tolist(), strict=True)
            edges |= {("feature", number, *row): g for row, active, g in gradients if active and row[0] > 0}
        for site, g_S in zip(self.errors, found[len(self.codes) :], strict=False):
            edges |= {("error", site, s): g for s, g in enumerate(g_S.tolist())}
        return edges | {("token", s): g for s, g in enumerate(found[-1].tolist())}


def layer_norm(x, module):
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + module.eps).rsqrt().detach() * module.weight + module.bias


def rms_norm(x, module):
    return x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt().detach() * module.weight


def named(model, row_N):
    """Edges of a dense row by what they come from."""
    sources, edges = Sources(model), {}
    for part, start in zip(model.parts, sources.of_parts, strict=True):
        for i, (position, latent) in enumerate(zip(part.positions_N.tolist(), part.latents_N.tolist(), strict=True)):
            edges["feature", part.number, position, latent + part.first] = float(row_N[start + i])
    for written, start in zip(sources.places, sources.of_errors, strict=True):
        edges |= {("error", written.place.site, s): float(row_N[start + s]) for s in range(model.size)}
    return edges | {("token", s): float(row_N[sources.of_tokens + s]) for s in range(model.size)}


def same(found, expected):
    assert set(found) == set(expected)
    size = max(map(abs, expected.values()))
    worst = max(expected, key=lambda key: abs(found[key] - expected[key]))
    assert abs(found[worst] - expected[worst]) < 1e-4 * size, worst


@pytest.mark.parametrize("mix", ["transcoders", "skip", "clt", "lorsa", "lorsa_signed"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_edges_are_the_gradients_of_the_model_itself(models, mixed, name, mix, monkeypatch):
    lm, dictionaries = models[name], mixed[name, mix]
    model = LocalModel(lm, dictionaries, TEXT)
    twin = Twin(lm, dictionaries, model.ids, monkeypatch)
    twin.run()
    assert (twin.logits_V - model.logits_V).abs().max() < 1e-4 * model.logits_V.abs().max()
    rows = Rows(Sources(model))
    for number, part in enumerate(model.parts):
        for i in range(1, len(part), max(1, len(part) // 3)):
            position, latent = part.positions_N[i : i + 1], part.latents_N[i : i + 1]
            (row_N,), _ = rows.of_latents(number, position, latent)
            z = twin.pre_activation(dictionaries[part.number], int(position), int(latent) + part.first)
            assert float(z.detach()) == pytest.approx(float(part.values_N[i]), rel=1e-3, abs=1e-3)
            same(named(model, row_N), twin.edges(z))
    W_VD, b_V = model.unembedding()
    place, last = Place.of("ln_final.hook_out", 3), torch.tensor([model.size - 1])
    (row_N,), _ = rows.of_vectors(place, last, (W_VD[7] - W_VD.mean(0))[None], (b_V[7] - b_V.mean())[None])
    same(named(model, row_N), twin.edges(twin.logits_V[7] - twin.logits_V.mean()))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
def test_edges_and_constant_add_up_to_the_value(models, mixed, name, mix):
    """Constants, beside, are what is left when nothing writes: found by a pass forwards."""
    model = LocalModel(models[name], mixed[name, mix], TEXT)
    rows = Rows(Sources(model))
    nothing = {i: torch.zeros(len(part)) for i, part in enumerate(model.parts)}
    no_errors = {w.place.site: torch.zeros_like(w.error_SD) for w in model.replaced()}
    empty = model.run(nothing, no_errors, torch.zeros_like(model.stream[0]))
    kinds = set()
    for number, part in enumerate(model.parts):
        edges_TN, constants_T = rows.of_latents(number, part.positions_N, part.latents_N)
        sums_T = edges_TN.double().sum(1) + constants_T
        size_T = torch.maximum(part.values_N.abs(), edges_TN.abs().sum(1))
        assert ((sums_T - part.values_N).abs() / size_T).max() < 1e-5
        before = any(w.place.kind == "stream" and w.place.point == part.place.point for w in part.writes)
        x_SD = model.stands_at(part.place, empty.before if before else empty.after)
        alone_T = part.pre_activations(x_SD, part.positions_N, part.latents_N)
        assert ((constants_T - alone_T).abs() / torch.maximum(size_T, alone_T.abs())).max() < 1e-5
        kinds.add(part.place.kind)
    assert kinds


def test_one_target_at_a_time_gives_the_same_as_many(models, mixed):
    model = LocalModel(models["gpt2"], mixed["gpt2", "lorsa"], TEXT)
    rows = Rows(Sources(model))
    for number, part in enumerate(model.parts):
        chosen = slice(3, len(part), 7)
        together, constants = rows.of_latents(number, part.positions_N[chosen], part.latents_N[chosen])
        for i, n in enumerate(range(3, len(part), 7)):
            alone, constant = rows.of_latents(number, part.positions_N[n : n + 1], part.latents_N[n : n + 1])
            assert torch.allclose(alone[0], together[i], atol=1e-5 * float(together.abs().max()))
            assert float(constant[0]) == pytest.approx(float(constants[i]), rel=1e-4, abs=1e-4)


def test_scaling_one_feature_changes_every_direct_target_by_its_edge(models, mixed):
    """Other features held: one pass forwards of the linear model against a column of edges."""
    model = LocalModel(models["llama"], mixed["llama", "clt"], TEXT)
    rows, delta = Rows(Sources(model)), 0.7
    clean = model.run()
    number, entry = 0, 11
    values_N = model.parts[number].values_N.clone()
    values_N[entry] *= 1 + delta
    moved = model.run({number: values_N})
    for later, part in enumerate(model.parts):
        edges_TN, _ = rows.of_latents(later, part.positions_N, part.latents_N)
        z, z_moved = (
            part.pre_activations(model.stands_at(part.place, s.after), part.positions_N, part.latents_N) for s in (clean, moved)
        )
        expected_T = delta * edges_TN[:, Sources(model).of_parts[number] + entry]
        assert torch.allclose(z_moved - z, expected_T, atol=1e-4 * float(part.values_N.abs().max()))
        assert later == 0 or expected_T.abs().max() > 1e-3

"""Dictionaries of every kind that graphs are made of, not trained: what is exact must be exact for any weights."""

import torch

from saebench.dictionaries import Scaling, parse_dictionary

TEXT = "def value_3(x):\n    return x * 3 + 9"


def make(lm, specs, seed=0):
    """Dictionaries as they are before training, on a text's activations, with decoders that also write to later layers."""
    ids_BS = torch.tensor([lm.prompt_ids(TEXT + "  # the number 9 and the name 3\n" + TEXT)])
    made = []
    for number, spec in enumerate(specs):
        config = parse_dictionary(spec, "spec")
        config = config.for_sites({site: lm.width(site) for site in config.sites}).for_lm(lm)
        read = lm.read(ids_BS, list(config.sites))
        x, y = (torch.cat([read[site] for site in sites], -1).clone() for sites in (config.reads, config.writes))
        if not config.sequential:
            x, y = x[:, 1:].flatten(0, 1), y[:, 1:].flatten(0, 1)
        dictionary = config.build()
        dictionary.initialise(x, y, torch.Generator().manual_seed(seed + number), lm)
        dictionary.fold(Scaling.identity(x.shape[-1]), Scaling.identity(y.shape[-1]))
        noise = torch.Generator().manual_seed(100 + seed + number)
        for name, weight in dictionary.named_parameters():
            if name.startswith("W_dec.") or name == "W_skip":
                weight.data += 0.1 * torch.randn(weight.shape, generator=noise)
        made.append(dictionary.eval().requires_grad_(False))
    return made


def transcoder(layer, **options):
    site, target = f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"
    return {"architecture": "transcoder", "d_sae": 64, "k": 5, "site": site, "target": target, **options}


def lorsa(layer, **options):
    site, target = f"blocks.{layer}.attn.hook_in", f"blocks.{layer}.hook_attn_out"
    return {"architecture": "lorsa", "d_sae": 32, "k": 5, "site": site, "target": target, **options}


def topk(site, **options):
    return {"architecture": "topk", "d_sae": 64, "k": 5, "site": site, **options}


def clt(layers):
    sites, targets = [f"blocks.{n}.ln2.hook_out" for n in layers], [f"blocks.{n}.hook_mlp_out" for n in layers]
    return {"architecture": "clt", "d_sae": 40 * len(layers), "k": 5, "site": sites, "target": targets}


def mixes(layers):
    """By name: what a graph can be made of."""
    every = range(layers)
    return {
        "transcoders": [transcoder(n) for n in every],
        "skip": [transcoder(n, skip=True) for n in every],
        "first_only": [transcoder(0)],
        "clt": [clt(list(every))],
        "lorsa": [transcoder(n) for n in every] + [lorsa(n) for n in every],
        "lorsa_signed": [lorsa(1, score="abs"), transcoder(1)],
        "stream": [transcoder(0), topk("blocks.0.hook_resid_post"), transcoder(2), topk("blocks.2.hook_resid_mid")],
        "heads": [topk("blocks.1.attn.hook_z"), topk("blocks.2.hook_attn_out"), transcoder(1)],
        "rules": [transcoder(n, architecture=a, k=k, target_l0=l0) for n, (a, k, l0) in enumerate(RULES)],
    }


RULES = [("batchtopk", 5, None), ("jumprelu", None, 5), ("gated", None, 5)]


def prepared(specs):
    return [{key: value for key, value in spec.items() if value is not None} for spec in specs]


MIXES = list(mixes(3))

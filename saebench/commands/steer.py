"""`saebench steer RUN`: what the model writes with features turned up or down, beside what it writes untouched, and what that costs."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from saebench.dictionaries import Dictionary
    from saebench.lm import LanguageModel
    from saebench.pipeline import Pipeline
    from saebench.runs import Run
    from saebench.steering.chosen import Chosen
    from saebench.steering.edits import Edit
    from saebench.steering.presets import Preset

NEUTRAL_CONTEXTS, NEUTRAL_TOKENS = 16, 128
HELP = "a text file whose examples are set apart by empty lines, or .jsonl with a text in every line"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory with trained dictionaries")
    parser.add_argument("--prompt", help="text that the model goes on from (with --compare: not needed)")
    parser.add_argument("--dictionary", metavar="ID", help="default the run's only one")
    choice = parser.add_argument_group("features: by hand, by texts, by a topic, or as a preset keeps them")
    choice.add_argument(
        "--feature", type=int, action="append", default=[], metavar="N", help="a latent (may be given several times)"
    )
    choice.add_argument("--positives", type=Path, metavar="FILE", help=f"examples of what is wanted: {HELP}")
    choice.add_argument("--negatives", type=Path, metavar="FILE", help="examples of other text")
    choice.add_argument("--topic", metavar="TEXT", help="a topic in words; needs a feature store (`saebench index`)")
    choice.add_argument("--count", type=int, default=5, help="latents that texts or a topic choose (default: 5)")
    choice.add_argument("--preset", metavar="NAME", help="edits that were saved before")
    how = parser.add_argument_group("what is done with them")
    how.add_argument("--how", default="add", help="add, scale, clamp, ablate, swap, orthogonal, cap or affine (default: add)")
    how.add_argument(
        "--strength", type=float, help="of add in tenths of the mean activation's length, default 4; of others a share, default 1"
    )
    how.add_argument("--value", type=float, help="the factor of scale, the activation of clamp, the projection of cap and affine")
    how.add_argument(
        "--positions", default="all", help="all, prompt, generated, last, a span such as 4-9, or after:TOKEN (default: all)"
    )
    how.add_argument("--without-error", action="store_true", help="put the reconstruction in place, not only the change")
    how.add_argument("--save", metavar="NAME", help="keep the edits as a preset of the run")
    text = parser.add_argument_group("what is written")
    text.add_argument("--tokens", type=int, default=60, help="new tokens (default: 60)")
    text.add_argument("--temperature", type=float, default=0.8, help="0 for the likeliest text (default: 0.8)")
    text.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compare", action="store_true", help="measure all methods over strengths, with --positives and --negatives; minutes"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from saebench.errors import UserError
    from saebench.pipeline import Pipeline, dictionaries
    from saebench.recipes import Recipe
    from saebench.runs import Run

    run = Run.open(args.run)
    found = dictionaries(run)
    pipeline = Pipeline(Recipe.parse(run.record["recipe"], str(args.run)))
    if args.compare:
        name = _one(args, run, found)
        return _compare(args, run, pipeline, name, found[name])
    if args.prompt is None or not args.prompt.strip():
        raise UserError("the prompt is empty: give --prompt some text to go on from")
    if args.preset is not None:
        return _preset(args, run, pipeline, found)
    name = _one(args, run, found)
    return _by_features(args, run, pipeline, name, found[name])


# --- what is done ---


def _by_features(args: argparse.Namespace, run: Run, pipeline: Pipeline, name: str, dictionary: Dictionary) -> dict[str, Any]:
    from saebench.progress import say
    from saebench.steering.baselines import unit_of_ids
    from saebench.steering.edits import edit
    from saebench.steering.hooks import check_edit
    from saebench.steering.positions import Positions
    from saebench.steering.presets import Preset, Setting, preset_path

    positions = Positions.parse(args.positions)
    if args.save is not None:
        preset_path(run.path, args.save)
    if args.feature:  # wrong numbers are told before the model is loaded
        edit(args.how, dictionary, args.feature, strength=_strength(args), value=args.value, positions=positions)
    lm = _lm(run, pipeline)
    chosen = _chosen(args, run, lm, name, dictionary)
    neutral_CS = _neutral(pipeline, run, name)
    unit = unit_of_ids(lm, dictionary.config.writes, neutral_CS) if args.how == "add" else 1.0
    edits = [
        edit(
            args.how, dictionary, chosen.latents, strength=_strength(args), value=args.value, unit=unit, positions=positions,
            weights=chosen.weights if args.how == "add" else (), keep_error=not args.without_error,
        )
    ]  # fmt: skip
    check_edit(lm, edits[0])
    result = _written(args, lm, edits, neutral_CS, _named(run, name, chosen))
    if args.save is not None:
        setting = Setting(
            dictionary=name, latents=chosen.latents, how=args.how, strength=_strength(args), value=args.value, unit=unit,
            weights=chosen.weights if args.how == "add" else (), positions=args.positions, keep_error=not args.without_error,
        )  # fmt: skip
        path = Preset(name=args.save, edits=(setting,), model=lm.fingerprint, prompt=args.prompt).save(run.path)
        say(f"preset: {path}")
        result["preset"] = str(path)
    return result


def _preset(args: argparse.Namespace, run: Run, pipeline: Pipeline, dictionaries: dict[str, Dictionary]) -> dict[str, Any]:
    from saebench.errors import UserError
    from saebench.steering.presets import Preset, preset_path, presets

    path = preset_path(run.path, args.preset)
    if not path.exists():
        raise UserError(f"{run.path} has no preset {args.preset!r}: it has {', '.join(presets(run.path)) or 'none'}")
    preset: Preset = Preset.open(path)
    lm = _lm(run, pipeline)
    neutral_CS = _neutral(pipeline, run, preset.edits[0].dictionary)
    return _written(args, lm, preset.made(dictionaries, lm), neutral_CS, f"preset {preset.name}")


def _written(args: argparse.Namespace, lm: LanguageModel, edits: list[Edit], neutral_CS: Tensor, what: str) -> dict[str, Any]:
    """Both texts and what they cost, shown and as data."""
    from saebench.steering.measures import side_effect
    from saebench.steering.samples import side_by_side

    untouched, steered = side_by_side(lm, edits, args.prompt, args.tokens, temperature=args.temperature, seed=args.seed)
    kl_C, size_C = side_effect(lm, edits, neutral_CS)
    effect = {"kl": float(kl_C.mean()), "size": float(size_C.mean())}
    _show(args.prompt, what, edits, dataclasses.asdict(untouched), dataclasses.asdict(steered), effect)
    return {
        "run": str(args.run),
        "edits": [{"how": e.how, "latents": list(e.latents), "strength": e.strength, "unit": e.unit} for e in edits],
        "prompt": args.prompt,
        "untouched": dataclasses.asdict(untouched),
        "steered": dataclasses.asdict(steered),
        **effect,
    }


def _compare(args: argparse.Namespace, run: Run, pipeline: Pipeline, name: str, dictionary: Dictionary) -> dict[str, Any]:
    from saebench.errors import Interrupted, UserError
    from saebench.figures.steering import dose_table, write_page
    from saebench.progress import say
    from saebench.steering.comparison import compare
    from saebench.steering.measures import prompts_of
    from saebench.steering.presets import preset_path

    positives, negatives = _texts(args)
    path = preset_path(run.path, args.save or args.positives.stem).with_suffix(".html")
    lm = _lm(run, pipeline)
    if args.prompt:
        raise UserError("--compare takes its prompts from the run's held-out text: leave --prompt out")
    neutral_CS = _neutral(pipeline, run, name)
    prompts = prompts_of(lm, neutral_CS)
    write = partial(write_page, path=path, title=f"Steering towards {args.positives.stem}")
    try:
        effects = compare(
            lm, dictionary, positives, negatives, prompts,
            neutral=neutral_CS, count=args.count, seed=args.seed, on_dose=write,
        )  # fmt: skip
    except KeyboardInterrupt:
        kept = f"{path} holds what was measured until then" if path.exists() else "nothing was measured yet"
        raise Interrupted(f"stopped; {kept}; the same command begins anew") from None
    for row in dose_table(effects):
        say("   ".join(f"{key} {value}" for key, value in row.items() if value))
    say(f"figure, table and texts: {path}")
    return {"run": str(args.run), "page": str(path), "target": effects.target, "doses": effects.rows()}


# --- what it is done with ---


def _one(args: argparse.Namespace, run: Run, found: dict[str, Dictionary]) -> str:
    from saebench.errors import UserError
    from saebench.pipeline import check_named

    check_named(run, found, () if args.dictionary is None else [args.dictionary])
    if args.dictionary is None and len(found) > 1:
        raise UserError(f"{run.path} has several dictionaries: name one of {', '.join(found)} by --dictionary")
    return args.dictionary or next(iter(found))


def _lm(run: Run, pipeline: Pipeline) -> LanguageModel:
    pipeline.check_model(run)
    return pipeline.lm


def _strength(args: argparse.Namespace) -> float:
    return args.strength if args.strength is not None else 4.0 if args.how == "add" else 1.0


def _neutral(pipeline: Pipeline, run: Run, name: str) -> Tensor:
    """Contexts that nothing was chosen for: of the feature store, or of the held-out text where there is none."""
    from saebench.errors import UserError
    from saebench.pipeline import feature_stores
    from saebench.steering.measures import spread

    try:
        contexts = feature_stores(run, [name])[name].contexts
    except UserError:
        contexts = pipeline.contexts[1]
    return spread(contexts.ids_NS, NEUTRAL_CONTEXTS)[:, :NEUTRAL_TOKENS]


def _chosen(args: argparse.Namespace, run: Run, lm: LanguageModel, name: str, dictionary: Dictionary) -> Chosen:
    from saebench.errors import UserError
    from saebench.steering.choosing import by_contrast, by_hand, by_output

    ways = [
        way for way, given in (("--feature", args.feature), ("--positives", args.positives), ("--topic", args.topic)) if given
    ]
    if len(ways) != 1:
        said = f"{' and '.join(ways)} are given together" if ways else "no feature is named"
        raise UserError(f"{said}: use one of --feature N, --positives FILE with --negatives FILE, --topic TEXT, --preset NAME")
    if args.feature:
        return by_hand(dictionary, args.feature)
    if args.topic:
        from saebench.pipeline import feature_stores
        from saebench.steering.topics import Reference, TopicAligner

        return TopicAligner(dictionary, args.topic, Reference.of_store(feature_stores(run, [name])[name])).chosen(args.count)
    positives, negatives = _texts(args)
    candidates = by_contrast(lm, dictionary, positives, negatives, count=50)
    return by_output(lm, dictionary, candidates, positives=positives[:8], negatives=negatives[:8], count=args.count)


def _texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The examples of both sides. Raises UserError where one is missing or has less than two texts."""
    from saebench.errors import UserError
    from saebench.features.documents import paragraphs
    from saebench.lm import load_text

    if args.positives is None or args.negatives is None:
        raise UserError("--positives and --negatives go together: give a file of examples for each")
    sides = []
    for path in (args.positives, args.negatives):
        texts = [part for document in load_text(str(path)) for part in paragraphs(document.text)]
        if len(texts) < 2:
            raise UserError(f"{path} has {len(texts)} example: give at least 2, set apart by empty lines")
        sides.append(texts)
    return sides[0], sides[1]


# --- showing ---


def _named(run: Run, name: str, chosen: Chosen) -> str:
    """The latents with their labels, where there are any."""
    from saebench.errors import UserError
    from saebench.features.labelling.labels import Labels
    from saebench.pipeline import feature_stores

    try:
        texts = Labels.open(feature_stores(run, [name])[name]).texts
    except UserError:
        texts = {}
    shown = [f"{latent} ({texts[latent]})" if texts.get(latent) else str(latent) for latent in chosen.latents]
    return f"{chosen.method}: {', '.join(shown)}"


def _show(
    prompt: str, what: str, edits: list[Edit], untouched: dict[str, Any], steered: dict[str, Any], effect: dict[str, float]
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    console.print(f"\n{what}", markup=False, style="bold")
    for one in edits:
        console.print(one.describe(), markup=False, style="dim")
    table = Table(expand=True, show_lines=False)
    table.add_column("untouched", ratio=1, overflow="fold")
    table.add_column("steered", ratio=1, overflow="fold")
    table.add_row(*(Text.assemble((prompt, "dim"), sample["text"]) for sample in (untouched, steered)))
    table.add_section()
    for figure, form in (("perplexity", ".1f"), ("repetition", ".0%"), ("seconds_per_token", ".4f")):
        table.add_row(*(f"{figure.replace('_', ' ')} {sample[figure]:{form}}" for sample in (untouched, steered)), style="dim")
    console.print(table)
    console.print(f"on neutral text: KL {effect['kl']:.4f} nats a token, size of the edit {effect['size']:.1%}\n", markup=False)

"""Steering the bundled model towards import statements, with features that the tool finds itself: beyond every control."""

import pytest

import saebench as sb
from evals.concepts import of_python
from saebench.activations import ActivationStream
from saebench.figures.steering import dose_figure, dose_table, reading, write_page
from saebench.steering.comparison import compare
from saebench.steering.measures import prompts_of, spread

SITE = "blocks.2.hook_resid_post"


@pytest.mark.slow
def test_imports(builtin_lm, tmp_path):
    training = sb.builtin_text()
    stream = ActivationStream(builtin_lm, sb.pack(training, builtin_lm.tokenizer, 128, 150_000), [SITE])
    sae = sb.train(sb.TopK(d_sae=1024, k=32), stream, sb.TrainConfig(num_tokens=200_000, batch_size=512))
    held_out = sb.pack(sb.load_text("builtin:held_out"), builtin_lm.tokenizer, 128).ids_NS
    imports, _ = of_python(training)
    effects = compare(
        builtin_lm, sae, imports.positives[:60], imports.negatives[:60], prompts_of(builtin_lm, held_out, 24), neutral=spread(held_out, 4),
        target=imports.target, strengths=(4.0, 6.0, 16.0), seeds=2, max_new_tokens=24, controls=3,
    )  # fmt: skip
    doses = [dose for dose in effects.doses if dose.strength == 6.0]
    # "Beyond" asks for an interval above untouched text too: controls that break the text may never write the target at all.
    controls = [dose.estimate("target").high for dose in [effects.untouched, *doses] if dose.kind == "control"]
    found = [dose.method for dose in doses if dose.kind == "features" and dose.estimate("target").low > max(controls)]
    assert len(controls) >= 7 and found, reading(effects)
    assert all(f"{method} from " in reading(effects) for method in found)
    assert any(effects.breaks_at(method) == 16.0 for method in effects.methods)  # and where fluency breaks is shown
    rows = dose_table(effects)
    assert rows[0]["method"] == "untouched" and {row["method"] for row in rows} == {"untouched", *effects.methods}
    assert len(dose_figure(effects).data) == 4 * len(effects.methods)
    write_page(effects, tmp_path / "page.html", "Imports")
    assert reading(effects).split(".")[0] in (tmp_path / "page.html").read_text()

"""Recipe files with values, names and YAML that nobody expects."""

import random
from dataclasses import fields

import pytest
import yaml

from snp_llm import Recipe
from snp_llm.cli.parse import prune_main
from tests.adversarial.trials import CHEAP, QUICKER
from tests.adversarial.values import MISSING, damaged, near

pytestmark = pytest.mark.exhaustive
COUNT = 130
GOOD = {
    "sparsity": 0.0,
    "calibration": "bundled",
    "ordering": "variance",
    "dampening": 0.1,
    "reference_weight": 0.5,
    "layout": "uniform",
    "round_to": 4,
    "seed": 3,
    "batch_size": 2,
    "absorb_bias": False,
    "bos": "once",
    "head_unit": "query",
    "hidden_device": "disk",
    "steps": 1,
    "text_column": "text",
    "save_every": 1.5,
}
TEXTS = (
    "&a [1, 2]",
    "*nowhere",
    "!!python/object/apply:os.system ['true']",
    "!!binary aGFsbG8=",
    "!!timestamp 2020-13-45",
    "!!int 'x'",
    "!!float .nan",
    "!!set {a, b}",
    "2020-01-01",
    "0x10",
    "0o17",
    "017",
    "1_000",
    "1:30",
    "1e3",
    ".inf",
    "-.inf",
    "~",
    "yes",
    "off",
    "'0.3'",
    "|\n  a\n  b",
    "<<",
    "{a: 1}",
    "- 1",
    "'\\0'",
    '"\\ud800"',
    '"\\x00"',
    "'a\\nb'",
    "9" * 5000,
    "a" * 50_000,
    "[" * 2000,
    "&x [*x]",
)


def change(generator, settings):
    """A recipe's text, and what is odd about it."""
    names = [field.name for field in fields(Recipe) if field.name not in ("model", "output", "dry_run", "push_to_hub")]
    way = generator.randrange(8)
    if way < 3:  # near what is good
        name = generator.choice(sorted(GOOD))
        value = near(generator, GOOD[name])
        if value is MISSING:
            return f"no {name}", yaml.safe_dump({key: value for key, value in settings.items() if key != name})
        try:
            return f"{name} = {value!r:.60}", yaml.safe_dump({**settings, name: value}, allow_unicode=True)
        except RecursionError:
            return "deep", "sparsity: " + "[" * 500
    if way == 3:
        name = generator.choice(names)
        value = generator.choice(TEXTS)
        text = yaml.safe_dump({key: old for key, old in settings.items() if key != name})
        return f"{name}: {value:.60}", f"{text}{name}: {value}\n"
    if way == 4:
        name = generator.choice(("sparsities", "Sparsity", "num-samples", "", "? [a]", "1", "evil", "<<", "{a: b}"))
        return f"a setting {name}", f"{yaml.safe_dump(settings)}{name}: 1\n"
    if way == 5:
        done, content = damaged(generator, yaml.safe_dump(settings).encode())
        return done, content
    if way == 6:
        a = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{x}: &{x} [{','.join(['*' + y] * 9)}]\n" for x, y in zip("bcdefghi", "abcdefgh", strict=True)
        )
        texts = (
            a,
            "--- \n" + yaml.safe_dump(settings) + "...\n---\nsparsity: 0.1\n",
            "%YAML 9.9\n---\n" + yaml.safe_dump(settings),
            yaml.safe_dump(settings) + "sparsity: 0.1\n",
            yaml.safe_dump([settings]),
            "just text",
            "# nothing\n",
            yaml.safe_dump(settings).replace(":", "=", 1),
            "\t" + yaml.safe_dump(settings),
            yaml.safe_dump(settings, default_flow_style=True),
            yaml.dump(settings, explicit_start=True, canonical=True),
            "x" * 200_000,
        )
        text = generator.choice(texts)
        return f"text {texts.index(text)}", text
    kept = generator.sample(sorted(settings), generator.randrange(1, len(settings) + 1))
    return "good", yaml.safe_dump({name: settings[name] for name in {"model", *kept}})


def test_recipes(model_of, trials):
    model = model_of("opt")
    for seed in range(COUNT):
        generator = random.Random(seed)
        file = trials.clean() / "recipe.yaml"
        done, text = change(generator, {"model": str(model), **GOOD})
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        arguments = ["--config", file, "--output", trials.place / "out", *CHEAP, "--calibration", "bundled"]
        code = trials.run(f"{seed} {done}", prune_main, [*arguments, *QUICKER], makes=("out", "1", "16", "text"))
        if code == 0 and "sparsity" not in done and yaml.safe_load(text).get("sparsity") == 0:
            trials.compare(f"{seed} {done}", model)
    trials.check(COUNT)

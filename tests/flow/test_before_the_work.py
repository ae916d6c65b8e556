"""What is refused before any weight or text is read: budgets and configs; and where the result goes."""

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from snp_llm import SnpError, checkpoint, prune
from snp_llm.checkpoint.skeleton import load_skeleton
from snp_llm.cli import parse
from snp_llm.cli.layouts import layout_facts
from snp_llm.models.anatomy import find_anatomy, find_blocks, find_sites
from snp_llm.models.families.decoders import FFN_KEYS, find_family
from snp_llm.models.outline import structure_of
from snp_llm.models.registry import pruned_config_class
from snp_llm.models.size import model_size, stored_bytes
from snp_llm.pruning.run import resolve
from snp_llm.pruning.widths.plan import check_budget
from snp_llm.runtime.errors import reason, shown
from tests.conftest import refused, save_model, small_model, small_opt, small_recipe
from tests.differing import DIFFERING, differing_config, differing_model
from tests.families import FAMILY_CONFIGS, every_family

LEAST_FFN = 8  # channels, the usual --round-to


def smallest(model_type: str):
    """A model of which every unit is gone that may go, built from its own config, without any plan of widths."""
    dense = small_model(model_type, torch.float32)
    family = find_family(dense.config)
    site = find_sites(find_blocks(dense), family)[0]
    heads = site.heads_after(site.step if site.prunable else site.units)
    widths = {family.heads_key: heads.query, family.ffn_key or FFN_KEYS[0]: LEAST_FFN}
    widths |= {family.kv_heads_key: heads.key_value} if family.kv_heads_key else {}
    values = {
        **dense.config.to_dict(),
        "pruned_layers": {str(i): widths for i in range(dense.config.num_hidden_layers)},
    }
    values.pop("model_type")
    if family.ffn_key and values.get(family.ffn_key) is None:
        values[family.ffn_key] = 4 * dense.config.hidden_size
    if family.head_dim_key:
        values[family.head_dim_key] = heads.size
    with torch.device("meta"):
        return dense, AutoModelForCausalLM.from_config(pruned_config_class(family.model_type)(**values))


@every_family()
@pytest.mark.parametrize("kind", ["params", "size", "flops"])
def test_the_least_and_the_most_that_a_budget_may_be(kind, model_type):
    """Counted on the smallest model that there can be, and on the dense one."""
    dense, small = smallest(model_type)
    sizes = [model_size(model, 32) for model in (small, dense)]
    beside = stored_bytes(dense) - sizes[1].bytes  # what files have beside the numbers
    least, most = ({"params": s.parameters, "size": s.bytes + beside, "flops": s.flops}[kind] for s in sizes)
    unit = "B" if kind == "size" else ""

    def check(amount: float) -> None:
        recipe = small_recipe(**{f"target_{kind}": f"{amount:.1f}{unit}"})
        check_budget(dense, resolve(recipe, dense))

    check(least)
    check(most)
    with pytest.raises(SnpError, match=f"^--target-{kind}: expected at least .*, what is left in this model"):
        check(least - 1)
    with pytest.raises(SnpError, match=f"^--target-{kind}: expected less than the model has"):
        check(most + 1)
    with pytest.raises(SnpError, match="Ask for ") as error:
        check(least / 2)
    share = float(re.search(r"Ask for ([\d.]+)x", str(error.value))[1])
    assert share - 0.001 <= least / most <= share
    check_budget(dense, resolve(small_recipe(**{f"target_{kind}": f"{share}x"}), dense))


@every_family()
def test_the_largest_sparsity(model_type):
    dense, small = smallest(model_type)
    most = 1 - model_size(small, 32).block_linear / model_size(dense, 32).block_linear
    for layout in ("compact", "padded"):
        recipe = resolve(small_recipe(layout=layout), dense)
        check_budget(dense, replace(recipe, sparsity=most))
        with pytest.raises(SnpError, match="^--sparsity: expected at most ") as error:
            check_budget(dense, replace(recipe, sparsity=most + 1e-4))
        named = float(re.search("Ask for (.*) or less", str(error.value))[1])
        assert most - 0.001 <= named <= most


@pytest.mark.parametrize(
    ("layout", "allocation"),
    [
        ("compact", "loss"),
        ("uniform", "variance"),
        *(pytest.param("compact", a, marks=pytest.mark.exhaustive) for a in ("variance", "uniform")),
        *(pytest.param("uniform", a, marks=pytest.mark.exhaustive) for a in ("loss", "uniform")),
    ],
)
def test_what_passes_the_check_is_pruned(layout, allocation, tokenizer):
    """At the very ends, and a step within."""
    dense, small = smallest("llama")
    most = 1 - model_size(small, 32).block_linear / model_size(dense, 32).block_linear
    passed = 0
    for sparsity in (0.0, most / 2, 0.9 * most, most):
        recipe = small_recipe(sparsity=sparsity, layout=layout, allocation=allocation, num_samples=2)
        try:
            check_budget(dense, resolve(recipe, dense))
        except SnpError:
            assert layout == "uniform" or allocation == "uniform"
            continue
        found = prune(dense, tokenizer, recipe)
        passed += 1
        if layout == "compact" and sparsity == most:
            assert model_size(found.model, 32).parameters == model_size(small, 32).parameters
    assert passed >= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-params", "1K"], "--target-params: expected at least 73K parameters, .* got 1K parameters"),
        (["--target-params", "93345"], "expected less than the model has, 93,344 parameters; got 93,345 parameters"),
        (["--target-params", "2B"], "expected less than the model has, 93.3K parameters; got 2B parameters"),
        (["--target-size", "1KB"], "--target-size: expected at least 298 kB, .* got 1 kB. Ask for 0.786x or more"),
        (["--target-size", "7GB"], "expected less than the model has, 379 kB; got 7 GB"),
        (["--target-flops", "0.01x"], "--target-flops: expected at least .*K FLOPs a token"),
        (["--sparsity", "0.99"], "--sparsity: expected at most 0.8"),
        (["--ffn-sparsity", "0.99"], "--ffn-sparsity: expected at most 0.875"),
        (["--head-sparsity", "0.99"], "--head-sparsity: expected at most 0.75"),
        (["--layout", "uniform", "--head-sparsity", "0.1"], "layout uniform; got 0.1. Use --head-sparsity 0"),
        (["--round-to", "512", "--ffn-sparsity", "0.1"], "--ffn-sparsity: .* got 0.1. Use a smaller --round-to"),
        (["--seq-len", "65"], "--seq-len: expected at most the model's 64 positions"),
    ],
)
@pytest.mark.parametrize("more", [[], pytest.param(["--dry-run"], marks=pytest.mark.exhaustive)])
def test_budgets_are_refused_by_the_config_alone(options, message, more, no_weights, tmp_path, capsys):
    text = ["--calibration", tmp_path / "text.jsonl", "--eval-dataset", tmp_path / "text.jsonl"]
    error = refused(capsys, parse.prune_main, no_weights, "--output", tmp_path / "out", *text, *options, *more)
    assert re.search(message, error), error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "text.jsonl"]


def pruned_before(folder, model_type, changes):
    """The config of a model that was pruned block by block, in place of the one in a folder."""
    dense = differing_model(model_type) if model_type in DIFFERING else small_model(model_type, torch.float32)
    family, blocks = find_family(dense.config), dense.config.num_hidden_layers
    values = {"pruned_layers": {str(blocks - 1): changes}, "pruned_structure": structure_of(dense)}
    pruned_config_class(family.model_type)(**{**dense.config.to_dict(), **values}).save_pretrained(folder)


@pytest.mark.parametrize(
    "model_type, changes, got",
    [
        ("opt", {"num_attention_heads": 5}, "5 query and 5 key-value heads"),
        ("gpt2", {"n_head": 5}, "5 query and 5 key-value heads"),
        ("llama", {"intermediate_size": 0}, "6 query and 3 key-value heads, and 0 and 64 FFN channels"),
        ("qwen3_moe", {"moe_intermediate_size": 16}, "FFN channels, and 4 experts of 16 and 32 channels"),
    ],
)
def test_blocks_that_no_plain_config_makes_alike_are_refused_by_the_config_alone(
    model_type, changes, got, no_weights, tmp_path, capsys
):
    pruned_before(no_weights, model_type, changes)
    options = ["--layout", "uniform", "--sparsity", "0.1", "--output", tmp_path / "out", "--calibration"]
    said = refused(capsys, parse.prune_main, no_weights, *options, tmp_path / "text.jsonl", "--no-eval")
    assert "layout uniform: expected head counts and widths that one plain" in said and got in said
    assert "Use --layout compact" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"num_attention_heads": 4, "num_key_value_heads": 2}, {"intermediate_size": 40}])
def test_blocks_that_a_plain_config_makes_alike_pass(changes, no_weights):
    pruned_before(no_weights, "llama", changes)
    skeleton = load_skeleton(str(no_weights), "auto")
    check_budget(skeleton, resolve(small_recipe(layout="uniform", sparsity=0.3), skeleton))


def test_a_padded_layout_of_blocks_that_differ_is_no_plain_one(no_weights):
    pruned_before(no_weights, "llama", {"intermediate_size": 40})
    found = layout_facts(find_anatomy(load_skeleton(str(no_weights), "auto")), "padded", 8)
    assert found["saved_as"] == ["snp_llama"] and found["loads_in"] == ["transformers with trust_remote_code"]


def test_names_of_texts_are_checked_first(no_weights, tmp_path, capsys):
    there = tmp_path / "text.jsonl"
    for options, message in (
        (["--calibration", "typo.txt"], "dataset typo.txt: no such file"),
        (["--calibration", "typo.txt", "--eval-dataset", there], "dataset typo.txt: no such file"),
        (["--calibration", there, "--eval-dataset", "typo.txt"], "dataset typo.txt: no such file"),
        (["--calibration", "wikitext"], "unknown dataset 'wikitext'.* Did you mean 'wikitext2'"),
        (["--calibration", there, "--eval-dataset", "random"], "unknown dataset 'random'"),
        (["--calibration", tmp_path], "is a folder without state.json or dataset_dict.json"),
        (["--calibration", "bundled", "--calibration-split", "dev"], "unknown split 'dev'"),
    ):
        assert re.search(message, refused(capsys, parse.prune_main, no_weights, *options)), message
    error = refused(capsys, parse.evaluate_main, no_weights, "--dataset", "typo.txt")
    assert "dataset typo.txt: no such file" in error


def test_a_model_that_is_a_file_or_has_no_tokenizer(tmp_path, capsys):
    folder = tmp_path / "model"
    small_opt().save_pretrained(folder)
    text = ["--calibration", "bundled", "--eval-dataset", "bundled"]
    assert "no tokenizer in that folder" in refused(capsys, parse.prune_main, folder, *text)
    assert "no tokenizer in that folder" in refused(capsys, parse.evaluate_main, folder, "--dataset", "bundled")
    assert "no tokenizer in that folder" in refused(capsys, parse.bench_main, folder, folder, "--prompt-lengths", "8")
    for main, options in (
        (parse.prune_main, text),
        (parse.inspect_main, []),
        (parse.evaluate_main, ["--dataset", "bundled"]),
    ):
        assert "is a file; expected a folder" in refused(capsys, main, folder / "config.json", *options)
    assert parse.inspect_main([str(folder)]) == 0  # which needs none


def test_all_lines_of_an_error_count():
    assert reason(OSError("one of:\n(1) this,\n\n   (2) that.")) == "one of: (1) this, (2) that."
    assert reason(OSError(28, "No space left on device", "file")) == "No space left on device"
    assert reason(ValueError()) == "ValueError" and len(reason(ValueError("x" * 10_000))) < 410
    assert shown(10**5000) == "an integer of more than 30 digits" and len(shown("x" * 10_000)) < 40


# --- configs ---------------------------------------------------------------------------------------------------------

ODD = (0, -1, 7, 10**30, 2**62, 1.5, "abc", "", [], [1], {}, None, True, float("nan"), float("inf"))


@every_family()
def test_every_family_stands_on_its_config_alone(model_type, tmp_path):
    AutoConfig.for_model(model_type, **FAMILY_CONFIGS[model_type]).save_pretrained(tmp_path)
    assert load_skeleton(str(tmp_path)).config.model_type == model_type


@pytest.mark.parametrize("model_type", ["opt", pytest.param("llama", marks=pytest.mark.exhaustive)])
def test_any_value_of_any_key_of_a_config(model_type, tmp_path, capsys):
    """A value is taken, or refused in one line; nothing else."""
    AutoConfig.for_model(model_type, **FAMILY_CONFIGS[model_type]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in config:
        for value in ODD:
            (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
            try:
                load_skeleton(str(tmp_path))
            except SnpError as error:
                assert "\n" not in str(error) and len(str(error)) < 700, (key, value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn_dim": 0}, "fc1.weight is 0 x 32; expected widths of at least 1"),
        ({"dropout": -3}, "config dropout: expected a probability from 0 to 1, got -3"),
        ({"attention_dropout": 1.5}, "config attention_dropout: expected a probability"),
        ({"num_hidden_layers": 0}, "config num_hidden_layers: expected an integer from 1 to 10,000, got 0"),
        ({"num_hidden_layers": -1}, "config num_hidden_layers: .* got -1"),
        ({"num_hidden_layers": 10**9}, "config num_hidden_layers: .* got 1000000000"),
        ({"max_position_embeddings": 0}, "config max_position_embeddings: expected an integer from 2 up, got 0"),
        ({"vocab_size": 0}, "config vocab_size: expected an integer from 1 up, got 0"),
        ({"hidden_size": -5}, "hidden_size"),
        ({"num_attention_heads": 0}, "no model can be built from its config"),
        ({"num_attention_heads": 5}, "no model can be built from its config"),
        ({"init_std": float("nan")}, "config init_std: expected a finite number, got nan"),
        ({"activation_function": "no"}, "no model can be built from its config"),
        ({"dtype": "float99"}, "config"),
        ({"text_config": {"hidden_size": 16}}, "config text_config: expected none, opt has no text model inside"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "inspect", "eval", "bench"])
def test_configs_that_no_model_can_have(command, changes, message, no_weights, capsys):
    config = json.loads((no_weights / "config.json").read_text())
    (no_weights / "config.json").write_text(json.dumps({**config, **changes}))
    main, *words = {
        "prune": (parse.prune_main, "--calibration", "bundled", "--no-eval", "--output", no_weights.parent / "out"),
        "inspect": (parse.inspect_main,),
        "eval": (parse.evaluate_main, "--dataset", "bundled"),
        "bench": (parse.bench_main, no_weights, "--prompt-lengths", "8"),
    }[command]
    assert re.search(message, refused(capsys, main, no_weights, *words))


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("lfm3", "layer_types"),
        ("glm4_moe_lite", "mlp_layer_types"),
        ("nemotron_h", "layers_block_type"),
        ("laguna", "num_attention_heads_per_layer"),
        ("smollm3", "no_rope_layers"),
    ],
)
@pytest.mark.parametrize("more", [-1, 1])
def test_lists_with_an_entry_for_every_layer_of_another_length(model_type, key, more, tmp_path, capsys):
    config = differing_config(model_type) if model_type in DIFFERING else small_model(model_type).config
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    layers = values["num_hidden_layers"] = config.num_hidden_layers
    values[key] = (values[key] * 2)[: layers + more]
    (tmp_path / "config.json").write_text(json.dumps(values))
    error = refused(capsys, parse.inspect_main, tmp_path)
    said = f"config {key}: expected {layers} entries, one for each of its num_hidden_layers, got {layers + more}."
    assert said in error
    with pytest.raises(SnpError, match=said):
        checkpoint.load(str(tmp_path), "auto")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: config["pruned_layers"].update({"7": {}}),
            "pruned_layers: expected layers 0 to 2, got 7",
        ),
        (lambda config: config["pruned_structure"]["parts"][0]["of"].append(3), "pruned_structure: .* 0 to 2, got 3"),
        (lambda config: config["pruned_structure"]["parts"][0]["of"].pop(), "every one of 3 layers once, got 2"),
    ],
)
def test_widths_of_layers_that_a_pruned_model_has_not(change, message, tokenizer, tmp_path, capsys):
    checkpoint.save(prune(small_opt(), tokenizer, small_recipe()).model, tokenizer, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    change(values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert re.search(message, refused(capsys, parse.prune_main, tmp_path, "--calibration", "bundled", "--no-eval"))


# --- where the result goes -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_prunes")
@pytest.mark.parametrize(
    ("here", "model"),
    [
        ("inside", ".."),
        *(
            pytest.param(*w, marks=pytest.mark.exhaustive)
            for w in ((".", "."), (".", "../model"), ("inside/deep", "../.."))
        ),
    ],
)
def test_inside_the_model_the_result_goes_beside_it(here, model, tmp_path, tokenizer, monkeypatch, capsys):
    folder = save_model(small_opt(), tokenizer, tmp_path / "model")
    (folder / "inside/deep").mkdir(parents=True)
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder / here)
    options = ["--calibration", "bundled", "--num-samples", "4", "--seq-len", "32", "--no-eval"]
    assert parse.prune_main([model, *options]) == 0
    assert f"goes beside it, to {tmp_path / 'model-snp-30'}" in capsys.readouterr().err
    assert (tmp_path / "model-snp-30/model.safetensors").exists() and sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["llama[v2]-7b", "[red]x[/red]", "[/]", ":smile:", "a|b"])
def test_names_are_printed_as_they_are(name, tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = name.replace("/", "")
    save_model(small_opt(), tokenizer, tmp_path / folder)
    few = ["--dataset", "bundled", "--seq-len", "32", "--max-windows", "1"]
    assert parse.evaluate_main([folder, folder, *few]) == 0
    assert capsys.readouterr().out.count(f"\n{folder} ") == 2


def test_what_nothing_foresaw_is_one_line_too(capsys, monkeypatch):
    too_large = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nto")
    for error in (
        too_large,
        OSError(5, "I/O error", "a\nb"),
        RecursionError("deep"),
        MemoryError(),
        "\ud800",
        OSError("x\ny"),
    ):

        def fail(*_given, error=error):
            raise error if isinstance(error, Exception) else UnicodeError(error)

        monkeypatch.setattr("snp_llm.cli.inspect.run_inspect", fail)
        refused(capsys, parse.inspect_main, "tiny-opt")

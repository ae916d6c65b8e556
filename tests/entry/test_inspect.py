"""`snp-llm inspect`, and how all commands talk: --json, --quiet, --log-level."""

import json
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from snp_llm import Recipe, prune
from snp_llm.checkpoint.saving import save
from snp_llm.cli.inspect import inspect
from snp_llm.cli.layouts import layout_facts, layout_line
from snp_llm.cli.main import main
from snp_llm.cli.parse import inspect_main, prune_main
from snp_llm.cli.prune import announce
from snp_llm.models.anatomy import find_anatomy
from snp_llm.pruning.run import resolve
from snp_llm.recipe.commands import Talk
from tests.conftest import save_model, small_model, small_opt, small_recipe
from tests.differing import differing_model
from tests.entry.test_cli import QUICK, refuse
from tests.families import FAMILY_CONFIGS, every_family

LARGE = {
    "opt": {
        "hidden_size": 9216,
        "word_embed_proj_dim": 9216,
        "num_hidden_layers": 64,
        "num_attention_heads": 72,
        "ffn_dim": 36864,
        "vocab_size": 50272,
        "dtype": "float16",
    },
    "llama": {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "dtype": "bfloat16",
    },
}


@pytest.mark.parametrize("model_type", ["opt", pytest.param("llama", marks=pytest.mark.exhaustive)])
def test_a_model_of_any_size_from_its_config_alone(model_type, tmp_path, capsys):
    AutoConfig.for_model(model_type, **LARGE[model_type]).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert inspect_main([str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    d, blocks = LARGE[model_type]["hidden_size"], LARGE[model_type]["num_hidden_layers"]
    block = 4 * d * d + 2 * d * 36864 if model_type == "opt" else 2 * d * d + 2 * d * 1024 + 3 * d * 28672
    parameters, sparsity, takes = facts["parameters"], facts["sparsity"], facts["prune"]
    assert sparsity["block_linear"] == blocks * block
    assert parameters["all"] == sum(count for kind, count in parameters.items() if kind != "all")
    assert 65e9 < parameters["all"] < 71e9
    assert sparsity["whole_model_reduction"] == pytest.approx(0.3 * blocks * block / parameters["all"])
    # One block at a time: far from the whole model, and more than the largest matrices of a site.
    widest = 36864 if model_type == "opt" else 28672
    assert 5 * 8 * widest**2 < takes["host_bytes"] < 1.1 * facts["bytes"]
    assert takes["flops"] > 2 * sparsity["block_linear"] * 128 * 2048


@every_family()
def test_parameters_by_kind_add_up_in_every_family(model_type):
    model = small_model(model_type, torch.float32)
    facts = inspect(model, Recipe("small", seq_len=32))
    kinds = {kind: count for kind, count in facts["parameters"].items() if kind != "all"}
    assert sum(kinds.values()) == facts["parameters"]["all"] == model.num_parameters()
    assert kinds["other"] <= 0.02 * facts["parameters"]["all"]  # some activations and heads have more to them
    assert min(kinds["attention"], kinds["FFN"], kinds["embeddings"]) > 0
    assert kinds["norms"] > 0 or model_type in ("nanochat", "olmo")  # whose norms have none
    embeddings = model.get_input_embeddings().weight
    assert kinds["head"] == sum(p.numel() for p in model.get_output_embeddings().parameters() if p is not embeddings)
    assert kinds["attention"] + kinds["FFN"] >= facts["sparsity"]["block_linear"]


def test_the_largest_sparsity_can_be_had_and_no_more(opt_folder, tmp_path, capsys):
    assert inspect_main([str(opt_folder), "--json"]) == 0
    most = json.loads(capsys.readouterr().out)["sparsity"]["largest"]["compact"]
    plan = [str(opt_folder), "--dry-run", "--allocation", "uniform", *QUICK]
    separate = ["--ffn-sparsity", str(most["ffn"]), "--head-sparsity", str(most["heads"])]
    assert prune_main([*plan, *separate, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] == pytest.approx(most["both"])
    more = ["--ffn-sparsity", str(most["ffn"] + 0.1), "--head-sparsity", "0"]
    refuse(capsys, [*plan, *more], "the minimum is|Ask for")


@pytest.mark.parametrize(
    ("model_type", "layout", "expected"),
    [
        ("llama", "uniform", "heads go; saved as llama; loads in transformers, vLLM, llama.cpp"),
        ("qwen2", "uniform", "loads in transformers, with --head-sparsity 0 also in vLLM, llama.cpp"),
        ("opt", "uniform", "the same in every block, of the FFN in multiples of 8; heads stay; saved as opt; loads in"),
        ("olmo2", "uniform", "heads stay"),
        ("olmo2", "compact", "heads stay"),
        ("llama", "compact", "heads go; saved as snp_llama; loads in transformers with trust_remote_code"),
        ("gpt2", "padded", "filled up with zeros, of the FFN in multiples of 8; heads go; saved as gpt2; loads in"),
    ],
)
def test_what_a_layout_writes_and_what_loads_it_is_said_before(model_type, layout, expected):
    assert expected in layout_line(layout, layout_facts(find_anatomy(small_model(model_type)), layout, 8))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "saved as snp_opt, loads in transformers with trust_remote_code; if only whole blocks go"),
        ({"layout": "uniform"}, "saved as opt, loads in what loads MODEL"),
        ({"depth_score": "influence"}, "saved as opt, loads in what loads MODEL"),
    ],
)
def test_what_loads_blocks_and_halves_of_blocks_is_said_before(settings, said, tmp_path, capsys):
    model = small_opt()
    recipe = resolve(small_recipe(depth="only", dry_run=True, **settings), model)
    announce(model, recipe, tmp_path, Talk())
    assert said in capsys.readouterr().out


def test_blocks_that_may_go_are_told_of(opt_folder, capsys):
    assert inspect_main([str(opt_folder), "--depth", "auto", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    blocks, share = facts["blocks"], facts["sparsity"]["largest"]["compact"]["blocks"]
    assert share == pytest.approx(1 - 1 / blocks) and "padded" not in facts["layouts"]
    assert facts["sites"]["block"]["parameters_a_unit"] * blocks == facts["sparsity"]["block_linear"]
    assert inspect_main([str(opt_folder), "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    # Each block is looked at once more, as wide as the stream; nothing more is cut.
    assert facts["prune"]["flops"] > without["prune"]["flops"] and "block" not in without["sites"]
    assert inspect_main([str(opt_folder), "--depth", "only"]) == 0
    assert "block site: blocks, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("experts", "said"),
    [("never", None), ("channels", "channels go"), ("whole", "whole ones go"), ("both", "whole ones and channels go")],
)
def test_what_goes_of_experts_is_said_by_layout(experts, said, tmp_path, capsys):
    differing_model("qwen3_moe").save_pretrained(tmp_path)
    assert inspect_main([str(tmp_path), "--experts", experts]) == 0
    assert (said or "experts stay") in capsys.readouterr().out
    assert inspect_main([str(tmp_path), "--experts", experts, "--json"]) == 0
    layouts = json.loads(capsys.readouterr().out)["layouts"]
    assert ("padded" in layouts) == (experts in ("never", "channels"))
    for layout, facts in layouts.items():
        assert facts.get("experts") == said
        assert (f"of experts {said}; " in layout_line(layout, facts)) == (said is not None)


def test_mistral_is_named_where_it_may_come_to_that():
    odd = find_anatomy(small_model("llama", num_key_value_heads=6))
    assert layout_facts(odd, "uniform", 8)["saved_as"] == ["llama", "mistral"]
    assert layout_facts(find_anatomy(small_model("llama")), "uniform", 8)["saved_as"] == ["llama"]


def test_pruned_folders_are_inspected_too(tokenizer, tmp_path, capsys):
    model = small_model("llama", torch.float32, num_key_value_heads=6)
    pruned = prune(model, tokenizer, small_recipe(sparsity=0.4, round_to=4))
    save(pruned.model, tokenizer, tmp_path / "out")
    assert pruned.model.config.model_type == "snp_llama"
    assert inspect_main([str(tmp_path / "out")]) == 0
    assert "Llama (snp_llama), 2 blocks" in capsys.readouterr().out
    assert inspect_main([str(tmp_path / "out"), "--json"]) == 0
    units = json.loads(capsys.readouterr().out)["units"]
    assert [u["heads"] for u in units] == [len(r.kept) for r in pruned.sites[::2]]
    assert [u["channels"] for u in units] == [len(r.kept) for r in pruned.sites[1::2]]


def test_heads_that_stay_are_said_to(tokenizer, tmp_path, capsys):
    save_model(small_model("olmo2", torch.float32), tokenizer, tmp_path)
    assert inspect_main([str(tmp_path)]) == 0
    assert "they stay, since a norm over all of them" in capsys.readouterr().out


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="the device is here")
def test_a_device_that_is_not_here_is_estimated_without_a_time(capsys):
    assert inspect_main(["tiny-opt", "--device", "mps", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["prune"]
    assert facts["device"] == "mps" and facts["device_bytes"] > 0 and facts["seconds_roughly"] is None
    assert inspect_main(["tiny-opt", "--device", "mps"]) == 0
    printed = capsys.readouterr().out
    assert "memory of mps" in printed and "no time, for there is no mps here" in printed


def test_inspect_refuses(tmp_path, capsys):
    refuse(capsys, ["./nowhere"], "no such folder", inspect_main)
    refuse(capsys, [str(tmp_path)], "no config.json in that folder", inspect_main)
    (tmp_path / "config.json").write_text("{}")
    refuse(capsys, [str(tmp_path)], "its config cannot be loaded", inspect_main)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refuse(capsys, [str(tmp_path)], "'bert' is not supported", inspect_main)
    AutoConfig.for_model("llama", **FAMILY_CONFIGS["llama"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "output_attentions": True}))  # loads, and is not saved
    refuse(capsys, [str(tmp_path)], "no model can be built from its config, or saved with it", inspect_main)
    refuse(capsys, ["tiny-opt", "--seq-len", "9999"], "at most the model's 256 positions", inspect_main)
    refuse(capsys, ["tiny-opt", "--log-level", "loud"], "--log-level.*loud", inspect_main)


def test_json_is_all_that_is_on_stdout(opt_folder, tmp_path, quick_prunes, capsys):
    assert prune_main([str(opt_folder), "--output", str(tmp_path / "out"), "--json", "--no-eval", *QUICK]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    written = json.loads((tmp_path / "out/prune_report.json").read_text())
    assert result["output"] == str(tmp_path / "out") and result["sparsity"] == written["sparsity"]
    assert "kept" not in result["sites"][0] and "block 0 fc2: kept" in printed.err and "layout compact" in printed.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert result["pruned"]["size"]["parameters"] == model.num_parameters()


def test_quiet_leaves_the_result(opt_folder, tmp_path, capsys):
    for level in (["--quiet"], ["--log-level", "warning"]):
        assert prune_main([str(opt_folder), "--dry-run", "--output", str(tmp_path / "out"), *level, *QUICK]) == 0
        printed = capsys.readouterr()
        assert printed.err == "" and "block-linear parameters" in printed.out


def test_a_rehearsal_says_what_it_takes_and_refuses_what_cannot_fit(opt_folder, tmp_path, capsys):
    common = [str(opt_folder), "--dry-run", "--output", str(tmp_path / "out"), *QUICK]
    assert prune_main(common) == 0
    printed = capsys.readouterr().out
    assert "host memory" in printed and "very roughly" in printed and "nothing was written" in printed
    # A million windows of hidden states, of which not one is computed.
    refuse(
        capsys, [*common, "--num-samples", "900000000"], "host memory: about .* needed, .* free.*--hidden-device disk"
    )


def test_help_fits_one_screen(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["snp-llm", "--help"])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(len(line) for line in lines) <= 100
    for command in ("prune", "eval", "inspect", "bench", "push", "report"):
        assert any(line.startswith(f"  snp-llm {command} ") for line in lines), command

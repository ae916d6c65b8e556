"""`snp-llm bench`: what it counts is checked against oracles; times are only there, never how long."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from snp_llm import prune
from snp_llm.checkpoint import contents
from snp_llm.cli.parse import bench_main
from snp_llm.evaluate import speed, turns, work
from snp_llm.evaluate.cells import MODELS, Cell
from snp_llm.models.size import attention_channels, model_size
from snp_llm.report import card as model_cards
from tests.conftest import small_model, small_opt, small_recipe
from tests.counting import Products
from tests.entry.test_cli import refuse


@pytest.fixture(scope="module")
def folders(pruned_opt, tmp_path_factory):
    """A small OPT and what was made of it, which benchmarks may be saved in."""
    return str(pruned_opt / "dense"), str(shutil.copytree(pruned_opt / "pruned", tmp_path_factory.mktemp("b") / "out"))


SHORT = ["--batch-sizes", "1", "2", "--prompt-lengths", "16", "--new-tokens", "2", "--repeats", "2"]


@pytest.mark.parametrize("memory", [False, pytest.param(True, marks=pytest.mark.exhaustive)])  # in processes of its own
def test_one_table_one_json_one_card(memory, folders, tmp_path, capsys):
    dense, pruned = folders
    assert bench_main([dense, pruned, *SHORT, "--save", *([] if memory else ["--no-memory"])]) == 0
    printed = capsys.readouterr()
    for words in (
        "prefill, 1 x 16",
        "decode, 2 after 16",
        "size on disk",
        *(("peak host memory",) if memory else ()),
        "weights read",
        "3 FFN widths are no multiples of 64",
    ):
        assert words in printed.out, words
    assert "┃" not in printed.out and "(1 of 4)" in printed.err  # no terminal here
    result = json.loads(Path(pruned, contents.BENCH).read_text())
    assert [c["cell"]["kind"] for c in result["cells"]] == ["prefill"] * 2 + ["decode"] * 2
    assert result["parameters"]["dense"] == model_size(small_opt(), 1).parameters > result["parameters"]["pruned"]
    assert not memory or result["memory"]["dense"]["host"] > result["memory"]["dense"]["libraries"] > 50e6
    for cell in result["cells"]:
        assert cell["speedup_low"] <= cell["speedup"] <= cell["speedup_high"] and cell["flops_ratio"] > 1
        for model in MODELS:
            timing = cell[model]
            assert 0 < timing["low"] <= timing["seconds"] <= timing["high"]
            tokens = 16 if cell["cell"]["kind"] == "prefill" else 1
            rate = tokens * cell["cell"]["batch"] / timing["seconds"]
            assert timing["per_second"] == pytest.approx(rate)
    card = Path(pruned, "README.md").read_text()
    assert card.count("## Speed") == 1 and "| prefill, 1 x 16 |" in card and card.startswith("---\n")
    assert bench_main([dense, pruned, *SHORT, "--no-memory", "--save", "--json", "--quiet"]) == 0
    again = capsys.readouterr()
    assert json.loads(again.out)["memory"] is None and again.err == ""
    card = Path(pruned, "README.md").read_text()
    assert card.count("## Speed") == 1 and "peak host memory" not in card


@pytest.mark.parametrize("model_type", ["opt", "llama", "qwen3", "gpt2"])
def test_flops_of_a_cell_are_what_torch_counts(model_type):
    """But for attention scores, of which eager attention computes those behind the diagonal too."""
    model = small_model(model_type, torch.float32)
    model.set_attn_implementation("eager")
    channels = attention_channels(model)
    for cell in (Cell("prefill", 3, 20, 0), Cell("decode", 3, 20, 4)):
        tokens = speed.random_tokens(model, cell, torch.device("cpu"))
        with Products() as before:
            speed.prefill(model, tokens[:, :20])
        extra = 4 * channels * 20 * (20 - 21 / 2)
        if cell.kind == "prefill":
            assert before.flops / 3 == pytest.approx(work.cell_flops(model, cell) + extra, rel=0.01)
            continue
        with Products() as both:
            speed.decode(model, tokens, 4, torch.device("cpu"))
        assert (both.flops - before.flops) / 12 == pytest.approx(work.cell_flops(model, cell), rel=0.01)


def test_decoding_gives_what_one_pass_gives(tokenizer):
    """The cache is used rightly, also where blocks differ in heads."""
    dense = small_model("llama", torch.float64, num_key_value_heads=6)
    pruned = prune(dense, tokenizer, small_recipe(head_sparsity=0.34, ffn_sparsity=0.3, round_to=4)).model
    seen = []
    spy = pruned.register_forward_hook(lambda _model, _given, output: seen.append(output.logits[:, -1]))
    tokens = torch.randint(2048, (2, 20), generator=torch.Generator().manual_seed(1))
    speed.decode(pruned, tokens, 5, torch.device("cpu"))
    spy.remove()
    assert torch.allclose(torch.stack(seen, 1), pruned(tokens).logits[:, 14:], atol=1e-10)


def test_weights_that_a_step_reads():
    tied, untied = small_opt(), small_opt(tie_word_embeddings=False)
    assert work.weights_read(tied) == model_size(tied, 1).bytes
    looked_up = untied.get_input_embeddings().weight.numel()
    assert work.weights_read(untied) == pytest.approx(model_size(untied, 1).bytes - 4 * looked_up)


def test_quartiles():
    assert turns.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert turns.quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 3.0, 4.0)


def test_bench_refuses(folders, capsys):
    dense, pruned = folders
    refuse(capsys, [dense, dense, "--save"], "--save: expected an output folder of `snp-llm prune`", bench_main)
    refuse(capsys, [dense, "./nowhere"], "no such folder", bench_main)
    long = ["--prompt-lengths", "60", "--new-tokens", "8", "--no-memory"]
    refuse(capsys, [dense, pruned, *long], "expected at most the 64 positions", bench_main)
    refuse(capsys, [dense, pruned, "--repeats", "0"], "--repeats: expected an integer from 1 to .*, got 0", bench_main)
    refuse(
        capsys,
        [dense, pruned, "--batch-sizes", "0", "1"],
        "--batch-sizes: expected an integer from 1 to .*, got 0",
        bench_main,
    )


@pytest.mark.parametrize("options", [[], ["--compile"]])
def test_bench_says_so_where_a_library_finds_no_memory(options, folders, capsys, monkeypatch):
    def run_out(*_):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(speed, "seconds_of", run_out)
    refuse(capsys, [*folders, *SHORT, "--no-memory", *options], "both models do not fit on cpu together", bench_main)


def test_a_section_of_the_card_is_replaced(tmp_path):
    (tmp_path / "README.md").write_text("---\na: b\n---\n\n# Model\n\nText.\n")
    model_cards.update_card(tmp_path, "Speed", ["slow"])
    model_cards.update_card(tmp_path, "Tasks", ["hard"])
    model_cards.update_card(tmp_path, "Speed", ["fast"])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\na: b\n---\n\n# Model\n\nText.\n\n<!-- Speed -->\n## Speed\n\nfast\n")
    assert "slow" not in text and text.count("hard") == 1 and [p.name for p in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_compiled_models(folders, capsys):
    dense, pruned = folders
    options = ["--batch-sizes", "1", "--prompt-lengths", "16", "--new-tokens", "3", "--repeats", "1", "--no-memory"]
    code = bench_main([dense, pruned, *options, "--compile"])
    printed = capsys.readouterr()
    if code == 2 and "torch.compile failed" in printed.err:
        pytest.skip("torch.compile does not work here: " + printed.err)
    assert code == 0 and "torch.compile: medians" in printed.out

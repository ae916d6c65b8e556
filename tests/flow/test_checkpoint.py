"""Folders: saved, reloaded where the package does not exist, never half-written."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, GPT2Config

from snp_llm import checkpoint, prune
from snp_llm.checkpoint.loading import DEQUANTISED
from snp_llm.cli.parse import evaluate_main, prune_main
from snp_llm.models.families.decoders import find_family
from snp_llm.runtime.errors import SnpError
from tests.conftest import OPT_VARIANTS, save_model, small_model, small_opt, small_recipe
from tests.families import FAMILY_CONFIGS, VARIANTS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("pre-norm", torch.float32),
        pytest.param("350m", torch.bfloat16, marks=pytest.mark.exhaustive),
        *(pytest.param(v, torch.float16, marks=pytest.mark.exhaustive) for v in ("pre-norm", "350m")),
    ],
)
def test_reloads_in_a_fresh_process_with_equal_logits(variant, dtype, tokenizer, tmp_path, fresh_processes):
    dense = small_opt(dtype, **OPT_VARIANTS[variant])
    pruned = prune(dense, tokenizer, small_recipe(sparsity=0.3))
    checkpoint.save(pruned.model, tokenizer, tmp_path / "out")
    assert checkpoint.verify(dense, pruned.model, tmp_path / "out", pruned.calibration.tokens[:2]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_with_the_package_imported_no_remote_code_is_needed(tokenizer, tmp_path):
    pruned = prune(small_opt(), tokenizer, small_recipe())
    checkpoint.save(pruned.model, tokenizer, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model).__name__ == "SnpOPTForCausalLM" and type(model).__module__.startswith("snp_llm.")
    tokens = pruned.calibration.tokens[:1]
    assert torch.equal(model.eval()(tokens).logits, pruned.model(tokens).logits)
    assert AutoTokenizer.from_pretrained(tmp_path)("text")["input_ids"] == tokenizer("text")["input_ids"]


def test_large_models_are_sharded(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("snp_llm.checkpoint.saving.LARGEST_SHARD", "100KB")
    pruned = prune(small_opt(), tokenizer, small_recipe())
    checkpoint.save(pruned.model, tokenizer, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and (tmp_path / "model.safetensors.index.json").exists()
    reloaded, _ = checkpoint.load(str(tmp_path), "auto")
    tokens = pruned.calibration.tokens[:1]
    assert torch.equal(reloaded(tokens).logits, pruned.model(tokens).logits)


def test_no_pickles_are_written(tokenizer, tmp_path):
    checkpoint.save(prune(small_opt(), tokenizer, small_recipe()).model, tokenizer, tmp_path)
    endings = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert endings == {".json", ".safetensors", ".py"}


def test_verification_notices_changed_weights(tokenizer, tmp_path):
    dense = small_opt()
    pruned = prune(dense, tokenizer, small_recipe())
    checkpoint.save(pruned.model, tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.decoder.layers.1.fc2.bias"][0] += 0.5
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SnpError, match="computes something else after reloading: logits differ by"):
        checkpoint.verify(dense, pruned.model, tmp_path, pruned.calibration.tokens[:1])


@pytest.mark.exhaustive
def test_verification_notices_a_folder_that_does_not_load(tokenizer, tmp_path):
    dense = small_opt()
    pruned = prune(dense, tokenizer, small_recipe(allocation="variance"))
    checkpoint.save(pruned.model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pruned_layers"]["0"]["ffn_dim"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SnpError, match="does not load in a fresh process"):
        checkpoint.verify(dense, pruned.model, tmp_path, pruned.calibration.tokens[:1])


# --- loading ---------------------------------------------------------------------------------------------------------


def test_loading_respects_the_checkpoints_dtype_or_the_users(tokenizer, tmp_path):
    save_model(small_opt(torch.bfloat16), tokenizer, tmp_path)
    assert checkpoint.load(str(tmp_path), "auto")[0].dtype == torch.bfloat16
    assert checkpoint.load(str(tmp_path), "float64")[0].dtype == torch.float64


def test_unknown_models():
    with pytest.raises(SnpError, match="model ./nowhere: no such folder"):
        checkpoint.load("./nowhere", "auto")
    with pytest.raises(SnpError, match="model nobody/nothing: its config cannot be loaded"):
        checkpoint.load("nobody/nothing", "auto")


def test_encoders_are_refused_before_weights_are_read(tmp_path):
    BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SnpError, match="'bert' is not supported: its .* blocks have no attention"):
        checkpoint.load(str(tmp_path), "auto")


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("gptq", "of gptq no way back is known here"),
        ("bitsandbytes", r"dequantise it: .*\.dequantize\(\)"),
        ("fp8", r"dequantise it: .*FineGrainedFP8Config\(dequantize=True\)"),
    ],
)
def test_quantised_checkpoints_are_refused_with_the_way_back(method, way, opt_folder):
    config = json.loads((opt_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (opt_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SnpError, match=f"quantised; expected float weights.*{way}"):
        checkpoint.load(str(opt_folder), "auto")


def test_classes_that_the_ways_back_name_take_what_they_are_told():
    for way in DEQUANTISED.values():
        if found := re.search(r"quantization_config=(\w+)", way):
            assert "dequantize" in inspect.signature(getattr(transformers, found[1])).parameters


def test_lora_adapters_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')
    with pytest.raises(
        SnpError, match=r"is a LoRA adapter; expected a whole model. Merge it first: .*merge_and_unload"
    ):
        checkpoint.load(str(tmp_path), "auto")


def test_configs_that_differ_from_layer_to_layer_natively_are_refused(opt_folder):
    config = json.loads((opt_folder / "config.json").read_text())
    config["per_layer_config"] = {"1": {"ffn_dim": 48}}
    (opt_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        SnpError, match="differs from layer to layer .per_layer_config., which the modelling code of opt"
    ):
        checkpoint.load(str(opt_folder), "auto")


def test_decoders_with_cross_attention_are_refused(tmp_path):
    GPT2Config(add_cross_attention=True).save_pretrained(tmp_path)
    with pytest.raises(SnpError, match="gpt2 is an encoder-decoder; expected a decoder-only model"):
        checkpoint.load(str(tmp_path), "auto")


def test_a_pruned_folder_is_an_input_like_any_other(tokenizer, tmp_path):
    recipe = small_recipe(sparsity=0.3, round_to=4, num_samples=2)
    once = prune(small_model("qwen3", torch.float32), tokenizer, recipe).model
    checkpoint.save(once, tokenizer, tmp_path)
    again, _ = checkpoint.load(str(tmp_path), "auto")
    tokens = torch.randint(3, 2048, (1, 12))
    assert torch.equal(again(tokens).logits, once(tokens).logits) and again.config.model_type == "snp_qwen3"
    twice = prune(again, tokenizer, small_recipe(sparsity=0.1, round_to=4, num_samples=2, layout="uniform")).model
    assert twice.config.model_type == "qwen3" and not hasattr(twice.config, "pruned_layers")


@pytest.mark.slow
@pytest.mark.parametrize(
    "types",
    [("opt", "gemma3_text", "falcon"), pytest.param((*FAMILY_CONFIGS, *VARIANTS), marks=pytest.mark.exhaustive)],
)
def test_every_family_and_layout_reloads_where_the_package_does_not_exist(
    types, tokenizer, alone, tmp_path, record_property
):
    """One process loads all folders, so that transformers is imported once."""
    tokens = torch.randint(3, 2048, (2, 20), generator=torch.Generator().manual_seed(0))
    expected, stock = {}, []
    for model_type in types:
        dense = small_model(model_type, torch.float32)
        for layout in ("compact", "uniform", "padded"):
            if layout == "uniform" and find_family(dense.config).ffn_key is None:
                continue
            pruned = prune(
                dense, tokenizer, small_recipe(sparsity=0.25, round_to=4, layout=layout, num_samples=4)
            ).model
            folder = tmp_path / f"{model_type}-{layout}"
            checkpoint.save(pruned, tokenizer, folder)
            expected[folder.name] = pruned(tokens).logits
            stock += [folder.name] if not list(folder.glob("*.py")) else []
    assert {name for name in expected if not name.endswith("-compact")} <= set(stock) and len(stock) < len(expected)
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    code = (
        "import sys; sys.modules['snp_llm'] = None\n"  # any import of it would fail
        "import torch\n"
        "from safetensors.torch import load_file, save_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "tokens, logits = load_file('tokens.safetensors')['tokens'], {}\n"
        f"for name in {sorted(expected)}:\n"
        f"    trust = name not in {stock}\n"
        "    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust, dtype='auto').eval()\n"
        "    logits[name] = model(tokens).logits.detach().contiguous()\n"
        "    model.generate(tokens[:, :4], max_new_tokens=3, pad_token_id=1)\n"
        "save_file(logits, 'logits.safetensors')\n"
    )
    run = alone(code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    reloaded = load_file(tmp_path / "logits.safetensors")
    for name, logits in expected.items():
        assert torch.equal(reloaded[name], logits), name
        record_property("model_type", name.rpartition("-")[0])


def test_a_tensor_in_two_files(tokenizer, tmp_path):
    """Readers take either one, so that they have to be the same; and what an index names has to be there."""
    folder = tmp_path / "sharded"
    tokenizer.save_pretrained(folder)
    small_opt().save_pretrained(folder, max_shard_size="60KB")
    one, other = sorted(folder.glob("*.safetensors"))[:2]
    tensors, others = load_file(one), load_file(other)
    name = next(iter(tensors))
    save_file({**others, name: tensors[name]}, other, metadata={"format": "pt"})
    checkpoint.load(str(folder), "auto", on_disk=tmp_path / "scratch")
    save_file({**others, name: tensors[name] + 1}, other, metadata={"format": "pt"})
    with pytest.raises(SnpError, match=f"two of its files hold {name}, with different values"):
        checkpoint.load(str(folder), "auto", on_disk=tmp_path / "scratch")
    save_file({k: v for k, v in tensors.items() if k != name}, one, metadata={"format": "pt"})
    save_file(others, other, metadata={"format": "pt"})
    with pytest.raises(SnpError, match=f"model .*: cannot be loaded. .*{name}"):
        checkpoint.load(str(folder), "auto", on_disk=tmp_path / "scratch")


def test_shapes_that_disagree_with_the_config(opt_folder):
    config = json.loads((opt_folder / "config.json").read_text())
    config["ffn_dim"] = 48
    (opt_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SnpError, match=r"9 tensors disagree with its config; .*fc1.bias is \(64,\), expected \(48,\)"):
        checkpoint.load(str(opt_folder), "auto")


def test_a_checkpoint_that_lacks_tensors(opt_folder):
    weights = load_file(opt_folder / "model.safetensors")
    del weights["model.decoder.layers.2.fc1.weight"]
    save_file(weights, opt_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SnpError, match=r"lacks 1 tensors, model.decoder.layers.2.fc1.weight first"):
        checkpoint.load(str(opt_folder), "auto")


def test_a_truncated_checkpoint(opt_folder):
    path = opt_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SnpError, match="cannot be loaded"):
        checkpoint.load(str(opt_folder), "auto")


def test_a_tokenizer_that_does_not_match(tokenizer, tmp_path):
    save_model(small_opt(vocab_size=512), tokenizer, tmp_path)
    with pytest.raises(SnpError, match="expected about 512 tokens, .*; it has 2,048, up to id 2,047"):
        checkpoint.load(str(tmp_path), "auto")


# --- code in inputs --------------------------------------------------------------------------------------------------


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A file that untrusted code would write, and a terminal that nobody answers."""

    def ask(*_args):
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", ask)
    return tmp_path / "executed"


def with_code(folder, trap, file, **values):
    """Puts a module that springs the trap when imported into a model's folder, and values into one of its configs."""
    code = (
        f"open({str(trap)!r}, 'w').close()\n"
        "from transformers import OPTConfig, PreTrainedTokenizerFast\n"
        "class Config(OPTConfig): model_type = 'custom'\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
    )
    (folder / "custom.py").write_text(code)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("command", [prune_main, evaluate_main])
def test_code_of_a_model_does_not_run_unasked(command, opt_folder, trap, capsys):
    with_code(opt_folder, trap, "config.json", model_type="custom", auto_map={"AutoConfig": "custom.Config"})
    before = sorted(opt_folder.parent.iterdir())
    assert command([str(opt_folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("snp-llm: error: model ") and error.count("\n") == 1
    assert "needs Python code from its own repository" in error and "allow it with --trust-remote-code" in error
    assert sorted(opt_folder.parent.iterdir()) == before  # not sprung, and no output


def test_code_of_a_model_runs_when_it_is_trusted(opt_folder, trap):
    """So that the trap of the other tests is one."""
    with_code(opt_folder, trap, "config.json", model_type="custom", auto_map={"AutoConfig": "custom.Config"})
    with pytest.raises(SnpError, match="'custom' is not supported"):
        checkpoint.load(str(opt_folder), "auto", trust_remote_code=True)
    assert trap.exists()


@pytest.mark.parametrize(
    "module", [pytest.param("custom", marks=pytest.mark.exhaustive), "somebody/repository--custom"]
)
def test_a_pruned_model_does_not_point_to_code_that_was_not_trusted(module, opt_folder, trap, tmp_path):
    """Users are told to trust the code of a pruned model, which must then be none but its own."""
    with_code(opt_folder, trap, "config.json", auto_map={"AutoConfig": f"{module}.Config"})
    with_code(opt_folder, trap, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, f"{module}.Tokenizer"]})
    dense, tokenizer = checkpoint.load(str(opt_folder), "auto")
    pruned = prune(dense, tokenizer, small_recipe())
    checkpoint.save(pruned.model, tokenizer, tmp_path / "out")
    checkpoint.verify(dense, pruned.model, tmp_path / "out", pruned.calibration.tokens[:1])
    assert not trap.exists() and not list((tmp_path / "out").glob("custom*"))
    for file in (tmp_path / "out").glob("*.json"):
        assert "custom" not in file.read_text()


class Pickled:
    def __init__(self, trap):
        self.trap = trap

    def __reduce__(self):
        return open, (self.trap, "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_is_more_than_tensors_is_refused(zipped, opt_folder, trap, capsys):
    (opt_folder / "model.safetensors").unlink()
    state = {"lm_head.weight": Pickled(str(trap))}
    torch.save(state, opt_folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert prune_main([str(opt_folder), "--output", str(opt_folder.parent / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("snp-llm: error: model ") and error.count("\n") == 1 and "expected safetensors" in error
    assert [path.name for path in opt_folder.parent.iterdir()] == [opt_folder.name]
    torch.load(opt_folder / "pytorch_model.bin", weights_only=False)  # the trap is one
    assert trap.exists()


def test_a_pickle_of_tensors_loads(opt_folder):
    dense, _ = checkpoint.load(str(opt_folder), "auto")
    (opt_folder / "model.safetensors").unlink()
    torch.save(dense.state_dict(), opt_folder / "pytorch_model.bin")
    same, _ = checkpoint.load(str(opt_folder), "auto")
    tokens = torch.arange(20)[None]
    assert torch.equal(dense(tokens).logits, same(tokens).logits)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_run_killed_while_writing_leaves_no_output_but_can_be_resumed(number, tmp_path):
    """A real process, really killed once its temporary folder holds weights."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "snp_llm.prune", "tiny-opt", "--output", str(out), "--num-samples", "2"]
    options = {"env": {**os.environ, "HF_HUB_OFFLINE": "1"}, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **options)
    deadline = time.time() + 120
    while not (tmp_path / ".out.partial/model.safetensors").exists():
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert not out.exists()
    if number == signal.SIGKILL:
        return
    assert "Traceback" not in stderr and "interrupted; no output was written" in stderr and "--resume" in stderr


def test_config_says_how_to_load_it(tokenizer, tmp_path):
    checkpoint.save(prune(small_opt(), tokenizer, small_recipe()).model, tokenizer, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.auto_map == {
        "AutoConfig": "modeling_snp.SnpOPTConfig",
        "AutoModel": "modeling_snp.SnpOPTModel",
        "AutoModelForCausalLM": "modeling_snp.SnpOPTForCausalLM",
        "AutoModelForQuestionAnswering": "modeling_snp.SnpOPTForQuestionAnswering",
        "AutoModelForSequenceClassification": "modeling_snp.SnpOPTForSequenceClassification",
    }
    assert config.architectures == ["SnpOPTForCausalLM"]
    assert (tmp_path / "generation_config.json").exists() and (tmp_path / "modeling_snp.py").exists()

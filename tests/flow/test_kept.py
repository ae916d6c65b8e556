"""The saved model computes what was loaded: at sparsity 0 to the bit, whatever the config and the checkpoint say."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from snp_llm import checkpoint, prune
from snp_llm.checkpoint.saving import check_kept
from snp_llm.checkpoint.tokenizer import CONFIG, check_carried, find_tokenizer_files
from snp_llm.cli.parse import prune_main
from snp_llm.models.anatomy import blocks_path
from snp_llm.runtime.errors import SnpError
from tests.conftest import save_model, small_model, small_opt, small_recipe
from tests.families import FAMILY_CONFIGS, every_family

TOKENS = torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
UNLIKE = [("gemma3_text", name) for name in ("untied", "tied in the config alone", "rms_norm_eps")]
# Config keys that change what is computed outside of the projections, with a value that is no default.
SCALES = {
    "attention_multiplier": 0.3,
    "attn_logit_softcapping": 20.0,
    "embedding_multiplier": 3.0,
    "final_logit_softcapping": 10.0,
    "layer_norm_eps": 1e-3,
    "layer_norm_epsilon": 1e-3,
    "logits_scaling": 4.0,
    "query_pre_attn_scalar": 40,
    "residual_multiplier": 0.7,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 2.0},
    "scale_attn_by_inverse_layer_idx": True,
    "scale_attn_weights": False,
}
BIASES = {"attention_bias": True, "mlp_bias": True, "enable_bias": True, "use_qkv_bias": True}


def variants(model_type):
    """Overrides of a family's small config, by name."""
    known = AutoConfig.for_model(model_type, **FAMILY_CONFIGS[model_type]).to_dict()
    yield "tied", {"tie_word_embeddings": True}
    yield "untied", {"tie_word_embeddings": False}
    yield "tied in the config alone", {"tie_word_embeddings": False}
    if biases := {key: value for key, value in BIASES.items() if key in known}:
        yield "with biases", biases
        yield "without biases", dict.fromkeys(biases, False)
    for key, value in SCALES.items():
        if key != "rope_parameters":
            changed = value
        elif model_type == "phi3":  # knows no linear scaling
            changed = {**(known.get(key) or {}), "rope_theta": 500_000.0}
        else:
            changed = {**(known.get(key) or {}), **value}
        if key in known and "full_attention" not in (known[key] if key == "rope_parameters" else ""):
            yield key, {key: changed}


@pytest.mark.parametrize(
    ("model_type", "variant"),
    [
        pytest.param(family, name, marks=() if (family, name) in UNLIKE else pytest.mark.exhaustive)
        for family in FAMILY_CONFIGS
        for name, _ in variants(family)
    ],
)
def test_sparsity_zero_is_what_was_loaded_in_every_layout(model_type, variant, tokenizer, tmp_path):
    folder = tmp_path / "dense"
    save_model(small_model(model_type, torch.float32, **dict(variants(model_type))[variant]), tokenizer, folder)
    if variant == "tied in the config alone":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    expected = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
    dense, _ = checkpoint.load(str(folder), "auto", on_disk=tmp_path / "scratch")
    for layout in ("compact", "uniform", "padded"):
        pruned = prune(dense, tokenizer, small_recipe(sparsity=0.0, layout=layout, num_samples=2))
        checkpoint.save(pruned.model, tokenizer, tmp_path / layout)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / layout)
        assert torch.equal(saved(TOKENS).logits, expected)
        check_kept(dense, tmp_path / layout)
    if variant == "tied in the config alone":
        assert not saved.config.tie_word_embeddings


@every_family()
def test_a_changed_tensor_outside_the_blocks_is_noticed(model_type, tokenizer, tmp_path):
    """One bit of any of them: embeddings, positions, last norm, head."""
    dense = small_model(model_type, torch.float32, tie_word_embeddings=False)
    checkpoint.save(prune(dense, tokenizer, small_recipe(num_samples=2)).model, tokenizer, tmp_path)
    file = tmp_path / "model.safetensors"
    weights, prefix = load_file(file), blocks_path(dense)
    outside = [name for name in weights if not name.startswith(prefix)]
    assert len(outside) >= 2  # NanoChat's last norm has no weights
    for name in outside:
        changed = weights[name].clone()
        changed.view(torch.int32).view(-1)[0] ^= 1
        save_file({**weights, name: changed}, file, metadata={"format": "pt"})
        with pytest.raises(SnpError, match="not the one that was loaded: .* differs"):
            check_kept(dense, tmp_path)
    save_file({k: v for k, v in weights.items() if k != "lm_head.weight"}, file, metadata={"format": "pt"})
    if "lm_head.weight" in weights:
        with pytest.raises(SnpError, match="not the one that was loaded: lm_head.weight differs"):
            check_kept(dense, tmp_path)
    save_file({**weights, "more": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(SnpError, match="more differs"):
        check_kept(dense, tmp_path)


@pytest.mark.exhaustive
def test_verification_runs_the_loaded_shell(tokenizer, tmp_path):
    """A scale that only the loaded model has cannot get lost unnoticed, though all tensors are its own."""
    dense = small_model("granite", torch.float32)
    pruned = prune(dense, tokenizer, small_recipe(num_samples=2))
    checkpoint.save(pruned.model, tokenizer, tmp_path)
    assert checkpoint.verify(dense, pruned.model, tmp_path, TOKENS[:1]) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "logits_scaling": 1.0}))
    with pytest.raises(SnpError, match="computes something else after reloading"):
        checkpoint.verify(dense, pruned.model, tmp_path, TOKENS[:1])


def test_a_pickled_checkpoint_that_holds_a_tied_tensor_once(tokenizer, tmp_path, quick_prunes):
    """Under either of its names, as converters write it."""
    model = small_opt()
    for name in ("model.decoder.embed_tokens.weight", "lm_head.weight"):
        folder = save_model(model, tokenizer, tmp_path / name)
        weights = {**load_file(folder / "model.safetensors")}
        weights[name] = weights.pop("model.decoder.embed_tokens.weight")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        out = tmp_path / f"{name}-out"
        settings = ["--sparsity", "0", "--num-samples", "2", "--seq-len", "32", "--no-eval", "--calibration", "bundled"]
        assert prune_main([str(folder), "--output", str(out), *settings]) == 0
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(TOKENS).logits, model(TOKENS).logits)


# --- code that a pruned model would lose -----------------------------------------------------------------------------


class Doubled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def test_a_class_of_the_users_own_is_refused(tokenizer):
    model = Doubled(small_model("llama", torch.float32).config)
    with pytest.raises(SnpError, match="Doubled: is code of the model's own"):
        prune(model, tokenizer, small_recipe())


OWN_CODE = (
    "from transformers import LlamaForCausalLM, LlamaConfig\n"
    "class MineConfig(LlamaConfig):\n    model_type = 'llama'\n"
    "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
)


@pytest.mark.parametrize("auto_map", [{"AutoConfig": "m.MineConfig", "AutoModelForCausalLM": "m.MineForCausalLM"}, {}])
def test_trusted_code_under_a_stock_type_is_refused_before_the_work(
    auto_map, tokenizer, tmp_path, capsys, quick_prunes
):
    folder = save_model(small_model("llama", torch.float32), tokenizer, tmp_path / "own")
    (folder / "m.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    command = [str(folder), "--output", str(tmp_path / "out"), "--no-eval", "--num-samples", "2", "--seq-len", "32"]
    command += ["--calibration", "bundled", "--quiet"]
    code = prune_main([*command, "--trust-remote-code"])
    error = capsys.readouterr().err
    if auto_map:
        assert code == 2 and "is code of the model's own" in error and "forward passes" not in error
        assert [path.name for path in tmp_path.iterdir()] == ["own"]
    else:
        assert code == 0


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_pruned_model_loaded_by_its_own_file_is_the_same_unless_that_was_changed(tokenizer, tmp_path, capsys):
    dense = small_model("llama", torch.float32)
    checkpoint.save(prune(dense, tokenizer, small_recipe(round_to=4)).model, tokenizer, tmp_path / "once")
    command = ["--no-eval", "--num-samples", "2", "--seq-len", "32", "--calibration", "bundled", "--trust-remote-code"]
    assert prune_main([str(tmp_path / "once"), "--output", str(tmp_path / "twice"), *command]) == 0
    shutil.copytree(tmp_path / "once", tmp_path / "changed")
    file = tmp_path / "changed/modeling_snp.py"
    file.write_text(file.read_text() + "\nPruned.forward = None\n")
    assert prune_main([str(tmp_path / "changed"), "--output", str(tmp_path / "thrice"), *command]) == 2
    assert "its modeling_snp.py is not this version's, with which" in capsys.readouterr().err
    command.remove("--trust-remote-code")
    assert prune_main([str(tmp_path / "changed"), "--output", str(tmp_path / "thrice"), *command]) == 0
    assert "its modeling_snp.py is not this version's, which is used instead" in capsys.readouterr().err


# In the form that earlier versions wrote, a file for every family.
EARLIER = """
from transformers import LlamaConfig, LlamaForCausalLM

from .snp_blocks import rebuild_blocks


class SnpLlamaConfig(LlamaConfig):
    model_type = "snp_llama"


class SnpLlamaForCausalLM(LlamaForCausalLM):
    config_class = SnpLlamaConfig

    def __init__(self, config):
        super().__init__(config)
        rebuild_blocks(self.model.layers, config)
        self.post_init()
"""
EARLIER_BLOCKS = """
from copy import copy


def rebuild_blocks(blocks, config):
    for index, block in enumerate(blocks):
        view = copy(config)
        view.__dict__.update(config.pruned_layers.get(str(index), {}))
        block.self_attn, block.mlp = type(block.self_attn)(view, index), type(block.mlp)(view)
"""
ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file, save_file

sys.modules["snp_llm"] = None
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.endswith(".modeling_snp_llama")
save_file({"logits": model(load_file(sys.argv[2])["tokens"]).logits}, sys.argv[3])
"""


@pytest.mark.exhaustive
def test_a_folder_of_an_earlier_version_loads_by_its_own_files_alone_and_by_this_version_s_here(
    tokenizer, tmp_path, capsys
):
    dense = small_model("llama", torch.float32)
    pruned = prune(dense, tokenizer, small_recipe(round_to=4)).model
    checkpoint.save(pruned, tokenizer, tmp_path / "old")
    (tmp_path / "old/modeling_snp.py").unlink()
    (tmp_path / "old/modeling_snp_llama.py").write_text(EARLIER)
    (tmp_path / "old/snp_blocks.py").write_text(EARLIER_BLOCKS)
    config = json.loads((tmp_path / "old/config.json").read_text())
    names = {"AutoConfig": "SnpLlamaConfig", "AutoModelForCausalLM": "SnpLlamaForCausalLM"}
    config["auto_map"] = {auto: f"modeling_snp_llama.{name}" for auto, name in names.items()}
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    save_file({"tokens": TOKENS}, tmp_path / "tokens")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [str(tmp_path / name) for name in ("old", "tokens", "logits")]
    subprocess.run([sys.executable, "-c", ALONE, *arguments], cwd=tmp_path, env=environment, check=True)
    assert torch.equal(load_file(tmp_path / "logits")["logits"], pruned(TOKENS).logits)
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    assert type(here) is type(pruned) and torch.equal(here(TOKENS).logits, pruned(TOKENS).logits)
    here.save_pretrained(tmp_path / "again")
    assert [file.name for file in (tmp_path / "again").glob("*.py")] == ["modeling_snp.py"]
    auto_map = json.loads((tmp_path / "again/config.json").read_text())["auto_map"]
    assert all(name.startswith("modeling_snp.Snp") for name in auto_map.values())
    command = [str(tmp_path / "old"), "--output", str(tmp_path / "out"), "--no-eval", "--num-samples", "2"]
    command += ["--seq-len", "32", "--calibration", "bundled"]
    assert prune_main([*command, "--trust-remote-code"]) == 2
    assert "its modeling_snp_llama.py is not this version's, with which" in capsys.readouterr().err
    assert prune_main(command) == 0
    assert "its modeling_snp_llama.py is not this version's, which is used instead" in capsys.readouterr().err


# --- keys that name code ---------------------------------------------------------------------------------------------

NAMING = {
    "auto_map": {"AutoModelForCausalLM": "evil/repo--evil.Model"},
    "custom_pipelines": {"text-generation": {"impl": "evil/repo--evil.Pipe", "pt": ["AutoModelForCausalLM"]}},
    "loading_config": {"impl": "evil/repo--evil"},
    "some_loader": "evil/repo--evil.load",
    "hooks": ["evil/repo--evil.hook"],
}


@pytest.mark.parametrize("layout", ["compact", "uniform"])
def test_no_key_that_may_name_code_is_inherited(layout, tokenizer, tmp_path):
    folder = save_model(small_model("qwen2", torch.float32), tokenizer, tmp_path / "evil")
    for name in ("config.json", "generation_config.json", CONFIG):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(
            json.dumps({**values, **NAMING, "repetition_penalty": 1.1, "temperature": 0.5, "head_dim": 8})
        )
    dense, loaded = checkpoint.load(str(folder), "auto")
    pruned = prune(dense, loaded, small_recipe(layout=layout, round_to=4, sparsity=0.25)).model
    for out, source in (("anew", None), ("carried", str(folder))):
        checkpoint.save(pruned, loaded, tmp_path / out, tokenizer_of=source)
        texts = {file.name: file.read_text() for file in (tmp_path / out).glob("*.json")}
        assert {"config.json", "generation_config.json", CONFIG} <= set(texts)
        assert "evil" not in texts["config.json"] + texts["generation_config.json"]
        assert "auto_map" not in texts[CONFIG] and "custom_pipelines" not in texts[CONFIG]
        assert json.loads(texts["config.json"])["head_dim"] == 8  # read by transformers, declared by no class
        generation = GenerationConfig.from_pretrained(tmp_path / out)
        assert generation.repetition_penalty == 1.1 and not generation.do_sample  # temperature then says nothing


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_tokenizer_files_are_carried_over_byte_for_byte(tokenizer, tmp_path, monkeypatch, quick_prunes):
    """Whatever is in them, and however they are written."""
    folder = save_model(small_opt(), tokenizer, tmp_path / "dense")
    config = json.loads((folder / CONFIG).read_text())
    for layout in (None, 7):
        (folder / CONFIG).write_text(json.dumps({**config, "unknown": "kept"}, indent=layout))
        (folder / "chat_template.jinja").write_text("{{ messages }}\n\n")
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
        (folder / "tokenizer.model").write_bytes(b"\x00not sentencepiece, and not ours to judge")
        (folder / "vocab.tiktoken").write_bytes(b"\xff")
        (folder / "secret.txt").write_text("of no tokenizer")
        out = tmp_path / f"out-{layout}"
        settings = ["--num-samples", "2", "--seq-len", "32", "--no-eval", "--calibration", "bundled"]
        assert prune_main([str(folder), "--output", str(out), *settings]) == 0
        for name in find_tokenizer_files(str(folder), tokenizer):
            assert (out / name).read_bytes() == (folder / name).read_bytes(), name
        assert (out / "additional_chat_templates/tools.jinja").exists() and (out / "vocab.tiktoken").exists()
        assert not (out / "secret.txt").exists()
        report = json.loads((out / "prune_report.json").read_text())
        assert "additional_chat_templates/tools.jinja" in report["files"]


def test_texts_that_no_file_can_hold_unescaped(opt_folder, tmp_path, quick_prunes):
    """Halves of characters in JSON, which are escaped there as they came."""
    for name, more in (("config.json", {"problem_type": "\ud800"}), (CONFIG, {"auto_map": {}, "more": "\ud800"})):
        values = json.loads((opt_folder / name).read_text())
        (opt_folder / name).write_text(json.dumps({**values, **more}))
    settings = ["--num-samples", "2", "--seq-len", "32", "--no-eval", "--calibration", "bundled"]
    assert prune_main([str(opt_folder), "--output", str(tmp_path / "out"), *settings]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["problem_type"] == "\ud800"
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["more"] == "\ud800"


def own_tokenizer(folder, body):
    (folder / "own.py").write_text(
        f"from transformers import PreTrainedTokenizerFast\nclass T(PreTrainedTokenizerFast):\n{body}"
    )
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "auto_map": {"AutoTokenizer": [None, "own.T"]}}))


def test_a_tokenizer_with_code_of_its_own_is_kept_where_it_is_not_needed(opt_folder, tmp_path, quick_prunes, capsys):
    command = [str(opt_folder), "--output", str(tmp_path / "out"), "--trust-remote-code", "--no-eval"]
    command += ["--num-samples", "2", "--seq-len", "32", "--calibration", "bundled"]
    own_tokenizer(
        opt_folder, "    def _encode_plus(self, text, **k):\n        return super()._encode_plus(text[::-1], **k)\n"
    )
    assert prune_main(command) == 2
    error = capsys.readouterr().err
    assert "does not read from its files what it reads here (other tokens for the same text)" in error
    assert not (tmp_path / "out").exists() and "forward" not in error
    own_tokenizer(opt_folder, "    pass\n")
    assert prune_main(command) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)("text")["input_ids"]
    assert not (tmp_path / "out/own.py").exists()


def test_a_folder_without_a_tokenizer(tmp_path):
    small_opt().save_pretrained(tmp_path)
    with pytest.raises(SnpError, match="tokenizer of .*: there is none; expected tokenizer.json"):
        checkpoint.load(str(tmp_path), "auto")


def test_added_tokens_past_the_embeddings_are_an_error_only_in_a_text(tmp_path, capsys, quick_prunes):
    folder = save_model(small_opt(), AutoTokenizer.from_pretrained(checkpoint.find_model("tiny-opt")), tmp_path / "m")
    more = AutoTokenizer.from_pretrained(folder)
    more.add_tokens(["<image>"], special_tokens=True)
    more.add_tokens(["<also>"])
    more.save_pretrained(folder)
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_text("a text " * 400)
    for number, (calibration, evaluation) in enumerate(((plain, plain), (marked, plain), (plain, marked))):
        marked.write_text("a text " * 400 + ("<image>" if number == 1 else "<also>") + " a text" * 40)
        command = [str(folder), "--calibration", str(calibration), "--eval-dataset", str(evaluation)]
        command += ["--num-samples", "64", "--seq-len", "16", "--output", str(tmp_path / f"out-{number}")]
        assert prune_main(command) == (2 if number else 0)
        if number:
            assert "marked.txt, " in (error := capsys.readouterr().err) and "the model embeds ids below 2,048" in error


def test_what_transformers_reads_otherwise_is_refused(tokenizer, tmp_path):
    save_model(small_opt(), tokenizer, tmp_path / "a")
    files = find_tokenizer_files(str(tmp_path / "a"), tokenizer)
    check_carried("a", files, tokenizer, ["opt", "snp_opt"])
    changed = AutoTokenizer.from_pretrained(tmp_path / "a")
    changed.chat_template = "{{ messages }}"
    with pytest.raises(SnpError, match="another chat template"):
        check_carried("a", files, changed, ["opt"])
    changed.add_tokens(["<more>"])
    with pytest.raises(SnpError, match="2,049 tokens against 2,048"):
        check_carried("a", files, changed, ["opt"])
    (tmp_path / "a/tokenizer.json").write_text("{")
    with pytest.raises(SnpError, match="does not read from its files"):
        check_carried("a", files, tokenizer, ["opt"])

"""Models that read images beside text: the text model is pruned, all else goes through as it is."""

import json
from functools import cache
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import AutoConfig, Cache, Llama4ForConditionalGeneration

from snp_llm import checkpoint, prune
from snp_llm.checkpoint.skeleton import check_text_weights
from snp_llm.checkpoint.tokenizer import PROCESSORS
from snp_llm.cli.parse import inspect_main, prune_main
from snp_llm.models.anatomy import blocks_path, find_blocks
from snp_llm.models.blocks import capture_calls
from snp_llm.models.layouts import needs_code
from snp_llm.models.registry import auto_class
from snp_llm.models.size import linear_weights, model_size
from snp_llm.models.text_part import text_config, text_modules
from snp_llm.runtime.errors import SnpError
from tests.conftest import save_model, small_recipe, zeroed
from tests.wrappers import COMPACT, NEED, WRAPPERS, small_wrapper, with_image

TOKENS = torch.randint(3, 1900, (2, 24), generator=torch.Generator().manual_seed(0))
CUTS = {"ffn_sparsity": 0.3, "head_sparsity": 0.3, "round_to": 4, "num_samples": 4}
QUICK = "gemma3"
EVERY = [name if name == QUICK else pytest.param(name, marks=pytest.mark.exhaustive) for name in WRAPPERS]

# Each given folders with models, and an image beside them, it writes their logits; it must not know the package.
RELOAD = """
import sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file
transformers.modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None  # as tests/wrappers.py has it
for folder in map(Path, sys.argv[1:]):
    auto = getattr(transformers, (folder / "auto").read_text())
    model = auto.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    with torch.no_grad():
        save_file({"logits": model(**load_file(folder / "image")).logits}, folder / "logits")
assert not any(name.split(".")[0] == "snp_llm" for name in sys.modules)
"""


def logits_of(model, model_type):
    """Of a text, and of one with an image in it."""
    return model(TOKENS).logits, model(**with_image(model_type, model.dtype)).logits


def cut(model, tokenizer, **overrides):
    """A pruned model; heads stay where a plain config cannot say that they go."""
    try:
        return prune(model, tokenizer, small_recipe(**{**CUTS, **overrides}))
    except SnpError as error:
        assert "--head-sparsity: expected at most 0" in str(error) and overrides["layout"] == "uniform"
        return prune(model, tokenizer, small_recipe(**{**CUTS, **overrides, "head_sparsity": 0.0}))


@pytest.mark.parametrize("model_type", EVERY)
def test_sparsity_zero_is_the_dense_model_to_the_bit_with_and_without_an_image(model_type, tokenizer):
    dense = small_wrapper(model_type)
    text, image = logits_of(dense, model_type)
    other = with_image(model_type)
    other["pixel_values"] = other["pixel_values"].flip(-1)
    assert (dense(**other).logits - image).abs().max() > 1e-3  # images matter
    for layout in ("compact", "uniform", "padded"):
        pruned = prune(dense, tokenizer, small_recipe(sparsity=0.0, layout=layout, num_samples=2)).model
        assert type(pruned) is type(dense)
        assert all(map(torch.equal, logits_of(pruned, model_type), (text, image)))


@pytest.mark.parametrize("layout", ["compact", "uniform", "padded"])
@pytest.mark.parametrize("model_type", EVERY)
def test_pruned_equals_dense_with_those_units_zeroed(model_type, layout, tokenizer):
    if layout == "uniform" and model_type in COMPACT:
        pytest.skip("no plain config holds other widths, which is said")
    dense = small_wrapper(model_type, torch.float64)
    pruned = cut(dense, tokenizer, layout=layout)
    masked = zeroed(dense, pruned)
    for got, wanted, before in zip(*(logits_of(m, model_type) for m in (pruned.model, masked, dense)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
        assert (got - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "types",
    [
        (QUICK,),
        pytest.param([name for name in WRAPPERS if name not in (QUICK, *NEED)], marks=pytest.mark.exhaustive),
        *(pytest.param((name,), marks=pytest.mark.exhaustive) for name in NEED),
    ],
)
def test_a_fresh_process_loads_every_layout_and_computes_the_same(types, tokenizer, alone, tmp_path, record_property):
    expected = {}
    for model_type in types:
        folder = save_model(small_wrapper(model_type), tokenizer, tmp_path / model_type)
        dense, loaded = checkpoint.load(str(folder), "auto")
        for layout in ("compact", "uniform")[: 1 if model_type in COMPACT else 2]:
            pruned = cut(dense, loaded, layout=layout, ffn_sparsity=0.45, allocation="loss").model
            out = tmp_path / f"{model_type}-{layout}"
            checkpoint.save(pruned, loaded, out, tokenizer_of=str(folder))
            checkpoint.saving.check_kept(dense, out)
            image = {key: value.contiguous() for key, value in with_image(model_type).items()}
            save_file(image, out / "image")
            (out / "auto").write_text(auto_class(dense.config).__name__)
            expected[out] = pruned(**image).logits
            again = checkpoint.load(str(out), "auto")[0]  # without its code, by this package
            assert type(again).__name__ == type(pruned).__name__
            torch.testing.assert_close(again(**image).logits, expected[out], rtol=1e-4, atol=1e-4)
    run = alone(RELOAD, *expected, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for out, logits in expected.items():
        torch.testing.assert_close(load_file(out / "logits")["logits"], logits, rtol=1e-4, atol=1e-4)
        record_property("model_type", out.name.rpartition("-")[0])


@cache
def cut_once(model_type: str, tokenizer):
    return cut(small_wrapper(model_type, torch.float64), tokenizer)


def writes_what_logits_say(model, model_type) -> bool:
    """Whether generation with a cache, after a text with an image in it, takes the tokens that logits without say."""
    given = with_image(model_type, torch.float64)
    at = given["input_ids"].shape[1]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    written = model.generate(**given, attention_mask=torch.ones_like(given["input_ids"]), **settings)
    text = int(model_type == "paligemma")  # whose kinds of token are a prompt's and others
    kinds = {key: pad(value, (0, 5), value=text) for key, value in given.items() if key.endswith("token_type_ids")}
    logits = model(**{**given, **kinds, "input_ids": written}, use_cache=False).logits
    logits[..., 2] = -torch.inf  # min_new_tokens forbids the end of text
    return torch.equal(logits[:, at - 1 : -1].argmax(-1), written[:, at:])


@pytest.mark.parametrize("model_type", EVERY)
def test_generation_with_a_cache_equals_logits_without(model_type, tokenizer):
    assert writes_what_logits_say(cut_once(model_type, tokenizer).model, model_type)


def padding_moves(model) -> float:
    """How far logits of a text are from those that it has beside a longer one."""
    batch = torch.cat([torch.cat([torch.full((1, 6), 1), TOKENS[:1, :10]], 1), TOKENS[1:, :16]])
    mask = (torch.arange(16) >= torch.tensor([[6], [0]])).long()
    together = model(batch, attention_mask=mask).logits
    one, other = together[:1, 6:] - model(TOKENS[:1, :10]).logits, together[1:] - model(TOKENS[1:, :16]).logits
    return float(max(one.abs().max(), other.abs().max()))


@pytest.mark.parametrize("model_type", EVERY)
def test_padding_and_batch_do_not_change_logits(model_type, tokenizer):
    if padding_moves(small_wrapper(model_type, torch.float64)) > 1e-4:
        pytest.skip("it minds padding, the dense model too")
    assert padding_moves(cut_once(model_type, tokenizer).model) < 1e-4


@pytest.mark.parametrize("model_type", EVERY)
def test_a_pruned_model_is_an_input_like_any_other(model_type, tokenizer):
    once = cut_once(model_type, tokenizer)
    twice = cut(once.model, tokenizer, ffn_sparsity=0.2, head_sparsity=0.0)
    assert [r.site.channels for r in twice.sites] == [len(r.kept) * r.site.unit_size for r in once.sites]
    assert torch.isfinite(twice.model(**with_image(model_type, torch.float64)).logits).all()


def test_widths_stand_at_the_top_of_a_config_and_other_keys_where_they_were(tokenizer):
    dense = small_wrapper(QUICK)
    compact = cut(dense, tokenizer, layout="compact", ffn_sparsity=0.45).model
    assert needs_code(compact.config) and compact.config.pruned_structure["blocks"] == blocks_path(dense)
    assert compact.config.pruned_layers and not hasattr(compact.config.text_config, "pruned_layers")
    names = {"AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM"}
    assert names <= set(compact.config.auto_map)
    uniform = cut(dense, tokenizer, layout="uniform").model.config
    assert uniform.model_type == QUICK and uniform.text_config.intermediate_size < 64
    assert uniform.text_config.num_attention_heads < 6 and uniform.text_config.head_dim == 8
    for config in (compact.config, uniform):
        assert config.vision_config.to_dict() == dense.config.vision_config.to_dict()
        assert text_config(config).model_type == "gemma3_text"


def test_towers_count_as_parameters_alone():
    model = small_wrapper(QUICK)
    size = model_size(model, 1)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.block_linear == sum(map(linear_weights, model.model.language_model.layers))
    attended = 4 * 48 * 2
    assert size.flops == 2 * (size.block_linear + model.lm_head.weight.numel()) + attended
    assert not text_modules(model) & {*model.model.vision_tower.modules(), *model.model.multi_modal_projector.modules()}


@pytest.mark.parametrize("model_type", EVERY)
def test_a_whole_model_is_not_taken_for_one_without_its_text(model_type, tmp_path):
    model = small_wrapper(model_type)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    check_text_weights(str(tmp_path), model)


def test_the_command_carries_processors_over_and_names_the_class_that_loads(tokenizer, tmp_path, quick_prunes, capsys):
    folder = save_model(small_wrapper(QUICK), tokenizer, tmp_path / "dense")
    for number, name in enumerate(PROCESSORS):
        (folder / name).write_text(json.dumps({"processor_class": "Gemma3Processor", "size": [28]}, indent=number))
    evil = {"auto_map": {"AutoProcessor": "evil.P"}, "image_processor": {"auto_map": {"A": "evil.I"}, "size": 28}}
    (folder / "processor_config.json").write_text(json.dumps(evil))
    assert inspect_main([str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layouts"]["compact"]["saved_as"] == [f"snp_{QUICK}"]
    settings = ["--num-samples", "2", "--seq-len", "32", "--no-eval", "--calibration", "bundled"]
    assert prune_main([str(folder), "--output", str(tmp_path / "out"), *settings]) == 0
    for name in PROCESSORS[1:]:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name
    assert json.loads((tmp_path / "out/processor_config.json").read_text()) == {"image_processor": {"size": 28}}
    card = (tmp_path / "out/README.md").read_text()
    assert "from transformers import AutoModelForImageTextToText, AutoProcessor" in card
    assert "pipeline_tag: image-text-to-text" in card and "model = AutoModelForImageTextToText.from" in card


@pytest.mark.parametrize("model_type", EVERY)
def test_no_cache_is_kept_between_windows(model_type):
    """Some wrappers hand `use_cache` on among other arguments, and by default would keep one."""
    model = small_wrapper(model_type)
    for call in capture_calls(model, find_blocks(model), TOKENS[:1])[1]:
        assert not any(isinstance(value, Cache) for value in (*call.args, *call.kwargs.values()))


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(folder, tmp_path, capsys):
    """The one line that `prune` says of a folder, which leaves nothing behind."""
    settings = ["--calibration", "bundled", "--seq-len", "32", "--no-eval"]
    assert prune_main([str(folder), "--output", str(tmp_path / "out"), *settings]) == 2
    error = capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    lines = [line for line in error.splitlines() if line.startswith("snp-llm: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_wrapper_without_its_text_is_refused(tokenizer, tmp_path, capsys):
    folder = save_model(small_wrapper(QUICK), tokenizer, tmp_path / "towers")
    towers = {key: value for key, value in load_file(folder / "model.safetensors").items() if "vision" in key}
    save_file(towers, folder / "model.safetensors", metadata={"format": "pt"})
    with mock.patch("snp_llm.cli.prune.load_on_disk", None):  # before anything is loaded
        said = refusal(folder, tmp_path, capsys)
    assert "hold no weights of the text model's blocks, such as model.language_model.layers.0." in said
    with pytest.raises(SnpError, match="the checkpoint lacks"):
        checkpoint.load(str(folder), "auto")


@pytest.mark.parametrize(
    ("model_type", "text", "said"),
    [
        ("llava", {"model_type": "nothing_known"}, "cannot be loaded"),
        ("llava", {"model_type": "t5"}, "is an encoder-decoder"),
        ("florence2", {"model_type": "bart"}, "is an encoder-decoder"),
    ],
)
def test_text_models_that_are_no_decoders_are_refused(model_type, text, said, tmp_path, capsys):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense/config.json").write_text(json.dumps({"model_type": model_type, "text_config": text}))
    assert said in refusal(tmp_path / "dense", tmp_path, capsys)


def test_a_class_that_does_not_run_whatever_its_weights_is_refused(tokenizer, tmp_path, capsys, monkeypatch):
    folder = save_model(small_wrapper("llama4"), tokenizer, tmp_path / "dense")

    def forward(self, input_ids, use_cache=None, **kwargs):
        raise AttributeError("the output has no attribute image_outputs")

    monkeypatch.setattr(Llama4ForConditionalGeneration, "forward", forward)
    assert inspect_main([str(folder)]) == 0
    assert "does not run over a text" in refusal(folder, tmp_path, capsys)


def test_a_type_that_also_has_a_class_for_its_text_alone_is_loaded_whole():
    for model_type in ("qwen3_5", "llama4", "mllama"):
        assert auto_class(AutoConfig.for_model(model_type)).__name__ == "AutoModelForImageTextToText"
    assert auto_class(AutoConfig.for_model("qwen3_5_text")).__name__ == "AutoModelForCausalLM"

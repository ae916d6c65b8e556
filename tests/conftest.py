"""Small models of every shape, and the bundled tokenizer. No test needs the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes, and their children, on two cores

import copy
import json
import subprocess
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedModel

from snp_llm import Recipe
from snp_llm.checkpoint.skeleton import load_skeleton
from snp_llm.cli.parse import prune_main
from snp_llm.data.sources import BUNDLED
from snp_llm.models.anatomy import find_blocks, find_sites
from snp_llm.models.families.decoders import find_family
from snp_llm.models.projections import projection, weight_of
from snp_llm.pruning.widths.latency import LatencyTable, key
from tests.alone import Fork, processes
from tests.families import FAMILY_CONFIGS, IN_FLOAT32, VARIANTS
from tests.quick import with_few_steps, without_page, without_reloading

SHARED = Path(__file__).parent.parent.parent / "shared"

# Every kind of OPT there is: the common pre-norm one, 350m (post-norm, projected embeddings), and one without biases.
OPT_VARIANTS = {
    "pre-norm": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
    "no-bias": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    "untied": {"tie_word_embeddings": False},
}


def small_opt(dtype: torch.dtype = torch.float32, **overrides) -> OPTForCausalLM:
    """A random OPT whose residual stream is not dominated by the embeddings, so that pruning it shows."""
    torch.manual_seed(0)
    values = {
        "vocab_size": 2048,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        **overrides,
    }
    model = OPTForCausalLM(OPTConfig(**values)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "layers" in name and parameter.dim() == 2:
            parameter.normal_(0, 0.3)
        elif "layers" in name and name.endswith("bias"):
            parameter.normal_(0, 0.1)
    return model.to(dtype)


def small_model(model_type: str, dtype: torch.dtype | None = None, **overrides) -> PreTrainedModel:
    """A random model of a family whose blocks matter as much as its embeddings, in float64 where that runs."""
    dtype = dtype or (torch.float32 if model_type in IN_FLOAT32 else torch.float64)
    torch.manual_seed(0)
    values = {**FAMILY_CONFIGS, **VARIANTS}[model_type]
    config = AutoConfig.for_model(model_type.partition(":")[0], **{**values, **overrides})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ("layers" in name or ".h." in name):
            parameter.normal_(0, 0.3)
        elif parameter.dim() == 1:
            parameter.normal_(0.2 if "norm" in name or "ln_" in name else 0.0, 0.1)
    return model.to(dtype)


def small_recipe(**overrides) -> Recipe:
    values = {"model": "small", "calibration": "bundled", "num_samples": 6, "seq_len": 32, "batch_size": 4}
    values["refine"] = "none"  # what sites are repaired to is the least-squares solution without it
    return Recipe(**{**values, **overrides})


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED / "tiny-opt")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Few steps of refinement, and few passes that are timed, where their number is left to the run."""
    with_few_steps(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def forks(monkeypatch, request):
    """Forks in place of fresh processes, which import torch for seconds, but where a test is about these."""
    if "fresh_processes" not in request.fixturenames:
        fork = partial(Fork, lambda: request.getfixturevalue("alone"))
        pipes = {name: getattr(subprocess, name) for name in ("PIPE", "DEVNULL")}
        monkeypatch.setattr("snp_llm.checkpoint.saving.subprocess", SimpleNamespace(Popen=fork, **pipes))


@pytest.fixture
def fresh_processes():
    """Leaves the processes that load saved models what they are."""


@pytest.fixture(scope="session")
def alone():
    """Runs a program's text where this package is not imported."""
    with processes() as run:
        yield run


@pytest.fixture
def quick_prunes(monkeypatch):
    """Leaves report.html and reloading out of prunes in this process."""
    without_page(monkeypatch.setattr)
    without_reloading(monkeypatch.setattr)


@pytest.fixture(scope="session")
def pruned_opt(tmp_path_factory, tokenizer) -> Path:
    """A small OPT, `dense`, and what a run made of it, `pruned`; tests that write there take a copy."""
    root = tmp_path_factory.mktemp("pruned-opt")
    dense = str(save_model(small_opt(), tokenizer, root / "dense"))
    options = "--no-eval --quiet --allocation uniform --metric error --ffn-sparsity 0.5 --num-samples 4 --seq-len 32"
    with pytest.MonkeyPatch.context() as patch:
        without_page(patch.setattr)
        without_reloading(patch.setattr)
        with_few_steps(patch.setattr)
        command = [dense, "--output", str(root / "pruned"), "--calibration", "bundled", *options.split()]
        assert prune_main(command) == 0
    return root


@pytest.fixture
def no_weights(tmp_path, tokenizer):
    """A config without weights beside a tokenizer that cannot be read: whoever reads more than the config fails."""
    folder = tmp_path / "model"
    small_opt().config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")
    (tmp_path / "text.jsonl").write_text("no JSON")
    return folder


@pytest.fixture
def opt_folder(tmp_path, tokenizer) -> Path:
    """A small random OPT on disk."""
    return save_model(small_opt(), tokenizer, tmp_path / "small-opt")


def save_model(model: PreTrainedModel, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def refused(capsys, main, *arguments) -> str:
    """The one line that a command is refused with."""
    assert main([*map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("snp-llm: error: ") and printed.err.count("\n") == 1
    return printed.err


def zeroed(dense: PreTrainedModel, pruned) -> PreTrainedModel:
    """The dense model with the units zeroed that the pruned one has lost, and its repaired weights."""
    found = copy.deepcopy(dense)
    for result in pruned.sites:
        site = result.site
        channels = torch.cat([torch.arange(u * site.unit_size, (u + 1) * site.unit_size) for u in result.kept.tolist()])
        small = projection(find_blocks(pruned.model)[site.block], site.path)
        large = projection(find_blocks(found)[site.block], site.path)
        weight = weight_of(small)
        padded = weight.shape == weight_of(large).shape
        weight_of(large).zero_()[:, channels] = weight[:, channels] if padded else weight
        if small.bias is not None:
            large.bias.copy_(small.bias)
    return found


def write_table(file: Path, folder: Path, ffn_share: float) -> None:
    """Latencies of a model's blocks in which that share of the time grows with the FFN's width, the rest with heads."""
    model = load_skeleton(str(folder))
    family = find_family(model.config)
    sites, times = find_sites(find_blocks(model), family), {}
    for site in sites:
        share = ffn_share if site.kind == "ffn" else 1 - ffn_share
        widths = sorted({1, site.units // 2, site.units})
        times[key(site)] = {width: 1 - share + share * width / site.units for width in widths}
    file.write_text(json.dumps(asdict(LatencyTable("cpu", "float32", 1, 32, len(sites) / 2 + 1, times))))


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the trained models and texts beside the checkout are not there")
    return SHARED

"""Runs on a device, as a simulation of one places them: the same units as on the CPU, wherever things wait."""

import gc
import json
import logging
import math
from contextlib import suppress
from importlib import import_module

import pytest
import torch

from snp_llm import prune
from snp_llm.checkpoint.saving import expected_logits
from snp_llm.cli.parse import prune_main, recover_main
from snp_llm.evaluate.perplexity import perplexity
from snp_llm.models.anatomy import find_anatomy, find_blocks
from snp_llm.pruning import pipeline, sensitivity
from snp_llm.pruning.estimate.estimate import decide
from snp_llm.pruning.run import resolve
from snp_llm.pruning.widths.latency import measure_table
from snp_llm.runtime import ranks
from snp_llm.runtime.device import rough_products, where_it_fits
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.storage import Storage
from tests.conftest import small_model, small_opt, small_recipe
from tests.differing import differing_model
from tests.images import CONVOLUTIONAL, image_recipe, small_classifier, small_processor
from tests.rehearsal import rehearsed

PAPER = {"ordering": "zca", "allocation": "variance", "reference": "self", "dampening": 0.01, "metric": "error"}
RUNS = {
    "default": ("opt", {}),
    "on the host": ("opt", {"hidden_device": "cpu"}),
    "on disk": ("llama", {"hidden_device": "disk"}),
    "paper": ("opt", PAPER),
    "uniform": ("llama", {"layout": "uniform", "sparsity": 0.25}),
    "padded, query heads": ("llama", {"layout": "padded", "head_unit": "query", "reference": "dense"}),
    "half precision": ("llama", {"dtype": "bfloat16"}),
}
FEW = (("default", "mps"), ("on the host", "cuda"))


def units_and_weights(model_type, tokenizer, settings, dtype=None):
    recipe = small_recipe(**{"num_samples": 12, **settings})
    model = small_model(model_type, dtype and getattr(torch, dtype))
    pruned = prune(model, tokenizer, recipe)
    return [site.kept.tolist() for site in pruned.sites], [
        p.cpu().double() for block in find_blocks(pruned.model) for p in block.parameters()
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if (name, kind) in FEW else pytest.mark.exhaustive)
        for name in RUNS
        for kind in ("cuda", "mps")
    ],
)
def test_a_device_prunes_as_the_cpu_does(name, kind, tokenizer):
    model_type, settings = RUNS[name]
    dtype = settings.get("dtype", "float32" if kind == "mps" else None)
    with rehearsed(kind) as gpu:
        units, weights = units_and_weights(model_type, tokenizer, settings | {"device": kind}, dtype)
        assert gpu.peak > 0
    expected, wanted = units_and_weights(
        model_type, tokenizer, settings | {"device": "cpu", "hidden_device": "cpu"}, dtype
    )
    assert units == expected
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-3 if dtype else 1e-4
    for one, other in zip(weights, wanted, strict=True):
        assert (one - other).norm() <= tolerance * other.norm().clamp_min(1e-12)


@pytest.mark.parametrize(
    ("kind", "pruned_as", "settings"),
    [
        ("mps", "qwen3_moe", {"experts": "whole"}),
        ("mps", "basic", {}),
        pytest.param("cuda", "qwen3_moe", {"experts": "whole", "hidden_device": "cpu"}, marks=pytest.mark.exhaustive),
        pytest.param("cuda", "qwen3_moe", {"experts": "channels"}, marks=pytest.mark.exhaustive),
        pytest.param("cuda", "vgg_bn", {"hidden_device": "cpu"}, marks=pytest.mark.exhaustive),
        pytest.param("mps", "vgg_bn", {"norm_statistics": "pass"}, marks=pytest.mark.exhaustive),
        ("cuda", "llama", {"depth": "only", "depth_score": "influence", "hidden_device": "cpu"}),
    ],
)
def test_experts_images_and_whole_blocks_go_on_a_device_as_on_the_cpu(kind, pruned_as, settings, tokenizer):
    def units(**where):
        if pruned_as in CONVOLUTIONAL:
            recipe = image_recipe(**settings | where)
            return [site.kept.tolist() for site in prune(small_classifier(pruned_as), small_processor(), recipe).sites]
        dense = differing_model(pruned_as) if "experts" in settings else small_model(pruned_as, torch.float32)
        return [site.kept.tolist() for site in prune(dense, tokenizer, small_recipe(**settings | where)).sites]

    with rehearsed(kind):
        found = units(device=kind)
    assert found == units(device="cpu", hidden_device="cpu")


@pytest.mark.usefixtures("quick_prunes")
@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_device_recovers(kind, pruned_opt, tmp_path):
    settings = ["--no-eval", "--quiet", "--tokens", "512", "--seq-len", "32", "--num-samples", "16", "--held-out", "4"]
    with rehearsed(kind):
        output = ["--output", str(tmp_path / "recovered"), "--calibration", "bundled"]
        assert recover_main([str(pruned_opt / "pruned"), "--device", kind, *output, *settings]) == 0


def test_products_are_rough_on_a_gpu_alone_and_for_a_while():
    setting = torch.backends.cuda.matmul
    assert setting.fp32_precision == "none"
    for kind, wanted in (("cuda", "tf32"), ("cpu", "none"), ("mps", "none")):
        with suppress(RuntimeError), rough_products(torch.device(kind)):
            assert setting.fp32_precision == wanted
            raise RuntimeError
        assert setting.fp32_precision == "none"


def test_sums_and_factors_are_in_float32_whatever_the_program_allows_networks(tokenizer, monkeypatch):
    settings, seen = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul), []

    def noted(compute):
        def wrapped(*args, **kwargs):
            seen.append([setting.fp32_precision for setting in settings])
            return compute(*args, **kwargs)

        return wrapped

    for place in (
        "pruning.factor.make_definite",
        "pruning.statistics.add_moments",
        "checkpoint.saving.logits_block_by_block",
    ):
        module, _, name = place.rpartition(".")
        monkeypatch.setattr(f"snp_llm.{place}", noted(getattr(import_module(f"snp_llm.{module}"), name)))
    model = small_model("opt", torch.float32)
    try:
        torch.set_float32_matmul_precision("medium")
        allowed = [setting.fp32_precision for setting in settings]
        pruned = prune(model, tokenizer, small_recipe())
        expected_logits(model, pruned.model, torch.ones(1, 8, dtype=torch.int64), torch.device("cpu"))
        assert allowed == ["tf32", "bf16"] == [setting.fp32_precision for setting in settings]
    finally:
        torch.set_float32_matmul_precision("highest")
        for setting in settings:
            setting.fp32_precision = "none"
    assert seen and all(found == ["ieee", "ieee"] for found in seen)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_latencies_are_measured_on_the_device_without_copies(kind):
    model = small_model("opt", torch.float32)
    with rehearsed(kind) as gpu:
        recipe = resolve(small_recipe(device=kind, sparsity=None, target_latency="0.9x"), model)
        table = measure_table(find_anatomy(model), recipe)
        assert table.whole > 0 and gpu.peak > 0
        moved = sum(gpu.uploads.values())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert moved < 2 * weights  # each block once, and the rest; not once a timing


def test_hidden_states_stay_where_the_estimate_leaves_room():
    model = small_model("opt", torch.float32)
    for memory, place in ((80e9, "cuda"), (1e6, "cpu")):
        with rehearsed(memory=memory):
            recipe = resolve(small_recipe(device="cuda"), model)
            assert decide(model, recipe).hidden_device == place
    assert decide(model, resolve(small_recipe(device="cpu"), model)).hidden_device == "cpu"
    asked = resolve(small_recipe(device="cpu", hidden_device="disk"), model)
    assert decide(model, asked) == asked


def test_pinned_memory_of_one_phase_does_not_stay_beside_that_of_the_next(tokenizer, monkeypatch):
    seen = []

    def noted(phase):
        def wrapped(*args):
            gc.collect()
            seen.append(gpu.pinned)
            return phase(*args)

        return wrapped

    for name in ("read_gradients", "read_curves", "measure"):
        monkeypatch.setattr(sensitivity, name, noted(getattr(sensitivity, name)))
    monkeypatch.setattr(pipeline, "prune_blocks", noted(pipeline.prune_blocks))
    model = small_model("opt", torch.float32)
    with rehearsed() as gpu:
        prune(model, tokenizer, small_recipe(device="cuda", hidden_device="cpu"))
    states = 6 * 32 * model.config.hidden_size * 4  # rounded up to a power of two
    assert seen[:3] == [0, 0, 0] and states <= seen[3] < 2 * states


def test_ranks_over_nccl_sum_on_the_device_and_hold_no_sum_twice(monkeypatch):
    sent = []

    def all_reduce(tensor):
        assert tensor.is_cuda  # NCCL knows nothing else
        sent.append(tensor.numel())
        tensor.mul_(2)

    monkeypatch.setattr(ranks, "rank_count", lambda: 2)
    monkeypatch.setattr(ranks.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(ranks.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(ranks, "PIECE", 40)
    with rehearsed() as gpu:
        here, there = torch.arange(100.0), torch.ones(10, device="cuda")
        ranks.add_up([here, there])
        assert gpu.peak <= (2 * 40 + 10) * 4
    assert torch.equal(here, 2 * torch.arange(100.0)) and bool((there == 2).all())
    assert sent == [40, 40, 20, 10]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
    ],
)
def test_what_runs_out_on_a_device_is_computed_on_the_cpu(error, caplog):
    def compute(device):
        if device.type == "cuda":
            raise error
        return device.type

    with caplog.at_level(logging.WARNING):
        assert where_it_fits("block 3: linear algebra", torch.device("cuda"), compute) == "cpu"
    assert "block 3: linear algebra: ran out of memory on cuda; computed on the CPU" in caplog.text
    with pytest.raises(RuntimeError):
        where_it_fits("it", torch.device("cpu"), lambda _device: compute(torch.device("cuda")))
    with pytest.raises(ZeroDivisionError):
        where_it_fits("it", torch.device("cuda"), lambda _device: 1 / 0)


SMALL = ("--sparsity", "0.3", "--num-samples", "8", "--seq-len", "32", "--no-eval", "--quiet")
SMALL = (*SMALL, "--calibration", "bundled", "--batch-size", "4")


@pytest.mark.usefixtures("quick_prunes")
@pytest.mark.parametrize(
    ("memory", "stretch", "enough"),
    [
        pytest.param(1e6, math.inf, True, marks=pytest.mark.exhaustive),
        pytest.param(80e9, 2e5, True, marks=pytest.mark.exhaustive),
        (80e9, 1.2e4, True),
        (1e5, math.inf, False),
        (1e4, math.inf, False),
    ],
)
def test_with_less_and_less_room_the_units_are_the_same_or_one_line_says_what_helps(
    memory, stretch, enough, capsys, tmp_path, monkeypatch, pruned_opt
):
    run = (str(pruned_opt / "dense"), *SMALL)
    monkeypatch.setattr("snp_llm.cli.prune.refuse_what_cannot_fit", lambda *_: None)  # what is left to the run itself
    with rehearsed(memory=memory, stretch=stretch):
        code = prune_main([*run, "--device", "cuda", "--output", str(tmp_path / "gpu")])
    if not enough:
        *_, said = capsys.readouterr().err.strip().splitlines()
        assert code == 2 and said.startswith("snp-llm: error: ") and "Use a smaller" in said
        return
    assert code == 0
    assert prune_main([*run, "--device", "cpu", "--output", str(tmp_path / "cpu")]) == 0
    reports = [json.loads((tmp_path / at / "prune_report.json").read_text()) for at in ("gpu", "cpu")]
    one, other = ([site["kept"] for site in report["sites"]] for report in reports)
    assert one == other


def test_sums_give_way_to_a_window_and_refinement_says_what_it_needs(tokenizer, caplog):
    """In 7 % of the memory that a run takes where there is enough."""
    dense, kept = small_opt().float(), []
    settings = {"device": "cuda", "num_samples": 8, "batch_size": 4, "sparsity": 0.3}
    for memory in (1e9, 1.2e5):
        with rehearsed(memory=memory), caplog.at_level(logging.INFO, "snp_llm"):
            pruned = prune(dense, tokenizer, small_recipe(**settings, refine="none"))
        kept.append([site.kept.tolist() for site in pruned.sites])
    assert kept[0] == kept[1] and "for a window beside sums; they go on on the CPU" in caplog.text
    with rehearsed(memory=1.2e5), pytest.raises(SnpError, match="block .: no memory left to refine .* Use --refine no"):
        prune(dense, tokenizer, small_recipe(**settings, refine=4))


def test_what_the_estimate_knows_not_to_fit_is_refused_before_the_run(capsys, tmp_path, pruned_opt):
    run = (str(pruned_opt / "dense"), *SMALL)
    with rehearsed(memory=6e6):
        assert prune_main([*run, "--device", "cuda", "--output", str(tmp_path / "gpu")]) == 2
    assert "memory of cuda: about 1" in capsys.readouterr().err


@pytest.mark.parametrize(("memory", "stretch"), [(80e9, math.inf), (1e6, math.inf), (4e5, math.inf), (80e9, 1e5)])
def test_perplexity_is_the_same_in_whatever_room(memory, stretch):
    model = small_model("opt", torch.float32)
    windows = torch.randint(2, 60, (24, 32), generator=torch.Generator().manual_seed(0))
    wanted = perplexity(model, windows, batch_size=4)
    with rehearsed(memory=memory, stretch=stretch):
        assert perplexity(model, windows, batch_size=4, device="cuda") == pytest.approx(wanted, rel=1e-6)


def test_hidden_states_wait_on_the_host_where_a_gpu_has_no_place_for_them(caplog):
    storage = Storage(torch.device("cuda"))
    with rehearsed(memory=1000), caplog.at_level(logging.INFO, "snp_llm"):
        assert storage.empty(2, 100, dtype=torch.float32).is_cuda
        assert not storage.empty(2, 200, dtype=torch.float32).is_cuda
    assert "no room on cuda for 0.0 GB of hidden states; they wait on the CPU" in caplog.text

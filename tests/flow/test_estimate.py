"""The estimate of a prune against what torch counts, and how it moves with every option."""

import pytest
import torch

from snp_llm import SnpError, prune
from snp_llm.checkpoint.skeleton import load_skeleton
from snp_llm.models.size import model_size
from snp_llm.pruning import pipeline, run
from snp_llm.pruning.estimate import estimate
from snp_llm.pruning.estimate.estimate import Estimate
from snp_llm.pruning.estimate.memory import LIBRARIES, Part
from snp_llm.pruning.estimate.refuse import refuse_what_cannot_fit
from snp_llm.pruning.widths.costs import pruned_bytes
from snp_llm.runtime.numbers import human_bytes, human_flops, human_time
from tests.conftest import save_model, small_model, small_recipe
from tests.counting import Products

GB = 10**9


def wide_model(model_type, hidden, ffn):
    size = {"hidden_size": hidden, "num_attention_heads": 6, "vocab_size": 2048}
    size |= {"ffn_dim": ffn, "word_embed_proj_dim": hidden} if model_type == "opt" else {"intermediate_size": ffn}
    return small_model(model_type, torch.float32, **size)


WAYS = {
    "default": {"num_samples": 8},
    "many windows": {"num_samples": 200},  # more than have targets
    "paper": {"num_samples": 8, "metric": "error", "reference": "self", "allocation": "variance"},
    "refined": {"num_samples": 8, "refine": 6},
}
FEW = (("opt", "default"), ("llama", "refined"))  # that leave no part of the estimate out


@pytest.mark.parametrize(
    ("model_type", "way"),
    [
        pytest.param(model_type, way, marks=() if (model_type, way) in FEW else pytest.mark.exhaustive)
        for model_type in ("opt", "llama")
        for way in WAYS
    ],
)
def test_flops_of_a_run_are_what_torch_counts(model_type, way, tokenizer):
    model = wide_model(model_type, 96, 256)
    recipe = run.resolve(small_recipe(**WAYS[way]), model)
    work = [w for w in estimate.estimate(model, recipe).work if not w.algebra]
    with Products() as products:
        prune(model, tokenizer, recipe)
    assert 0.7 < sum(w.flops for w in work) / products.flops < 1.4


PAPER = {"metric": "error", "reference": "self", "allocation": "variance", "ordering": "zca", "dampening": 0.01}


@pytest.mark.parametrize(
    ("ffn", "options"),
    [  # in float64, in float64, in float32
        (512, {}),
        pytest.param(512, PAPER, marks=pytest.mark.exhaustive),
        pytest.param(1152, {"ordering": "obs"}, marks=pytest.mark.exhaustive),
    ],
    ids=["default", "paper", "wide"],
)
def test_flops_of_a_visit_with_its_algebra_are_what_torch_counts(ffn, options, tokenizer):
    model = wide_model("llama", 192, ffn)
    recipe = run.resolve(small_recipe(num_samples=8, **options), model)
    expected = sum(w.flops for w in estimate.estimate(model, recipe).work if w.what.startswith("visit"))
    with Products(algebra=True) as counted:
        pipeline.plan(model, tokenizer, recipe)
    assert expected == pytest.approx(counted.flops, rel=0.05)


@pytest.mark.parametrize(
    "options",
    [{}, {"reference": "self"}, {"dampening": 0.1, "ordering": "obs"}, {**PAPER, "sparsity": 0.6}],
    ids=["default", "no drift", "little to choose", "nothing to choose"],
)
def test_flops_of_a_whole_run_are_what_torch_counts(options, tokenizer):
    """With equal sparsity everywhere: a site that is left whole would cost nothing, which nobody knows before."""
    model = wide_model("opt", 192, 512)
    recipe = run.resolve(small_recipe(num_samples=8, **{**options, "allocation": "uniform"}), model)
    with Products(algebra=True) as counted:
        prune(model, tokenizer, recipe)
    assert estimate.estimate(model, recipe).flops == pytest.approx(counted.flops, rel=0.1)


def of(model, **options) -> Estimate:
    return estimate.estimate(model, run.resolve(small_recipe(**options), model))


def test_what_each_option_saves():
    model = small_model("llama", torch.float32)
    plain = of(model)
    many = of(model, num_samples=600)
    assert many.peak("host") > plain.peak("host") and many.peak("disk") > plain.peak("disk")
    assert many.flops > 10 * plain.flops
    assert of(model, num_samples=600, hidden_device="disk").peak("host") < many.peak("host")
    assert of(model, num_samples=600, reference="self").peak("host") < many.peak("host")
    many = of(model, batch_size=6, seq_len=64)  # else the algebra takes more than a batch
    assert of(model, batch_size=1, seq_len=64).peak("host") < many.peak("host")
    assert of(model, allocation="uniform", metric="error").flops < plain.flops
    assert of(model.half()).peak("host") < plain.peak("host")


def test_memory_of_a_cpu_run_is_all_host_memory():
    model = small_model("llama", torch.float32)
    here, there = of(model, device="cpu"), of(model, device="cuda")
    assert here.peak("device") == 0 and here.parts("device") == []
    assert there.peak("device") > 0 and there.peak("host") - LIBRARIES < here.peak("host")  # two processes
    assert sum(part.bytes for part in there.parts("device")) == there.peak("device")
    waiting = of(model, device="cuda", hidden_device="cuda")
    assert waiting.peak("device") > there.peak("device") and waiting.peak("host") < there.peak("host")


def test_disk_holds_the_pruned_model_twice():
    model = small_model("llama", torch.float32)
    size = model_size(model, 32)
    (part,) = [p for p in of(model, sparsity=0.5, measured_cuts=0).parts("disk") if p.kind == "model"]
    assert part.bytes == 2 * (size.bytes - 4 * size.block_linear // 2)
    assert pruned_bytes(size, small_recipe(target_size="0.7x")) == round(0.7 * size.bytes)
    assert pruned_bytes(size, small_recipe(layout="padded")) == size.bytes


def test_a_skeleton_is_estimated_like_the_model(tokenizer, tmp_path):
    model = small_model("llama", torch.float32)
    save_model(model, tokenizer, tmp_path)
    for file in tmp_path.iterdir():
        if file.name != "config.json":
            file.unlink()
    skeleton = load_skeleton(str(tmp_path))
    assert all(p.is_meta for p in skeleton.parameters())
    assert of(skeleton) == of(model)


def needing(device: int = 0, host: int = 0, disk: int = 0, kind: str = "hidden") -> Estimate:
    parts = [
        Part("prune", place, kind, "something large", count)
        for place, count in (("device", device), ("host", host), ("disk", disk))
    ]
    return Estimate(tuple(part for part in parts if part.bytes), ())


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("hidden", "--hidden-device disk, or fewer --num-samples"),
        ("activations", "--batch-size"),
        ("logits", "--seq-len"),
        ("block", "--dtype bfloat16"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_option_that_helps(kind, option, tmp_path):
    with pytest.raises(SnpError, match=f"host memory: about 900 TB needed, .* free. Something large .* {option}"):
        refuse_what_cannot_fit(needing(host=900_000 * GB, kind=kind), torch.device("cpu"), tmp_path / "out")


def test_the_disk_may_be_too_small(tmp_path):
    with pytest.raises(SnpError, match=r"disk at .*: about 900 TB needed"):
        refuse_what_cannot_fit(needing(disk=900_000 * GB, kind="model"), torch.device("cpu"), tmp_path / "a/b")
    with pytest.raises(SnpError, match="use fewer --num-samples"):
        refuse_what_cannot_fit(needing(disk=900_000 * GB), torch.device("cpu"), tmp_path)


def test_what_fits_is_not_refused(tmp_path):
    refuse_what_cannot_fit(needing(host=10**6, disk=10**6), torch.device("cpu"), tmp_path)


def test_the_device_is_asked_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (8 * GB, 80 * GB))
    with pytest.raises(SnpError, match="memory of cuda: about 9 GB needed, 8 GB free"):
        refuse_what_cannot_fit(needing(device=9 * GB), torch.device("cuda"), tmp_path)


def test_numbers_for_people():
    assert [human_bytes(n) for n in (12, 999, 1234, 999_999, 1_234_567_890)] == [
        "12 B",
        "999 B",
        "1.23 kB",
        "1 MB",
        "1.23 GB",
    ]
    assert human_flops(1.5e12) == "1.5 TFLOPs"
    assert [human_time(s) for s in (3.21, 80, 600, 7200)] == ["3.2 seconds", "80 seconds", "10 minutes", "2 hours"]

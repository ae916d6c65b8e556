"""Classifiers of images through the whole flow: what stays is what least squares, padding and counting say."""

import base64
import copy
import io
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from snp_llm import checkpoint, prune
from snp_llm.checkpoint.saving import folder_bytes, save
from snp_llm.cli.parse import bench_main, evaluate_main, inspect_main, prune_main
from snp_llm.data.images import labelled_batches
from snp_llm.data.pictures import Pictures
from snp_llm.evaluate.material import form_of
from snp_llm.models.anatomy import block_prefixes, find_anatomy
from snp_llm.models.blocks import loss_gradient
from snp_llm.models.positions import layer_positions, positions
from snp_llm.models.projections import inputs_as_rows, weight_of
from snp_llm.models.segments import Segments
from snp_llm.models.site import site_bias, site_weight
from snp_llm.models.size import linear_weights, model_size
from snp_llm.models.surgery import drop_shared
from snp_llm.models.task import drawn_labels
from snp_llm.pruning.cut import cut_alike
from snp_llm.pruning.run import resolve
from snp_llm.pruning.sensitivity import SiteCurves
from snp_llm.pruning.shared import readers, shared_order
from snp_llm.pruning.widths.coupled import coupled_costs
from snp_llm.pruning.widths.plan import widths_of
from snp_llm.runtime.errors import SnpError
from tests.images import (
    CLASSES,
    CONVOLUTIONAL,
    KINDS,
    TRANSFORMER,
    image_folder,
    image_recipe,
    saved_classifier,
    small_classifier,
    small_processor,
)

UNLIKE = (("bottleneck", "compact"),)  # of the families whose blocks are told least by a stock config

exhaustive = partial(pytest.param, marks=pytest.mark.exhaustive)

PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_is_dense_with_zeros_in_its_place(kind):
    dense, processor = small_classifier(kind, torch.float64), small_processor()
    before = copy.deepcopy(dense.state_dict())
    compact = prune(dense, processor, image_recipe(dtype="float64"))
    padded = prune(dense, processor, image_recipe(dtype="float64", layout="padded"))
    logits, expected = (run.model(PIXELS.double()).logits for run in (compact, padded))
    assert (logits - expected).abs().max() < 1e-6 * expected.abs().max()
    assert model_size(compact.model, 1).parameters < model_size(dense, 1).parameters
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_no_sparsity_changes_no_bit(kind):
    dense = small_classifier(kind)
    pruned = prune(dense, small_processor(), image_recipe(sparsity=0.0, reference="self")).model
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in pruned.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        pytest.param(kind, layout, marks=() if (kind, layout) in UNLIKE else pytest.mark.exhaustive)
        for kind in KINDS
        for layout in ("compact", "uniform")
    ],
)
def test_saved_models_load_in_a_process_without_this_package(kind, layout, tmp_path):
    dense = small_classifier(kind)
    pruned = prune(dense, small_processor(), image_recipe(layout=layout))
    checkpoint.save(pruned.model, small_processor(), tmp_path)
    assert checkpoint.verify(dense, pruned.model, tmp_path, PIXELS) < 1e-6
    config = json.loads((tmp_path / "config.json").read_text())
    if layout == "uniform":
        assert config["model_type"] == ("snp_vgg" if kind.startswith("vgg") else dense.config.model_type)
    again = prune(
        checkpoint.load(str(tmp_path), "auto")[0],
        small_processor(),
        image_recipe(sparsity=0.1, layout=layout, round_to=1),
    )
    assert model_size(again.model, 1).parameters <= model_size(pruned.model, 1).parameters


def test_plain_configs_hold_fewer_heads(tmp_path):
    dense = small_classifier("deit")
    pruned = prune(dense, small_processor(), image_recipe(layout="uniform", sparsity=None, head_sparsity=0.34)).model
    assert pruned.config.num_attention_heads == 2 and pruned.config.head_dim == 8
    checkpoint.save(pruned, small_processor(), tmp_path)
    assert torch.equal(AutoModelForImageClassification.from_pretrained(tmp_path)(PIXELS).logits, pruned(PIXELS).logits)


def test_a_reader_of_shared_units_comes_to_least_squares():
    dense = small_classifier("vgg", torch.float64)
    settings = {"reference": "self", "dampening": 0.0, "metric": "error", "ordering": "obs", "allocation": "uniform"}
    run = prune(dense, small_processor(), image_recipe(dtype="float64", num_samples=64, **settings))
    (first,) = [r for r in run.sites if r.site.block == 1]
    anatomy = find_anatomy(dense)
    seen, blocks = [], anatomy.blocks
    hook = blocks[1][0].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    dense(run.calibration.tokens)
    hook.remove()
    X = inputs_as_rows(blocks[1][0], seen[0]).flatten(0, 1)
    channels = (first.kept[:, None] * 9 + torch.arange(9)).flatten()
    A = torch.cat([X[:, channels], X.new_ones(len(X), 1)], 1)
    wanted = X @ site_weight(blocks[1], first.site).T + site_bias(blocks[1], first.site)
    expected = A @ torch.linalg.lstsq(A, wanted, driver="gelsd").solution
    reader = find_anatomy(run.model).blocks[1][0]
    got = X[:, channels] @ weight_of(reader).T + reader.bias
    kept = run.sites[1].kept if run.sites[1].site.shared is not None else slice(None)  # the next cut took rows away
    torch.testing.assert_close(got, expected[:, kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bottleneck", "vgg_bn", "mixed", "all"])
def test_norms_hold_what_a_pass_over_the_images_gives(kind, monkeypatch):
    settings = {"dtype": "float64", "allocation": "uniform", "sparsity": 0.4}
    if kind == "mixed":
        monkeypatch.setattr("snp_llm.models.segments.WIDEST_PATCH", 20)
    if kind == "all":
        settings["norm_statistics"] = "pass"
    kind = {"mixed": "vgg_bn", "all": "bottleneck"}.get(kind, kind)
    run = prune(small_classifier(kind, torch.float64), small_processor(), image_recipe(**settings))
    norms = {n: m for n, m in run.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    found = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
    seen = {}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda _m, inputs, name=name: seen.update({name: inputs[0]}))
    run.model(run.calibration.tokens)
    cut = [s.site for s in run.sites if len(s.kept) < s.site.units and s.site.norm]
    prefixes = find_anatomy(run.model).blocks.prefixes
    assert cut
    anew = [f"{prefixes[site.block]}.{site.norm}" for site in cut]
    for name in norms if "norm_statistics" in settings else anew:
        mean, variance = seen[name].mean((0, 2, 3)), seen[name].var((0, 2, 3), unbiased=False)
        torch.testing.assert_close(found[name][0], mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[name][1], variance, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_costs_are_what_the_pruned_model_has(kind, tmp_path):
    dense = small_classifier(kind)
    for settings, key in (({"sparsity": 0.3}, "weights"), ({"target_params": "0.6x", "sparsity": None}, "params")):
        run = prune(dense, small_processor(), image_recipe(**settings))
        costs = coupled_costs(find_anatomy(dense), key)
        widths = [len(run.sites[numbers[0]].kept) for numbers in costs.sites]
        size = model_size(run.model, 1)
        assert costs.cost(widths) == pytest.approx(size.block_linear if key == "weights" else size.parameters)
    run = prune(dense, small_processor(), image_recipe(target_flops="0.7x", sparsity=None, round_to=1))
    share = model_size(run.model, 1).flops / model_size(dense, 1).flops
    assert 0.68 < share <= 0.7  # a unit of so small a network is a hundredth of it
    save(dense, small_processor(), tmp_path / "dense")
    limit = round(0.8 * folder_bytes(tmp_path / "dense"))
    run = prune(dense, small_processor(), image_recipe(target_size=f"{limit}B", sparsity=None, round_to=1))
    save(run.model, small_processor(), tmp_path / "small")
    assert 0.9 * limit < folder_bytes(tmp_path / "small") <= limit


@pytest.mark.parametrize("layout", ["compact", pytest.param("uniform", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", ["vgg-16", *map(exhaustive, ("resnet-50", "deit-small"))])
def test_budgets_of_flops_are_met_within_a_hundredth_of_models_of_full_size(kind, layout):
    model_type, values = {
        "resnet-50": ("resnet", {"depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]}),
        "vgg-16": ("vgg_bn", {}),
        "deit-small": ("vit", {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}),
    }[kind]
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, num_labels=1000, image_size=224, **values)
        model = AutoModelForImageClassification.from_config(config)
    for share in (0.7, 0.4):
        anatomy = find_anatomy(model)
        settings = {"sparsity": None, "target_flops": f"{share}x", "allocation": "uniform", "layout": layout}
        recipe = resolve(image_recipe(**settings), model)
        widths = widths_of(anatomy, [None] * len(anatomy.sites), recipe)
        found = pruned_flops(anatomy, widths) / model_size(model, 1).flops
        assert share - 0.01 < found <= share + 1e-9


def pruned_flops(anatomy, widths):
    """FLOPs of an image in a model whose sites keep so many units, counted in layers that have lost the others."""
    cut = find_anatomy(copy.deepcopy(anatomy.model))
    kept = {site: torch.arange(width) for site, width in zip(anatomy.sites, widths, strict=True)}
    for site, units in kept.items():
        cut_alike(cut.blocks[site.block], SimpleNamespace(site=site, kept=units))
    for index, block in enumerate(cut.blocks):
        for shared, numbers in readers(anatomy).items():
            here = [anatomy.sites[n] for n in numbers if anatomy.sites[n].block == index]
            drop_shared(block, index, shared, here, kept[anatomy.sites[numbers[0]]])
    layers = dict(cut.model.named_modules())
    for prefix, block in zip(block_prefixes(anatomy.model), cut.blocks, strict=True):
        layers.update({f"{prefix}{path}": module for path, module in block.named_modules()})
    counts = layer_positions(anatomy.model)
    heads = sum(s.unit_size * len(units) for s, units in kept.items() if s.heads is not None)
    attended = sum(4.0 * heads * positions(anatomy.model) for _ in range(positions(anatomy.model)))
    return attended + sum(2.0 * count * layers[path].weight.numel() for path, count in counts.items())


def test_readers_of_a_stream_keep_the_same_units():
    dense = small_classifier("basic", embedding_size=16)
    run = prune(dense, small_processor(), image_recipe(sparsity=0.5))
    by_name = {}
    for result in run.sites:
        if result.site.shared is not None:
            by_name.setdefault(result.site.shared.name, []).append(result.kept.tolist())
    assert set(by_name) == {"stem", "stage 2"}  # the first stage adds to the stem's channels
    assert all(kept == group[0] for group in by_name.values() for kept in group) and len(by_name["stem"]) == 4


def test_an_order_that_sites_share_is_theirs_where_they_agree():
    order, rises = torch.tensor([2, 0, 1]), torch.tensor([5.0, 1.0, 2.0])
    curve = SiteCurves(None, None, order, rises, lambda: None)
    joint, curves = shared_order([curve, curve])
    assert joint.tolist() == [2, 0, 1] and curves.tolist() == [16.0, 6.0, 4.0, 0.0]


def test_wide_channels_are_mixed_for_all_taps(monkeypatch):
    monkeypatch.setattr("snp_llm.models.segments.WIDEST_PATCH", 20)
    dense = small_classifier("vgg")
    anatomy = find_anatomy(dense)
    assert [site.taps for site in anatomy.sites] == [9, 9, 4, 0, 0]
    compact, padded = (prune(dense, small_processor(), image_recipe(layout=x)).model for x in ("compact", "padded"))
    torch.testing.assert_close(compact(PIXELS).logits, padded(PIXELS).logits, rtol=1e-4, atol=1e-5)


def test_labels_are_drawn_from_the_model_and_follow_from_the_image():
    logits = torch.tensor([[0.0, 100.0, 0.0]]).repeat(3, 1).requires_grad_()
    assert drawn_labels(logits, PIXELS) < 1e-6
    even = torch.zeros(3, 4)
    alone = [drawn_labels(even[:1], image[None]) for image in PIXELS]
    assert drawn_labels(even, PIXELS) == pytest.approx(sum(map(float, alone)))


def test_gradients_of_a_network_begin_at_its_logits():
    model = small_classifier("vgg")
    blocks = find_anatomy(model).blocks
    assert isinstance(blocks, Segments)
    logits = model(PIXELS).logits
    gradient = loss_gradient(model, blocks, PIXELS, logits)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(3), atol=1e-6, rtol=0)
    assert sum(map(linear_weights, blocks)) == model_size(model, 1).block_linear


@pytest.mark.parametrize("kind", ["bottleneck", *map(exhaustive, ("deit", "vgg_bn"))])
def test_the_commands_run_on_a_folder_of_images(kind, tmp_path, capsys):
    folder, images = saved_classifier(kind, tmp_path / "dense"), image_folder(tmp_path / "images")
    out = str(tmp_path / "out")
    arguments = [str(folder), "--output", out, "--calibration", str(images), "--num-samples", "8", "--round-to", "4"]
    assert prune_main([*arguments, "--quiet"]) == 0
    assert "top-1" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/prune_report.json").read_text())
    assert report["task"] == "images" and 0 <= report["pruned"]["top1"] <= 100
    card = (tmp_path / "out/README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "AutoImageProcessor" in card
    page = (tmp_path / "out/report.html").read_text()
    assert len(report["samples"]) == 8 and page.count("data:image/png;base64,") == 8 and "img-src data:" in page
    for sample in report["samples"]:
        drawn = Image.open(io.BytesIO(base64.b64decode(sample["picture"])))
        assert drawn.size == (16, 16) and {sample[of] for of in ("label", "dense", "pruned")} <= set(CLASSES)
    assert evaluate_main([str(folder), out, "--dataset", str(images)]) == 0
    assert "top-1" in capsys.readouterr().out
    assert inspect_main([str(folder)]) == 0
    assert prune_main([*arguments, "--quiet", "--dry-run", "--sparsity", "0.2"]) == 0
    timed = [str(folder), out, "--batch-sizes", "1", "4", "--repeats", "2", "--quiet"]
    assert bench_main([*timed, "--save", "--no-memory"]) == 0
    printed = capsys.readouterr().out
    assert "images, 4 at a time" in printed and "images a second" in printed
    cell = json.loads((tmp_path / "out/bench.json").read_text())["cells"][1]
    assert cell["dense"]["per_second"] == pytest.approx(4 / cell["dense"]["seconds"])
    assert cell["flops_ratio"] == pytest.approx(report["dense"]["size"]["flops"] / report["pruned"]["size"]["flops"])
    assert cell["bytes_ratio"] == pytest.approx(report["dense"]["size"]["bytes"] / report["pruned"]["size"]["bytes"])
    assert bench_main([*timed, "--new-tokens", "4"]) == 2
    assert "--new-tokens: expected models of texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda f, i: i.joinpath("apple/0.png").write_bytes(b"no image"), "0.png: expected an image"),
        (lambda f, i: i.joinpath("apple").rename(i / "plane"), "expected one of the model's 4 classes as a label"),
        (lambda f, i: f.joinpath("preprocessor_config.json").unlink(), "no processor in that folder"),
        (lambda f, i: small_processor(12).save_pretrained(f), "expected 3 channels of 16 x 16"),
        (lambda f, i: [file.unlink() for file in i.rglob("*.png")], "expected image files"),
    ],
)
def test_mistakes_are_said_in_one_line(break_it, said, tmp_path, capsys):
    folder, images = saved_classifier("vit", tmp_path / "dense"), image_folder(tmp_path / "images", each=2)
    break_it(folder, images)
    capsys.readouterr()
    arguments = ["--calibration", str(images), "--num-samples", "8", "--quiet", "--output", str(tmp_path / "out")]
    assert prune_main([str(folder), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.exhaustive
def test_peak_memory_of_classifiers_is_measured_in_processes_of_their_own(tmp_path, capsys):
    names = [str(saved_classifier("vgg_bn", tmp_path / name)) for name in ("one", "other")]
    assert bench_main([*names, "--batch-sizes", "2", "--repeats", "2", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert all(memory[model]["host"] > memory[model]["libraries"] > 50e6 for model in ("dense", "pruned"))


def table_of_images(file, labels, names=None, mode="RGB"):
    """A parquet file of as many images as labels; names: what the dataset calls its classes."""
    column = ClassLabel(names=names) if names else Value("int64")
    pictures = [Image.new(mode, (16, 16), 7) for _ in labels]
    rows = {"image": pictures, "label": labels}
    Dataset.from_dict(rows, Features({"image": ImageColumn(), "label": column})).to_parquet(str(file))
    return file


@pytest.mark.parametrize(
    ("labels", "more", "said"),
    [
        ([0, 7], {}, "number 1: expected one of the model's 4 classes as a label, got 7"),
        ([0, -1], {}, "expected one of the model's 4 classes as a label, got -1"),
        ([0, None], {}, "number 1: expected a label"),
        ([0, 1], {"mode": "I;16"}, "number 0: expected an image, cannot be read (its values have more than 8 bits"),
        ([0, 1], {"column": "--image-column=pixels"}, "expected a column 'pixels' of images, it has image, label"),
        ([0, 1], {"column": "--label-column=class"}, "expected a label, in a column 'class'"),
    ],
)
def test_tables_that_do_not_fit_are_refused_by_row(labels, more, said, tmp_path, capsys):
    folder = saved_classifier("vit", tmp_path / "dense")
    column = [more.pop("column")] if "column" in more else []
    table = table_of_images(tmp_path / "t.parquet", labels, **more)
    arguments = ["--calibration", "noise", "--eval-dataset", str(table), "--num-samples", "8", "--quiet", *column]
    assert prune_main([str(folder), *arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error and not (tmp_path / "out").exists()


def test_classes_go_by_their_names_where_these_are_the_models(tmp_path):
    form = form_of(small_classifier("vit").config, small_processor(), torch.float32)
    for names, expected in ((CLASSES[::-1], [3, 0]), (["a", "b", "c", "d"], [0, 3])):
        table = table_of_images(tmp_path / "t.parquet", [0, 3], list(names))
        ((_, classes),) = labelled_batches(form, Pictures(str(table)), batch_size=4)[0]
        assert classes.tolist() == expected


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_every_mode_become_what_the_model_takes(mode, tmp_path):
    table = table_of_images(tmp_path / "t.parquet", [0], mode=mode)
    for kind, channels in (("vit", 3), ("bottleneck", 1)):
        processor = small_processor()
        processor.image_mean = processor.image_std = [0.5] * channels
        form = form_of(small_classifier(kind, num_channels=channels).config, processor, torch.float32)
        ((pixels, _),) = labelled_batches(form, Pictures(str(table)), batch_size=4)[0]
        assert pixels.shape == (1, channels, 16, 16)


def test_too_few_images_are_warned_of_with_the_number_that_is_needed(caplog):
    dense = small_classifier("vgg")
    with caplog.at_level("INFO", logger="snp_llm"):
        prune(dense, small_processor(), image_recipe(num_samples=9))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "9 images are fewer than 3 of 5 sites have channels for" in warning and "needs 64" in warning
    assert any("--reference self" in r.getMessage() for r in caplog.records)
    caplog.clear()
    with caplog.at_level("WARNING", logger="snp_llm"):
        prune(dense, small_processor(), image_recipe(num_samples=64))
        prune(small_classifier("deit"), small_processor(), image_recipe(num_samples=2))
    assert not caplog.records


def test_images_have_to_be_named(tmp_path, capsys):
    folder = saved_classifier("vit", tmp_path / "dense")
    assert prune_main([str(folder)]) == 2 and "--calibration: expected images" in capsys.readouterr().err
    assert prune_main([str(folder), "--calibration", "noise"]) == 2 and "--eval-dataset" in capsys.readouterr().err


def test_grey_images_have_the_same_in_all_channels(tmp_path):
    folder, images = saved_classifier("vit", tmp_path / "dense"), image_folder(tmp_path / "images", grey=True)
    model, processor = checkpoint.load(str(folder), "auto")
    drawn = prune(model, processor, image_recipe(calibration=str(images), num_samples=4)).calibration.tokens
    assert torch.equal(drawn[:, 0], drawn[:, 2])


def test_layers_that_cannot_lose_channels_are_named():
    grouped = small_classifier("vgg")
    grouped.features[3] = nn.Conv2d(8, 12, 3, padding=1, groups=4)
    with pytest.raises(SnpError, match=r"features\.3: is a grouped convolution"):
        find_anatomy(grouped)
    bare = small_classifier("bottleneck")
    bare.resnet.embedder.embedder.normalization = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(SnpError, match="without running statistics"):
        find_anatomy(bare)
    tied = small_classifier("basic")
    layers = tied.resnet.encoder.stages[0].layers
    layers[1].layer[0].convolution.weight = layers[1].layer[1].convolution.weight
    with pytest.raises(SnpError, match="shares its weights with"):
        find_anatomy(tied)
    twice = small_classifier("vgg", layers=[8, "M", 16, 16, 16, "M"])
    twice.features[7] = twice.features[5]
    with pytest.raises(SnpError, match=r"features\.7: shares its weights with features\.5"):
        find_anatomy(twice)
    padded = small_classifier("basic")
    padded.resnet.encoder.stages[1].layers[0].shortcut = nn.ZeroPad2d(1)
    with pytest.raises(SnpError, match=r"1\.layers\.0\.shortcut: is a ZeroPad2d; .* zeros cannot lose"):
        find_anatomy(padded)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("clip", "the tower of a model of two"),
        ("siglip", "the tower of"),
        ("swin", "expected one attention in a block"),
    ],
)
def test_classifiers_of_other_builds_are_refused_in_words(model_type, said):
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(AutoConfig.for_model(model_type))
    with pytest.raises(SnpError, match=said):
        find_anatomy(model)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["compact", "uniform"])
@pytest.mark.parametrize("model_type", ["beit", "dinov2", "dinov2_with_registers", "ijepa", "vit_msn"])
def test_transformers_that_are_not_in_the_table_work_as_the_docs_say(model_type, layout, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **TRANSFORMER, mlp_ratio=2)
    dense = AutoModelForImageClassification.from_config(config).eval().requires_grad_(False)
    pruned = prune(dense, small_processor(), image_recipe(layout=layout)).model
    checkpoint.save(pruned, small_processor(), tmp_path)
    assert checkpoint.verify(dense, pruned, tmp_path, PIXELS) < 1e-6
    assert model_size(pruned, 1).parameters < model_size(dense, 1).parameters


def test_budgets_that_a_network_does_not_have_are_refused():
    dense = small_classifier("vgg")
    for settings, said in (
        ({"sparsity": None, "head_sparsity": 0.3}, "use --sparsity"),
        ({"sparsity": None, "target_latency": "0.5x"}, "Use --target-flops"),
        ({"sparsity": None, "max_perplexity_increase": "5%"}, "one of images has no perplexity"),
        ({"sparsity": 0.99}, "expected to keep at least"),
    ):
        with pytest.raises(SnpError, match=said):
            prune(dense, small_processor(), image_recipe(**settings))


def test_sites_of_a_stream_are_found_once():
    anatomy = find_anatomy(small_classifier("bottleneck"))
    assert {shared.name: len(numbers) for shared, numbers in readers(anatomy).items()} == {
        "stem": 2,
        "stage 1": 3,
        "stage 2": 1,
    }
    assert resolve(replace(image_recipe(), reference="residual"), anatomy.model).reference == "self"


@pytest.mark.parametrize("theirs", ["timm", "torchvision"])
def test_vggs_of_others_load_by_their_names(theirs, tmp_path):
    model, names = small_classifier("vgg_bn", fc_sizes=[24, 24]), {}
    for key, tensor in model.state_dict().items():
        if theirs == "timm" and key.startswith("classifier"):
            key = key.replace("classifier.0", "pre_logits.fc1").replace("classifier.3", "pre_logits.fc2")
            key = key.replace("classifier.6", "head.fc")
            tensor = tensor.unflatten(1, (16, 2, 2)) if key == "pre_logits.fc1.weight" else tensor
            tensor = tensor[..., None, None] if key == "pre_logits.fc2.weight" else tensor
        names[key] = tensor.contiguous()
    save_file(names, tmp_path / "model.safetensors")
    said = {"architecture": "vgg_bn", "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.5] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    loaded, processor = checkpoint.load(str(tmp_path), "auto")
    assert loaded.config.layers == model.config.layers and torch.equal(loaded(PIXELS).logits, model(PIXELS).logits)
    assert list(processor.image_mean) == [0.5] * 3
    assert find_anatomy(loaded).family.name == "VGG with batch norms"

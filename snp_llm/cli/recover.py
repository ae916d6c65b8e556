"""`snp-llm recover`: from a pruned folder to a recovered one and what is printed of it. Parses no arguments."""

import logging
import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from snp_llm import checkpoint
from snp_llm.checkpoint import contents, output
from snp_llm.checkpoint.contents import read_report
from snp_llm.checkpoint.journal import Journal
from snp_llm.checkpoint.skeleton import load_config
from snp_llm.cli.report import write_page
from snp_llm.data.windows import Windows
from snp_llm.evaluate.material import Evaluation, Figures, material_of
from snp_llm.evaluate.samples import Sample
from snp_llm.models.offload import fingerprint
from snp_llm.models.size import model_size
from snp_llm.models.task import task_of
from snp_llm.pruning.identity import identity
from snp_llm.pruning.run import resolve
from snp_llm.recipe.commands import Talk
from snp_llm.recipe.recipe import Recipe, ResolvedRecipe
from snp_llm.recipe.recovery import RecoverRecipe
from snp_llm.recovery.recover import Tools, budget_of, check_dense, recover, windows_wanted
from snp_llm.recovery.train import CHECKS, in_float32
from snp_llm.report import recovery as recovery_report
from snp_llm.report.card import write_card
from snp_llm.report.facts import write_report
from snp_llm.runtime import ranks
from snp_llm.runtime.device import compute_device, describe_device
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.numbers import human_bytes
from snp_llm.runtime.terminal import print_json, print_table, progress, watching

log = logging.getLogger("snp_llm")

# Settings that a recovery shares with prune, and takes from the pruned folder's report where it is not given them.
SHARED = (
    *("calibration", "calibration_split", "text_column", "image_column", "label_column", "seq_len", "bos"),
    *("eval_dataset", "eval_split"),
)


def run_recover(recipe: RecoverRecipe, command: Sequence[str], talk: Talk) -> None:
    """Load, train, save, verify, measure, print; on several ranks, rank 0 writes and prints."""
    source = Path(recipe.folder)
    report = read_report(source)
    texts, dense = material_recipe(recipe, report), dense_name(recipe, report)
    beside = os.path.normpath(recipe.folder) if source.name else os.path.abspath(recipe.folder)
    folder = Path(recipe.output or f"{beside}-recovered")
    inputs = {"the pruned model": source, "the dense model": Path(dense), "the text": Path(str(texts.calibration))}
    there = {what: path for what, path in inputs.items() if path.exists()}
    output.check_output(folder, overwrite=recipe.overwrite, inputs=there)
    check_logits_folder(recipe, {"the pruned model": source, "the output": folder})
    if recipe.train == "lora" and report["recipe"].get("layout") == "padded":
        raise SnpError(
            f"--train lora: {recipe.folder} is padded, and low-rank changes fill its zeros again; expected --train "
            "blocks, which leaves them, or a compact folder."
        )
    config = load_config(recipe.folder)
    budget_of(recipe, task_of(config).item)
    material = material_of(config)
    material.check(texts, "calibration")
    if recipe.eval:
        material.check(texts, "evaluation")
    with ranks.joined(recipe.device):
        if ranks.rank():
            log.setLevel(logging.ERROR)  # rank 0 says it for all
        options = {"overwrite": recipe.overwrite, "resume": recipe.resume, "inputs": there}
        with output.finished_folder(folder, **options) as partial:  # type: ignore[arg-type]
            made = recover_into(partial, recipe, texts, (dense, report), shlex.join(command))
        if ranks.rank() == 0:
            finish(recipe, folder, made, talk)


def check_logits_folder(recipe: RecoverRecipe, others: dict[str, Path]) -> None:
    """Raises SnpError if the dense model's logits would be kept in a folder that is something else, by what that is."""
    if recipe.dense_logits is None:
        return
    kept = Path(recipe.dense_logits).resolve()
    for what, path in others.items():
        if kept.is_relative_to(path.resolve()):
            raise SnpError(f"--dense-logits {recipe.dense_logits}: is {what}, or in it; expected a folder of its own.")


def material_recipe(recipe: RecoverRecipe, report: dict[str, Any]) -> Recipe:
    """What is trained on and measured by, as a recipe of `prune` says it."""
    before = report["recipe"]
    if not isinstance(before, dict) or not isinstance(before.get("model"), str):
        raise SnpError(f"{recipe.folder}: expected the settings of a prune in its {contents.REPORT}, got others.")
    given = {name: value for name in SHARED if (value := getattr(recipe, name)) is not None}
    for text, split in (("calibration", "calibration_split"), ("eval_dataset", "eval_split")):
        if text in given:
            given.setdefault(split, None)  # that of the report is another text's
    kept = {name: before.get(name) for name in SHARED if before.get(name) is not None}
    rest = {"model": recipe.folder, "seed": recipe.seed, "device": recipe.device, "eval": recipe.eval}
    return Recipe(**{**kept, **given, **rest})


def dense_name(recipe: RecoverRecipe, report: dict[str, Any]) -> str:
    """The dense model, as it was named or as the report names it."""
    name = recipe.dense or str(report["recipe"]["model"])
    if (
        recipe.dense is None
        and not Path(name).exists()
        and not checkpoint.is_hub_id(name)
        and name != checkpoint.TINY_OPT
    ):
        raise SnpError(
            f"--dense: expected the model that {recipe.folder} was made from; its report calls it {name}, which is not "
            "here. Say where it is."
        )
    return name


@dataclass(frozen=True)
class Loaded:
    """The pruned model as it is in its folder, and what it reads.

    Attributes:
        model: its weights in their files.
        reader: tokenizer or image processor.
        texts: settings, all of them definite.
        windows: trained on, and held out.
        held_out: how many of the last are.
        evaluation: what it is measured by, or None.
    """

    model: PreTrainedModel
    reader: Any
    texts: ResolvedRecipe
    windows: Windows
    held_out: int
    evaluation: Evaluation | None


def load_pruned(recipe: RecoverRecipe, texts: Recipe, scratch: Path) -> Loaded:
    """The pruned model and its material, checked against each other."""
    model, reader = checkpoint.load(recipe.folder, "auto", on_disk=scratch / "pruned")
    material, item = material_of(model.config), task_of(model.config).item
    resolved = resolve(texts, model, reader)
    evaluation = material.evaluation(reader, resolved, model) if recipe.eval else None
    count, held_out = windows_wanted(recipe, item, resolved.seq_len)
    drawn = material.calibration(reader, ResolvedRecipe(**{**vars(resolved), "num_samples": count}), model, held_out)
    held_out = min(held_out, max(1, len(drawn.tokens) // 4))
    if len(drawn.tokens) < 2:
        raise SnpError("--calibration: expected at least two windows, one of them to be held out; got one.")
    return Loaded(model, reader, resolved, drawn, held_out, evaluation)


def recover_into(
    partial: Path, recipe: RecoverRecipe, texts: Recipe, origin: tuple[str, dict[str, Any]], command: str
) -> dict[str, Any]:
    """Does everything between a parsed recipe and a folder that only has to get its name.

    Args:
        partial: to write into.
        recipe: settings.
        texts: what is trained on and measured by.
        origin: the dense model's name and the pruned folder's report.
        command: as it was typed.

    Returns:
        What is known of the recovery; empty but on rank 0.
    """
    dense_model, report = origin
    device, scratch = compute_device(recipe.device), partial / contents.DENSE / str(ranks.rank())
    loaded = load_pruned(recipe, texts, scratch)
    dense, _ = checkpoint.load(dense_model, "auto", on_disk=scratch / "dense")
    check_dense(dense, loaded.model, recipe)
    log.info("hashing the weights of both models")
    depends = {
        **identity(loaded.model, loaded.reader, loaded.windows, loaded.texts),
        "recovery": recipe.identity(),
        "dense model": fingerprint(dense),
    }
    journal = Journal(partial / contents.JOURNAL, recipe.save_every)
    journal.belongs_to(lambda: depends)
    taught = {"dense": depends["dense model"], "windows": loaded.windows.digest}
    precise = in_float32(recipe, device)
    trained, _ = checkpoint.load(recipe.folder, "float32" if precise or recipe.train == "blocks" else "auto")
    windows, item = (loaded.windows.tokens, loaded.held_out), task_of(loaded.model.config).item
    with progress(CHECKS + 1, "loading") as signs:
        tools = Tools(device, journal.phase("recovery"), signs.step, partial / contents.DENSE / "logits", taught)
        recovered = recover(
            trained,
            lambda: checkpoint.load(dense_model, "float32" if precise else "auto")[0],
            windows,
            recipe,
            loaded.model.dtype,
            tools,
        )
    del trained
    saved, _ = checkpoint.load(recipe.folder, "auto")
    with torch.no_grad():
        saved.load_state_dict(recovered.state, strict=False)
    figures: list[Figures] | None = None
    measured: str | None = None
    shown: list[Sample] = []
    if loaded.evaluation is not None:
        figures, measured = loaded.evaluation.measure([dense, loaded.model, saved], device, watching)
        shown = loaded.evaluation.shown([dense, saved], device)
    if ranks.rank():
        return {}
    difference = save_verified(saved, loaded, recipe.folder, partial)
    another = recovery_report.of_another(report, model_size(dense, 1).parameters, figures, measured)
    facts: dict[str, Any] = {
        "command": command,
        "dense": dense_model,
        "another": another,
        "text": loaded.windows.description,
        "sha256": loaded.windows.digest,
        "held_out": loaded.held_out,
        "device": describe_device(device),
        "figures": figures,
    }
    made = recovery_report.entry(recipe, recovered, item, facts)
    summary = recovery_report.with_recovery(report, made, figures, measured, another=another)
    summary |= {"largest_logit_difference": difference, **({"samples": shown} if shown and not another else {})}
    if measured is not None:
        summary["evaluation"] = measured
    write_down(summary, made, saved, partial)
    return {**made, "evaluation": measured, "largest_logit_difference": difference}


def save_verified(saved: PreTrainedModel, loaded: Loaded, source: str, partial: Path) -> float:
    """Writes the recovered model and compares it in a fresh process; returns the largest difference of a logit."""
    compared = material_of(saved.config).compared(loaded.windows)
    with ExitStack() as stack:
        fresh = stack.enter_context(checkpoint.fresh_process(loaded.model))
        with watching(f"saving {human_bytes(model_size(saved, 1).bytes)}"):
            checkpoint.save(saved, loaded.reader, partial, tokenizer_of=source)
        with watching("reloading in a fresh process, and comparing"):
            fresh.load(partial, compared)
            checkpoint.check_kept(loaded.model, partial)
            return checkpoint.compare(loaded.model, saved, partial, compared, fresh)


def write_down(summary: dict[str, Any], made: dict[str, Any], saved: PreTrainedModel, partial: Path) -> None:
    """Card, recipe of the pruning and report."""
    base = str(summary["recipe"]["model"])
    write_card(summary, saved.config, base if checkpoint.is_hub_id(base) else None, partial)
    recovery_report.write_section(made, partial)
    source = Path(made["recipe"]["folder"]) / contents.RECIPE
    if source.is_file():
        typed = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in made["command"])
        text = source.read_text(encoding="utf-8")
        (partial / contents.RECIPE).write_text(f"# Of the pruning. Afterwards: {typed}\n{text}", encoding="utf-8")
    written = [name for name in contents.files_in(partial) if name.split("/")[0] not in contents.UNFINISHED]
    summary["files"] = sorted({*written, contents.REPORT})
    write_report(summary, partial)


def finish(recipe: RecoverRecipe, folder: Path, made: dict[str, Any], talk: Talk) -> None:
    """The page and the closing words."""
    write_page(folder)
    if talk.json:
        print_json({"output": str(folder), **made})
        return
    print(f"{recipe.folder} -> {folder}")
    print_table(recovery_report.table(made))
    if made["evaluation"] is not None:
        print(f"measured on {made['evaluation']}")
    print(recovery_report.sentence(made))
    print(f"reloaded in a fresh process: logits differ by {made['largest_logit_difference']:.1e} of the largest")

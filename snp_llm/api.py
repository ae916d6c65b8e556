"""The Python interface: a model in memory pruned on data in memory, saved and pushed as the commands do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm import checkpoint
from snp_llm.checkpoint import hub, output
from snp_llm.cli.report import write_page
from snp_llm.data.given import ORIGIN
from snp_llm.evaluate.material import material_of
from snp_llm.models import size
from snp_llm.models.blocks import frozen
from snp_llm.models.registry import auto_class, is_own
from snp_llm.pruning import pipeline
from snp_llm.recipe.file import unknown
from snp_llm.recipe.groups import EVALUATION, ONCE
from snp_llm.recipe.recipe import Recipe
from snp_llm.report import facts
from snp_llm.report.folder import describe
from snp_llm.report.words import asked
from snp_llm.runtime.device import compute_device, hand_back, place_for_another
from snp_llm.runtime.errors import SnpError, shown
from snp_llm.runtime.signs import UNWATCHED, Signs

OF_COMMANDS = {*EVALUATION, *ONCE, "save_every"} - {"trust_remote_code"}

HINT = "Settings have names, such as sparsity=0.3."

# Wrappers of other libraries by the attribute that each is known by, and what to prune in its place.
WRAPPERS = {
    "base_model": "a PEFT model whose adapters are not merged; prune model.merge_and_unload()",
    "_orig_mod": "compiled; prune the model that torch.compile was given, then compile the pruned one",
    "module": "wrapped for training on several devices; prune model.module",
}


@dataclass(frozen=True, repr=False)
class PrunedModel(pipeline.PrunedModel):
    """A pruned model with everything that is known about it, ready to be saved.

    Attributes:
        dense: that it was made from, which `save` compares with.
    """

    dense: PreTrainedModel | None = None

    def save(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Saves the model as `snp-llm prune` does: whole or not at all, reloaded in a fresh process and compared.

        Args:
            folder: to write, with config, weights, tokenizer, report, model card and page.
            overwrite: replace an output of this program that is there.

        Returns:
            The folder.

        Raises:
            SnpError: something is there already, or what was saved is not the model.
        """
        folder = Path(folder)
        output.check_output(folder, overwrite=overwrite)
        dense, kind = self.dense or self.model, compute_device(self.recipe.device)
        with output.finished_folder(folder, overwrite=overwrite) as partial:
            checkpoint.save(self.model, self.tokenizer, partial)
            counted_as = self.recipe.seq_len, self.recipe.experts
            sizes = [size.model_size(model, *counted_as) for model in (dense, self.model)]
            hand_back(kind)
            compared = material_of(dense.config).compared(self.calibration)
            on = place_for_another(kind, sizes[1].bytes)
            difference = checkpoint.verify(dense, self.model, partial, compared, on, self.gone)
            written = (sizes[0].bytes, checkpoint.folder_bytes(partial))
            before, after = (facts.Measured(s, disk) for s, disk in zip(sizes, written, strict=True))
            base = self.recipe.model if checkpoint.is_hub_id(self.recipe.model) else None
            describe(partial, self, (before, after), {"largest_logit_difference": difference}, base)
        write_page(folder)
        return folder

    def push(self, folder: Path | str, repo_id: str, *, private: bool = False) -> str:
        """Uploads a folder that `save` wrote to the Hugging Face Hub, in one commit.

        Args:
            folder: from `save`.
            repo_id: user/name; made if it does not exist.
            private: only its owners may see it.

        Returns:
            The repository's address.
        """
        return hub.push(Path(folder), repo_id, private=private)

    def __repr__(self) -> str:
        kept = dict.fromkeys(result.site.unit for result in self.sites)
        for unit in kept:
            sites = [result for result in self.sites if result.site.unit == unit]
            kept[unit] = f"{sum(len(s.kept) for s in sites):,} of {sum(s.site.units for s in sites):,} {unit}"
        what = f"{type(self.model).__name__}, {asked(self.recipe.as_dict(), 'sparsity {:g}'.format)} asked for"
        return f"PrunedModel({what}; kept {', '.join(map(str, kept.values()))})"


def prune(
    model: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | Any = None,
    recipe: Recipe | None = None,
    *,
    data: Any = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    measure: Callable[[PreTrainedModel], float] | None = None,
    on_progress: Callable[[int, int | None, str], None] | None = None,
    **settings: Any,
) -> PrunedModel:
    """Remove units from every site of a model and repair what reads them by least squares.

        pruned = prune(model, tokenizer, data=["a text", "another", ...], sparsity=0.3)
        pruned.model.generate(...)
        pruned.save("smaller")

    Args:
        model: dense, in memory, of any device; left as it was. Or a name as `snp-llm prune` takes it.
        tokenizer: the model's; or the image processor, for models of images. With a name it may be left out.
        recipe: settings to start from; its model is not read.
        data: what to calibrate on: token ids, (windows, T) or (tokens,); an iterable of texts, of conversations
            (`[{"role": ..., "content": ...}, ...]`), or of records with a column `text`, `messages` or `input_ids` (a
            `datasets.Dataset`, a `DataLoader`); for models of images pixels, Pillow's images, files or records of
            them. A text is the name of a dataset. None: what `calibration` says, WikiText-2 if nothing does.
        loss: of a window, whose gradients weigh what a cut may spoil, in place of the negative log-likelihood: from
            logits, (1, T, vocabulary), and token ids, (1, T), or (1, classes) and pixels, to a tensor of one number;
            summed over tokens, not averaged, for predictions to be of its size.
        measure: with `max_perplexity_increase`: figure of a model, smaller is better, of which that is the permitted
            rise; None: perplexity on held-out calibration text.
        on_progress: called after every step, and when something begins that is none, with how many are done, how many
            there are (None where a search decides), and a line about it.
        settings: those of `Recipe`, such as `sparsity`, `layout`, `num_samples`, `seq_len`, `device`.

    Returns:
        The pruned model, in the type of the dense one, and everything that is known about it.

    Raises:
        SnpError: a setting that there is not or that cannot be; a model that cannot be pruned, or that is quantised or
            wrapped; data that is none; numerical failure, with the block's name.
    """
    for name in settings:
        if name in OF_COMMANDS:
            raise SnpError(f"prune: {name}: is a setting of the command; here a model is saved by .save(folder).")
        if name not in {field.name for field in fields(Recipe)}:
            raise SnpError(f"prune: {unknown(name)}")
    if not isinstance(recipe, Recipe | None):
        raise SnpError(f"prune: recipe: expected a Recipe, got {recipe!r}. {HINT}")
    name = model if isinstance(model, str) else str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    if isinstance(data, str) and not data.isprintable():
        raise SnpError(
            f"data: expected a list of texts, or a dataset's name, got one text, {shown(data)}. Pass [text]."
        )
    if isinstance(data, str | Path):
        settings, data = {**settings, "calibration": str(data)}, None
    elif data is not None:
        settings["calibration"] = ORIGIN
    if isinstance(data, Tensor) and data.dim() == 2 and not data.is_floating_point():
        settings.setdefault("seq_len", data.shape[1])
    settings["model"] = name or type(model).__name__
    chosen = Recipe(**settings) if recipe is None else replace(recipe, **settings)
    if isinstance(model, str):
        model, found = checkpoint.load(model, chosen.dtype, trust_remote_code=chosen.trust_remote_code)
        tokenizer = tokenizer or found
    check_in_memory(model, tokenizer)
    if chosen.dtype not in ("auto", kind := str(model.dtype).removeprefix("torch.")):
        raise SnpError(f"prune: dtype: expected {kind}, in which the model is, got {chosen.dtype}. Convert it first.")
    if loss is not None:
        if not chosen.needs_gradients:
            raise SnpError("loss: expected allocation='loss', or metric='loss', which alone ask for its gradients.")
        chosen = replace(chosen, measured_cuts=0)  # which are measured by the divergence of logits, whatever the loss
    signs = UNWATCHED if on_progress is None else counted(on_progress)
    with at_rest(model):
        result = pipeline.prune(model, tokenizer, chosen, given=pipeline.Given(data, measure, loss), signs=signs)
    result.model.config._name_or_path = ""  # pruned again, it is not the model that the dense one was loaded from
    return PrunedModel(**vars(result), dense=model)


def counted(tell: Callable[[int, int | None, str], None]) -> Signs:
    """Signs that tell how many steps are done, and how many there are."""
    done, total = 0, None

    def step(line: str) -> None:
        nonlocal done
        done += 1
        tell(done, total, line)

    def expect(count: int) -> None:
        nonlocal total
        total = count

    return Signs(step, begin=lambda line: tell(done, total, line), expect=expect)


def check_in_memory(model: Any, tokenizer: Any) -> None:
    """Raises SnpError for what is no plain model of transformers with its tokenizer."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        inside = {*getattr(model, "__dict__", {}), *getattr(model, "_modules", {})}
        what = next((what for attribute, what in WRAPPERS.items() if attribute in inside), "no model of transformers")
        raise SnpError(f"prune: {kind} is {what}.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise SnpError(
            f"prune: {kind} has adapters loaded; merge them with PEFT, or remove them with delete_adapter()."
        )
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None):
        raise SnpError(
            f"prune: {kind} is quantised; prune it before that, or what model.dequantize() gives, and quantise the "
            "pruned one."
        )
    known = auto_class(model.config)._model_mapping.get(type(model.config), None) if is_own(type(model)) else None
    whole = known if isinstance(known, tuple) else (known or type(model),)
    if not isinstance(model, whole):
        names = " or ".join(one.__name__ for one in whole)
        raise SnpError(
            f"prune: {kind}: expected {names}, whose logits say what a cut costs; got a body alone, or with another "
            "head. Prune the whole model; bodies with other heads load from what .save(folder) writes, to be trained."
        )
    parts = [part for part in model.modules() if not hasattr(part, "_hf_hook")]  # which fetches weights from disk
    if any(parameter.is_meta for part in parts for parameter in part.parameters(recurse=False)):
        raise SnpError(f"prune: {kind} has weights on the meta device, which hold nothing; load them first.")
    if not callable(tokenizer):
        raise SnpError(f"prune: expected the tokenizer of {kind}, or its image processor, got {tokenizer!r}. {HINT}")


@contextmanager
def at_rest(model: PreTrainedModel) -> Iterator[None]:
    """Keeps a model from training meanwhile: no dropout, no gradients of parameters."""
    modes = {module: module.training for module in model.modules()}
    try:
        with frozen(model.eval()):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode

"""`snp-llm export`: a folder into a file of another engine, compared with the model there. Parses no arguments."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from snp_llm import checkpoint
from snp_llm.checkpoint import output
from snp_llm.checkpoint.readers import reader_for
from snp_llm.checkpoint.tokenizer import carry_over
from snp_llm.engines import gguf, llama_cpp, onnx
from snp_llm.engines.extras import is_there
from snp_llm.models.task import TEXT, task_of
from snp_llm.recipe.commands import ExportRecipe, Talk
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.terminal import print_json

log = logging.getLogger("snp_llm")

# Largest difference over the largest logit, by the type of the weights in the file.
TOLERANCES = {"f32": 1e-3, "f16": 1e-2, "bf16": 5e-2}


def run_export(recipe: ExportRecipe, talk: Talk) -> None:
    """Writes the file, reads it back, runs it where the engine is installed, and says what came out."""
    model, reader = checkpoint.load(recipe.folder, "float32", trust_remote_code=recipe.trust_remote_code)
    model.eval()
    result = TO[recipe.to](recipe, model, reader)
    if talk.json:
        print_json(result)
        return
    print(f"{recipe.folder} -> {result['output']}: {result['bytes'] / 1e6:,.1f} MB, {result['what']}")
    if result["difference"] is None:
        print(f"not run: {result['engine']} is not installed")
    else:
        print(f"run in {result['engine']}: differs by {result['difference']:.1e} of the largest logit")


def to_gguf(recipe: ExportRecipe, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """A GGUF file, whole or not at all."""
    if task_of(model.config) is not TEXT:
        raise SnpError("--to gguf: expected a model of texts; llama.cpp has no classifiers of images. Use --to onnx.")
    file = Path(recipe.output or f"{recipe.folder.rstrip('/')}.gguf")
    if file.exists() and not recipe.overwrite:
        raise SnpError(f"{file}: is there already. Choose another --output, or use --overwrite.")
    if not file.absolute().parent.is_dir():
        raise SnpError(f"{file}: expected a folder to write it into, there is none.")
    gguf.check_expressible(model)
    with tempfile.TemporaryDirectory(dir=file.absolute().parent, prefix=f".{file.name}-") as scratch:
        partial = Path(scratch) / file.name
        gguf.write_gguf(model, Path(checkpoint.find_model(recipe.folder)), partial, recipe.dtype)
        if faults := gguf.differences(model, partial, recipe.dtype):
            raise SnpError(f"--to gguf: the file is not the model: {faults[0]}. Please report it with the config.json.")
        engine, apart = "llama.cpp (pip install xllamacpp)", None
        if is_there(llama_cpp.PACKAGE):
            engine, apart = "llama.cpp", llama_cpp.difference(model, tokenizer, partial)
            check_close(apart, recipe.dtype, engine)
        os.replace(partial, file)
    what = f"architecture {gguf.architecture(model)}, {recipe.dtype}"
    return {"output": str(file), "bytes": file.stat().st_size, "what": what, "engine": engine, "difference": apart}


def to_onnx(recipe: ExportRecipe, model: PreTrainedModel, reader: Any) -> dict[str, Any]:
    """A folder with an ONNX graph, config and what makes its inputs, whole or not at all."""
    if recipe.dtype != "f32":
        raise SnpError(f"--dtype {recipe.dtype}: ONNX graphs are written in f32. Quantise the file with onnxruntime.")
    if recipe.with_cache and task_of(model.config) is not TEXT:
        raise SnpError("--with-cache: expected a model of texts, which goes on from what it has read.")
    folder = Path(recipe.output or f"{recipe.folder.rstrip('/')}-onnx")
    if folder.exists():
        raise SnpError(f"{folder}: is there already. Choose another --output, or remove it.")
    source = checkpoint.find_model(recipe.folder)
    with output.finished_folder(folder, overwrite=False) as partial:
        onnx.write_onnx(model, partial, cache=recipe.with_cache)
        engine, apart = "onnxruntime", None
        if is_there(engine):
            apart = onnx.difference(model, partial)
            check_close(apart, recipe.dtype, engine)
        model.config.save_pretrained(partial)
        carry_over(reader_for(model.config).files(source, reader), partial)
    size = sum(file.stat().st_size for file in folder.glob(f"{onnx.FILE}*"))
    what = f"{onnx.input_name(model)} to logits{', with a cache' if recipe.with_cache else ''}"
    return {"output": str(folder), "bytes": size, "what": what, "engine": engine, "difference": apart}


def check_close(apart: float, dtype: str, engine: str) -> None:
    """Raises SnpError where an engine says something else than torch."""
    if not apart <= TOLERANCES[dtype]:
        raise SnpError(
            f"{engine} computes something else: logits differ by {apart:.1e} of the largest, expected at most "
            f"{TOLERANCES[dtype]:.0e}. Nothing was written."
        )


TO = {"gguf": to_gguf, "onnx": to_onnx}

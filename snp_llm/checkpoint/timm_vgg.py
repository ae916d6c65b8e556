"""VGGs of timm and torchvision, read from safetensors by a map of names. Imports neither of them."""

import json
import tempfile
from atexit import register
from functools import cache
from pathlib import Path
from shutil import rmtree
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.hub import cached_file

from snp_llm.models.modeling_snp_vgg import VggBnConfig, VggConfig
from snp_llm.runtime.errors import SnpError

OURS = {"pre_logits.fc1.": "classifier.0.", "pre_logits.fc2.": "classifier.3.", "head.fc.": "classifier.6."}

WEIGHTS = "model.safetensors"


@cache
def converted(name: str) -> str | None:
    """A folder in the Hugging Face format of a VGG that timm's hub or a local folder holds in timm's; else None.

    It lasts as long as the process does.

    Args:
        name: hub id, or local folder.

    Raises:
        SnpError: it lacks tensors that a VGG has.
    """
    folder = Path(name)
    if not folder.is_dir() and not name.startswith("timm/vgg"):
        return None
    config = _file(name, "config.json")
    values = {} if config is None else json.loads(config.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or not str(values.get("architecture")).startswith("vgg"):
        return None
    weights = _file(name, WEIGHTS)
    if weights is None:
        raise SnpError(f"model {name}: no {WEIGHTS} in it; expected a VGG of timm with its weights in safetensors.")
    tensors = {ours(key): tensor for key, tensor in load_file(weights).items()}
    tensors = {key: t.flatten(1) if key.startswith("classifier") and t.dim() > 2 else t for key, t in tensors.items()}
    work = tempfile.mkdtemp(prefix="snp-vgg-")
    register(rmtree, work, ignore_errors=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, f"{work}/{WEIGHTS}", {"format": "pt"})
    shape = vgg_shape(name, tensors)
    kind = VggBnConfig if shape["batch_norm"] else VggConfig
    kind(**shape, architectures=["SnpVggForImageClassification"]).save_pretrained(work)
    (Path(work) / "preprocessor_config.json").write_text(json.dumps(processor_values(values)), encoding="utf-8")
    return work


def ours(key: str) -> str:
    """The name here of one of timm's tensors; torchvision's are the same."""
    return next((key.replace(theirs, own) for theirs, own in OURS.items() if key.startswith(theirs)), key)


def vgg_shape(name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What a VGG's config says of its layers, from its tensors: between two blocks of layers there is a pooling.

    Raises:
        SnpError: no such layers.
    """
    convolutions = sorted(int(k.split(".")[1]) for k, t in tensors.items() if k.startswith("features") and t.dim() == 4)
    linear = sorted(int(k.split(".")[1]) for k, t in tensors.items() if k.startswith("classifier") and t.dim() == 2)
    if not convolutions or not linear:
        raise SnpError(f"model {name}: expected features.* and classifier.*, or timm's names of a VGG; it has others.")
    norms = any(key.endswith("running_mean") for key in tensors)
    layers: list[int | str] = []
    for at, after in zip(convolutions, [*convolutions[1:], None], strict=True):
        layers.append(len(tensors[f"features.{at}.weight"]))
        if after is None or after - at > (3 if norms else 2):
            layers.append("M")
    last = next(width for width in reversed(layers) if isinstance(width, int))
    return {
        "layers": layers,
        "batch_norm": norms,
        "num_channels": tensors[f"features.{convolutions[0]}.weight"].shape[1],
        "fc_sizes": [len(tensors[f"classifier.{at}.weight"]) for at in linear[:-1]],
        "pool_size": round((tensors[f"classifier.{linear[0]}.weight"].shape[1] / last) ** 0.5),
        "num_labels": len(tensors[f"classifier.{linear[-1]}.weight"]),
    }


def processor_values(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers' processor has to know of what timm's config says of images."""
    said = config.get("pretrained_cfg") or {}
    return {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": (said.get("input_size") or [3, 224, 224])[-1]},
        "crop_pct": said.get("crop_pct") or 0.875,
        "resample": 2 if said.get("interpolation", "bilinear") == "bilinear" else 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(said.get("mean") or [0.485, 0.456, 0.406]),
        "image_std": list(said.get("std") or [0.229, 0.224, 0.225]),
    }


def _file(name: str, file: str) -> Path | None:
    if Path(name).is_dir():
        found = Path(name) / file
        return found if found.is_file() else None
    cached = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if cached is None else Path(cached)

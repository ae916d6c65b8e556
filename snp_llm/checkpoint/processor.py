"""Image processors: found beside a model, loaded, carried over to the pruned one. Knows no images."""

import hashlib
from typing import Any

from transformers import AutoImageProcessor, PretrainedConfig, PreTrainedModel

from snp_llm.checkpoint.tokenizer import find_processor_files
from snp_llm.runtime.errors import SnpError, reason

NAME = "preprocessor_config.json"


def load_processor(name: str, path: str, model: PreTrainedModel, *, trust_remote_code: bool) -> Any:
    """The image processor beside a model.

    Args:
        name: of the model, as it was given.
        path: where transformers finds it.
        model: that the processor is of.
        trust_remote_code: whether code in its repository may run.

    Raises:
        SnpError: there is none, it cannot be loaded, or there is nothing here that decodes images.
    """
    channels = getattr(model.config, "num_channels", 3)
    if channels not in (1, 3):
        raise SnpError(f"model {name}: expected 1 or 3 channels of an image (num_channels), got {channels}.")
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise SnpError(
            f"model {name}: classifies images, which Pillow decodes; expected it. pip install 'snp-llm[vision]'."
        ) from error
    if not find_processor_files(path):
        raise SnpError(
            f"processor of {name}: there is none; expected {NAME} beside the weights. Copy it from the model that this "
            "one was made from."
        )
    try:
        processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and the hub client raise dozens of kinds
        raise SnpError(f"processor of {name}: cannot be loaded. {reason(error)}") from error
    note_size(model.config, path)
    return processor


def note_size(config: PretrainedConfig, path: str) -> None:
    """Says in a config how large images are that a processor makes, where the config leaves it open.

    A convolutional network takes any size; what it costs at that of its images has to be known.
    """
    if getattr(config, "image_size", None) is not None or not find_processor_files(path):
        return
    try:
        from PIL import Image

        blank = Image.new("RGB" if getattr(config, "num_channels", 3) == 3 else "L", (256, 256))
        pixels = AutoImageProcessor.from_pretrained(path)(images=[blank], return_tensors="pt")["pixel_values"]
    except Exception:  # what is wrong is said where it is loaded
        return
    config.image_size = [*pixels.shape[2:]]


def processor_sum(processor: Any) -> str:
    """SHA-256 of what a processor does."""
    return hashlib.sha256(processor.to_json_string().encode()).hexdigest()

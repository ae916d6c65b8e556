"""At how many positions of an image each layer of a model is computed. Runs shapes alone."""

import json
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from snp_llm.models.projections import Projection, outputs_as_rows
from snp_llm.models.registry import auto_class
from snp_llm.models.segments import Segments
from snp_llm.models.site import Site
from snp_llm.models.task import image_shape


def positions(model: PreTrainedModel) -> int:
    """Positions of an image where most sites are last: tokens of a transformer, those of the last feature map."""
    counts = [count for count in layer_positions(model).values() if count > 1]
    return counts[-1] if counts else 2


def site_positions(model: PreTrainedModel, blocks: Segments, site: Site) -> int:
    """Positions of one image at which a site of a convolutional network is read."""
    found = layer_positions(model).get(blocks.named(site.block, site.consumers[0]), 1)
    return max(found, site.taps if found == 1 else 1)


def layer_positions(model: PreTrainedModel) -> dict[str, int]:
    """Positions of one image at each linear layer and convolution, by path, in the order in which they are run."""
    return dict(_layer_positions(model.config.to_json_string(use_diff=False)))


@lru_cache(maxsize=16)
def _layer_positions(config_text: str) -> tuple[tuple[str, int], ...]:
    values = {**json.loads(config_text), "dtype": "float32"}
    config: PretrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
    found: list[tuple[str, int]] = []

    def note(path: str, module: nn.Module, _inputs: object, output: Tensor) -> None:
        found.append((path, outputs_as_rows(module, output).shape[1:-1].numel()))  # type: ignore[arg-type]

    with torch.device("meta"), torch.no_grad():
        model = auto_class(config).from_config(config).eval()
        for path, module in model.named_modules():
            if isinstance(module, Projection):
                module.register_forward_hook(partial(note, path))
        model(torch.zeros(1, *image_shape(config)))
    return tuple(found)

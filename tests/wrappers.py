"""Small models that read images beside text: a config of every type, and inputs with an image in them."""

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from snp_llm.models.registry import auto_class
from tests.families import OWN_EMBEDDINGS, SHARED_KEYS

IMAGE = 2000  # the token that an image's features take the place of
TINY = {"vocab_size": 2048, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "max_position_embeddings": 64}
TEXT = {
    **TINY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 64,
    "head_dim": 8,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
LOCAL = {"sliding_window": 8, "query_pre_attn_scalar": 24, "layer_types": ["sliding_attention", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
GRIDS = {"depth": 2, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
MARKS = {"image_token_id": IMAGE, "video_token_id": 2001, "vision_start_token_id": 2002, "vision_end_token_id": 2003}
LLAMA, CLIP, SIGLIP = (
    {**TEXT, "model_type": "llama"},
    {**TOWER, "model_type": "clip_vision_model", "projection_dim": 32},
    {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
)

# By type: its config, and how many image tokens an image of 28 x 28 takes.
WRAPPERS: dict[str, tuple[dict, int]] = {
    "gemma3": (
        {"text_config": {**TEXT, **LOCAL}, "vision_config": TOWER, "mm_tokens_per_image": 4, "image_token_id": IMAGE},
        4,
    ),
    "llava": ({"text_config": LLAMA, "vision_config": CLIP, "image_token_id": IMAGE}, 4),
    "llava_next": (
        {
            "text_config": {**TEXT, "model_type": "mistral"},
            "vision_config": CLIP,
            "image_token_id": IMAGE,
            "image_grid_pinpoints": [[28, 28]],
        },
        10,
    ),
    "llava_onevision": (
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": SIGLIP,
            "image_token_id": IMAGE,
            "video_token_id": 2001,
            "image_grid_pinpoints": [[28, 28]],
            "vision_feature_layer": -1,
        },
        10,
    ),
    "qwen2_5_vl": (
        {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": {
                **GRIDS,
                "hidden_size": 32,
                "intermediate_size": 48,
                "out_hidden_size": 48,
                "window_size": 28,
                "fullatt_block_indexes": [1],
            },
            **MARKS,
        },
        4,
    ),
    "qwen3_vl": (
        {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": {
                **GRIDS,
                "hidden_size": 32,
                "intermediate_size": 48,
                "out_hidden_size": 48,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **MARKS,
        },
        4,
    ),
    "qwen3_5": (
        {
            "text_config": {
                **TEXT,
                "head_dim": 16,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
            },
            "vision_config": {
                **GRIDS,
                "hidden_size": 32,
                "intermediate_size": 48,
                "out_hidden_size": 48,
                "num_position_embeddings": 16,
            },
            **MARKS,
        },
        4,
    ),
    "mistral3": (
        {
            "text_config": {**TEXT, "model_type": "mistral"},
            "vision_config": {**TOWER, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": IMAGE,
            "spatial_merge_size": 1,
        },
        4,
    ),
    "idefics3": (
        {"text_config": LLAMA, "vision_config": TOWER, "image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": 1},
        1,
    ),
    "smolvlm": (
        {"text_config": LLAMA, "vision_config": TOWER, "image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": 1},
        1,
    ),
    "internvl": (
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
            "image_token_id": IMAGE,
        },
        1,
    ),
    "paligemma": (
        {
            "text_config": {**TEXT, "model_type": "gemma"},
            "vision_config": {**SIGLIP, "projection_dim": 48},
            "projection_dim": 48,
            "image_token_index": IMAGE,
        },
        4,
    ),
    "aya_vision": (
        {
            "text_config": {**TEXT, "model_type": "cohere2", "sliding_window": 8},
            "vision_config": SIGLIP,
            "image_token_index": IMAGE,
        },
        1,
    ),
    # Its class has no sdpa, its text model has.
    "got_ocr2": (
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {
                **TOWER,
                "output_channels": 16,
                "window_size": 2,
                "global_attn_indexes": [1],
                "mlp_dim": 48,
            },
            "image_token_id": IMAGE,
        },
        1,
    ),
    "vipllava": (
        {
            "text_config": LLAMA,
            "vision_config": CLIP,
            "image_token_index": IMAGE,
            "vision_feature_layers": [-1, -2],
        },
        4,
    ),
    "gemma4": (
        {
            "text_config": {**TEXT, **LOCAL, **OWN_EMBEDDINGS, **SHARED_KEYS, "global_head_dim": 16},
            "vision_config": {
                **TOWER,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "pooling_kernel_size": 2,
                "position_embedding_size": 8,
            },
            "image_token_id": IMAGE,
        },
        1,
    ),
    # Its tower is one of timm's.
    "gemma3n": (
        {
            "text_config": {**TEXT, **LOCAL, **OWN_EMBEDDINGS, **SHARED_KEYS, "laurel_rank": 4, "altup_num_inputs": 3},
            "vision_config": {
                "architecture": "test_mambaout",
                "hidden_size": 64,
                "vocab_size": 8,
                "vocab_offset": 2004,
            },
            "audio_config": {
                "hidden_size": 32,
                "vocab_size": 8,
                "vocab_offset": 2012,
                "conf_num_attention_heads": 4,
                "conf_num_hidden_layers": 1,
                "sscp_conv_channel_size": [8, 8],
            },
            "image_token_id": IMAGE,
            "audio_token_id": 2001,
            "vision_soft_tokens_per_image": 1,
        },
        1,
    ),
    "llama4": (
        {
            "text_config": {
                **TEXT,
                "intermediate_size_mlp": 80,
                "num_local_experts": 4,
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 8,
                "no_rope_layers": [1, 0],
                "layer_types": ["chunked_attention", "full_attention"],
            },
            "vision_config": {
                **TOWER,
                "intermediate_size": 128,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
            "image_token_index": IMAGE,
        },
        1,
    ),
}
# transformers 5.24 wants outputs of images of Llama 4's text model, which has none: it runs no such model as it is.
if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
    MoeCausalLMOutputWithPast.image_outputs = None
NEED = {"gemma3n": "timm"}  # a package
COMPACT = ("gemma3n",)  # no plain config holds other widths of them
GRID_TYPES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")  # they take patches, and the grid that these are in


def small_wrapper(model_type: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a type whose text blocks matter as much as its embeddings."""
    if model_type in NEED:
        pytest.importorskip(NEED[model_type])
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **WRAPPERS[model_type][0])
    model = auto_class(config).from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(0.2 if "norm" in name else 0.0, 0.1)
        else:  # towers and projectors too, some of which start with zeros
            parameter.normal_(0, 0.3 if "layers" in name or "embed" not in name else 0.1)
    return model


def with_image(model_type: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Arguments of a forward pass over a text with an image in it."""
    draw = torch.Generator().manual_seed(0)
    text, image = torch.randint(3, 1900, (1, 12), generator=draw), torch.full((1, WRAPPERS[model_type][1]), IMAGE)
    around = {} if model_type not in GRID_TYPES else {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    tokens = torch.cat([text[:, :4], image, text[:, 4:]], 1)
    pixels = torch.randn(1, 3, 28, 28, generator=draw, dtype=torch.float64).to(dtype)
    if model_type in GRID_TYPES:
        pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=draw, dtype=torch.float64).to(dtype)
        around["mm_token_type_ids"] = (tokens == IMAGE).int()
    if model_type == "gemma4":
        pixels = torch.randn(1, 4, 3 * 14 * 14, generator=draw, dtype=torch.float64).to(dtype)
        around["image_position_ids"] = torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]])
    if model_type in ("idefics3", "smolvlm"):
        pixels = pixels[:, None]
    if model_type in ("llava_next", "llava_onevision"):
        pixels, around["image_sizes"] = torch.stack([pixels, pixels], 1), torch.tensor([[28, 28]])
    if model_type == "mistral3":
        around["image_sizes"] = torch.tensor([[28, 28]])
    if model_type in ("gemma3", "paligemma"):
        around["token_type_ids"] = (tokens == IMAGE).int()
    return {"input_ids": tokens, "pixel_values": pixels, **around}

"""What the JSON files of a saved model say, so that transformers 4 and 5 read the same in them. Opens no files."""

import math
from typing import Any

# Keys of the base and of the rotated share of a head in transformers 4, where they are not the usual ones.
ROPE_KEYS = {"gpt_neox": ("rotary_emb_base", "rotary_pct"), "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct")}

# Families whose `rope_scaling` there holds a `type`, these keys and no others.
SCALING_KEYS = {"phi3": {"short_factor", "long_factor"}, "olmo2": {"factor"}}


def config_for_both(config: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` of transformers 5 with what transformers 4 reads instead of `rope_parameters` and `dtype`.

    Transformers 4 takes the rotary base from `rope_theta` and the scaling from `rope_scaling`; where only
    `rope_parameters` stands, it silently takes its defaults. Transformers 5 prefers `rope_parameters`, but for
    `rope_scaling`, which therefore says the same.

    Args:
        config: as transformers 5 wrote it; left as it is.

    Returns:
        The config with more keys. What transformers 5 makes of it differs at most in keys that repeat others.
    """
    family = str(config.get("model_type", "")).removeprefix("snp_")
    if isinstance(text := config.get("text_config"), dict):  # where 4 reads whether the head is tied, and 5 does not
        tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
        config = {**config, "text_config": {**config_for_both(text), **tied}}
    more: dict[str, Any] = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope and family != "gemma3_text":
        return {**config, **more}  # 4 does not know the family, and 5 would take `rope_scaling` for all kinds of layer
    if "full_attention" in rope:  # Gemma 3: one for every kind of layer, of which the local kind is never scaled in 4
        local = rope.get("sliding_attention") or {}
        scaled = local.get("rope_type", "default") != "default"
        more["rope_local_base_freq"] = (
            None if scaled else local.get("rope_theta")
        )  # null makes 4 fail, and not compute wrong
        rope = rope["full_attention"]
    base, share = ROPE_KEYS.get(family, ("rope_theta", "partial_rotary_factor"))
    if "rope_theta" in rope:
        more[base] = rope["rope_theta"]
    if "partial_rotary_factor" in rope and (family, rope["partial_rotary_factor"]) != ("phi3", 1.0):  # 5 would keep it
        more[share] = rope["partial_rotary_factor"]
    if "mrope_section" in rope:  # of Qwen's VL
        more["rope_scaling"] = rope
    elif rope.get("rope_type", "default") != "default":
        more |= _scaling(family, rope, config.get("max_position_embeddings"))
    return {**config, **more}


def tokenizer_for_both(config: dict[str, Any]) -> dict[str, Any]:
    """A `tokenizer_config.json` of transformers 5 with names that transformers 4 knows as well.

    The class that 5 calls `TokenizersBackend` is `PreTrainedTokenizerFast` in both, and what 5 calls
    `extra_special_tokens` and lists is `additional_special_tokens` in both.
    """
    names = {"extra_special_tokens": "additional_special_tokens"}
    listed = isinstance(config.get("extra_special_tokens"), list)
    renamed = {names.get(key, key) if listed else key: value for key, value in config.items()}
    if renamed.get("tokenizer_class") == "TokenizersBackend":
        renamed["tokenizer_class"] = "PreTrainedTokenizerFast"
        renamed.setdefault("model_input_names", ["input_ids", "attention_mask"])  # 4 would add token_type_ids
    return renamed


def _scaling(family: str, rope: dict[str, Any], positions: int | None) -> dict[str, Any]:
    """`rope_scaling` and what belongs to it outside."""
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if isinstance(scaling.get("factor"), int):
        scaling["factor"] = float(scaling["factor"])  # some families insist
    original = rope.get("original_max_position_embeddings")
    if rope["rope_type"] != "longrope" or original is None:
        more = {}
    else:  # 4 reads it outside only, and computes the factor from it even if there is one
        more = {"original_max_position_embeddings": original}
        factor = scaling.get("factor")
        if factor is not None and scaling.get("attention_factor") is None and factor != (positions or 0) / original:
            gain = math.log(factor) / math.log(original) if factor > 1 else 0.0
            scaling["attention_factor"] = math.sqrt(1 + gain)
    if family == "phi3":  # outside in 5 as well
        scaling.pop("original_max_position_embeddings", None)
    if set(scaling) - {"type", "rope_type"} == SCALING_KEYS.get(family):  # with others 4 refuses the config, rightly
        scaling["type"] = scaling.pop("rope_type")
    return {"rope_scaling": scaling, **more}

"""A model as a GGUF file for llama.cpp. Widths of their own in every block are said under its architecture `deci`.

Keys and tensor names are those of llama.cpp's `src/models/llama.cpp` and `src/models/deci.cpp`, which compute the same
but for the widths: RMS norms before attention and FFN, rotary positions, a gated FFN with SiLU.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from snp_llm.engines.extras import needed
from snp_llm.models.modeling_snp import NoHeads
from snp_llm.models.registry import dense_type
from snp_llm.runtime.errors import SnpError

KNOWN = ("llama", "mistral", "qwen2", "seed_oss")  # whose blocks are Llama's, biases aside

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

ATTENTION = ("self_attn.", "input_layernorm.")

OF_ZEROS = 32  # channels of an FFN that has gone: of a block without one llama.cpp leaves out the attention as well

# llama.cpp's names for how a text is cut into words before byte-pair encoding, by the patterns in tokenizer.json; where
# digits stand alone, and with GPT-2's pattern as ByteLevel has it.
GPT2 = "ByteLevel"
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE = {
    (GPT2,): "gpt-2",
    ("Digits", GPT2): "smollm",
    (rf"{LETTERS}\p{{N}}{{1,3}}{REST}",): "llama-bpe",
    (rf"{LETTERS}\p{{N}}{REST}",): "qwen2",
}

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # what a token is, as GGUF counts

ALONE = "llama.cpp's own converter takes plain configs (--layout uniform) of the types that it knows"


def write_gguf(model: PreTrainedModel, folder: Path, path: Path, dtype: str) -> None:
    """Writes a model and its tokenizer under llama.cpp's `llama`, or `deci` where widths differ.

    Args:
        model: in memory.
        folder: that holds its tokenizer.
        path: of the new file.
        dtype: of matrices: f32, f16 or bf16; vectors are f32, as llama.cpp has them.

    Raises:
        SnpError: a model or a tokenizer that the file cannot express; it says what can.
    """
    gguf = needed("gguf", "gguf")
    check_expressible(model)
    words = tokens_of(folder, embeddings(model).shape[0])
    writer = gguf.GGUFWriter(path, architecture(model))
    writer.add_name(folder.resolve().name)
    for key, value in metadata(model, dtype).items():
        _add(gguf, writer, key, value)
    _add_tokenizer(gguf, writer, folder, words)
    for name, values in tensors(model, dtype):
        raw = None if values.dtype != torch.bfloat16 else gguf.GGMLQuantizationType.BF16
        data = values.numpy() if raw is None else values.view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_expressible(model: PreTrainedModel) -> None:
    """Raises SnpError for what the file's architecture does not compute."""
    config, kind = model.config, dense_type(model.config)
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    wrong = [
        (kind not in KNOWN, f"{kind} is not among {', '.join(KNOWN)}"),
        (getattr(config, "hidden_act", "silu") != "silu", f"the activation is {getattr(config, 'hidden_act', '')}"),
        (float(getattr(rotary, "attention_scaling", 1.0)) != 1.0, "the scaling of positions scales attention too"),
        (getattr(rotary, "rope_type", "") in ("dynamic", "longrope"), "the scaling of positions depends on the length"),
        (_window(config), "a sliding window is narrower than the context"),
        (getattr(config, "attn_logit_softcapping", None) is not None, "attention logits are capped"),
    ]
    for fault, what in wrong:
        if fault:
            raise SnpError(f"--to gguf: {what}, which is not written here; {ALONE}.")
    gone: list[Any] = [block.self_attn for block in model.model.layers if isinstance(block.self_attn, NoHeads)]
    if any(attention.o_proj.bias is not None for attention in gone):
        raise SnpError(f"--to gguf: an attention that has gone left its bias, which has no place here; {ALONE}.")
    if _heads(model)[0][0] == 0:
        raise SnpError(f"--to gguf: the first block has no attention left, which llama.cpp does not load; {ALONE}.")


def _window(config: PretrainedConfig) -> bool:
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    return bool(window and used and window < config.max_position_embeddings)


def architecture(model: PreTrainedModel) -> str:
    """llama.cpp's: one of them has a width for all blocks, the other one for each."""
    return "llama" if len({*_heads(model)}) == len({*_channels(model)}) == 1 else "deci"


def _heads(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Query and key-value heads of every block, read off its projections."""
    size = head_dim(model)
    found = []
    for block in model.model.layers:
        attention = block.self_attn
        gone = isinstance(attention, NoHeads)
        rows = [0, 0] if gone else [attention.q_proj.weight.shape[0], attention.k_proj.weight.shape[0]]
        found.append((rows[0] // size, rows[1] // size))
    return found


def _channels(model: PreTrainedModel) -> list[int]:
    return [block.mlp.down_proj.weight.shape[1] or OF_ZEROS for block in model.model.layers]


def embeddings(model: PreTrainedModel) -> Tensor:
    """One row for each token, (vocabulary, d)."""
    weight: Any = model.get_input_embeddings().weight
    found: Tensor = weight
    return found


def head_dim(model: PreTrainedModel) -> int:
    """Channels of a head, all of which are rotated."""
    return 2 * len(model.model.rotary_emb.inv_freq)


def metadata(model: PreTrainedModel, dtype: str) -> dict[str, Any]:
    """What the file says beside its tensors: integers, floats, and lists of integers, one for each block."""
    config, name, size = model.config, architecture(model), head_dim(model)
    vocabulary, hidden = embeddings(model).shape
    heads, channels = _heads(model), _channels(model)
    queries, keys = [q for q, _ in heads], [k for _, k in heads]
    if name == "llama":
        queries, keys, channels = queries[0], keys[0], channels[0]  # type: ignore[assignment]
    found = {
        "vocab_size": vocabulary,
        "context_length": config.max_position_embeddings,
        "embedding_length": hidden,
        "block_count": len(model.model.layers),
        "feed_forward_length": channels,
        "attention.head_count": queries,
        "attention.head_count_kv": keys,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    kinds = {"f32": 0, "f16": 1, "bf16": 32}
    return {"general.file_type": kinds[dtype], **{f"{name}.{key}": value for key, value in found.items()}}


def _add(gguf: ModuleType, writer: Any, key: str, value: Any) -> None:
    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_key_value(key, value, kinds.FLOAT32)
    else:
        writer.add_key_value(key, value, kinds.UINT32)


def tensors(model: PreTrainedModel, dtype: str) -> Iterator[tuple[str, Tensor]]:
    """Names and values as GGUF has them, tied ones once; with the factors of scaled positions, if they are scaled."""
    tied, size = model.config.tie_word_embeddings, head_dim(model)
    gone = {f"model.layers.{i}.{part}" for i, (q, _) in enumerate(_heads(model)) if not q for part in ATTENTION}
    for name, parameter in model.state_dict().items():
        if (name == "lm_head.weight" and tied) or name.startswith(tuple(gone)):
            continue
        values = parameter.detach().cpu().float()
        if not values.numel():
            values = values.new_zeros([size or OF_ZEROS for size in values.shape])
        if ".q_proj." in name or ".k_proj." in name:
            values = interleaved(values, size)
        if values.dim() > 1:
            values = values.to(DTYPES[dtype])
        yield gguf_name(name), values.contiguous()
    factors = rope_factors(model)
    if factors is not None:
        yield "rope_freqs.weight", factors


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, block, module = stem.split(".", 3)
        return f"blk.{block}.{TENSORS[module]}.{kind}"
    return f"{TENSORS[stem]}.{kind}"


def interleaved(rows: Tensor, size: int) -> Tensor:
    """Query or key rows, or their bias, in llama.cpp's order: it rotates channels 0 and 1 of a head together, where
    transformers rotates 0 and size/2."""
    halves = rows.reshape(-1, 2, size // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def rope_factors(model: PreTrainedModel) -> Tensor | None:
    """What each rotation is slowed by, (head_dim / 2,), float32: `theta^(-2i/d)` over the model's frequencies; None
    where that is 1 throughout."""
    size, rotary = head_dim(model), model.model.rotary_emb
    base = float(model.config.rope_parameters["rope_theta"])
    plain = base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    factors = (plain / rotary.inv_freq.detach().cpu().double()).float()
    return None if torch.allclose(factors, torch.ones_like(factors), atol=1e-5) else factors


def tokens_of(folder: Path, vocabulary: int) -> tuple[list[str], list[int], list[str], str]:
    """A byte-pair tokenizer as GGUF has it: tokens and what each is, merges, and how words are cut.

    Args:
        folder: with its tokenizer.json.
        vocabulary: rows of the embeddings; what the tokenizer does not know of them is unused.

    Raises:
        SnpError: another kind of tokenizer, or words cut in a way that has no name here.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        raise SnpError(f"--to gguf: expected {file.name} in {folder}, found none; {ALONE}.")
    values = json.loads(file.read_text(encoding="utf-8"))
    inner = values["model"]
    if inner.get("type") != "BPE" or inner.get("byte_fallback") or values.get("normalizer"):
        kind = inner.get("type")
        raise SnpError(f"--to gguf: expected byte-level BPE in tokenizer.json, got another {kind}; {ALONE}.")
    cut = tuple(_patterns(values.get("pre_tokenizer") or {}))
    if cut not in PRE:
        raise SnpError(
            f"--to gguf: words are cut by {' and '.join(cut) or 'nothing'}, which has no name here; {ALONE}."
        )
    tokens, kinds = [f"[PAD{number}]" for number in range(vocabulary)], [UNUSED] * vocabulary
    for token, number in inner["vocab"].items():
        if number < vocabulary:
            tokens[number], kinds[number] = token, NORMAL
    for added in values.get("added_tokens", []):
        if added["id"] < vocabulary:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in inner["merges"]]
    return tokens, kinds, merges, PRE[cut]


def _patterns(step: dict[str, Any]) -> Iterator[str]:
    """What a pre-tokenizer cuts words by, in order."""
    kind = step.get("type")
    if kind == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _patterns(inner)
    elif kind == "Split":
        yield step["pattern"].get("Regex", step["pattern"].get("String", ""))
    elif kind == "Digits":
        yield "Digits" if step["individual_digits"] else "groups of digits"
    elif kind == "ByteLevel":
        if step.get("use_regex", True):
            yield GPT2
    elif kind is not None:
        yield kind


def _add_tokenizer(gguf: ModuleType, writer: Any, folder: Path, words: tuple[Sequence[Any], ...]) -> None:
    tokens, kinds, merges, pre = words
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    special = gguf.SpecialVocab(folder, load_merges=False, n_vocab=len(tokens))
    special.add_to_gguf(writer, quiet=True)


def differences(model: PreTrainedModel, path: Path, dtype: str) -> list[str]:
    """Reads a file back and compares it with the model; what disagrees, for people."""
    gguf = needed("gguf", "gguf")
    reader = gguf.GGUFReader(path)
    faults = []
    for key, value in metadata(model, dtype).items():
        found = reader.fields[key].contents() if key in reader.fields else None
        if found != (float(torch.tensor(value)) if isinstance(value, float) else value):
            faults.append(f"{key}: expected {value}, read {found}")
    read = {tensor.name: tensor for tensor in reader.tensors}
    wanted = dict(tensors(model, dtype))
    faults += [f"{name}: in one of file and model only" for name in sorted(read.keys() ^ wanted.keys())]
    for name in read.keys() & wanted.keys():
        raw, values = read[name].data, wanted[name]
        if raw.tobytes() != values.contiguous().view(torch.uint8).numpy().tobytes():
            faults.append(f"{name}: values differ")
    return faults

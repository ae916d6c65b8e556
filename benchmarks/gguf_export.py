"""A Llama or Mistral model as a GGUF file, float32, and the check that the file says what the model is.

    python benchmarks/gguf_export.py FOLDER model.gguf --tokenizer-from dense.gguf

Only what these two families need. For other families, and to quantise, use llama.cpp's own converter, which takes the
same folders. The tokenizer, which pruning leaves alone, is copied from a GGUF of the dense model.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from snp_llm.engines.gguf import gguf_name, interleaved

KNOWN = ("llama", "mistral")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer-from", type=Path, default=None, metavar="GGUF")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype="float32")
    write_gguf(model, args.output, args.tokenizer_from)
    faults, tensors, keys = check_gguf(model, args.output)
    print("\n".join(faults) or f"{args.output}: {tensors} tensors and {keys} metadata keys read back equal")
    raise SystemExit(1 if faults else 0)


def write_gguf(model: PreTrainedModel, path: Path, tokenizer_from: Path | None = None) -> None:
    """Writes the model under llama.cpp's architecture `llama`, which is Mistral's there too.

    Args:
        model: Llama or Mistral, with the same widths in every block.
        path: of the new file.
        tokenizer_from: a GGUF whose tokenizer the new one gets.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(Path(model.name_or_path).name or model.config.model_type)
    for key, (value, kind) in metadata(model.config).items():
        writer.add_key_value(key, value, kind)
    if tokenizer_from is not None:
        copy_tokenizer(writer, tokenizer_from)
    for name, values in tensors(model):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def metadata(config: PretrainedConfig) -> dict[str, tuple[object, gguf.GGUFValueType]]:
    """What the file says of a config.

    Readers take the head dimension for `embedding_length / head_count` unless `key_length` and `value_length` say
    otherwise, which they must after heads are gone; transformers reads it from `rope.dimension_count`.
    """
    rope = getattr(config, "rope_parameters", {})
    window = getattr(config, "sliding_window", None)
    if config.model_type not in KNOWN or rope["rope_type"] != "default" or window:
        raise SystemExit(
            f"expected a Llama or Mistral config with plain rotary positions and full attention, got "
            f"{config.model_type} with rope {rope.get('rope_type')} and window {window}. Use llama.cpp's converter."
        )
    count, real = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32
    return {
        "general.file_type": (int(gguf.LlamaFileType.ALL_F32), count),
        "llama.vocab_size": (config.vocab_size, count),
        "llama.context_length": (config.max_position_embeddings, count),
        "llama.embedding_length": (config.hidden_size, count),
        "llama.block_count": (config.num_hidden_layers, count),
        "llama.feed_forward_length": (config.intermediate_size, count),
        "llama.attention.head_count": (config.num_attention_heads, count),
        "llama.attention.head_count_kv": (config.num_key_value_heads, count),
        "llama.attention.key_length": (config.head_dim, count),
        "llama.attention.value_length": (config.head_dim, count),
        "llama.rope.dimension_count": (config.head_dim, count),
        "llama.rope.freq_base": (rope["rope_theta"], real),
        "llama.attention.layer_norm_rms_epsilon": (config.rms_norm_eps, real),
    }


def copy_tokenizer(writer: gguf.GGUFWriter, source: Path) -> None:
    for key, field in gguf.GGUFReader(source).fields.items():
        if key.startswith("tokenizer."):
            writer.add_key_value(
                key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values as GGUF has them, tied ones once."""
    tied = model.config.tie_word_embeddings
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        values = parameter.float()
        if ".q_proj." in name or ".k_proj." in name:
            values = interleaved(values, model.config.head_dim)
        yield gguf_name(name), values.contiguous().numpy()


def check_gguf(model: PreTrainedModel, path: Path) -> tuple[list[str], int, int]:
    """Reads a file back and compares it with the model's own modules, not with what was meant to be written.

    Returns:
        What disagrees, for people; the numbers of tensors and of metadata keys that were compared.
    """
    reader = gguf.GGUFReader(path)
    block = model.model.layers[0]
    head_dim = block.self_attn.head_dim
    expected = {
        "general.architecture": "llama",
        "llama.vocab_size": model.model.embed_tokens.weight.shape[0],
        "llama.embedding_length": model.model.embed_tokens.weight.shape[1],
        "llama.block_count": len(model.model.layers),
        "llama.feed_forward_length": block.mlp.down_proj.weight.shape[1],
        "llama.attention.head_count": block.self_attn.q_proj.weight.shape[0] // head_dim,
        "llama.attention.head_count_kv": block.self_attn.k_proj.weight.shape[0] // head_dim,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.rope.dimension_count": 2 * len(model.model.rotary_emb.inv_freq),
        "llama.rope.freq_base": np.float32(model.config.rope_parameters["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": np.float32(block.input_layernorm.variance_epsilon),
    }
    faults = []
    for key, value in expected.items():
        found = reader.fields[key].contents() if key in reader.fields else None
        if found != value:
            faults.append(f"{key}: expected {value}, read {found}")
    read = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    wanted = {gguf_name(name): p.detach().float().numpy() for name, p in model.named_parameters()}  # tied ones once
    faults += [f"{name}: in one of file and model only" for name in sorted(read.keys() ^ wanted.keys())]
    for name in read.keys() & wanted.keys():
        found = read[name]
        if ".attn_q." in name or ".attn_k." in name:  # back, pair by pair, as llama.cpp's rotation sees them
            heads = found.reshape(-1, head_dim, *found.shape[1:])
            found = np.concatenate([heads[:, 0::2], heads[:, 1::2]], 1).reshape(found.shape)
        if not np.array_equal(found, wanted[name]):
            faults.append(f"{name}: values differ")
    return faults, len(wanted), len(expected)


if __name__ == "__main__":
    main()

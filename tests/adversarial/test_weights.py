"""Safetensors files and shard indexes that are damaged, incomplete, or another model's."""

import json
import random
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adversarial.trials import BUNDLED, KEEP_ALL
from tests.adversarial.values import MISSING, ODD, changed, damaged, near, places
from tests.conftest import save_model, small_model

pytestmark = pytest.mark.exhaustive
FAMILIES = ("opt", "llama", "gpt2", "phi3")
HEADERS, TENSORS, INDEXES = 120, 90, 80
COUNT = HEADERS + TENSORS + INDEXES
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "U8", "BOOL", "C64", "X9", "", "f32")


def split(content):
    """Length, header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return length, json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def other_bytes(generator, content):
    """A file with another header or other bytes, and what was done to it."""
    length, header, data = split(content)
    names = [name for name in header if name != "__metadata__"]
    name, other = generator.sample(names, 2)
    entry, at = header[name], generator.randrange(len(data))
    start, stop = entry["data_offsets"]
    shape = entry["shape"]

    def with_entry(**values):
        return joined({**header, name: {**entry, **values}}, data)

    def with_value(path):
        return joined(changed(header, path, generator.choice([value for value in ODD if value is not MISSING])), data)

    bit = bytes([data[at] ^ 1 << generator.randrange(8)])
    many = generator.choice((0, 1, 7, 8, 2**31, 2**32, 2**40, 2**63, 2**64 - 1, length - 1, length + 1, length * 2))
    dtype = generator.choice(DTYPES)
    path = generator.choice([*places(header)])
    moved = generator.choice((1, 4, -4, len(data), 2**63, -1, 0.5, None))
    text = json.dumps(header)
    repeated = f'{text[:-1]}, "{name}": {json.dumps(generator.choice((header[name], header[other])))}}}'.encode()
    ways = {
        "cut off": content[: generator.randrange(len(content))],
        "cut off in the header": content[: generator.randrange(length + 8)],
        "more bytes": content + bytes(generator.randrange(1, 9)),
        f"a header of {many} bytes": joined(header, data, many),
        f"{name} as {dtype}": with_entry(dtype=dtype),
        f"{name} in another shape": with_entry(
            shape=generator.choice(([*shape, 1], shape[::-1], [1, *shape], [-1], []))
        ),
        f"{name} of nothing": with_entry(shape=[0, *shape[1:]], data_offsets=[start, start]),
        f"{name} of huge shape": with_entry(shape=[2**40, 2**40]),
        f"{name} moved": with_entry(data_offsets=[start + moved, stop + moved] if moved else [start, None]),
        f"{name} the wrong way round": with_entry(data_offsets=[stop, start]),
        f"{name} where {other} is": with_entry(data_offsets=header[other]["data_offsets"]),
        f"{name} twice": joined(repeated, data),
        f"{name} gone from the header": joined({k: v for k, v in header.items() if k != name}, data),
        f"{'.'.join(map(str, path))} odd": with_value(path),
        "other metadata": joined({**header, "__metadata__": generator.choice(({"format": "tf"}, {}, {"a": 1}))}, data),
        "no metadata": joined({k: v for k, v in header.items() if k != "__metadata__"}, data),
        "spaces after the header": joined(json.dumps(header).encode() + b" " * 8, data),
        f"a flipped bit at {at}": joined(header, data[:at] + bit + data[at + 1 :]),
        "a deep header": joined(b"[" * 100_000, data),
        "another order": joined(dict(reversed(header.items())), data),
        "empty": b"",
        "a pickle": b"\x80\x04\x95" + content,
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }
    return generator.choice([*ways.items()])


def test_headers_and_bytes(model_of, trials):
    for seed in range(HEADERS):
        generator = random.Random(seed)
        family = generator.choice(FAMILIES)
        model = shutil.copytree(model_of(family), trials.clean() / "model")
        file = model / "model.safetensors"
        done, content = other_bytes(generator, file.read_bytes())
        file.write_bytes(content)
        trials.prune(f"{seed} {family} {done}", model, *KEEP_ALL, *BUNDLED, wrong=f"model {model}")
    trials.check(HEADERS)


def other_tensors(generator, tensors):
    """Tensors that are not those of the config, and what was done to them."""
    name, other = generator.sample(sorted(tensors), 2)
    tensor = tensors[name]
    dtype = generator.choice((torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool))
    value = generator.choice((float("nan"), float("inf"), float("-inf"), 1e38, -0.0, 0.0, 1e-45))
    place = tuple(generator.randrange(size) for size in tensor.shape)
    one = tensor.clone()
    one[place] = value
    ways = {
        f"{name} gone": {k: v for k, v in tensors.items() if k != name},
        f"{name} under another name": {k + ".x" * (k == name): v for k, v in tensors.items()},
        "one more": {**tensors, generator.choice(("more", f"{name}.scale", "lm_head.bias", "", "a\nb")): torch.ones(2)},
        f"{name} as {dtype}": {**tensors, name: tensor.to(dtype)},
        f"all as {dtype}": {k: v.to(dtype) for k, v in tensors.items()},
        f"{name} of one row more": {**tensors, name: torch.cat([tensor, tensor[:1]])},
        f"{name} of one row less": {**tensors, name: tensor[:-1].clone()},
        f"{name} with a dimension more": {**tensors, name: tensor[None]},
        f"{name} as a scalar": {**tensors, name: torch.tensor(1.0)},
        f"{name} without elements": {**tensors, name: tensor[:0].clone()},
        f"{name} is {other}": {**tensors, name: tensors[other].clone()},
        f"{name} with {value} at {place}": {**tensors, name: one},
        f"{name} all {value}": {**tensors, name: torch.full_like(tensor, value)},
        "none": {},
        "one alone": {name: tensor},
        "a head of its own": {**tensors, "lm_head.weight": torch.randn(2048, 48)},
        "of another family": small_model("gpt_neox", torch.float32).state_dict(),
    }
    return generator.choice([*ways.items()])


def test_tensors(model_of, trials):
    for seed in range(TENSORS):
        generator = random.Random(seed)
        torch.manual_seed(seed)
        family = generator.choice(FAMILIES)
        model = shutil.copytree(model_of(family), trials.clean() / "model")
        file = model / "model.safetensors"
        done, tensors = other_tensors(generator, load_file(file))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
        trials.prune(f"{seed} {family} {done}", model, *KEEP_ALL, *BUNDLED, visit=seed % 4 == 0)
    trials.check(TENSORS)


@pytest.fixture(scope="module")
def sharded(tokenizer, tmp_path_factory):
    """A model in five files."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    save_model(small_model("llama", torch.float32), tokenizer, folder)
    (folder / "model.safetensors").unlink()
    small_model("llama", torch.float32).save_pretrained(folder, max_shard_size="60KB")
    assert len([*folder.glob("*.safetensors")]) > 3
    return folder


def other_index(generator, model):
    """Changes a sharded model, and says how."""
    file = model / "model.safetensors.index.json"
    index, shards = json.loads(file.read_text()), sorted(model.glob("*.safetensors"))
    (one, other), name = generator.sample(shards, 2), generator.choice(sorted(index["weight_map"]))
    way = generator.randrange(15)
    if way in OF_FILES:
        return other_files(generator, way, file, one, other)
    if way == 4:
        outside = model.parent / "outside.safetensors"
        one.rename(outside)
        where = generator.choice(("../outside.safetensors", str(outside), "sub/../../outside.safetensors"))
        index["weight_map"] = {k: where if v == one.name else v for k, v in index["weight_map"].items()}
        done = f"a shard outside, {where}"
    elif way == 9:
        index["weight_map"][generator.choice(("more", "lm_head.bias", ""))] = generator.choice(
            (one.name, "no.safetensors")
        )
        done = "one more in the index"
    elif way == 10:
        index["weight_map"][name] = generator.choice((other.name, "", ".", "config.json", "model.safetensors"))
        done = f"{name} in {index['weight_map'][name]!r}"
    elif way == 11:
        del index["weight_map"][name]
        done = f"no {name}"
    elif way == 12:
        index["metadata"] = generator.choice(
            (None, {}, {"total_size": -1}, {"total_size": "x", "impl": "evil.py"}, [1])
        )
        done = f"metadata {index['metadata']}"
    elif way == 13:
        index = {key: value for key, value in index.items() if key == "weight_map"}
        done = "no metadata"
    else:
        path = generator.choice([*places(index)])
        inner = index
        for key in path:
            inner = inner[key]
        value = near(generator, inner)
        index = changed(index, path, value)
        done = f"{'.'.join(path)} = {value!r:.60}"
    file.write_text(json.dumps(index))
    return done


OF_FILES = (0, 1, 2, 3, 5, 6, 7, 8)  # ways that leave the index as it is, or damage its file


def other_files(generator, way, file, one, other):
    """Changes two shards or the index file beside them, and says how."""
    model = file.parent
    if way == 0:
        one.unlink()
        return f"no {one.name}"
    if way == 1:
        content = one.read_bytes()
        one.write_bytes(content[: generator.randrange(len(content))])
        return f"{one.name} cut off"
    if way == 2:
        a, b = one.read_bytes(), other.read_bytes()
        one.write_bytes(b)
        other.write_bytes(a)
        return f"{one.name} and {other.name} exchanged"
    if way == 3:
        shutil.copy(one, model / "model.safetensors")
        return "one shard under the name of a whole model"
    if way == 5:
        one.rename(model.parent / "moved.safetensors")
        one.symlink_to(model.parent / "moved.safetensors")
        return "a shard behind a link"
    if way == 6:
        done, content = damaged(generator, file.read_bytes())
        file.write_bytes(content)
        return f"index {done}"
    tensors = load_file(one)
    key = generator.choice(sorted(tensors))
    there = load_file(other)
    value, said = (tensors[key], "") if way == 7 else (torch.zeros_like(tensors[key]), ", with zeros")
    save_file({**there, key: value}, other, metadata={"format": "pt"})
    return f"{key} in {other.name} as well{said}"


def test_indexes(sharded, trials):
    for seed in range(INDEXES):
        model = shutil.copytree(sharded, trials.clean() / "model")
        done = other_index(random.Random(seed), model)
        trials.prune(f"{seed} {done}", model, *KEEP_ALL, *BUNDLED, wrong=f"model {model}")
    trials.check(INDEXES)

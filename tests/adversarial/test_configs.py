"""config.json and generation_config.json of several families with values that nobody expects."""

import json
import random
import shutil

import pytest

from snp_llm.cli.parse import inspect_main
from tests.adversarial.trials import BUNDLED, KEEP_ALL
from tests.adversarial.values import CODE, MISSING, NAMING, changed, damaged, near, places

pytestmark = pytest.mark.exhaustive
FAMILIES = ("opt", "llama", "mistral", "qwen2", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "granite")
PRUNED, INSPECTED, BROKEN = 160, 100, 40
COUNT = PRUNED + INSPECTED + BROKEN
# Keys that a config may have and those of these models have not.
MORE = {
    **NAMING,
    "quantization_config": {"quant_method": "awq", "bits": 4},
    "per_layer_config": {"0": {"intermediate_size": 32}},
    "pruned_layers": {"0": {"intermediate_size": 32}},
    "text_config": {"hidden_size": 16},
    "layer_types": ["full_attention", "full_attention"],
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_theta": 5000.0,
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": CODE,
    "experts_implementation": CODE,
    "torch_dtype": "float16",
    "dtype": "float64",
    "torchscript": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "is_decoder": True,
    "add_cross_attention": True,
    "is_encoder_decoder": True,
    "use_cache": False,
    "num_labels": 3,
    "id2label": {"0": "a"},
    "problem_type": "regression",
    "base_model_tp_plan": {"layers.*": CODE},
    "_name_or_path": "/etc/passwd",
    "_commit_hash": "../..",
    "transformers_version": "99.0",
    "transformers_weights": "other.safetensors",
    "gguf_file": "model.gguf",
    "head_dim": 8,
    "tie_word_embeddings": True,
    "max_length": 50,
    "num_beams": 4,
    "do_sample": True,
    "temperature": 0.7,
    "length_penalty": 0.0,
}


def mutate(generator, config):
    """A config with one, now and then two, values changed, and what was done."""
    done = []
    for _ in range(generator.choice((1, 1, 1, 2))):
        if generator.random() < 0.3:
            key = generator.choice(sorted(MORE))
            path, value = (key,), MORE[key] if generator.random() < 0.7 else near(generator, MORE[key])
            if value is MISSING:
                value = None
        else:
            path = generator.choice([*places(config)])
            inner = config
            for key in path:
                inner = inner[key]
            value = near(generator, inner)
        config = changed(config, path, value)
        done.append(f"{'.'.join(map(str, path))} = {'missing' if value is MISSING else repr(value)[:60]}")
    return ", ".join(done), config


def test_values(model_of, trials):
    for seed in range(PRUNED + INSPECTED):
        generator = random.Random(seed)
        family = generator.choice(FAMILIES)
        model = shutil.copytree(model_of(family), trials.clean() / "model")
        name = "generation_config.json" if seed % 8 == 7 else "config.json"
        done, config = mutate(generator, json.loads((model / name).read_text()))
        (model / name).write_text(json.dumps(config))
        where = f"{seed} {family} {name}: {done}"
        if seed < PRUNED:
            if seed % 16 == 8:
                (model / "generation_config.json").unlink(missing_ok=True)
            trials.prune(where, model, *KEEP_ALL, *BUNDLED, visit=seed % 4 == 0)
        else:
            trials.run(where, inspect_main, [model, *(["--json"] if seed % 2 else [])])
    trials.check(PRUNED + INSPECTED)


def test_files_that_are_no_such_config(model_of, trials):
    for seed in range(BROKEN):
        generator = random.Random(seed)
        model = shutil.copytree(model_of("llama"), trials.clean() / "model")
        file = model / generator.choice(("config.json", "config.json", "generation_config.json"))
        done, content = damaged(generator, file.read_bytes())
        if seed % 10 == 0:
            file.unlink()
            done = generator.choice(("a folder", "a link to itself", "gone"))
            if done == "a folder":
                file.mkdir()
            elif done != "gone":
                file.symlink_to(file)
        else:
            file.write_bytes(content)
        trials.prune(f"{seed} {file.name} {done}", model, *KEEP_ALL, *BUNDLED)
    trials.check(BROKEN)

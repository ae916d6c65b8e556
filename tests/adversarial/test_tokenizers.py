"""Tokenizers that are damaged, of another model, or name code."""

import json
import random
import shutil

import pytest

from snp_llm.cli.parse import evaluate_main
from tests.adversarial.trials import BUNDLED, KEEP_ALL
from tests.adversarial.values import CODE, MISSING, NAMING, changed, damaged, near, places

pytestmark = pytest.mark.exhaustive
COUNT = 100
FAMILIES = ("opt", "llama", "gpt2", "qwen2")
CONFIG = {
    **NAMING,
    "tokenizer_class": "GPT2Tokenizer",
    "auto_map": {"AutoTokenizer": [CODE, CODE]},
    "chat_template": "{{ messages }}{% for",
    "model_max_length": 10**30,
    "bos_token": {"content": "<new>", "__type": "AddedToken"},
    "eos_token": "<unheard of>",
    "added_tokens_decoder": {"5000": {"content": "<far>", "special": True}},
    "extra_special_tokens": {"image_token": "<image>"},
    "processor_class": "EvilProcessor",
    "vocab_file": "/etc/passwd",
    "tokenizer_file": "/etc/passwd",
    "name_or_path": "../..",
    "add_bos_token": True,
    "add_prefix_space": True,
    "do_lower_case": True,
    "padding_side": "up",
}


def other_rules(generator, rules):
    """Changes what is in tokenizer.json, and says how."""
    vocabulary = rules["model"]["vocab"]
    token, other = generator.sample(sorted(vocabulary), 2)
    way = generator.randrange(12)
    if way == 0:
        vocabulary[token] = generator.choice(
            (2048, 5000, 2**31, 2**32 - 1, 2**32, -1, 0.5, None, "1", vocabulary[other])
        )
        return f"{token} has id {vocabulary[token]}"
    if way == 1:
        for name in generator.sample(sorted(vocabulary), generator.choice((1, 100, 1500))):
            del vocabulary[name]
        return f"{len(vocabulary)} tokens"
    if way == 2:
        rules["model"]["vocab"] = {name: id + 2048 for name, id in vocabulary.items()}
        return "all ids past the embeddings"
    if way == 3:
        ids = list(vocabulary.values())
        generator.shuffle(ids)
        rules["model"]["vocab"] = dict(zip(vocabulary, ids, strict=True))
        return "ids shuffled"
    if way == 4:
        far = generator.choice((2048, 5000, 2**31))
        rules["added_tokens"] += [
            {"id": far, "content": "<far>", "special": generator.random() < 0.5}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ]
        return f"one more added token, {far}"
    if way == 5:
        rules["model"]["type"] = generator.choice(("BPE", "Unigram", "WordPiece", "WordLevel", "Evil", None))
        return f"model {rules['model']['type']}"
    if way == 6:
        rules["model"]["merges"] = generator.choice(
            ([], [["a"]], [["a", "b"]], ["a b"], None, rules["model"]["merges"][:9])
        )
        return "other merges"
    if way == 7:
        part = generator.choice(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
        rules[part] = generator.choice((None, {"type": "Lowercase"}, {"type": "Evil"}, {"type": "Whitespace"}, {}, []))
        return f"{part} {rules[part]}"
    if way == 8:
        rules["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        return "truncates"
    path = generator.choice([*places({k: v for k, v in rules.items() if k != "model"})])
    inner = rules
    for key in path:
        inner = inner[key]
    value = near(generator, inner)
    new = changed(rules, path, value)
    rules.clear()
    rules.update(new)
    return f"{'.'.join(map(str, path))} = {'missing' if value is MISSING else repr(value)[:60]}"


def change(generator, model):
    """Changes a model's tokenizer, and says how."""
    way = generator.randrange(10)
    rules, config = model / "tokenizer.json", model / "tokenizer_config.json"
    if way < 4:
        values = json.loads(rules.read_text())
        done = other_rules(generator, values)
        rules.write_text(json.dumps(values))
    elif way < 8:
        values = json.loads(config.read_text())
        if generator.random() < 0.6:
            path = (generator.choice(sorted(CONFIG)),)
            value = CONFIG[path[0]] if generator.random() < 0.7 else near(generator, CONFIG[path[0]])
            value = None if value is MISSING else value
        else:
            path = generator.choice([*places(values)])
            value = near(generator, values[path[0]])
        config.write_text(json.dumps(changed(values, path, value)))
        done = f"config {path[0]} = {'missing' if value is MISSING else repr(value)[:60]}"
    else:
        file = generator.choice((rules, config))
        done, content = damaged(generator, file.read_bytes())
        if generator.random() < 0.3:
            done = "gone"
            file.unlink()
        else:
            file.write_bytes(content)
        done = f"{file.name} {done}"
    if generator.random() < 0.2:
        more = generator.choice(("special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.jinja"))
        (model / more).write_text(generator.choice(("{}", "[]", "{", '{"<far>": 9999}', '{"bos_token": "<far>"}', "")))
        done += f", and {more}"
    return done


def test_tokenizers(model_of, trials, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A text for whatever tokenizer comes along, 東京 and naïve ones as well.\n" * 40)
    for seed in range(COUNT):
        generator = random.Random(seed)
        family = generator.choice(FAMILIES)
        model = shutil.copytree(model_of(family), trials.clean() / "model")
        done = f"{seed} {family} {change(generator, model)}"
        if seed % 4 == 3:
            trials.run(done, evaluate_main, [model, "--dataset", text, "--seq-len", 16, "--max-windows", 2, "--quiet"])
        else:
            trials.prune(done, model, *KEEP_ALL, *(BUNDLED if seed % 4 else ("--calibration", "random")))
    trials.check(COUNT)

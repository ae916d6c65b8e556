"""The Python interface: what people hold in memory, against windows that are cut by hand."""

import copy
import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    OPTForCausalLM,
    OPTForSequenceClassification,
)

import snp_llm
from snp_llm import Recipe, SnpError
from snp_llm.data.given import given_windows
from tests.conftest import small_opt
from tests.differing import differing_model

TEXTS = [f"This is text number {n}, and it says that {n} squared is {n * n}." for n in range(120)]
TALKS = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"{n} is a number."}]
    for n in range(120)
]
FEW = {"num_samples": 4, "seq_len": 16, "device": "cpu", "round_to": 4}


@pytest.fixture
def talking(tokenizer):
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    return talking


def windows(tokenizer, data, **options):
    values = {"column": "text", "num_samples": 8, "seq_len": 32, "seed": 0, "bos": "once", **options}
    return given_windows(tokenizer, data, **values)


def drawn(tokenizer, text: str) -> torch.Tensor:
    """Windows of 32 tokens, cut by hand, in the order of the seed."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    cut = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))[:8]]


def test_every_kind_of_text_gives_the_same_windows(tokenizer):
    expected = drawn(tokenizer, "\n\n".join(TEXTS))
    rows = [{"text": text, "number": 1} for text in TEXTS]
    for data in (TEXTS, tuple(TEXTS), iter(TEXTS), rows, (row for row in rows), datasets.Dataset.from_list(rows)):
        assert torch.equal(windows(tokenizer, data).tokens, expected), type(data)
    named = [{"body": text} for text in TEXTS]
    assert torch.equal(windows(tokenizer, named, column="body").tokens, expected)


def test_every_kind_of_conversation_gives_what_the_chat_template_makes(talking):
    text = "\n\n".join(talking.apply_chat_template(talk, tokenize=False) for talk in TALKS)
    for data in (
        TALKS,
        [{"messages": talk} for talk in TALKS],
        datasets.Dataset.from_list([{"messages": t} for t in TALKS]),
    ):
        assert torch.equal(windows(talking, data).tokens, drawn(talking, text)), type(data)


def test_token_ids_are_taken_as_they_are(tokenizer):
    ids = torch.arange(64 * 32) % 2000
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:8]
    expected = ids.reshape(64, 32)[order]
    tokenised = [{"input_ids": row.tolist(), "attention_mask": [1] * 32} for row in ids.reshape(64, 32)]
    batches = torch.utils.data.DataLoader([{"input_ids": row} for row in ids.reshape(64, 32)], batch_size=4)
    for data in (ids.reshape(64, 32), ids.reshape(64, 32).int(), ids, tokenised, batches):
        assert torch.equal(windows(tokenizer, data).tokens, expected)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "at least one text, got none"),
        ("a text", "iterable of texts"),
        ({"text": "a"}, "iterable of texts"),
        (3, "iterable of texts"),
        ([3, 4], "record 1 is 3"),
        ([[1, 2, 3]], r"record 1 is \[1, 2, 3\]. Token ids come as a tensor"),
        ([{"body": "a"}], "column 'text' of texts, or 'messages'; record 1 has body"),
        (["short"], "at least one window of 32 tokens"),
        (torch.rand(4, 32), "token ids, integers"),
        (torch.zeros(4, 31, dtype=torch.int64), "windows of 32 tokens"),
        (torch.zeros(0, 32, dtype=torch.int64), "windows of 32 tokens"),
        ([[{"role": "user"}]], "chat template"),
    ],
)
def test_what_is_no_data_is_refused(data, says, tokenizer):
    with pytest.raises(SnpError, match=says):
        windows(tokenizer, data)


@pytest.mark.parametrize(("token", "says"), [(-100, "expected token ids from 0 on, got -100"), (9999, "9,999 is in")])
def test_ids_that_a_model_does_not_embed_are_refused(token, says, tokenizer):
    with pytest.raises(SnpError, match=says):
        snp_llm.prune(small_opt(), tokenizer, data=torch.full((4, 16), token), sparsity=0.3, **FEW)


def test_a_text_is_what_the_command_calls_a_dataset(tokenizer):
    model = small_opt()
    named = snp_llm.prune(model, tokenizer, data="bundled", sparsity=0.3, **FEW)
    asked = snp_llm.prune(model, tokenizer, Recipe("m", calibration="bundled", sparsity=0.3, **FEW))
    for one, other in zip(named.model.parameters(), asked.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_model_in_training_is_pruned_without_its_dropout_and_trains_on(tokenizer):
    still, training = small_opt(dropout=0.5), small_opt(dropout=0.5).train().requires_grad_(True)
    seen = []
    found = [
        snp_llm.prune(m, tokenizer, data=TEXTS, sparsity=0.3, on_progress=lambda *said: seen.append(said), **FEW).model
        for m in (still, training)
    ]
    for one, other in zip(*(model.parameters() for model in found), strict=True):
        assert torch.equal(one, other)
    assert training.training and all(p.requires_grad for p in training.parameters())
    half, total = seen[: len(seen) // 2], seen[0][1]
    assert sorted({done for done, _, _ in half}) == list(range(total + 1)) and half[-1][0] == total
    assert "reading data of the program" in [line for _, _, line in half]


def test_a_rise_of_ones_own_measure(tokenizer):
    dense = small_opt()
    whole = sum(p.numel() for p in dense.parameters())

    def size(model):
        return 2 - sum(p.numel() for p in model.parameters()) / whole

    found = snp_llm.prune(dense, tokenizer, data=TEXTS, measure=size, max_perplexity_increase="5%", **FEW)
    assert 1.0 < size(found.model) <= 1.05


def test_saved_it_is_what_the_command_would_have_saved(tokenizer, tmp_path):
    pruned = snp_llm.prune(small_opt(), tokenizer, data=TEXTS, sparsity=0.4, **FEW)
    assert repr(pruned).startswith("PrunedModel(SnpOPTForCausalLM, sparsity 0.4 asked for; kept ")
    assert "of 192 channels" in repr(pruned) and len(repr(pruned)) < 200
    folder = pruned.save(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for one, other in zip(pruned.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)
    assert AutoTokenizer.from_pretrained(folder)("a text")["input_ids"] == tokenizer("a text")["input_ids"]
    assert {"README.md", "prune_report.json", "recipe.yaml", "report.html"} <= {file.name for file in folder.iterdir()}
    with pytest.raises(SnpError, match="overwrite"):
        pruned.save(folder)


def test_sparsity_of_a_saved_mixture_counts_the_experts_that_may_go(tokenizer, tmp_path):
    dense = differing_model("qwen3_moe")
    few = {**FEW, "refine": "none", "measured_cuts": 0}
    pruned = snp_llm.prune(dense, tokenizer, data=TEXTS, experts="whole", head_sparsity=0.0, ffn_sparsity=0.4, **few)
    report = json.loads((pruned.save(tmp_path / "out") / "prune_report.json").read_text())
    before, after = (
        sum(p.numel() for n, p in m.named_parameters() if "proj" in n and n.endswith(("weight", "proj")))
        for m in (dense, pruned.model)
    )
    assert report["dense"]["size"]["block_linear"] == before and report["pruned"]["size"]["block_linear"] == after
    assert report["sparsity"]["achieved"] == (before - after) / before > 0.1


def test_a_model_that_is_pruned_again_is_not_called_what_the_first_one_was(tokenizer):
    dense = small_opt()
    dense.config._name_or_path = "user/small"
    first = snp_llm.prune(dense, tokenizer, data=TEXTS, sparsity=0.3, **FEW)
    again = snp_llm.prune(first.model, tokenizer, data=TEXTS, sparsity=0.3, **FEW)
    assert first.recipe.model == dense.config._name_or_path == "user/small"
    assert again.recipe.model == type(first.model).__name__


def test_one_text_in_the_place_of_a_list_is_said(tokenizer):
    with pytest.raises(SnpError, match=r"data: expected a list of texts, or a dataset's name, got one text.*\[text\]"):
        snp_llm.prune(small_opt(), tokenizer, data="\n".join(TEXTS), sparsity=0.3, **FEW)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sparcity": 0.3}, "Did you mean 'sparsity'"),
        ({"ordering": "greedi"}, "Did you mean 'greedy'"),
        ({"layout": "dense"}, "expected one of uniform, compact, padded"),
        ({"sparsity": 1.5}, "--sparsity"),
        ({"overwrite": True}, "setting of the command"),
        ({"output": "x"}, "setting of the command"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_done(settings, says, tokenizer):
    with pytest.raises(SnpError, match=says):
        snp_llm.prune(None, tokenizer, **settings)


def test_what_is_no_plain_model_is_refused_in_words(tokenizer):
    model = small_opt()
    with pytest.raises(SnpError, match="no model of transformers"):
        snp_llm.prune(torch.nn.Linear(2, 2), tokenizer)
    with pytest.raises(SnpError, match="compiled"):
        snp_llm.prune(torch.compile(model), tokenizer)
    with pytest.raises(SnpError, match="several devices"):
        snp_llm.prune(torch.nn.DataParallel(model), tokenizer)
    with pytest.raises(SnpError, match="tokenizer"):
        snp_llm.prune(model)
    with pytest.raises(SnpError, match=r"got 0\.3\. Settings have names"):
        snp_llm.prune(model, 0.3)
    with pytest.raises(SnpError, match=r"recipe: expected a Recipe, got 0\.3"):
        snp_llm.prune(model, tokenizer, 0.3)
    with torch.device("meta"), pytest.raises(SnpError, match="meta device"):
        snp_llm.prune(OPTForCausalLM(model.config), tokenizer)
    for other in (model.model, OPTForSequenceClassification(model.config)):
        with pytest.raises(SnpError, match="expected OPTForCausalLM, whose logits"):
            snp_llm.prune(other, tokenizer)
    with pytest.raises(SnpError, match="dtype: expected float32, in which the model is, got bfloat16"):
        snp_llm.prune(model, tokenizer, dtype="bfloat16")
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(SnpError, match="quantised"):
        snp_llm.prune(model, tokenizer)


def test_adapters_that_are_not_merged_are_refused(tokenizer):
    peft = pytest.importorskip("peft")
    with pytest.raises(SnpError, match="merge_and_unload"):
        snp_llm.prune(peft.get_peft_model(small_opt(), peft.LoraConfig(target_modules=["q_proj"])), tokenizer)


def test_everything_public_is_there():
    for name in snp_llm.__all__:
        assert getattr(snp_llm, name) is not None


def test_a_loss_of_ones_own_weighs_errors_by_its_gradients(tokenizer):
    """The task's own loss given by hand changes no bit; another one changes what is kept; what is none is refused."""
    model, few = small_opt(), {"data": TEXTS, "sparsity": 0.4, "refine": "none", "measured_cuts": 0, **FEW}

    def likelihood(logits, tokens):
        return torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")

    def first_half(logits, tokens):
        return likelihood(logits[:, : tokens.shape[1] // 2], tokens[:, : tokens.shape[1] // 2])

    usual, same, other = (snp_llm.prune(model, tokenizer, loss=loss, **few) for loss in (None, likelihood, first_half))
    for one, two in zip(usual.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(one, two)
    losses = [[site.predicted_loss for site in run.sites] for run in (usual, other)]
    assert losses[0] != losses[1]
    with pytest.raises(SnpError, match="loss: expected a tensor of one number, computed from the logits, got 1.0"):
        snp_llm.prune(model, tokenizer, loss=lambda _logits, _tokens: 1.0, **few)
    with pytest.raises(SnpError, match="loss: expected allocation='loss'"):
        snp_llm.prune(model, tokenizer, loss=likelihood, allocation="uniform", metric="error", **few)


def test_everything_public_is_listed_and_on_the_page_of_the_interface():
    page = (Path(__file__).parent.parent.parent / "docs/api.md").read_text()
    for name in set(snp_llm.__all__) - {"__version__"}:
        assert getattr(snp_llm, name).__doc__ and f"::: snp_llm.{name}\n" in page

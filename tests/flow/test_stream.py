"""Tokens on their way through the blocks: where they wait, and what happens when a batch or a matrix does not fit."""

import gc
import logging
from pathlib import Path

import pytest
import torch

from snp_llm import prune
from snp_llm.pruning import statistics, stream
from snp_llm.runtime import device
from snp_llm.runtime.batches import BatchSize, in_batches
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.storage import Storage, let_go
from tests.conftest import small_model, small_recipe

CUTS = {"sparsity": 0.4, "round_to": 4, "num_samples": 10, "batch_size": 8}


def too_large(limit: int, seen: list[int]):
    """What a device does that has room for so many windows."""

    def compute(at: slice) -> slice:
        seen.append(at.stop - at.start)
        if at.stop - at.start > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return at

    return compute


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_nothing_is_left_out(caplog):
    seen, batch = [], BatchSize(8)
    slices = [at for at, _ in in_batches(11, batch, too_large(3, seen))]
    assert [i for at in slices for i in range(at.start, at.stop)] == list(range(11))
    assert seen[:3] == [8, 4, 2] and batch.windows == 2  # remembered for the next pass
    assert [m for m in caplog.messages if "did not fit; going on with 2 at a time" in m]
    with pytest.raises(SnpError, match="one calibration window.*--seq-len"):
        [*in_batches(2, BatchSize(2), too_large(0, []))]
    with pytest.raises(RuntimeError, match="something else"):
        [*in_batches(2, BatchSize(2), lambda _at: (_ for _ in ()).throw(RuntimeError("something else")))]


def test_a_device_with_little_memory_gives_the_same_model(tokenizer, monkeypatch, caplog):
    dense = small_model("llama")
    expected = prune(dense, tokenizer, small_recipe(**CUTS))
    real = stream.in_batches

    def on_a_small_device(windows, batch, compute, *more):
        def limited(at):
            if at.stop - at.start > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return compute(at)

        return real(windows, batch, limited, *more)

    for module in ("stream", "sequential", "gradients", "curves", "measured", "reference"):
        monkeypatch.setattr(f"snp_llm.pruning.{module}.in_batches", on_a_small_device)
    found = prune(dense, tokenizer, small_recipe(**CUTS))
    assert [m for m in caplog.messages if "going on with 2 at a time" in m]
    for a, b in zip(expected.sites, found.sites, strict=True):
        assert torch.equal(a.kept, b.kept)
    for a, b in zip(expected.model.parameters(), found.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_sums_and_factors_without_room_on_the_device_go_to_the_cpu_and_the_run_says_so(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(
        "snp_llm.pruning.reference.enough_windows", lambda _widest, _seq_len: 3
    )  # not all have references
    dense = small_model("llama")
    expected = prune(dense, tokenizer, small_recipe(**CUTS))
    for module in (statistics, device):
        monkeypatch.setattr(module, "has_room", lambda _device, size: size < 10_000)
    caplog.set_level(logging.INFO, logger="snp_llm")
    found = prune(dense, tokenizer, small_recipe(**CUTS))
    assert [m for m in caplog.messages if "mlp.down_proj: no room for sums of" in m and "computed on the CPU" in m]
    assert [m for m in caplog.messages if "mlp.down_proj: no room for algebra of" in m]
    for a, b in zip(expected.model.parameters(), found.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("choices", [{}, {"allocation": "variance", "metric": "error", "reference": "self"}])
def test_sums_of_wide_sites_wait_in_files_where_hidden_states_do(tokenizer, monkeypatch, choices):
    monkeypatch.setattr(
        "snp_llm.pruning.reference.enough_windows", lambda _widest, _seq_len: 3
    )  # not all have references
    dense = small_model("llama")
    expected = prune(dense, tokenizer, small_recipe(**CUTS, **choices))
    monkeypatch.setattr(statistics, "FILES_FROM", 1)
    released = []
    for module in ("factor", "repair"):
        monkeypatch.setattr(
            f"snp_llm.pruning.{module}.let_go", lambda files: released.append(len(files)) or let_go(files)
        )
    found = prune(dense, tokenizer, small_recipe(**CUTS, **choices, hidden_device="disk"))
    # Second moments, those of held-out windows, and what outputs lack of their references, likewise, and second moments
    # where there are no references; the visit has none.
    assert set(released) == ({1, 2} if choices else {2, 5})
    for a, b in zip(expected.model.parameters(), found.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tensors_in_files_are_the_same_when_they_come_back(tmp_path):
    tensor, pages = Storage(None, tmp_path).file(1000, 500, dtype=torch.float32)
    assert not tensor.any()
    expected = torch.randn(1000, 500)
    tensor.copy_(expected)
    let_go([pages])
    assert torch.equal(tensor, expected)
    tensor[3] = 7.0
    let_go([pages])
    assert tensor[3].eq(7).all() and torch.equal(tensor[4:], expected[4:])


def test_hidden_states_on_disk_are_files_without_a_name(tmp_path):
    storage = Storage(None, tmp_path / "deep" / "down")
    states = storage.empty(3, 5, 7, dtype=torch.bfloat16)
    states.fill_(2.0)
    states[1] = 3.0
    assert states[1].eq(3).all() and states[2].eq(2).all() and list((tmp_path / "deep/down").iterdir()) == []
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert maps.read_text().count("/deep/down/hidden-") == 1
        del states
        gc.collect()
        assert "/deep/down/hidden-" not in maps.read_text()
    with pytest.raises(SnpError, match="--hidden-device disk"):
        Storage(None, tmp_path).empty(1 << 50, dtype=torch.float32)

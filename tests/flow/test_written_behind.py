"""Files of a journal that are written while the run goes on, and sums over their bytes."""

import threading

import pytest
import torch

from snp_llm.checkpoint import journal as journals
from snp_llm.checkpoint.journal import Journal, wait_for_writers
from snp_llm.runtime import files
from snp_llm.runtime.errors import DiskError
from snp_llm.runtime.files import checksum


def test_blocks_are_written_while_the_run_goes_on(tmp_path, monkeypatch):
    release, write = threading.Event(), journals.write_tensors

    def slowly(*args, **kwargs):
        release.wait(10)
        write(*args, **kwargs)

    monkeypatch.setattr(journals, "write_tensors", slowly)
    journal = Journal(tmp_path / "journal", behind=True)
    journal.put(0, {"weight": torch.ones(3)}, ["fact"])
    assert not journal.file(0).exists()
    release.set()
    assert torch.equal(journal.get(0, "weight"), torch.ones(3))  # whoever reads waits
    assert journal.facts(0) == ["fact"]
    journal.put(1, {"weight": torch.zeros(3)})
    wait_for_writers()
    assert journal.file(1).exists()
    journal.save_state(2, {}, range(0), last=True)
    again = Journal(tmp_path / "journal")
    assert again.last_state(range(0), 0) == (2, {})


def test_a_disk_that_fails_meanwhile_is_said_at_the_next_block(tmp_path):
    (tmp_path / "file").write_text("in the way")
    journal = Journal(tmp_path / "file" / "journal", behind=True)
    journal.put(0, {"weight": torch.ones(3)})
    with pytest.raises(DiskError, match="cannot be written"):
        journal.put(1, {"weight": torch.ones(3)})


def test_every_byte_of_a_large_file_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SECTION", 1000)
    monkeypatch.setattr(files, "PIECE", 300)
    file = tmp_path / "file"
    content = bytes(range(256)) * 16
    file.write_bytes(content)
    whole = checksum(file)
    for at in (0, 299, 300, 999, 1000, 2500, 4095):
        changed = bytearray(content)
        changed[at] ^= 1
        file.write_bytes(changed)
        assert checksum(file) != whole, at
    for other in (content[:-1], content + b"0", content[1000:] + content[:1000], b""):
        file.write_bytes(other)
        assert checksum(file) != whole
    file.write_bytes(content)
    assert checksum(file) == whole
    assert checksum(tmp_path / "gone") == ""

"""Models and runs on disk: load, save and verify, the output folder, the journal of an unfinished run, the Hub."""

from snp_llm.checkpoint.loading import TINY_OPT, check_config, explained, find_model, is_hub_id, load
from snp_llm.checkpoint.saving import FreshProcess, check_kept, compare, folder_bytes, fresh_process, save, verify

__all__ = [
    "TINY_OPT",
    "FreshProcess",
    "check_config",
    "check_kept",
    "compare",
    "explained",
    "find_model",
    "folder_bytes",
    "fresh_process",
    "is_hub_id",
    "load",
    "save",
    "verify",
]

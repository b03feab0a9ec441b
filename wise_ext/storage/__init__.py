"""What an edited memory looks like on disk; see ``docs/storage.md``."""

from wise_ext.storage.directory import (
    StoredMemory,
    check_base,
    holds_memory,
    load_memory_dir,
    save_memory,
)
from wise_ext.storage.encoding import digest_edits, ledger_entry
from wise_ext.storage.journal import Journal
from wise_ext.storage.journal_reader import JournalState
from wise_ext.storage.new_folder import check_new, new_folder
from wise_ext.storage.verify import Check, verify

__all__ = [
    "Check",
    "Journal",
    "JournalState",
    "StoredMemory",
    "check_base",
    "check_new",
    "digest_edits",
    "holds_memory",
    "ledger_entry",
    "load_memory_dir",
    "new_folder",
    "save_memory",
    "verify",
]

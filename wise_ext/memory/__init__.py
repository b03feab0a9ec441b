"""Side memories as plain tensors: masks, shards, their banks, merging and routing."""

from wise_ext.memory.bank import PackedBank
from wise_ext.memory.column_bank import Bank, ColumnBank, Columns
from wise_ext.memory.cues import NO_CUE, Cues, cue_number
from wise_ext.memory.key_index import KeyIndex
from wise_ext.memory.low_rank import LowRankBank, LowRankShard
from wise_ext.memory.masks import (
    bits_to_bool,
    bool_to_bits,
    popcount,
    random_mask_bits,
    row_counts,
)
from wise_ext.memory.merging import METHODS, merge
from wise_ext.memory.mixed_bank import MixedBank
from wise_ext.memory.routing import (
    MAIN,
    Decision,
    IndicatorRouter,
    KeyRouter,
    Router,
    uncued,
)
from wise_ext.memory.shards import Shard
from wise_ext.memory.side_memory import SideMemory
from wise_ext.memory.token_keys import TokenKeys

__all__ = [
    "MAIN",
    "METHODS",
    "NO_CUE",
    "Bank",
    "ColumnBank",
    "Columns",
    "Cues",
    "Decision",
    "IndicatorRouter",
    "KeyIndex",
    "KeyRouter",
    "LowRankBank",
    "LowRankShard",
    "MixedBank",
    "PackedBank",
    "Router",
    "Shard",
    "SideMemory",
    "TokenKeys",
    "bits_to_bool",
    "bool_to_bits",
    "cue_number",
    "merge",
    "popcount",
    "random_mask_bits",
    "row_counts",
    "uncued",
]

"""Token data: the crash-safe store of generated records, and packed training sequences.

`store`, `reader` and their parts import neither torch nor transformers; `dataset` imports torch.
"""

from llmqat.data.reader import RecordDataset, open_dataset
from llmqat.data.records import Record
from llmqat.data.store import RecordWriter, parse_shard

__all__ = ["Record", "RecordDataset", "RecordWriter", "open_dataset", "parse_shard"]

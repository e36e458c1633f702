"""Reading and writing checkpoints: strict, atomic, safetensors only (docs/packed-format.md)."""

from llmqat.checkpoint.load import from_pretrained
from llmqat.checkpoint.save import save_pretrained
from llmqat.checkpoint.verify import verify_export

__all__ = ["from_pretrained", "save_pretrained", "verify_export"]

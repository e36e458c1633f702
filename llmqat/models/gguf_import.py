"""A LLaMA-architecture GGUF file to an ordinary transformers folder.

Block-quantized tensors are dequantized to fp32 as the ``gguf`` package defines it and kept in fp32
(bf16 would change the values), the row order that GGUF files use for the query and key projections
is undone, and the byte-level BPE tokenizer is rebuilt from the metadata. The result is what
``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` read without a
network. transformers can read GGUF files itself, in three times the time, and version 5.17 gives
this tokenizer the wrong end-of-text token and the wrong split of digits.

Needs the ``gguf`` package.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from llmqat.errors import CheckpointError
from llmqat.io import fsync_dir, make_dir

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r")
_GPT2_SPLIT = ("gpt-2", "default", *_DIGITS_APART)
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


class _Metadata:
    """The key-value part of a GGUF file, with errors that name the key."""

    def __init__(self, reader: Any, path: Path) -> None:
        self._fields = reader.fields
        self._path = path

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def require(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self._path.name}: metadata key {key!r} is missing")
        return value


def _open(path: str | os.PathLike[str]) -> tuple[Any, _Metadata]:
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError("reading GGUF files needs the gguf package: pip install gguf")
    from gguf import GGUFReader

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no GGUF file at {path}")
    try:
        reader = GGUFReader(str(path))
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path.name} is not a readable GGUF file: {error}") from error
    metadata = _Metadata(reader, path)
    architecture = metadata.require("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{path.name}: architecture {architecture!r} is not supported, only 'llama'"
        )
    return reader, metadata


def _config(metadata: _Metadata, tied: bool) -> LlamaConfig:
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise CheckpointError(f"RoPE scaling {scaling!r} is not supported by the GGUF import")
    heads = metadata.require("llama.attention.head_count")
    hidden = metadata.require("llama.embedding_length")
    head_dim = metadata.get("llama.attention.key_length", hidden // heads)
    if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError("rotating a part of the head dimension is not supported")
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=metadata.require("llama.feed_forward_length"),
        num_hidden_layers=metadata.require("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=metadata.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=len(metadata.require("tokenizer.ggml.tokens")),
        max_position_embeddings=metadata.require("llama.context_length"),
        # Stored as fp32: 9.9999997e-06 means 1e-05.
        rms_norm_eps=float(f"{metadata.require('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_theta=float(metadata.get("llama.rope.freq_base", 10000.0)),
        tie_word_embeddings=tied,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def _name(gguf_name: str) -> str:
    """``blk.3.attn_q.weight`` to ``model.layers.3.self_attn.q_proj.weight``."""
    parts = gguf_name.split(".")
    if parts[-1] == "weight" and len(parts) == 2 and parts[0] in _MODEL_TENSORS:
        return f"{_MODEL_TENSORS[parts[0]]}.weight"
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _LAYER_TENSORS:
        if parts[3] == "weight":
            return f"model.layers.{parts[1]}.{_LAYER_TENSORS[parts[2]]}.weight"
    raise CheckpointError(f"tensor {gguf_name!r} has no place in a LLaMA model")


def unpermute_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes the row order of GGUF query and key projections.

    GGUF pairs rotated dimensions as neighbours (0, 1), (2, 3) ...; transformers pairs the halves of
    the head, (0, D/2), (1, D/2 + 1) ... (spec 9).

    Args:
        weight: [heads * D, K], D even.
        heads: query heads for the query projection, KV heads for the key projection.

    Returns:
        [heads * D, K], a contiguous copy.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns).contiguous()


def read_gguf(path: str | os.PathLike[str]) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    """Configuration and fp32 weights of a LLaMA-architecture GGUF file.

    Args:
        path: the ``.gguf`` file; any tensor type that ``gguf.quants`` can dequantize.

    Returns:
        The configuration and the state dict of ``LlamaForCausalLM``; without ``lm_head.weight``
        when the file holds no output tensor, in which case the head is tied to the embedding.

    Raises:
        CheckpointError: not a GGUF file, another architecture, or missing, unknown or misshapen
            tensors.
    """
    reader, metadata = _open(path)
    return _read(reader, metadata)


def _read(reader: Any, metadata: _Metadata) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    from gguf.quants import dequantize

    config = _config(metadata, tied=all(t.name != "output.weight" for t in reader.tensors))
    expected = _expected_shapes(config)
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = _name(tensor.name)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if name not in expected or name in state or shape != expected[name]:
            raise CheckpointError(
                f"tensor {tensor.name!r} of shape {shape} does not fit the model, which expects"
                f" {expected.get(name)} once"
            )
        # A copy: fp32 tensors come as read-only views of the mapped file.
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        weight = torch.from_numpy(values).reshape(shape)
        if name.endswith("q_proj.weight"):
            weight = unpermute_rows(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = unpermute_rows(weight, config.num_key_value_heads)
        state[name] = weight
    missing = sorted(expected.keys() - state.keys())
    if missing:
        raise CheckpointError(f"the GGUF file lacks {len(missing)} tensors, first {missing[0]!r}")
    return config, state


def _expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    # Built on the meta device: the model itself says what it needs, at no cost in memory.
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _tokenizer(metadata: _Metadata) -> PreTrainedTokenizerFast:
    kind = metadata.require("tokenizer.ggml.model")
    split = metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or split not in _GPT2_SPLIT:
        raise CheckpointError(
            f"tokenizer {kind!r} with pre-tokenizer {split!r} is not supported: the GGUF import"
            f" knows byte-level BPE ('gpt2') with {', '.join(_GPT2_SPLIT)}"
        )
    tokens = metadata.require("tokenizer.ggml.tokens")
    types = metadata.require("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in metadata.require("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if not len(vocabulary) == len(tokens) == len(types):
        raise CheckpointError("the tokenizer's tokens repeat, or do not match their types")
    for merge in merges:
        if len(merge) != 2 or any(part not in vocabulary for part in (*merge, "".join(merge))):
            raise CheckpointError(f"merge {' '.join(merge)!r} uses tokens outside the vocabulary")
    kinds = list(zip(tokens, types, strict=True))

    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    splitter: Any = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(metadata.get("tokenizer.ggml.add_space_prefix", False)),
        use_regex=True,
    )
    if split in _DIGITS_APART:
        splitter = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), splitter]
        )
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in kinds if k == _CONTROL]
    )
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in kinds if k == _USER_DEFINED])

    def token(key: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and not 0 <= index < len(tokens):
            raise CheckpointError(f"{key} token {index} lies outside the vocabulary")
        return None if index is None else tokens[index]

    bos = token("bos")
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        if bos is None:
            raise CheckpointError("the tokenizer adds a BOS token but the file names none")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, vocabulary[bos])]
        )
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        model_max_length=metadata.require("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    result.chat_template = metadata.get("tokenizer.chat_template")
    return result


@contextmanager
def _folder_at_once(directory: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``directory`` that takes its name when the block ends well."""
    make_dir(directory.parent)
    work = directory.with_name(f".{directory.name}.tmp-{secrets.token_hex(4)}")
    work.mkdir()
    try:
        yield work
        for entry in work.iterdir():
            with open(entry, "rb") as file:
                os.fsync(file.fileno())
        fsync_dir(work)
        # Fails on a folder that is not empty: whoever was first keeps the name.
        os.rename(work, directory)
        fsync_dir(directory.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(
                errno.EEXIST, os.strerror(errno.EEXIST), str(directory)
            ) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)  # gone already after the rename


def convert_gguf(path: str | os.PathLike[str], directory: str | os.PathLike[str]) -> Path:
    """Writes a GGUF file as a transformers folder, all of it or nothing.

    Args:
        path: the ``.gguf`` file.
        directory: the folder to create; it must not exist, or be empty.

    Returns:
        ``directory``, holding ``config.json``, ``generation_config.json``, ``model.safetensors``
        (fp32) and the tokenizer's files.

    Raises:
        CheckpointError: see :func:`read_gguf`; a tokenizer that is not byte-level BPE.
        FileExistsError: ``directory`` holds something; it is left as it is.
    """
    reader, metadata = _open(path)
    tokenizer = _tokenizer(metadata)
    config, state = _read(reader, metadata)
    directory = Path(directory)
    with _folder_at_once(directory) as work:
        config.save_pretrained(work)
        GenerationConfig.from_model_config(config).save_pretrained(work)
        tokenizer.save_pretrained(work)
        save_file(state, work / "model.safetensors", metadata={"format": "pt"})
    return directory

"""Decoder blocks whose norms, rotary embedding and SwiGLU write the codes that the linears read.

    hidden -> norm+quantize -> q, k, v -> rotate+quantize K, V -> attention -> o
           -> add+norm+quantize -> gate, up -> SiLU*up+quantize -> down -> add

Each row is quantized once, where it is produced, and backward keeps int8 codes: less time and less
memory than the same block without quantization. The blocks of a transformers model become these in
place: same objects, children, parameters and names, so that caches, masks, gradient checkpointing
and `generate` work as before. A converted model runs the same blocks on packed linears.

Norms and SiLU are those of the specification, bit for bit what the engine computes; attention is
the library's, on keys and values as a quantized cache gives them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llmqat.config import QATConfig
from llmqat.errors import ConfigError
from llmqat.models import compat
from llmqat.models.families import Family, iter_blocks
from llmqat_kernels import nn as qnn


class FusedAttention(compat.LlamaAttention):
    """Attention from codes of the normed input to the residual stream's addend.

    K and V are quantized before they enter a cache: each once, whoever reads it later.
    """

    quantized_kv: qnn.QuantizedKV

    def forward(
        self,
        hidden_states: qnn.QuantizedRows,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows [B, T, K] -> [B, T, K] and the attention weights where the function gives them."""
        query, key, value = self.quantized_kv(
            self.q_proj(hidden_states),
            self.k_proj(hidden_states),
            self.v_proj(hidden_states),
            *position_embeddings,
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mixed, weights = compat.attention_function(self)(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(mixed.flatten(2)), weights


class FusedDecoderLayer(compat.LlamaDecoderLayer):
    """One block; the sum before the second norm exists once, as that norm's input."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states [B, T, K] and what the model hands to every block -> [B, T, K]."""
        rows, stream = self.input_layernorm(hidden_states)
        mixed, _ = self.self_attn(rows, **kwargs)
        rows, stream = self.post_attention_layernorm(mixed, stream)
        return stream + self.mlp(rows)


FUSED_PARTS: dict[str, type[nn.Module]] = {
    "input_layernorm": qnn.QuantizedRMSNorm,
    "self_attn": FusedAttention,
    "post_attention_layernorm": qnn.QuantizedRMSNorm,
    "mlp": qnn.QuantizedSwiGLU,
}
"""The children of a fused block."""


FUSABLE = ("llama",)
"""The families whose blocks can be fused."""


def check_fusable(model: nn.Module, family: Family, config: QATConfig) -> None:
    """ConfigError unless `config` gives the blocks codes to share, and they are the known ones."""
    config.check_codes("fused")
    if family.name not in FUSABLE:
        raise ConfigError(
            f"fused: blocks of {family.architecture} are not supported, only LlamaForCausalLM's;"
            " leave fused out"
        )
    for name in ("w_bits", "a_bits"):
        if getattr(config, name) > 8:
            raise ConfigError(
                f"fused: needs {name} of at most 8, got {getattr(config, name)}: there are no codes"
                " to share; leave fused out"
            )
    if model.config.hidden_act != "silu":
        raise ConfigError(
            f"fused: activation {model.config.hidden_act!r} is not supported, only silu; leave"
            " fused out"
        )
    for name, block in iter_blocks(model, family):
        if type(block) is not compat.LlamaDecoderLayer:
            raise ConfigError(
                f"fused: {name} is a {type(block).__name__}, not the library's own block; leave"
                " fused out"
            )


def fuse_blocks(model: nn.Module, family: Family, config: QATConfig) -> None:
    """Let the blocks, whose linears are quantized already, share codes; and give the model the
    specification's last norm.
    """
    for _, block in iter_blocks(model, family):
        attention, mlp = block.self_attn, block.mlp
        for norm, bits in (
            (block.input_layernorm, attention.q_proj.bits),
            (block.post_attention_layernorm, mlp.gate_proj.bits),
        ):
            qnn.QuantizedRMSNorm.adopt(norm, bits, norm.variance_epsilon)
        kv = qnn.QuantizedKV(attention.head_dim, config.kv_bits, config.kv_mode, config.ste_clip)
        qnn.become(attention, FusedAttention, quantized_kv=kv)
        qnn.QuantizedSwiGLU.adopt(mlp)
        qnn.become(block, FusedDecoderLayer)
    norm = model.get_submodule(family.norm)
    qnn.RMSNorm.adopt(norm, norm.variance_epsilon)
    compat.keep_blocks_whole(model, FusedDecoderLayer.__name__)

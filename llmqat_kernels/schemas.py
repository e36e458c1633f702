"""The one list of operators: name -> schema.

Public operators live in the torch namespace ``llmqat::``; a native backend registers the same
schema strings under ``llmqat_cpu::`` / ``llmqat_cuda::``. Shapes (spec paragraph in brackets):

* rows: any tensor whose last dimension is the row; ``scale`` drops the last dimension, or replaces
it
  by the number of groups when ``group_size > 0``.                                       [1-6]
* GEMM: ``y[M, N] = a[M, K] @ w[N, K].T``; ``w`` is int8 codes [N, K] or packed uint8 [N,
ceil(K/2)]. [7, 8]
* integer groups: as GEMM; ``a`` may be packed uint8 [M, ceil(K/2)] where its codes have 4 bits. [8, 18]
* KV cache: ``k_codes, v_codes`` [S, Hkv, T, D] int8 (8 bit), [S, Hkv, T, D/2] uint8 (4 bit) or
  [S, Hkv, T, D] float (16 bit); ``k_scale, v_scale`` fp32 [S, Hkv, T] (serving) or [S, T] (paper);
  ``cos, sin`` [T, D/2]; ``slots, positions, lengths`` int64 [n].                          [9]
"""

SCHEMAS: dict[str, str] = {
    # rows
    "quantize": "(Tensor x, int bits, int group_size=-1, bool bf16_scale=False) -> (Tensor, Tensor)",
    "dequantize": "(Tensor codes, Tensor scale, int group_size, ScalarType dtype) -> Tensor",
    "fake_quantize": "(Tensor x, int bits, int group_size=-1, float? ste_clip=None, bool bf16_scale=False) -> Tensor",
    "fake_quantize_channels": "(Tensor x, int bits, int group_size, float? ste_clip=None) -> Tensor",
    "fake_quantize_backward": "(Tensor grad, Tensor x, float? ste_clip) -> Tensor",
    "pack_int4": "(Tensor codes) -> Tensor",
    "unpack_int4": "(Tensor packed, int columns) -> Tensor",
    # linears
    "int_matmul": "(Tensor a, Tensor w, int w_bits) -> Tensor",
    "quantized_matmul": (
        "(Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias, int w_bits, int group_size,"
        " ScalarType dtype) -> Tensor"
    ),
    "quantized_linear": (
        "(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, int w_bits, int a_bits, int group_size=-1) -> Tensor"
    ),
    "qat_linear": (
        "(Tensor x, Tensor weight, Tensor w_codes, Tensor w_scale, Tensor? bias, int a_bits,"
        " int group_size=-1, float? ste_clip=None) -> (Tensor, Tensor, Tensor)"
    ),
    "qat_matmul": (
        "(Tensor x, Tensor a, Tensor a_scale, Tensor weight, Tensor w_codes, Tensor w_scale, Tensor? w_multiplier,"
        " Tensor? bias, int group_size=-1, float? ste_clip=None) -> Tensor"
    ),
    "qat_matmul_backward_input": "(Tensor grad, Tensor w_codes, Tensor w_scale, int group_size) -> Tensor",
    "qat_matmul_backward_weight": "(Tensor grad, Tensor a, Tensor a_scale, ScalarType dtype) -> Tensor",
    "quantize_integer_groups": "(Tensor x, int bits, int group_size) -> (Tensor, Tensor, Tensor)",
    "integer_group_matmul": (
        "(Tensor a, Tensor a_scale, Tensor w, Tensor w_multiplier, Tensor w_scale, Tensor? bias, int group_size,"
        " ScalarType dtype) -> Tensor"
    ),
    "repack_weight": "(Tensor w, int w_bits) -> Tensor",
    "repacked_matmul": (
        "(Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias, int n, int w_bits, int group_size,"
        " ScalarType dtype) -> Tensor"
    ),
    "repacked_matmul_silu_mul": (
        "(Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias, int n, int w_bits, int group_size,"
        " ScalarType dtype) -> Tensor"
    ),
    "repacked_matmul_add": (
        "(Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias, Tensor residual, int n, int w_bits,"
        " int group_size) -> Tensor"
    ),
    "repacked_linear": (
        "(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, int n, int w_bits, int group_size) -> Tensor"
    ),
    "repacked_linear_add": (
        "(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, Tensor residual, int n, int w_bits, int group_size)"
        " -> Tensor"
    ),
    "float_matmul": "(Tensor x, Tensor w, Tensor? bias, int n) -> Tensor",
    # producers: normalisation and activation fused with quantization
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "rms_norm_quantize": (
        "(Tensor x, Tensor weight, float eps, int bits, Tensor? residual=None) -> (Tensor, Tensor, Tensor)"
    ),
    "rms_norm_quantize_train": (
        "(Tensor x, Tensor weight, float eps, int bits, Tensor? residual=None, bool values=True)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "rms_norm_backward": (
        "(Tensor grad, Tensor x, Tensor weight, float eps, Tensor? grad_total=None) -> (Tensor, Tensor)"
    ),
    "silu_mul": "(Tensor gate, Tensor up) -> Tensor",
    "silu_mul_quantize": "(Tensor gate, Tensor up, int bits) -> (Tensor, Tensor)",
    "silu_mul_quantize_train": (
        "(Tensor gate, Tensor up, int bits, bool values=True) -> (Tensor, Tensor, Tensor)"
    ),
    "silu_mul_qat_matmul": (
        "(Tensor gate, Tensor up, int a_bits, Tensor weight, Tensor w_codes, Tensor w_scale, Tensor? w_multiplier,"
        " Tensor? bias, int group_size=-1, float? ste_clip=None) -> Tensor"
    ),
    "silu_mul_backward": "(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    # attention
    "rope": "(Tensor x, Tensor cos, Tensor sin, Tensor positions) -> Tensor",
    "rope_fake_quantize": (
        "(Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, int bits, bool pre_rope,"
        " float? ste_clip=None) -> (Tensor, Tensor)"
    ),
    "rope_quantize_append": (
        "(Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_codes, Tensor(b!) k_scale,"
        " Tensor(c!) v_codes, Tensor(d!) v_scale, Tensor slots, Tensor positions, int bits, bool pre_rope) -> ()"
    ),
    "attention_decode": (
        "(Tensor q, Tensor k_codes, Tensor k_scale, Tensor v_codes, Tensor v_scale, Tensor cos, Tensor sin,"
        " Tensor slots, Tensor lengths, float scaling, int bits, bool pre_rope) -> Tensor"
    ),
    # the same over pages of 64 tokens: k_codes, v_codes [P, Hkv, 64, ...], page_table int32 [S, pages]
    "rope_quantize_append_paged": (
        "(Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_codes, Tensor(b!) k_scale,"
        " Tensor(c!) v_codes, Tensor(d!) v_scale, Tensor page_table, Tensor slots, Tensor positions,"
        " int bits, bool pre_rope) -> ()"
    ),
    # rope_quantize_append of k and v, and the rotated queries of q
    "rope_quantize_append_queries": (
        "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_codes, Tensor(b!) k_scale,"
        " Tensor(c!) v_codes, Tensor(d!) v_scale, Tensor? page_table, Tensor slots, Tensor positions,"
        " int bits, bool pre_rope) -> Tensor"
    ),
    "attention_decode_paged": (
        "(Tensor q, Tensor k_codes, Tensor k_scale, Tensor v_codes, Tensor v_scale, Tensor page_table,"
        " Tensor cos, Tensor sin, Tensor slots, Tensor lengths, int max_length, float scaling, int bits,"
        " bool pre_rope) -> Tensor"
    ),
    "attention_decode_quantize": (
        "(Tensor q, Tensor k_codes, Tensor k_scale, Tensor v_codes, Tensor v_scale, Tensor? page_table,"
        " Tensor cos, Tensor sin, Tensor slots, Tensor lengths, int max_length, float scaling, int bits,"
        " bool pre_rope, int a_bits) -> (Tensor, Tensor, Tensor)"
    ),
    # distillation and sampling
    "distillation_loss": (
        "(Tensor student_hidden, Tensor student_head, Tensor teacher_hidden, Tensor teacher_head,"
        " Tensor? valid=None, int chunk_size=1024) -> (Tensor, Tensor, Tensor)"
    ),
    "distillation_loss_logits": (
        "(Tensor student_logits, Tensor teacher_logits, Tensor? valid=None, int chunk_size=1024) -> (Tensor, Tensor)"
    ),
    "distillation_loss_top_k": (
        "(Tensor student_hidden, Tensor student_head, Tensor probabilities, Tensor tokens, Tensor? valid=None,"
        " int chunk_size=1024) -> (Tensor, Tensor, Tensor)"
    ),
    "sample": (
        "(Tensor logits, Tensor record, Tensor step, Tensor greedy, int seed, float temperature=1.0, int top_k=0)"
        " -> Tensor"
    ),
}

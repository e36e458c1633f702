"""The engine against transformers' forward of the same model, and against itself."""

from __future__ import annotations

import copy

import pytest
import torch

import llmqat_kernels as qk
from llmqat.checkpoint import from_pretrained, save_pretrained
from llmqat.config import QATConfig
from llmqat.convert import convert, prepare
from llmqat.errors import ConfigError
from llmqat.models.families import find_family, iter_linears
from llmqat.runtime import Engine, Request, Sampling, run_requests
from llmqat_kernels import native
from llmqat_kernels.errors import InvalidArgumentType
from tests.llmqat.tiny import random_tokens, tiny_llama

SETTINGS = ["16-16-16", "8-8-8", "4-8-4", "4-8-16", "4-6-8", "4-16-16", "16-8-16"]


def quantized(model, setting, mode="paper", packed=True, **fields):
    """A copy of ``model``, prepared and (where there is anything to pack) converted."""
    config = QATConfig.parse(setting, kv_mode=mode, **fields)
    model = prepare(copy.deepcopy(model), config)
    return convert(model) if packed and config.weight.enabled else model


def all_logits(engine, tokens):
    """Logits of every position, by feeding one token at a time."""
    return torch.stack([engine.decode([token], [0])[0] for token in tokens])


@pytest.mark.parametrize("mode", ["paper", "serving"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_logits_equal_transformers(backend, setting, mode):
    model = quantized(tiny_llama(1), setting, mode)
    tokens = random_tokens(3, 1, 24)
    with torch.no_grad():
        expected = model(tokens).logits[0]
    got = all_logits(Engine(model, max_len=32), tokens[0].tolist())
    # Float norms, RoPE and softmax round differently here and there; a code that flips at a tie
    # costs a step of its grid, so quantized settings are compared more loosely and by their choice.
    tolerance = 1e-4 if setting == "16-16-16" else 0.2
    assert (got - expected).abs().max() < tolerance * expected.abs().max()
    assert (got.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95


@pytest.mark.parametrize(
    "fields", [{"tied": True}, {"bias": True}, {"kv_heads": 4}, {"kv_heads": 1}]
)
@pytest.mark.parametrize("setting", ["16-16-16", "4-8-8"])
def test_model_shapes(backend, setting, fields):
    model = quantized(tiny_llama(2, **fields), setting)
    tokens = random_tokens(4, 1, 12)
    with torch.no_grad():
        expected = model(tokens).logits[0]
    got = all_logits(Engine(model, max_len=16), tokens[0].tolist())
    assert (got.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


def test_llama3_rope_scaling(backend):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny_llama(5, rope_parameters=rope)
    tokens = random_tokens(6, 1, 40)
    with torch.no_grad():
        expected = model(tokens).logits[0]
    got = all_logits(Engine(model, max_len=64), tokens[0].tolist())
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "setting,fields", [("8-8-8", {}), ("4-8-4", {}), ("4-6-8", {"group_size": 32})]
)
def test_linears_bit_equal(backend, dtype, setting, fields):
    """The fused product equals each module of the converted model, bit for bit, on the same
    input.
    """
    model = quantized(tiny_llama(7, bias=True), setting, **fields).to(dtype)
    engine = Engine(model, max_len=8)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    block = engine.weights.blocks[0]
    x = torch.randn(5, attention.q_proj.in_features, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )
    wide = torch.randn(5, mlp.down_proj.in_features, generator=torch.Generator().manual_seed(2)).to(
        dtype
    )
    for _, _, module in iter_linears(model, find_family(model)):
        # k and v fake-quantize their output in the model; the engine does that as it writes the
        # cache.
        module.spec = type(module.spec)(module.spec.weight, module.spec.activation)
    for linear, modules, value in (
        (block.qkv, (attention.q_proj, attention.k_proj, attention.v_proj), x),
        (block.o, (attention.o_proj,), x),
        (block.gate_up, (mlp.gate_proj, mlp.up_proj), x),
        (block.down, (mlp.down_proj,), wide),
    ):
        with torch.inference_mode():
            got = engine.forward.linear(linear, value)
            expected = torch.cat([module(value) for module in modules], dim=-1)
        assert linear.integer and got.dtype == dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", ["paper", "serving"])
def test_prepared_equals_converted(backend, mode):
    base = tiny_llama(8)
    tokens = random_tokens(9, 1, 10)[0].tolist()
    prepared = Engine(quantized(base, "4-8-4", mode, packed=False), max_len=16)
    packed = Engine(quantized(base, "4-8-4", mode), max_len=16)
    assert torch.equal(all_logits(prepared, tokens), all_logits(packed, tokens))
    for a, b in zip(prepared.caches, packed.caches, strict=True):
        assert torch.equal(a.k_codes, b.k_codes) and torch.equal(a.v_scale, b.v_scale)


def test_two_thousand_positions_prepared_and_reloaded(backend, tmp_path):
    """Served from the prepared model and from the packed folder: the same tokens at every
    position.
    """
    prepared = quantized(tiny_llama(19), "4-8-4", packed=False)
    save_pretrained(quantized(tiny_llama(19), "4-8-4"), tmp_path / "packed")
    reloaded = from_pretrained(tmp_path / "packed")
    prompts = [[i + 1, i + 2] for i in range(16)]
    expected, got = (
        Engine(model, max_slots=16, max_len=127).generate(prompts, 125)
        for model in (prepared, reloaded)
    )
    assert sum(len(done.new_tokens) for done in expected) == 2000
    assert [done.tokens for done in got] == [done.tokens for done in expected]


@pytest.mark.parametrize("setting", ["16-16-16", "4-8-8"])
def test_greedy_tokens_equal_transformers(backend, setting):
    model = quantized(tiny_llama(10), setting)
    engine = Engine(model, max_slots=2, max_len=64)
    prompts = [[5, 6, 7], [9], [3, 1, 4, 1, 5]]
    same = total = 0
    for prompt, done in zip(prompts, engine.generate(prompts, 24), strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
        )
        same += sum(a == b for a, b in zip(done.tokens, expected[0].tolist(), strict=True))
        total += len(done.tokens)
        assert done.tokens[: len(prompt)] == prompt and done.finish_reason == "length"
    assert same / total > 0.9


@pytest.mark.parametrize("setting", ["16-16-16", "4-8-4"])
def test_rows_do_not_depend_on_each_other(setting):
    """CPU only (spec 17): batches, chunks of a prompt and slots give the same bits."""
    with qk.use_backend("auto"):
        model = quantized(tiny_llama(11), setting)
        alone, together = Engine(model, max_len=64), Engine(model, max_slots=3, max_len=64)
        if set(alone.backends().values()) != {"cpu"}:
            pytest.skip("needs the cpu backend for every operator")
        prompts = [random_tokens(i, 1, 7 + 6 * i)[0].tolist() for i in range(3)]
        together.extend([2, 0, 1], prompts)
        after = together.decode([1, 2, 3], [2, 0, 1])
        for i, prompt in enumerate(prompts):
            alone.reset()
            for token in prompt:
                alone.decode([token], [0])
            assert torch.equal(alone.decode([i + 1], [0])[0], after[i])


@pytest.mark.parametrize("setting", ["16-16-16", "4-8-4", "16-8-16"])
def test_blocks_are_fused_where_a_native_call_exists(backend, setting):
    model = quantized(tiny_llama(20), setting, "serving")
    assert Engine(model, max_len=16).forward.fused == (backend == "cpu" and setting == "4-8-4")
    assert not Engine(model, max_len=16, fuse=False).forward.fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("fields", [{}, {"bias": True, "kv_heads": 4}], ids=str)
@pytest.mark.parametrize("mode", ["paper", "serving"])
@pytest.mark.parametrize("setting", ["4-8-8", "8-8-4", "4-8-16"])
def test_fused_blocks_give_the_same_bits(setting, mode, fields, mixed, dtype):
    if not native.is_available():
        pytest.skip(native.why_not())
    plain = tiny_llama(22, layers=3, **fields)
    model = quantized(plain, setting, mode, packed=False)
    if mixed:  # the middle block has a float linear: two native calls around it
        model.model.layers[1].mlp.down_proj = copy.deepcopy(plain.model.layers[1].mlp.down_proj)
    model.to(dtype)
    engines = [Engine(model, max_slots=2, max_len=40, fuse=fuse) for fuse in (False, True)]
    assert [engine.forward.fused for engine in engines] == [False, True]
    assert len(engines[1].forward._steps) == (3 if mixed else 1)
    prompts = [random_tokens(7, 1, 17)[0].tolist(), [3]]
    for step in (
        lambda engine: engine.prefill([0, 1], prompts),
        lambda engine: engine.decode([5], [1]),
        lambda engine: engine.decode([6, 7], [1, 0]),
    ):
        composed, fused = map(step, engines)
        assert torch.equal(composed, fused)
    for a, b in zip(*(engine.caches for engine in engines), strict=True):
        assert torch.equal(a.k_codes, b.k_codes) and torch.equal(a.v_codes, b.v_codes)
        assert torch.equal(a.k_scale, b.k_scale) and torch.equal(a.v_scale, b.v_scale)


def test_eight_bit_head(backend):
    model = tiny_llama(21, tied=True)
    exact, small = Engine(model, max_len=8), Engine(model, max_len=8, head_bits=8)
    assert small.weight_bytes["head"] < 0.4 * exact.weight_bytes["head"]
    a, b = (engine.prefill([0], [[1, 2, 3]]) for engine in (exact, small))
    assert 0 < (a - b).abs().max() < 0.1 * a.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "setting,fields", [("4-8-4", {}), ("8-8-8", {"tied": True}), ("16-16-16", {})]
)
def test_screened_head_gives_the_same_tokens(setting, fields, dtype):
    if not native.is_available():
        pytest.skip(native.why_not())
    model = quantized(tiny_llama(23, vocab=2000, **fields), setting).to(dtype)
    plain, screened = (
        Engine(model, max_slots=3, max_len=48, screen_head=screen) for screen in (None, True)
    )
    assert not plain.screens and "head screen" not in plain.weight_bytes
    assert screened.screens and screened.weight_bytes["head screen"] > 2000 * 64
    prompts = random_tokens(24, 5, 6, 2000).tolist()
    assert [d.tokens for d in screened.generate(prompts, 40)] == [
        d.tokens for d in plain.generate(prompts, 40)
    ]
    requests = [Request(i, tuple(prompt), 40, n_greedy=3 * i) for i, prompt in enumerate(prompts)]
    mixed, expected = (  # some steps greedy, some drawn, some both
        sorted((d.request.record, tuple(d.tokens)) for step in steps for d in step)
        for steps in (run_requests(e, requests, Sampling(seed=1)) for e in (screened, plain))
    )
    assert mixed == expected


def test_screen_only_where_it_can_be():
    if not native.is_available():
        pytest.skip(native.why_not())
    large = tiny_llama(25, vocab=8192, layers=1)
    assert Engine(large, max_len=8).screens
    assert not Engine(large, max_len=8, screen_head=False).screens
    assert not Engine(large, max_len=8, head_bits=8).screens
    with qk.use_backend("reference"):
        assert not Engine(large, max_len=8).screens
        with pytest.raises(ConfigError, match="screen_head: needs the cpu backend"):
            Engine(large, max_len=8, screen_head=True)
    with pytest.raises(ConfigError, match="screen_head: needs the cpu backend"):
        Engine(large, max_len=8, screen_head=True, head_bits=8)
    with pytest.raises(qk.InvalidArgument, match="no screen of its head"):
        Engine(large, max_len=8, screen_head=False).extend_greedy([0], [[1]])
    assert Engine(large, max_len=8).extend_greedy([], []) == []
    with torch.no_grad():
        large.lm_head.weight[5, 5] = float("nan")
    assert not Engine(large, max_len=8).screens


def test_screened_engine_ends_a_sequence_without_logits():
    if not native.is_available():
        pytest.skip(native.why_not())
    model = tiny_llama(18)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    engine = Engine(model, max_slots=2, max_len=16, screen_head=True)
    done = engine.generate([[1, 7], [1, 2]], 4)
    assert done[0].finish_reason == "error" and done[0].new_tokens == []


# What generate takes


def test_generate_takes_a_tensor_of_prompts():
    engine, prompts = Engine(tiny_llama()), [[1, 2, 3], [4, 5, 6]]
    wanted = [done.tokens for done in engine.generate(prompts, 3)]
    for dtype in (torch.int64, torch.int32):
        ids = torch.tensor(prompts, dtype=dtype)
        assert [done.tokens for done in engine.generate(ids, 3)] == wanted


@pytest.mark.parametrize(
    "prompts, got",
    [
        ([1, 2, 3], "one of int"),
        (3, "int"),
        ("text", "str"),
        (["text"], "one of str"),
        ({"input_ids": [[1]]}, "dict"),
        ([torch.tensor([1, 2])], "one of Tensor"),
        (torch.tensor([1, 2]), r"torch.int64 \(2,\)"),
        (torch.ones(1, 2), r"torch.float32 \(1, 2\)"),
        (torch.ones(1, 2, dtype=torch.bool), r"torch.bool \(1, 2\)"),
    ],
    ids=str,
)
def test_generate_names_what_prompts_are(prompts, got):
    says = f"^prompts: expected a list of lists of token ids.*, got {got}$"
    with pytest.raises(InvalidArgumentType, match=says):
        Engine(tiny_llama()).generate(prompts, 3)


def test_generate_names_a_sampling_that_is_none():
    with pytest.raises(InvalidArgumentType, match=r"^sampling: expected Sampling, got dict$"):
        Engine(tiny_llama()).generate([[1]], 3, sampling={"seed": 0})
    with pytest.raises(InvalidArgumentType, match=r"^sampling: expected Sampling, got NoneType$"):
        next(Engine(tiny_llama()).run([Request(0, (1,), 4)], None))

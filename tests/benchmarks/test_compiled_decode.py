"""The baseline decoder computes what the model computes."""

import pytest
import torch
import torch.nn.functional as F

import llmqat_kernels as qk
from benchmarks.compiled_decode import PlainDecoder, block_step
from benchmarks.random_model import config_of, float_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[2, 1], ids=["MHA", "GQA"])
def model(request):
    config = config_of("tiny")
    config.num_key_value_heads = request.param
    found = float_model(config, CPU)
    for parameter in found.parameters():  # sharper than at initialization: no ties of the argmax
        if parameter.dim() > 1:
            parameter.mul_(6)
    return found


def decode(model, prompts, count, int4):
    """The prompts fed token by token, then ``count`` greedy tokens of each."""
    decoder = PlainDecoder(model, len(prompts), 24, int4=int4, compiles=False)
    fed = list(zip(*prompts, strict=True))
    for position, tokens in enumerate(fed):
        decoder.start(list(tokens), position)
        chosen = [decoder.step().tolist()]
    chosen += [decoder.step().tolist() for _ in range(count - 1)]
    return [list(row) for row in zip(*chosen, strict=True)]


def test_greedy_tokens_are_those_of_transformers(model):
    prompts = [[5, 9, 77], [200, 3, 1]]
    ids = torch.tensor(prompts)
    wanted = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
    )
    assert decode(model, prompts, 5, int4=False) == wanted[:, 3:].tolist()


def test_int4_is_the_model_with_rounded_linears(model):
    """The same tokens as bf16 weights that hold the 4-bit values."""
    rounded = float_model(model.config, CPU)
    rounded.load_state_dict(model.state_dict())
    for name, parameter in rounded.named_parameters():
        if "layers" in name and parameter.dim() == 2:
            codes, scale = qk.quantize(parameter.data, 4)
            parameter.data = (codes * scale.bfloat16().unsqueeze(1)).bfloat16()
    prompts = [[5, 9, 77, 30]]
    assert decode(model, prompts, 1, True) == decode(rounded, prompts, 1, False)


def test_the_block_is_one_graph_for_all_blocks(model):
    """torch.compile on a GPU must not fall back to eager parts, nor compile every block; the
    tracing is the same here.
    """
    decoder = PlainDecoder(model, 2, 8, int4=False, compiles=False)
    x = F.embedding(torch.tensor([1, 2]), decoder.embedding)
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    rest = (decoder._cos[0], decoder._sin[0], torch.tensor([3]), mask, decoder.dim, 1e-6)
    expected = block_step(x, decoder.blocks[0], *rest)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(block_step, fullgraph=True, dynamic=False, backend=backend)
    with torch.inference_mode():
        assert torch.equal(compiled(x, decoder.blocks[0], *rest), expected)
        other = block_step(x, decoder.blocks[1], *rest)
        assert torch.equal(compiled(x, decoder.blocks[1], *rest), other)
    assert len(graphs) == 1

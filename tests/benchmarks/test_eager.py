"""What the eager baselines move: the bars of the fake quantizer suppose about 32 bytes a value."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import eager

BITS = 4


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write; a value that stands for a row counts once."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if not op.is_view and op is not torch.ops.aten.detach.default:
            tensors = (x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor))
            self.bytes += sum(
                x.untyped_storage().nbytes() if 0 in x.stride() else x.nbytes for x in tensors
            )
        return result


@pytest.mark.parametrize(
    ("quantizer", "forward", "backward"),
    [
        (eager.fake_quantize, 34, 0),
        (eager.PublishedFakeQuantize.apply, 32, 14),
        (eager.PaperFakeQuantize.apply, 18, 0),
    ],
    ids=["detach", "published", "lean"],
)
def test_bytes_a_value(quantizer, forward, backward):
    x = torch.randn(64, 4096, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.ones(64, 4096, dtype=torch.bfloat16)
    with Traffic() as there:
        y = quantizer(x, BITS)
    with Traffic() as back:
        torch.autograd.grad(y, x, upstream)
    assert [round(t.bytes / x.numel()) for t in (there, back)] == [forward, backward]


@pytest.mark.parametrize(
    "quantizer", [eager.PublishedFakeQuantize.apply, eager.PaperFakeQuantize.apply]
)
def test_spellings_agree(quantizer):
    x = torch.randn(16, 256)
    torch.testing.assert_close(quantizer(x, BITS), eager.fake_quantize(x, BITS))

"""Quantized training in a plain PyTorch loop: a Hugging Face LLaMA, then a model of one's own.

python examples/drop_in.py
"""

import copy

import llmqat  # before torch: it sets passive OpenMP waiting
import llmqat_kernels as qk
from llmqat_kernels import nn as qnn

# isort: split
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, SIZE, HEADS = 64, 64, 4


def fit(name, model, loss_of):
    """The loop: nothing in it knows about quantization."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(40):
        start = torch.randint(VOCAB, (8, 1))
        loss = loss_of((start + 3 * torch.arange(32)) % VOCAB)  # sequences that count in threes
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")


def distil():
    """Level 1: one call makes a Hugging Face model train through quantization."""
    sizes = {"vocab_size": VOCAB, "hidden_size": SIZE, "intermediate_size": 4 * SIZE}
    shape = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "initializer_range": 0.3}
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, **shape)).eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    llmqat.prepare(student, llmqat.QATConfig.parse("4-8-4"), fused=True)

    def loss_of(ids):
        return qk.distillation_loss_logits(student(ids).logits, teacher(ids).logits)

    fit("LLaMA of Hugging Face", student, loss_of)


class Decoder(nn.Module):
    """Level 2: one's own block; every tensor is quantized once, where it is made."""

    def __init__(self, bits):
        super().__init__()
        widths = [(SIZE, SIZE)] * 4 + [(SIZE, 4 * SIZE)] * 2 + [(4 * SIZE, SIZE)]
        linears = [qnn.QATLinear(k, n, bias=False, bits=bits) for k, n in widths]
        self.embed, self.head = nn.Embedding(VOCAB, SIZE), nn.Linear(SIZE, VOCAB)
        self.first, self.second = (qnn.QuantizedRMSNorm(SIZE, bits) for _ in range(2))
        self.q, self.k, self.v, self.out = linears[:4]
        self.mlp = qnn.QuantizedSwiGLU(*linears[4:])
        self.kv = qnn.QuantizedKV(SIZE // HEADS, bits=8)
        self.angles = torch.arange(32)[None, :, None] * torch.logspace(0, -3, SIZE // HEADS // 2)

    def forward(self, ids):
        rows, x = self.first(self.embed(ids))
        angles = self.angles[:, : ids.shape[1]]
        q, k, v = self.kv(self.q(rows), self.k(rows), self.v(rows), angles.cos(), angles.sin())
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        rows, x = self.second(self.out(mixed.transpose(1, 2).flatten(2)), x)
        return self.head(x + self.mlp(rows))


if __name__ == "__main__":
    torch.manual_seed(0)
    distil()
    model = Decoder(qnn.LinearBits(w_bits=4, a_bits=8))
    fit("own", model, lambda ids: F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:]))

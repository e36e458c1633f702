"""The full-precision side of the comparison: ``transformers`` ``generate``, batch 1, greedy, fp32
and bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def decode_speed(
    model: PreTrainedModel, input_ids: torch.Tensor, new_tokens: int
) -> tuple[float, list[int]]:
    """Tokens per second of the decode phase alone (prefill timed apart and subtracted), and the
    new ids.
    """

    def timed(count: int) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        out = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        return time.perf_counter() - start, out

    timed(1)
    prefill, _ = timed(1)
    total, out = timed(new_tokens)
    return (new_tokens - 1) / (total - prefill), out[0, input_ids.shape[1] :].tolist()


def main(argv: Sequence[str] | None = None) -> None:
    """Print one JSON object with the speed in both dtypes, the text and the bytes of the
    weights.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--greedy", action="store_true", help="accepted for symmetry; decoding is always greedy"
    )
    parser.add_argument(
        "--json", action="store_true", help="accepted for symmetry; output is always JSON"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    input_ids = torch.tensor([tokenizer(args.prompt)["input_ids"]])
    result: dict[str, Any] = {"threads": args.threads, "tokens_per_second": {}, "weight_bytes": {}}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
        with torch.inference_mode():
            speed, ids = decode_speed(model, input_ids, args.max_new_tokens)
        result["tokens_per_second"][name] = speed
        result["weight_bytes"][name] = sum(p.nbytes for p in model.parameters())
        result.setdefault("text", tokenizer.decode(ids))
    print(json.dumps(result))


if __name__ == "__main__":
    main()

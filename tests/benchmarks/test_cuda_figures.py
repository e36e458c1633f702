"""Figures of quantized generation: nothing measured, made-up results, missed bars, failed gates."""

import json

import pytest

from benchmarks import cells, cuda_figures, cuda_pages, records, report
from benchmarks.attention import FORMS
from benchmarks.gemm import CUBLAS, LAYERS

HERE = {"time": "2026-01-01T00:00:00", "commit": "abc", "processor": "NVIDIA H200", "isa": ""}
HERE |= {"torch": "2.13.0", "triton": "3.6.0", "driver": "1.2"}


def row(part, cell, candidate, role, p50, share=90.0, gate="passed"):
    label = " ".join(f"{key}={value}" for key, value in cell.items())
    found = HERE | {"part": part, "cell": label, "candidate": candidate, "role": role, "gate": gate}
    if not gate.startswith("failed"):
        found |= {"p50_us": f"{p50}", "percent_of_copy": f"{share}"}
    return found


def write(folder, ours=10.0, share=90.0, gate="passed"):
    """Every figure of the table: cuBLAS takes 35 us, humming 15, bf16 attention 40."""
    products, attentions = [], []
    for layer in LAYERS:
        for m in (1, 16, 4096):
            cell = {"model": "llama-7b", "layer": layer, "M": m}
            for name, role, time in (
                ("cuda W4A8", "ours", ours),
                ("cuda W4A8 + quantize", "ours", ours),
                ("triton W4A8", "ours", 30.0),
                (CUBLAS, "baseline", 35.0),
                ("humming W4A8", "baseline", 15.0),
            ):
                ok = gate if name == "cuda W4A8" and m == 16 else "passed"
                products.append(row("gemm", cell, name, role, time, share, ok))
    for context in (1024, 8192):
        cell = {"heads": "MHA", "context": context, "batch": 1}
        for bits, mode in FORMS:
            time = 18.0 if bits == 8 else 11.0
            attentions.append(row("attention", cell, f"cuda KV{bits} {mode}", "ours", time))
        for name, time in (("SDPA flash", 40.0), ("SDPA efficient", 90.0)):
            attentions.append(row("attention", cell, name, "baseline", time))
    records.append(folder / "gemm_cuda.csv", products, cells.COLUMNS)
    records.append(folder / "attention_cuda.csv", attentions, cells.COLUMNS)
    rates = {"llmqat W4A8KV8": 900.0, "compiled int4": 450.0, "transformers bf16": 40.0}
    rates["llmqat W4A8KV8, CUDA C++ first"] = 990.0
    decode = {
        "tokens_per_second": {n: {"p50": r, "p20": r, "p80": r} for n, r in rates.items()},
        "ratios": {"compiled int4": 2.0, "transformers bf16": 22.5},
        "ratios_of_cuda": {"compiled int4": 2.2, "transformers bf16": 24.75},
        "share_of_bound": 0.76,
        "share_of_bound_cuda": 0.83,
        "notes": {"transformers bf16, static cache": "left out: --budget"},
        "bound": {"KV8": 1189.0},
    }
    prefill = {"tokens_per_second": {"llmqat W4A8KV8": {"p50": 9000.0}}, "notes": {}}
    found = {"batches": {"1": decode}, "prefill": prefill, "environment": HERE}
    (folder / "decode_7b_cuda.json").write_text(json.dumps(found))
    generation = {
        "model": "llama-7b", "max_len": 512,
        "ratio_to_baseline": {"llmqat, 64 slots": 60.0, "llmqat, KV8 (approximate)": 90.0},
        "tokens_per_second": {"llmqat, 64 slots": {"p50": 2000.0}},
    }  # fmt: skip
    (folder / "generate_data_cuda.json").write_text(json.dumps(generation))
    equal = {"differences": 0, "cases": 900, "batch_checks": 80}
    (folder / "equality_cuda_cuda.json").write_text(json.dumps(equal))


def table(folder):
    return cuda_figures.table(folder, report.read_result)


def test_nothing_measured(tmp_path):
    text = table(tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(lines) == len(cuda_figures.FIGURES)
    assert sum("not yet measured on a GPU" in line for line in lines) == len(lines) - 2
    assert "1.998x (bytes as allocated" in text and "3.992x" in text
    assert text.endswith("not yet measured on a GPU (all of it: `make bench-gpu`).")
    assert "bar missed" not in text


def test_everything_measured(tmp_path):
    write(tmp_path)
    text = table(tmp_path)
    assert "not yet measured" not in text and "bar missed" not in text
    assert "3.50x (M=1) to 3.50x, cuda W4A8 |" in text and "1.50x (M=1)" in text
    assert "90 % (down, M=1) to 90 %, cuda W4A8" in text
    assert "2.22x (8192 x 1)" in text and "3.64x (8192 x 1)" in text
    assert "900 tok/s on NVIDIA H200, 76 % of its memory limit" in text
    assert "990 tok/s on NVIDIA H200, 83 % of its memory limit" in text
    assert "| 2.00x, CUDA C++ first 2.20x |" in text and "22.50x, CUDA C++ first 24.75x" in text
    assert "60.0x (64 slots, llama-7b" in text
    assert "0 in 900 cases" in text
    assert "0 differences in 36 products of M = 1 to 4096" in text
    assert "NVIDIA H200, torch 2.13.0, triton 3.6.0, driver 1.2, commits abc." in text


def test_missed_bars_are_marked_and_newer_rows_count(tmp_path):
    write(tmp_path)
    write(tmp_path, ours=14.0, share=50.0)
    missed = [line for line in table(tmp_path).splitlines() if "bar missed" in line]
    assert len(missed) == 4 and "2.50x (M=1)" in missed[0] and "1.07x" in missed[1]
    assert all("50 %" in line for line in missed[2:])


def test_a_failed_gate_is_said_where_a_bar_would_be(tmp_path):
    write(tmp_path, gate="failed: rows")
    lines = [line for line in table(tmp_path).splitlines() if "gate failed: rows" in line]
    assert len(lines) == 4 and all("M=16" in line and "bar missed" in line for line in lines)


def test_triton_is_shown_where_there_is_no_cuda_kernel(tmp_path):
    cell = {"model": "llama-7b", "M": 1}
    rows = [
        row("gemm", cell | {"layer": layer}, name, role, time)
        for layer in LAYERS
        for name, role, time in (("triton W4A8", "ours", 20.0), (CUBLAS, "baseline", 30.0))
    ]
    records.append(tmp_path / "gemm_cuda.csv", rows, cells.COLUMNS)
    assert "1.50x (M=1) to 1.50x, triton W4A8: bar missed" in table(tmp_path)


@pytest.mark.parametrize("text", ['{"batches": {"1": {}}}', '{"batches": {"1": {"x": 1}}}'])
def test_a_broken_file_is_named(tmp_path, text):
    (tmp_path / "decode_7b_cuda.json").write_text(text)
    with pytest.raises(cuda_figures.DataError, match="7B-shaped"):
        table(tmp_path)


def test_pages(tmp_path):
    nothing = cuda_pages.sections(tmp_path, report.read_result)
    assert nothing.count("not yet measured on a GPU") == 3
    assert "A100-80: computed, not measured" in nothing
    write(tmp_path)
    text = cuda_pages.sections(tmp_path, report.read_result)
    assert "| llama-7b, us a layer | M=1 | M=16 | M=4096 |" in text
    assert "| cuda W4A8 | 40.0 | 40.0 | 40.0 |" in text
    assert "| MHA 8192 x 1 | SDPA flash 40.0 | 2.22x (90.0 %)" in text
    assert text.count("| tok/s | batch 1 | prefill |") == 1
    assert "| llmqat W4A8KV8, CUDA C++ first | 990.0 |" in text
    assert "| memory limit, W4A8KV8 | 1189 |  |" in text


def test_limits_of_an_a100_by_hand():
    """Four products of a 7B layer: 202 M weights; 312 TFLOPS bound W4A16 from M = 64."""
    text = cuda_pages.computed()
    assert "| W4A8 over W16A16, at most | 3.99x | 3.95x | 3.82x | 2.49x | 2.00x | 2.00x |" in text
    assert "| llama-7b W4A8KV8 | 504 |" in text and "not measured" in text

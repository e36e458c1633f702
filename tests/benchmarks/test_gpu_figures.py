"""The GPU's figures: nothing measured, everything measured (made-up numbers), missed bars."""

import json

import pytest

from benchmarks import gpu_figures, records, report, run
from benchmarks.registry import cases
from benchmarks.roofline import Roofline
from llmqat.errors import DataError

HERE = {"time": "2026-01-01T00:00:00", "commit": "abc", "processor": "Some GPU", "isa": ""}
HERE |= {"threads": 1, "torch": "2.13.0", "clock": "events", "cuda": "13.0", "driver": "1.2"}
HERE |= {"triton": "3.6.0"}
ROOF = Roofline({1: 1e12}, fp32=1e15, bf16=1e15, int8=1e15)
OTHERS = {
    "eager": 10.0,
    "eager, as published": 9.0,
    "eager, the paper's": 4.4,
    "torch.compile of the spec": 1.5,
    "F.linear bf16": 1.7,
    "own W8A8": 1.02,
    "F.cross_entropy on probabilities": 2.0,
    "F.kl_div": 2.5,
    "Liger with the teacher's head": 1.2,
}
STEP = {
    "llmqat": {"time over plain": 0.9, "eager over ours": 2.1},
    "llmqat fused": {
        "time over plain": 1.1,
        "eager over ours": 1.5,
        "lean eager over ours": 1.1,
        "time over plain, as a graph": 0.8,
        "eager over ours, as a graph": 2.5,
        "lean eager over ours, as a graph": 1.6,
    },
    "llmqat fused, composed gradients": {
        "time over plain": 1.2,
        "time over plain, as a graph": 0.75,
        "eager over ours": 1.4,
    },
}


def write(results, time=1.0, chosen=None):
    """A cuda.csv of every case (or of some): each baseline so many times slower than ours."""
    rows = []
    for case in cases(device_type="cuda") if chosen is None else chosen:
        floor, _ = ROOF.bound(case.cost, case.dtype)
        seconds = {records.OURS: [time * floor / 0.9]}
        seconds |= {name: [time * ratio * floor / 0.9] for name, ratio in OTHERS.items()}
        peak = {name: 100 for name in seconds} | {records.OURS: 5}
        measured = run.Measured(seconds, dict.fromkeys(seconds, "graph"), 2, peak)
        rows += [HERE | row for row in run.rows_of(case, "triton", measured, ROOF)]
    records.append(results / "cuda.csv", rows)


def write_json(results, name, value):
    (results / f"{name}.json").write_text(json.dumps(value))


@pytest.fixture
def measured(tmp_path):
    write(tmp_path)
    write_json(
        tmp_path,
        "qat_slice_cuda",
        {"models": {"slice": {"checkpointing": {"ratios": STEP}, "no checkpointing": {}}}},
    )
    saved = {"plain": 1.0, "llmqat": 0.9, "llmqat fused": 0.55}
    write_json(tmp_path, "saved_activations", {"models": {"slice": {"saved_over_plain": saved}}})
    found = {"differences": 0, "cases": 5500, "shapes": 5400, "cases_per_minute": 1800.0}
    found |= {"by_operator": {"quantize": 5500}, "batch_checks": 90}
    write_json(tmp_path, "equality_triton", found)
    write_json(tmp_path, "equality_triton_cuda", found | {"cases": 400, "shapes": 390})
    return tmp_path


def table(results):
    return gpu_figures.table(results, report.read_result)


def test_nothing_measured(tmp_path):
    text = table(tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(gpu_figures.FIGURES)
    assert all("not yet measured" in row and "x (" not in row for row in rows)
    assert text.endswith("GPU: not yet measured on a GPU (`make bench-gpu`).")
    assert "bar missed" not in text


def test_everything_measured(measured):
    text = table(measured)
    assert "not yet measured" not in text and "bar missed" not in text
    assert "9.00x" in text and "1.70x" in text and "1.02x" in text and "1.20x" in text
    assert "| 90 % (" in text and "5.0 % (" in text
    assert "; over the leanest eager 4.40x |" in text
    assert (
        "0.80x (slice; launched from Python 1.10x; gradients of dequantized codes by torch 0.75x)"
    ) in text
    assert "55.0 % (slice)" in text
    assert "2.50x (slice; launched from Python 1.50x; lean eager over ours 1.60x)" in text
    assert "0 in 5,500 cases of 1 operators (5,400 shapes, 1,800 a minute)" in text
    assert text.endswith("GPU: Some GPU, torch 2.13.0, Triton 3.6.0, driver 1.2, commits abc.")


def test_a_missed_bar_is_marked(measured):
    write(measured, time=2.0)  # newer rows: 45 % of the copy bandwidth, the same ratios
    lines = [line for line in table(measured).splitlines() if "bar missed" in line]
    assert len(lines) == 2 and all("share of copy bandwidth" in line for line in lines)
    assert all("45 %" in line for line in lines)


def test_a_difference_and_too_few_shapes_miss_the_bar(measured):
    found = json.loads((measured / "equality_triton.json").read_text())
    write_json(measured, "equality_triton", found | {"shapes": 4999})
    assert table(measured).count("bar missed") == 1
    write_json(measured, "equality_triton", found | {"differences": 1})
    assert table(measured).count("bar missed") == 2


def test_a_failed_gate_is_said(measured):
    case = next(cases(["silu_mul_quantize"], device_type="cuda"))
    head = {"op": case.entry.op, "variant": case.entry.variant, "shape": case.shape.label}
    head |= {"dtype": "bfloat16", "candidate": records.OURS, "gate": "failed: output 0"}
    records.append(measured / "cuda.csv", [HERE | head])
    assert f"gate failed at {case.shape.label}: bar missed" in table(measured)


def test_a_run_that_is_cut_short_has_the_rows_of_the_table_first(measured):
    every = list(cases(device_type="cuda"))
    ordered = run.most_important_first(every, "cuda")
    count = len(run.read_by_figures(every))
    assert 0 < count < len(every) == len(ordered)
    whole = table(measured)
    (measured / "cuda.csv").unlink()
    write(measured, chosen=ordered[:count])
    assert table(measured) == whole
    (measured / "cuda.csv").unlink()
    write(measured, chosen=ordered[count:])
    gpu_rows = [f for f in gpu_figures.FIGURES if f.command == gpu_figures.RUN]
    from_files = sum("equality" in str(f.read) or "QAT step" in f.name for f in gpu_rows)
    from_files += sum("invariance" in str(f.read) for f in gpu_rows)
    assert table(measured).count(f"| {gpu_figures.MISSING} |") == len(gpu_rows) - from_files


def test_a_case_that_raised_is_never_a_number(measured):
    """Its row has no time: the figures that read it say so, the page of rows too."""
    rows = [
        {"op": c.entry.op, "variant": c.entry.variant, "shape": c.shape.label}
        | {
            "dtype": c.dtype_name,
            "candidate": records.OURS,
            "gate": "failed: OutOfMemoryError: a | b",
        }
        for c in cases(device_type="cuda")
    ]
    records.append(measured / "cuda.csv", [HERE | row for row in rows])
    text = table(measured)
    assert "9.00x" not in text and "1.70x" not in text and "| 90 % (" not in text
    assert "| 5.0 % (" not in text and text.count("gate failed at") > 5
    page = report.kernel_tables(measured).split("### Some GPU")[1].split("\n\n")[2]
    lines = set(page.splitlines())
    assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
    assert sum("gate failed: OutOfMemoryError: a / b; not timed" in x for x in lines) == len(rows)


def test_the_last_gpu_is_shown(measured):
    rows = (measured / "cuda.csv").read_text().replace("Some GPU", "Other GPU").splitlines()
    with (measured / "cuda.csv").open("a") as file:
        file.write("\n".join(rows[1:]) + "\n")
    assert "Other GPU" in table(measured) and "Some GPU" not in table(measured)


def test_a_broken_file_is_named(measured):
    write_json(measured, "qat_slice_cuda", {"models": {"slice": {"checkpointing": {}}}})
    assert "QAT step" in table(measured)
    write_json(measured, "equality_triton", {"cases": 3})
    with pytest.raises(DataError, match="Triton kernels against"):
        table(measured)


def test_gpu_rows_have_a_section_of_their_own(measured):
    text = report.kernel_tables(measured)
    assert "### Some GPU, CUDA 13.0, driver 1.2, triton 3.6.0" in text
    assert "own W8A8 1.02x" in text and "GPU rows: not yet measured" not in text

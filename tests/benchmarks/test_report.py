"""The report: tables from files, missing files, missed bars, stale pages."""

import json

import pytest

from benchmarks import records, report, run
from benchmarks.registry import cases
from llmqat.errors import DataError

CASE = next(cases(["pack_int4"]))
RESULTS = {
    "equality": {
        "instruction_sets": {
            isa: {"elements": 50_000_000, "differences": 0} for isa in ("scalar", "avx512vnni")
        }
    },
    "decode": {
        "ratio_of": "llmqat 4-8-8 paper",
        "ratios": {"transformers fp32": 7.0, "transformers bf16": 8.0, "llama.cpp Q4_1": 0.9},
        "tokens_per_second": {"llmqat 4-8-8 paper": {"p50": 120.0}, "llama.cpp Q4_1": {"p50": 78}},
        "environment": {"processor": "Some CPU", "torch": "2.13.0", "commit": "abc"},
    },
    "qat_step_float32": {"tokens": "2x256", "clock": "cpu", "ratio": {"float": 0.8, "fused": 0.9}},
    "generate_data": {
        "ratio_to_baseline": {"llmqat, 64 slots": 9.0, "llmqat, 128 slots": 11.0},
        "tokens_per_second": {
            "llmqat, 64 slots": {"p50": 150.0},
            "llmqat, 128 slots": {"p50": 190.0},
        },
    },
    "demo": {
        "setting": "4-8-4",
        "perplexity": {"full_precision": 20.0, "rtn": {"4-8-4": 60.0}, "qat": {"4-8-4": 36.0}},
        "bytes": {"linears": {"ratio": 0.2515}},
        "seconds": {"train": 300.0, "export": 60.0},
    },
}


@pytest.fixture
def results(tmp_path):
    for name, result in RESULTS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    return tmp_path


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A repository with both pages and nothing measured."""
    (tmp_path / "docs").mkdir()
    readme, docs = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    readme.write_text("# Title\n<!-- figures -->\nold\n<!-- /figures -->\nend\n")
    docs.write_text("# Benchmarks\n<!-- rows -->\n<!-- /rows -->\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "DEMO", tmp_path / "report.json")
    return readme, docs


def test_measured_figures_and_a_missed_bar(results):
    table = report.figures(results)
    assert "7.0x fp32, 8.0x bf16 (120 tok/s)" in table
    assert "0.90x (llama.cpp Q4_1 78 tok/s): bar missed" in table
    assert "0.60x (36.0 over 60.0; full precision 20.0)" in table
    assert "0 in 50 M elements on each of scalar, avx512vnni" in table
    assert "11.0x (128 slots, 190 tok/s)" in table and "0.252x" in table and "6.0 min" in table
    cpu = table.split("| Triton kernels")[0]
    assert table.count("bar missed") == 1 and cpu.count("not yet measured") == 0
    assert "0.80x (2x256 tokens; 0.90x over our own fused fake-quantizer) | `python -m" in table
    assert "bf16:" not in table
    assert cpu.rstrip().endswith("Measured on Some CPU, torch 2.13.0, commits abc.")


def test_nothing_measured(tmp_path):
    cpu = report.figures(tmp_path).split("| Triton kernels")[0]
    assert cpu.count("not yet measured") == sum(
        not figure.optional for figure in report.FIGURE_LIST
    )
    tables = report.kernel_tables(tmp_path)
    assert "Rows: not yet measured" in tables and "not yet measured on a GPU" in tables


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_file_is_named(results, text):
    (results / "decode.json").write_text(text)
    with pytest.raises(DataError, match=r"decode\.json"):
        report.figures(results)


def rows(seconds, time, processor="Some CPU"):
    here = {"time": time, "commit": "abc", "processor": processor, "isa": "avx2", "threads": 1}
    here |= {"torch": "2.13.0", "clock": "wall"}
    roof = run.Roofline({1: 1e9}, 1e9, 1e9, 1e9)
    measured = run.Measured({records.OURS: [seconds], "eager": [3 * seconds]})
    return [here | row for row in run.rows_of(CASE, "cpu", measured, roof)]


def test_the_newest_row_of_each_machine_is_shown(tmp_path):
    path = tmp_path / "cpu.csv"
    records.append(path, rows(1.0, "2026-01-01T00:00:00"))
    records.append(path, rows(5.0, "2026-01-01T00:00:00", "Other CPU"))
    records.append(path, rows(2.0, "2026-01-02T00:00:00"))
    tables = report.kernel_tables(tmp_path)
    assert "2000000 (2000000-2000000) us" in tables and "1000000 (" not in tables
    assert tables.count("thread(s), wall clock") == 2
    assert "### Other CPU avx2, 1 thread(s), wall clock" in tables
    assert tables.count("eager 3.00x") == 2


def test_check_finds_a_stale_page_and_a_rewrite_mends_it(pages, capsys):
    readme, docs = pages
    assert report.main(["--check"]) == 1 and "README.md is stale" in capsys.readouterr().err
    assert "old" in readme.read_text()
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n<!-- figures -->\n|") and text.endswith("-->\nend\n")
    assert "not yet measured" in text and "not yet measured" in docs.read_text()


def gpu_row():
    """A row as a GPU would have left it; its figures are made up."""
    case = next(cases(["quantize"], device_type="cuda"))
    here = {"time": "2026-01-01T00:00:00", "commit": "abc", "processor": "Some GPU", "isa": ""}
    here |= {"threads": 1, "torch": "2.13.0", "clock": "events", "triton": "3.6.0"}
    here |= {"cuda": "13.0", "driver": "1.2"}
    roof = run.Roofline({1: 1e9}, 1e9, 1e9, 1e9)
    measured = run.Measured({records.OURS: [1.0], "eager": [2.0]})
    return [here | row for row in run.rows_of(case, "triton", measured, roof)]


def test_what_a_gpu_measured_is_also_a_page_beside_it(pages, capsys):
    folder = report.RESULTS
    records.append(folder / "cpu.csv", rows(1.0, "2026-01-01T00:00:00"))
    page = folder / "report_cuda.md"
    assert report.main([]) == 0 and not page.exists()
    records.append(folder / "cuda.csv", gpu_row())
    assert report.main(["--check"]) == 1
    assert "results/report_cuda.md is stale" in capsys.readouterr().err
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    text = page.read_text()
    assert "### Some GPU, CUDA 13.0, driver 1.2, triton 3.6.0" in text and "eager 2.00x" in text
    assert "| Triton kernels | bar |" in text and "| Quantized generation on a GPU" in text
    assert "Some CPU" not in text
    assert text.partition("## Rows\n\n")[2].strip() in pages[1].read_text()


def test_a_page_without_markers_does_not_cost_the_gpu_report(pages):
    records.append(report.RESULTS / "cuda.csv", gpu_row())
    pages[0].write_text("# Title\n")
    with pytest.raises(DataError, match="figures"):
        report.main([])
    assert (report.RESULTS / "report_cuda.md").exists()


def test_lost_markers_are_an_error(pages):
    pages[0].write_text("# Title\n")
    with pytest.raises(DataError, match="figures"):
        report.main(["--check"])


def test_the_repository_has_the_markers():
    for page, markers in (("README.md", report.FIGURES), ("docs/benchmarks.md", report.ROWS)):
        report.between((report.ROOT / page).read_text(), markers, "")


def test_a_result_of_a_copy_without_a_commit_is_from_an_unknown_one():
    assert records.commits_of(["abc", "abc", "def"]) == "commits abc, def"
    assert records.commits_of([None, "", "abc"]) == "commits unknown, abc"

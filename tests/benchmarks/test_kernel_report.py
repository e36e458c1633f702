"""The pages of docs/kernels, from figures that are made up; the compilation is tested in
tests/triton/test_compiled.py.
"""

import json
from dataclasses import asdict

import pytest

from benchmarks import cubin, kernel_forms, kernel_pages, kernel_report
from benchmarks.kernel_pages import Result

ZERO = dict.fromkeys(cubin.Figures.__dataclass_fields__, 0)
FIGURES = asdict(
    cubin.Figures(
        **ZERO | {"registers": 40, "resident": 48, "shared": 128, "instructions": 300},
    )
) | {"wide_loads": 2, "loads": 3, "stores": 1, "imma": 64}


def result(name="quantize bf16", arch=80, **changes):
    return Result("quantize", name, arch, (), **({"figures": FIGURES} | changes))


def test_a_page_has_both_architectures_side_by_side():
    other = FIGURES | {"imma": 0, "igmma": 4}
    text = kernel_pages.page("quantize", [result(), result(arch=90, figures=other)], (80, 90))
    row = next(line for line in text.splitlines() if line.startswith("| quantize bf16"))
    assert row.count("|") == 2 * len(kernel_pages.COLUMNS) + 2
    assert "| 64 IMMA | 4 IGMMA | 2/3 | 2/3 |" in row
    assert "llmqat_kernels/backends/triton/quantize.py" in text and "with triton 3" in text


def test_a_form_of_one_architecture_leaves_the_other_empty():
    text = kernel_pages.page("quantize", [result(arch=90)], (80, 90))
    assert "| quantize bf16 |  | 40 |" in text


def test_failures_are_on_the_page_and_below_their_row_in_the_table():
    bad = result(failures=["spills: 2 spill instructions, 8 bytes of local memory"])
    text = kernel_pages.page("quantize", [bad], (80, 90))
    assert "- quantize bf16 sm_80: spills: 2 spill instructions" in text
    lines = list(kernel_pages.table([bad, result(figures=None, failures=["compile: no"])]))
    assert lines[2].strip().startswith("FAILS spills") and "?" in lines[3]


def test_pages_are_written_whole_and_found_stale(tmp_path):
    texts = kernel_pages.pages([result(), result(arch=90)], (80, 90))
    assert texts.keys() == {"quantize.md", "kernels.json"}
    assert len(json.loads(texts["kernels.json"])["kernels"]) == 2
    (tmp_path / "gone.md").write_text("kernels that are gone, by `make kernels`")
    (tmp_path / "other.md").write_text("what somebody wrote of other kernels")
    assert kernel_pages.stale(texts, tmp_path) == ["gone.md", "kernels.json", "quantize.md"]
    kernel_pages.save(texts, tmp_path)
    assert kernel_pages.stale(texts, tmp_path) == []
    assert not (tmp_path / "gone.md").exists() and (tmp_path / "other.md").exists()
    (tmp_path / "quantize.md").write_text("edited")
    assert kernel_pages.stale(texts, tmp_path) == ["quantize.md"]


def test_a_broken_file_is_a_failure_and_hides_no_other(monkeypatch):
    def broken(module, arch):
        raise AttributeError("no variants")

    monkeypatch.setattr(kernel_forms, "variants", broken)
    monkeypatch.setattr(kernel_report, "variants", broken)
    assert kernel_forms.names("quantize", 80, False) == ["variants(): AttributeError"]
    (found,) = kernel_report.examine([("quantize", "variants(): AttributeError", 80)])
    assert found.figures is None and found.failures == ["compile: AttributeError: no variants"]


@pytest.mark.parametrize("option", [["--only", "x"], ["--arch", "80"], ["--quick"]])
def test_pages_take_every_kernel(option, capsys):
    with pytest.raises(SystemExit):
        kernel_report.main([*option, "--save"])
    assert "take every kernel" in capsys.readouterr().err


def test_a_recorded_form_of_the_same_key_is_gated_again_and_not_compiled(monkeypatch):
    form = ("quantize", kernel_forms.names("quantize", 80, True)[0], 80)
    keys = {form: "a key"}
    monkeypatch.setattr(kernel_report, "key_of", keys.get)
    records = {form: result(key="a key", figures=FIGURES | {"spills": 2})}
    (known,) = kernel_report.reusable([form], records).values()
    assert known.failures == ["spills: 2 spill instructions, 0 bytes of local memory"]
    assert "vector_loads" in known.promises
    keys[form] = "another key"
    assert kernel_report.reusable([form], records) == {}
    assert kernel_report.reusable([form], {}) == {}


def test_a_wrong_record_is_named():
    again, known = result(), result(figures=FIGURES | {"registers": 39})
    form = again.form
    assert list(kernel_report.disagreements({form: again}, {form: again})) == []
    said = "quantize/quantize bf16 sm_80: registers 40 not 39"
    assert list(kernel_report.disagreements({form: again}, {form: known})) == [said]


def test_figures_are_recorded_and_read_back(tmp_path):
    results = [result(key="k"), result(name="bad", figures=None, failures=["compile: no"])]
    kernel_pages.save(kernel_pages.pages(results, (80, 90)), tmp_path)
    release, records = kernel_pages.recorded(tmp_path)
    assert release.startswith("3.") and list(records.values()) == results
    assert kernel_pages.recorded(tmp_path / "none") == ("", {})


def test_a_sample_has_every_file_and_architecture_and_changes_with_the_seed():
    forms = [(m, f"form {i}", a) for m in "abc" for i in range(50) for a in (80, 90)]
    drawn = kernel_forms.drawn(forms, 20, "seed")
    assert len(drawn) == 24 == len({*drawn}) and {(m, a) for m, _, a in drawn} == {
        (m, a) for m, _, a in forms
    }
    assert drawn == kernel_forms.drawn(forms, 20, "seed") != kernel_forms.drawn(forms, 20, "other")
    assert kernel_forms.drawn([], 20, "seed") == []

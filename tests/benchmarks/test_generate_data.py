"""Data generation's benchmark at tiny sizes: the table and the file."""

import json

import pytest
import torch

from benchmarks import generate_data, timing


def test_random_weights_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    argv = ["--shape", "tiny", "--quick", "--max-len", "10", "--threads", "1", "--save"]
    generate_data.main(argv)
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "bfloat16 teacher tiny" in out and "| llmqat, 4 slots |" in out
    found = json.loads((tmp_path / "generate_data.json").read_text())
    assert set(found["tokens_per_second"]) == {generate_data.BASELINE, "llmqat, 4 slots"}
    assert found["ratio_to_baseline"]["llmqat, 4 slots"] > 0 and found["max_len"] == 10
    assert found["notes"] == {} and found["cache_bytes"]["llmqat, 4 slots"] > 0


def test_a_gpu_also_has_a_quantized_cache():
    names = generate_data.engine_makers(None, [64], 32, torch.device("cuda"))
    assert list(names) == ["llmqat, 64 slots", "llmqat, 64 slots, KV8 (approximate)"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_the_device_one_line_and_status_1(capsys):
    with pytest.raises(SystemExit) as stop:
        generate_data.main(["--device", "cuda"])
    assert stop.value.code == 1 and "no CUDA device" in capsys.readouterr().err

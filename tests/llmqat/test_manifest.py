"""llmqat/data/manifest.py: which run a folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmqat.data import open_dataset, parse_shard
from llmqat.errors import DataError
from tests.llmqat.store_faults import (
    CONFIG,
    PARTS,
    RECORDS,
    fill,
    fingerprint,
    make_record,
    writer,
)


def test_manifest_content(tmp_path: Path) -> None:
    folder = fill(tmp_path, manifest={**CONFIG, "versions": {"llmqat": "0"}})
    raw = json.loads((folder / "manifest.json").read_text())
    assert raw["config"] == CONFIG and raw["complete"] is True
    assert raw["versions"][0]["llmqat"] == "0" and "pyarrow" in raw["versions"][0]
    assert [part["file"] for part in raw["parts"]] == PARTS
    assert sum(part["rows"] for part in raw["parts"]) == RECORDS
    assert raw["tokens"] == sum(make_record(i).length for i in range(RECORDS))
    for part in raw["parts"]:
        assert part["bytes"] == (folder / "parts" / part["file"]).stat().st_size


def test_parse_shard() -> None:
    assert parse_shard("0/1") == (0, 1) and parse_shard(" 3/8 ") == (3, 8)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"manifest": {**CONFIG, "seed": 4}}, "config.seed"),
        ({"manifest": {**CONFIG, "seed": 3.0}}, "config.seed"),
        (
            {"manifest": {**CONFIG, "sampling": {"temperature": 0.9, "top_k": 0}}},
            "config.sampling.temperature",
        ),
        ({"manifest": {**CONFIG, "dtype": "bf16"}}, "config.dtype"),
        ({"manifest": {"teacher": "tiny"}}, "config.sampling"),
        ({"records": RECORDS - 1}, "records"),
        ({"records": range(1, RECORDS)}, "first_record"),
        ({"records_per_part": 6}, "records_per_part"),
        ({"shard": (0, 2)}, "shard.count"),
    ],
)
def test_other_configuration_is_refused(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    folder = fill(tmp_path)
    before = fingerprint(folder)
    with pytest.raises(DataError, match=field) as caught:
        writer(folder, **changes)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert fingerprint(folder) == before
    writer(folder).close()  # and the lock was given back


def test_other_versions_are_recorded(tmp_path: Path) -> None:
    with writer(tmp_path, manifest={**CONFIG, "versions": {"torch": "1"}}) as out:
        out.write(make_record(0))
    for version in ("2", "1"):
        fill(tmp_path, manifest={**CONFIG, "versions": {"torch": version}})
    raw = json.loads((tmp_path / "manifest.json").read_text())
    assert [v["torch"] for v in raw["versions"]] == ["1", "2"]


def test_lost_manifest(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.write(make_record(0))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest\.json"):
        writer(tmp_path)


@pytest.mark.parametrize(
    "field", ["format", "format_version", "config", "shard", "records", "parts"]
)
@pytest.mark.parametrize("value", [None, -1, "x", [1], {"index": 5, "count": 2}])
def test_altered_manifest(tmp_path: Path, field: str, value: Any) -> None:
    folder = fill(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    for change in ({field: value}, None):
        altered = (
            {**manifest, **change} if change else {k: v for k, v in manifest.items() if k != field}
        )
        (folder / "manifest.json").write_text(json.dumps(altered))
        if change and field == "config" and isinstance(value, dict):
            continue  # a config may hold anything; the writer compares it
        for use in (writer, open_dataset):
            with pytest.raises(DataError, match=r"manifest\.json") as caught:
                use(folder)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file", "../../etc/passwd"),
        ("file", PARTS[1]),
        ("file", "part-00000000-00000003.parquet"),
        ("rows", 4),
        ("sha256", "0"),
        ("bytes", -1),
        ("tokens", True),
    ],
)
def test_altered_part_entry(tmp_path: Path, key: str, value: Any) -> None:
    folder = fill(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parts"][0][key] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_dataset(folder)


def test_truncated_manifest(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    text = (folder / "manifest.json").read_bytes()
    for cut in range(0, len(text) - 2, 37):
        (folder / "manifest.json").write_bytes(text[:cut])
        with pytest.raises(DataError, match=r"manifest\.json"):
            open_dataset(folder)

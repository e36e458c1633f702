"""The manifest of a record folder: which records it is to hold, how they are made, what is there so
far.

Records are cut into blocks of `records_per_part` consecutive ids counted from `first_record`; a
block is one part. A shard owns whole blocks, so that the parts of n shards, copied together, are
byte for byte the parts of one unsharded run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmqat import io
from llmqat.errors import ConfigError, DataError

__all__ = ["FORMAT_VERSION", "Manifest", "PartEntry", "parse_shard", "part_name", "part_range"]

FORMAT = "llmqat-records"
FORMAT_VERSION = 1
_PART = re.compile(r"part-(\d{8,19})-(\d{8,19})\.parquet")
_MANIFEST = re.compile(r"manifest(?:-(\d{1,9})-of-(\d{1,9}))?\.json")


def parse_shard(text: str) -> tuple[int, int]:
    """`"i/n"` as (i, n) with 0 <= i < n; raises `ConfigError` naming the flag."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--shard {text!r}: write i/n with 0 <= i < n, such as 0/4")
    return int(match[1]), int(match[2])


def part_name(first: int, last: int) -> str:
    """File name of the part that holds the records `first..last`, both included."""
    return f"part-{first:08d}-{last:08d}.parquet"


def part_range(name: str) -> tuple[int, int] | None:
    """(first, last) of a part's file name, or None for any other file."""
    match = _PART.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class PartEntry:
    """What the manifest says of one part: record ids `first..last`, tokens, and the file's size and
    SHA-256.
    """

    first: int
    last: int
    tokens: int
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """The part's file name."""
        return part_name(self.first, self.last)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the JSON."""
        return {
            "file": self.name,
            "rows": self.last - self.first + 1,
            "tokens": self.tokens,
            "bytes": self.size,
            "sha256": self.sha256,
        }


@dataclass
class Manifest:
    """The content of one `manifest[-i-of-n].json`.

    `config` is whatever decides the records (teacher, its config hash, sampling, seed, ...): a
    restart must give the same. `versions` lists the software that wrote here; it is recorded and
    not compared.
    """

    config: dict[str, Any]
    first_record: int
    records: int
    records_per_part: int
    shard: int = 0
    shards: int = 1
    format: str = FORMAT
    versions: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[int, PartEntry] = field(default_factory=dict)  # by block

    @property
    def name(self) -> str:
        """Its file name."""
        return "manifest.json" if self.shards == 1 else f"manifest-{self.tag}.json"

    @property
    def tag(self) -> str:
        """`i-of-n`, zero-padded so that names sort."""
        width = len(str(self.shards))
        return f"{self.shard:0{width}d}-of-{self.shards}"

    @property
    def blocks(self) -> range:
        """The blocks of this shard."""
        total = -(-self.records // self.records_per_part)
        return range(
            total * self.shard // self.shards,
            total * (self.shard + 1) // self.shards,
        )

    def ids(self, block: int) -> range:
        """The record ids of a block."""
        start = block * self.records_per_part
        stop = min(start + self.records_per_part, self.records)
        return range(self.first_record + start, self.first_record + stop)

    @property
    def all_ids(self) -> range:
        """The record ids of this shard."""
        blocks = self.blocks
        if not blocks:
            return range(self.first_record, self.first_record)
        return range(self.ids(blocks[0]).start, self.ids(blocks[-1]).stop)

    def block_of(self, record_id: int) -> int:
        """The block that a record id belongs to."""
        return (record_id - self.first_record) // self.records_per_part

    def is_whole(self, part: PartEntry) -> bool:
        """Whether a part holds all records of its block. The last one of a run of fewer records
        may not.
        """
        ids = self.ids(self.block_of(part.first))
        return (part.first, part.last) == (ids[0], ids[-1])

    @property
    def complete(self) -> bool:
        """Whether every block of this shard is a part."""
        return len(self.parts) == len(self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object; a function of the settings and the parts (no time, no host)."""
        parts = [self.parts[block] for block in sorted(self.parts)]
        return {
            "format": self.format,
            "format_version": FORMAT_VERSION,
            "config": self.config,
            "first_record": self.first_record,
            "records": self.records,
            "records_per_part": self.records_per_part,
            "shard": {"index": self.shard, "count": self.shards},
            "versions": self.versions,
            "complete": self.complete,
            "tokens": sum(part.tokens for part in parts),
            "parts": [part.to_dict() for part in parts],
        }

    def save(self, folder: Path) -> None:
        """Write it to its name in `folder`, atomically."""
        io.write_json(folder / self.name, self.to_dict())

    @classmethod
    def load(cls, path: Path, format: str = FORMAT) -> Manifest:
        """Read and check one manifest of `format`; `DataError` names the file and the field that
        is wrong.
        """
        try:
            raw = json.loads(path.read_bytes())
        except OSError as error:
            raise io.error_at(error, path, "cannot read") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is truncated or altered: {error}") from error
        try:
            return cls._parse(raw, path.name, format)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(
                f"{path} is truncated or altered: field {error} is missing or wrong"
            ) from error
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @classmethod
    def _parse(cls, raw: Any, name: str, format: str) -> Manifest:
        if not isinstance(raw, dict) or raw.get("format") != format:
            raise DataError(f"is not a manifest of {format}")
        if raw["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"format_version {raw['format_version']!r} is unknown; "
                f"this version reads {FORMAT_VERSION}"
            )
        index, count = _integer(raw["shard"], "index"), _integer(raw["shard"], "count", 1)
        if not isinstance(raw["config"], dict) or not isinstance(raw["versions"], list):
            raise DataError("config must be an object and versions a list")
        self = cls(
            config=raw["config"],
            first_record=_integer(raw, "first_record"),
            records=_integer(raw, "records"),
            records_per_part=_integer(raw, "records_per_part", 1),
            shard=index,
            shards=count,
            format=format,
            versions=raw["versions"],
        )
        if index >= count or name != self.name:
            raise DataError(f"shard {index} of {count} does not belong in a file of this name")
        for item in raw["parts"]:
            bounds = part_range(item["file"])
            block = self.block_of(bounds[0]) if bounds else -1
            if block not in self.blocks or item["file"] != part_name(
                self.ids(block)[0], self.ids(block)[-1]
            ):
                raise DataError(f"part {item['file']!r} is not one of this shard's parts")
            if block in self.parts:
                raise DataError(f"part {item['file']!r} is listed twice")
            ids = self.ids(block)
            if _integer(item, "rows") != len(ids):
                raise DataError(f"part {item['file']!r}: rows must be {len(ids)}")
            sha = item["sha256"]
            if not isinstance(sha, str) or not re.fullmatch("[0-9a-f]{64}", sha):
                raise DataError(f"part {item['file']!r}: sha256 is not 64 hex digits")
            size, tokens = _integer(item, "bytes"), _integer(item, "tokens")
            self.parts[block] = PartEntry(ids[0], ids[-1], tokens, size, sha)
        return self

    def same_run(
        self, other: Manifest, here: str, *, shard: bool = True, grow: bool = False
    ) -> None:
        """Raise `DataError` naming the first field in which `other` (found at `here`) is another
        run. With `grow`, an unsharded one of fewer records is the same run.
        """
        found, mine = other.to_dict(), self.to_dict()
        if grow and self.shards == other.shards == 1 and other.records < self.records:
            found["records"] = self.records
        for key in ("config", "first_record", "records", "records_per_part", "shard"):
            a, b = found[key], mine[key]
            if key == "shard" and not shard:
                a, b = {"count": a["count"]}, {"count": b["count"]}
            difference = _difference(a, b, key)
            if difference:
                raise DataError(f"{here} holds another run: {difference}; use another folder")


def manifest_files(folder: Path) -> list[Path]:
    """Every manifest in `folder`, by name."""
    return sorted(path for path in folder.iterdir() if _MANIFEST.fullmatch(path.name))


def plain_json(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`value` as JSON would give it back (tuples to lists); `ConfigError` for what JSON cannot
    hold.
    """
    try:
        result = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must hold JSON values only: {error}") from error
    assert isinstance(result, dict)
    return result


def _integer(raw: Any, key: str, least: int = 0) -> int:
    value = raw[key]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise DataError(f"{key} must be an integer >= {least}, got {value!r}")
    return value


def _difference(found: Any, mine: Any, where: str) -> str | None:
    """The first differing leaf as "name: folder has a, this run has b", or None."""
    if isinstance(found, dict) and isinstance(mine, dict):
        for key in sorted(set(found) | set(mine)):
            if key not in found or key not in mine:
                side = "this run" if key not in found else "the folder"
                return f"{where}.{key} is only in {side}"
            difference = _difference(found[key], mine[key], f"{where}.{key}")
            if difference:
                return difference
        return None
    if found == mine and type(found) is type(mine):
        return None
    return f"{where}: the folder has {found!r}, this run has {mine!r}"

"""`llmqat_manifest.json`: sizes and SHA-256 of every file of a checkpoint, written last and checked
first.
"""

from __future__ import annotations

import os
from pathlib import Path

from llmqat import io
from llmqat.checkpoint.format import CONFIG, MANIFEST, MANIFEST_VERSION
from llmqat.checkpoint.validate import (
    FILE_NAME,
    MAX_INT,
    PICKLE_SUFFIXES,
    is_count,
    open_file,
    printable,
    read_json,
    regular_file,
)
from llmqat.errors import CheckpointError
from llmqat_kernels import SPEC_VERSION


def write_manifest(folder: Path) -> None:
    """List every file of `folder`; the last file to be written."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": io.sha256_file(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {
        "format": "llmqat",
        "version": MANIFEST_VERSION,
        "spec": SPEC_VERSION,
        "files": files,
    }
    io.write_json(folder / MANIFEST, manifest)


def read_manifest(folder: Path, *, required: bool) -> dict[str, int] | None:
    """File sizes by name, after comparing sizes and hashes; None where there is no manifest."""
    if not required and not os.path.lexists(folder / MANIFEST):
        return None
    where = str(folder / MANIFEST)
    manifest = read_json(folder, MANIFEST)
    if manifest.get("format") != "llmqat" or not is_count(
        manifest.get("version"), MANIFEST_VERSION
    ):
        raise CheckpointError(
            f"{where}: format and version are unknown; written by another program or a newer"
            " version"
        )
    if set(manifest) != {"format", "version", "spec", "files"} or manifest["spec"] != SPEC_VERSION:
        raise CheckpointError(
            f"{where}: expected format, version, spec {SPEC_VERSION!r} and files; write it again"
        )
    files = manifest["files"]
    if not isinstance(files, dict) or CONFIG not in files:
        raise CheckpointError(f"{where}: files must list sizes and hashes, config.json among them")
    sizes = {}
    for name, entry in files.items():
        if (
            not FILE_NAME.fullmatch(name)
            or not isinstance(entry, dict)
            or set(entry) != {"size", "sha256"}
        ):
            raise CheckpointError(
                f"{where}: entry {printable(name)} is malformed; write the checkpoint again"
            )
        if not is_count(entry["size"], MAX_INT) or not isinstance(entry["sha256"], str):
            raise CheckpointError(
                f"{where}: size or sha256 of {name} is malformed; write the checkpoint again"
            )
        with open_file(folder, name) as (_, size):
            if size != entry["size"]:
                raise CheckpointError(
                    f"{folder / name}: {size} bytes, the manifest says {entry['size']}; copy it"
                    " again"
                )
        sizes[name] = size
    for name, entry in files.items():
        if io.sha256_file(regular_file(folder, name)) != entry["sha256"]:
            raise CheckpointError(
                f"{folder / name}: contents differ from the manifest (SHA-256); copy it again"
            )
    return sizes


def check_no_strangers(folder: Path, used: set[str]) -> None:
    """Refuse weights in a packed folder other than the `used` ones: stray shards, or formats that
    can run code.
    """
    for name in sorted(os.listdir(folder)):
        if name.lower().endswith(PICKLE_SUFFIXES):
            raise CheckpointError(
                f"{folder / name}: such files can run code when read; remove it, only safetensors"
                " is used"
            )
        if name.endswith(".safetensors") and name not in used:
            raise CheckpointError(f"{folder / name}: is not part of this checkpoint; remove it")

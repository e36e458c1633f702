"""``llmqat info``: versions, the native library, and which backend runs each operator and why."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import llmqat_kernels
from llmqat import overview
from llmqat_kernels import native
from llmqat_kernels.backends import triton

PACKAGES = (
    "llmqat",
    "torch",
    "transformers",
    "triton",
    "accelerate",
    "safetensors",
    "numpy",
    "pyarrow",
)


@dataclass
class InfoArguments:
    """Options of ``llmqat info``."""

    json: bool = field(default=False, metadata={"help": "Print one JSON object instead of tables."})
    families: bool = field(
        default=False,
        metadata={"help": "Print instead which model families are supported, and released sizes."},
    )


ARGUMENTS = (InfoArguments,)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """Everything the command prints."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        "spec": llmqat_kernels.SPEC_VERSION,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native": {
            "available": native.is_available(),
            "reason": None if native.is_available() else native.why_not(),
            "isa": native.isa() if native.is_available() else None,
            "build": native.build_info(),
        },
        "triton": {"available": not triton.why_not(), "reason": triton.why_not() or None},
        "operators": {
            device: {
                c.op: {"backend": c.backend, "reason": c.reason}
                for c in llmqat_kernels.choices(device)
            }
            for device in devices
        },
    }


def render(info: dict[str, Any]) -> str:
    """The tables for people."""
    lines = [f"spec {info['spec']} · Python {info['python']} · {info['threads']} threads"]
    lines.append(
        "  ".join(f"{name} {v or 'not installed'}" for name, v in info["versions"].items())
    )
    library = info["native"]
    lines.append(f"native library: {library['isa'] or 'missing, ' + library['reason']}")
    lines += [f"  {key}: {value}" for key, value in library["build"].items()]
    lines.append(f"triton kernels: {info['triton']['reason'] or 'ready'}")
    if not info["cuda_devices"]:
        lines.append("cuda: no device")
    for device, operators in info["operators"].items():
        lines.append(f"\noperators on {device}")
        width = max(map(len, operators))
        lines += [
            f"  {op:<{width}}  {c['backend']:<9}  {c['reason']}" for op, c in operators.items()
        ]
    return "\n".join(lines)


def run(arguments: InfoArguments) -> None:
    """Print the report."""
    if arguments.families:
        print(json.dumps(overview.to_dict()) if arguments.json else overview.render())
        return
    info = collect()
    print(json.dumps(info, indent=2) if arguments.json else render(info))

"""What figures were measured on: the processor or card, and the versions of what ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("invact", "torch", "triton", "transformers", "timm", "open_clip_torch", "fewbit", "optiacts")


def installed_versions() -> dict[str, str]:
    """Of Python and of the packages that the figures depend on."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The kind of machine, by plain names and numbers; nothing that tells one machine of a kind from another.

    Returns:
        "device", "cpu", "cpu_capability" and "cpu_threads"; on a GPU also its "gpu", "gpu_memory_bytes" and the
        "runtime" that torch was built for; and every OMP_ variable that is set.
    """
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = properties.total_memory
        found["runtime"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return found | {name: value for name, value in sorted(os.environ.items()) if name.startswith("OMP_")}


def machine_in_words(kind: dict[str, Any]) -> str:
    """As "AMD EPYC, AVX512, 2 threads", or a card with its runtime."""
    if "gpu" in kind:
        return f"{kind['gpu']}, {kind['runtime']}"
    threads = kind["cpu_threads"]
    return f"{kind['cpu']}, {kind['cpu_capability']}, {threads} {'thread' if threads == 1 else 'threads'}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())

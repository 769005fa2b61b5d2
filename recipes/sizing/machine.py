"""What is installed and what is here to compute with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

from reasonrec.recipes.models.precision import choose, default_device
from reasonrec.recipes.models.quantized import free_memory

GIB = 2**30


def versions() -> Iterator[str]:
    """The packages that the kit is built on, and those that are missing or in a version it was not written for."""
    wrong, found = [], []
    for words in importlib.metadata.requires("reasonrec") or []:
        wanted = Requirement(words)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing: pip install '{wanted}'")
            continue
        found.append(f"{wanted.name} {installed}")
        if not wanted.specifier.contains(installed, prereleases=True):
            wrong.append(
                f"{wanted.name} {installed} is installed, {wanted.specifier} is needed: pip install '{wanted}'"
            )
    yield f"python {platform.python_version()}, {', '.join(found)}"
    yield from wrong
    if not wrong:
        yield "all versions are in the ranges that the kit is written for"


def devices() -> Iterator[str]:
    """Processors, memory and disk, and what is computed in."""
    yield (
        f"CPU: {os.cpu_count()} cores, PyTorch's kernels use {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads; {free_memory() / GIB:.1f} GiB of memory free"
    )
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        yield (
            f"GPU {number}: {torch.cuda.get_device_name(number)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, "
            f"compute capability {'.'.join(map(str, torch.cuda.get_device_capability(number)))}"
        )
    yield f"disk: {shutil.disk_usage(Path.cwd()).free / GIB:.0f} GiB free here"
    yield str(choose("auto", default_device()))


def available(device: torch.device) -> int:
    """Bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()

"""The machine: versions, driver, memory, and what it reaches in matrix products and copies."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

from onecard.common import GIB, Section
from redraft import provenance


def run(section: Section) -> None:
    section.put("provenance", provenance.collect(0, str(section.device)))
    section.attempt("device", lambda: about(section))
    for name in ("bfloat16", "float32"):
        section.attempt(f"products in {name}", lambda: products(section, name))  # noqa: B023
    section.attempt("copies", lambda: copies(section))


def about(section: Section) -> dict[str, Any]:
    """Name, driver, memory and what torch allows itself."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        "float32_precision": torch.get_float32_matmul_precision(),
    }
    if section.cuda:
        about = torch.cuda.get_device_properties(section.device)
        free, total = torch.cuda.mem_get_info(section.device)
        found |= {
            "name": about.name,
            "capability": f"{about.major}.{about.minor}",
            "cores": about.multi_processor_count,
        }
        found |= {"memory_gib": round(total / GIB, 1), "free_gib": round(free / GIB, 1), "driver": driver()}
        found["cudnn"] = torch.backends.cudnn.version()
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def driver() -> str | None:
    """The driver's version as its own tool says it; none without the tool."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def products(section: Section, dtype: str) -> dict[str, Any]:
    """10^12 operations a second of square products."""
    size = 128 if section.tiny else 8192
    one, other = (torch.randn(size, size, device=section.device, dtype=getattr(torch, dtype)) for _ in range(2))
    seconds = section.seconds_of(lambda: one @ other, repeats=10, warm_ups=3)
    return {"size": size, "tera_operations_per_second": round(2 * size**3 / seconds / 1e12, 3)}


def copies(section: Section) -> dict[str, Any]:
    """10^9 bytes a second within the device (read and written both count) and from the CPU to it."""
    size = 2**20 if section.tiny else GIB
    here = torch.ones(size, dtype=torch.uint8)
    there, other = here.to(section.device), here.to(section.device)
    found = {"within": 2 * size / section.seconds_of(lambda: other.copy_(there))}
    found["from_the_cpu"] = size / section.seconds_of(lambda: there.copy_(here))
    if section.cuda:
        pinned = here.pin_memory()
        found["from_pinned_memory"] = size / section.seconds_of(lambda: there.copy_(pinned))
    return {name: round(rate / 1e9, 2) for name, rate in found.items()}

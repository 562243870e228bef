"""The cache key of an artifact, and each factor of it.

The key is a digest over what decides the compiled result: the checkpoint's config and tensor
types, every pass with its options and its source, this package's source, the libraries, the
device, the options. Finding an artifact therefore needs no capture and no import of
transformers. No environment variable and no path is part of it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fxlm.compiler.options import CompileOptions
from fxlm.compiler.pipeline import GraphPass

ROOMS = ("compiler", "passes", "models")
EXTENSIONS = ("avx", "amx", "sse", "fma", "asimd", "sve", "bf16")  # of instruction sets


def factors(
    checkpoint_digest: str,
    dtype: str,
    options: CompileOptions,
    passes: Sequence[GraphPass],
    max_model_len: int | None = None,
) -> dict[str, Any]:
    """Every factor of the key, by name; JSON-able.

    Args:
        max_model_len: given only if the model's constants depend on the context.
    """
    return {
        "max_model_len": max_model_len,
        "checkpoint": checkpoint_digest,
        "dtype": dtype,
        "block_size": options.block_size,
        "eager": options.eager,
        "trust_remote_code": options.trust_remote_code,
        "passes": [p.identity() for p in passes],
        "source": source_digest(),
        "versions": versions(),
        "device": device_identity(options.device),
    }


def digest(content: Any) -> str:
    """SHA-256 of JSON-able content, 64 hexadecimal digits."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the libraries whose code ends up in an artifact."""
    names = ("torch", "transformers", "triton")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


@cache
def source_digest(*folders: str) -> str:
    """SHA-256 over the source files of folders: by default those that decide a graph."""
    base = Path(__file__).resolve().parent.parent
    total = hashlib.sha256()
    for folder in folders or ROOMS:
        for file in sorted((base / folder).rglob("*")):
            if file.suffix in (".py", ".cpp", ".h") and "bundled" not in file.parts:
                total.update(str(file.relative_to(base)).encode() + b"\0")
                total.update(file.read_bytes() + b"\0")
    return total.hexdigest()


@cache
def device_identity(device: str) -> dict[str, str]:
    """What compiled code depends on of the device."""
    if device.startswith("cuda"):
        import torch

        major, minor = torch.cuda.get_device_capability()
        return {"kind": "cuda", "capability": f"{major}.{minor}"}
    return {
        "kind": "cpu",
        "machine": platform.machine(),
        "features": hashlib.sha256(_cpu_features().encode()).hexdigest()[:16],
        "compiler": _compiler_version(),
    }


def _cpu_features() -> str:
    """Instruction set extensions, as the kernel names them."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                words = sorted(line.split(":")[1].split())
                return " ".join(w for w in words if w.startswith(EXTENSIONS))
    except OSError:
        pass
    return platform.processor()


def _compiler_version() -> str:
    try:
        run = subprocess.run(
            ["g++", "-dumpfullversion"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"g++ {run.stdout.strip()}"

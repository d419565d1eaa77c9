"""What a result may depend on beside its config and its data: the machine, the packages, the commit of the code."""

import hashlib
import platform
import subprocess
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def machine() -> dict[str, Any]:
    """Say what a result may depend on: two machines with equal entries give bit-equal records."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        processor = next(
            (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), processor
        )
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {
        "python": platform.python_version(),
        "fslib": import_module("fslib").__version__,
    }  # installed or not
    for name in ("torch", "transformers", "datasets", "numpy", "scikit-learn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def code_checksum() -> str:
    """Return a checksum of the package's own code: two installations with equal ones compute the same."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "fslib").rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def git_commit() -> str:
    """Return the commit the code is at, with "+changes" if fslib/ differs from it; "unknown" outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--", "fslib") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

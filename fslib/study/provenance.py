"""What a result may depend on beside config and data: machine, packages, code."""

import hashlib
import platform
import re
import subprocess
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def machine() -> dict[str, Any]:
    """Return what a result may depend on here.

    Two machines with equal entries give bit-equal records.
    """
    cpuinfo = Path("/proc/cpuinfo")
    told = cpuinfo.read_text() if cpuinfo.is_file() else ""
    processor = re.search(r"^model name\s*:(.*)", told, re.M)
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor[1].strip() if processor else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    own = import_module("fslib").__version__  # installed or not
    packages = ("torch", "transformers", "datasets", "numpy", "scikit-learn")
    found = {name: version(name) for name in packages}
    return {"python": platform.python_version(), "fslib": own, **found}


def code_checksum() -> str:
    """Return a checksum of the package's own code.

    Two installations with equal ones compute the same.
    """
    digest = hashlib.sha256()
    for path in sorted((ROOT / "fslib").rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def git_commit() -> str:
    """Return the commit the code is at; "unknown" outside a checkout.

    It ends in "+changes" if fslib/ differs from it.
    """

    def git(*words: str) -> str:
        options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True}
        return subprocess.run(["git", *words], check=True, **options).stdout.strip()

    try:
        changes = "+changes" if git("status", "--porcelain", "--", "fslib") else ""
        return git("rev-parse", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

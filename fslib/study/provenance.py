"""What a result may depend on beside config and data: machine, packages, code."""

import hashlib
import platform
import re
import subprocess
from functools import partial
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
    name = processor[1].strip() if processor else platform.processor()
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    here = {"system": platform.system(), "architecture": platform.machine(), "processor": name}
    return here | {"capability": capability, "threads": threads, "accelerator": gpu}


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
    paths = sorted((ROOT / "fslib").rglob("*.py"))
    whole = b"".join(path.name.encode() + path.read_bytes() for path in paths)
    return hashlib.sha256(whole).hexdigest()[:16]


def git_commit() -> str:
    """Return the commit the code is at; "unknown" outside a checkout.

    It ends in "+changes" if fslib/ differs from it.
    """
    ask = partial(subprocess.check_output, cwd=ROOT, stderr=subprocess.DEVNULL, text=True)
    try:
        changes = "+changes" if ask(["git", "status", "--porcelain", "--", "fslib"]) else ""
        return str(ask(["git", "rev-parse", "HEAD"])).strip() + changes
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

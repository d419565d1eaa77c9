"""Hostile days, on purpose: runs are killed, again and again, and crowd each other.

    python tests/campaign/campaign.py         100 kills (over an hour on two cores)
    python tests/campaign/campaign.py 10      10 kills

Full disks and damaged records are tested in tests/test_records.py. Every trial runs the command
`fslib` in processes of its own on the profile `smoke`, and compares what it leaves behind with the
results of one undisturbed run. A line per trial that went wrong, then a table: trials, wrong in
silence, tracebacks, lost results. The exit code is 1 if one of them is not zero. The random
moments come from a fixed seed.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from small_units import start  # noqa: E402

SMOKE = ["--profile", "smoke"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EXITS = {signal.SIGKILL: {-9}, signal.SIGTERM: {-15, 143}, signal.SIGINT: {-2, 130}}
KINDS = ("silent", "tracebacks", "lost")  # what can go wrong
LONGEST = 1800  # seconds that one command may take


@dataclass
class Tally:
    """What came of one kind of trial: how many, and what went wrong, a line each."""

    name: str
    trials: int = 0
    wrong: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def row(self) -> str:
        counts = " | ".join(str(len(lines)) for lines in self.wrong.values())
        return f"| {self.name} | {self.trials} | {counts} |"


def begin(words: list[str]) -> subprocess.Popen:
    """Begin a command in a process group of its own, as a terminal would."""
    fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = {"stdin": subprocess.DEVNULL, "start_new_session": True, "cwd": ROOT}
    return start(["run", *words], env=fixed, **options)


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
            for changing in ("seconds", "commit", "content_sha256"):
                record.pop(changing, None)
            content = json.dumps(record).encode()
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


@contextlib.contextmanager
def undisturbed(notebooks: list[str]) -> Iterator[tuple[Path, dict[str, bytes]]]:
    """A folder to work in, and what one calm run leaves in a results folder."""
    with tempfile.TemporaryDirectory(prefix="fslib-campaign-") as place:
        calm = Path(place) / "calm"
        process = begin([*notebooks, *SMOKE, "--results", str(calm)])
        _, err = process.communicate(timeout=LONGEST)
        assert process.returncode == 0, err
        yield Path(place), contents(calm)


def kills(count: int, longest: float, notebooks: list[str]) -> Tally:
    """Kill a run at random moments, one start after another on one folder; then let one finish."""
    names = ", ".join(s.name for s in SIGNALS)
    tally, moments = Tally(f"killed at a random moment ({names})"), random.Random(0)
    with undisturbed(notebooks) as (place, expected):
        words = [*notebooks, *SMOKE, "--results", str(place / "rough")]
        for number in range(count):
            chosen = SIGNALS[number % len(SIGNALS)]
            process = begin(words)
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
        process = begin(words)
        _, err = process.communicate(timeout=LONGEST)
        if process.returncode:
            one_line(tally, "the last run", process.returncode, err, {0})
        compare(tally, f"after {count} kills", Path(words[-1]), expected)
    return tally


def together(count: int, notebooks: list[str]) -> Tally:
    """Several runs at once on one folder."""
    tally = Tally(f"{count} runs at once on one folder")
    with undisturbed(notebooks) as (place, expected):
        shared = place / "shared"
        words = [*notebooks, *SMOKE, "--results", str(shared)]
        processes = [begin(words) for _ in range(count)]
        for number, process in enumerate(processes):
            _, err = process.communicate(timeout=LONGEST)
            tally.trials += 1
            if process.returncode:
                one_line(tally, f"run {number}", process.returncode, err, {0})
        compare(tally, f"{count} at once", shared, expected)
    return tally


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("rounds", nargs="?", type=int, default=100, help="kills (default: 100)")
    parser.add_argument("--longest", type=float, default=30, help="seconds (default: 30)")
    parser.add_argument("--notebooks", nargs="*", default=[], help="default: all")
    options = parser.parse_args()
    killed = kills(options.rounds, options.longest, options.notebooks)
    tallies = [killed, together(3, options.notebooks)]
    for tally in tallies:
        for kind, lines in tally.wrong.items():
            for line in lines:
                print(f"{kind}: {line}", flush=True)
    print("\n| what | trials | wrong in silence | tracebacks | lost |")
    print("| --- | --- | --- | --- | --- |")
    for tally in tallies:
        print(tally.row())
    return int(any(any(tally.wrong.values()) for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())

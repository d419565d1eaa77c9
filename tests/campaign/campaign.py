"""Hostile days, on purpose: runs are killed, crowd each other, and meet full disks and damage.

    python tests/campaign/campaign.py                 all of it (over an hour on two cores)
    python tests/campaign/campaign.py kills disks     some of it: kills, together, disks, damage
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
LONGEST = 1800  # seconds that one command may take
STORAGE = ["02", "03"]  # what a disk or a record can do to a run does not depend on the notebook


@dataclass
class Tally:
    """What came of one kind of trial: how many, and what went wrong, a line each."""

    name: str
    trials: int = 0
    silent: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def row(self) -> str:
        wrong = [str(len(part)) for part in (self.silent, self.tracebacks, self.lost)]
        return f"| {self.name} | {self.trials} | {' | '.join(wrong)} |"

    def report(self) -> None:
        for what in ("silent", "tracebacks", "lost"):
            for line in getattr(self, what):
                print(f"    {what}: {line}", flush=True)


def environment(**changes: str) -> dict[str, str]:
    fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    fixed["TOKENIZERS_PARALLELISM"] = "false"
    kept = {k: v for k, v in os.environ.items() if k not in ("FSLIB_DATA", "FSLIB_RESULTS")}
    return kept | fixed | changes


def start(words: list[str], **changes: str) -> subprocess.Popen:
    """Begin a command in a process group of its own, as a terminal would."""
    options: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    options |= {"stdin": subprocess.DEVNULL, "text": True, "start_new_session": True}
    # what a shell starts in the background ignores Ctrl-C, and so would what it starts
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([*COMMAND, *words], env=environment(**changes), cwd=ROOT, **options)


def run(words: list[str], **changes: str) -> tuple[int, str, str]:
    process = start(words, **changes)
    out, err = process.communicate(timeout=LONGEST)
    return process.returncode, out, err


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
            tally.lost.append(f"{trial}: {name} is missing")
        elif name not in expected:
            tally.lost.append(f"{trial}: {name} was left behind")
        elif found[name] != expected[name]:
            tally.silent.append(f"{trial}: {name} differs")


def one_line(tally: Tally, trial: str, code: int, err: str, wanted: set[int]) -> None:
    """A refusal is one line of `fslib: ...` and the exit code that was promised."""
    if "Traceback" in err:
        tally.tracebacks.append(f"{trial}: {err.strip().splitlines()[-1]}")
    elif code not in wanted:
        how = f"exit code {code}, not {sorted(wanted)}"
        tally.silent.append(f"{trial}: {how}; {err.strip()[-200:]}")
    elif len(err.strip().splitlines()) > 1:
        tally.tracebacks.append(f"{trial}: several lines for one: {err.strip()!r:.400}")


@contextlib.contextmanager
def undisturbed(notebooks: list[str]) -> Iterator[tuple[Path, dict[str, bytes]]]:
    """A folder to work in, and what one calm run leaves in a results folder."""
    with tempfile.TemporaryDirectory(prefix="fslib-campaign-") as place:
        calm = Path(place) / "calm"
        code, _, err = run(["run", *notebooks, *SMOKE, "--results", str(calm)])
        assert code == 0, err
        yield Path(place), contents(calm)


def kills(count: int, longest: float, notebooks: list[str]) -> Tally:
    """Kill a run at random moments, one start after another on one folder; then let one finish."""
    names = ", ".join(s.name for s in SIGNALS)
    tally, moments = Tally(f"killed at a random moment ({names})"), random.Random(0)
    with undisturbed(notebooks) as (place, expected):
        rough = place / "rough"
        words = ["run", *notebooks, *SMOKE, "--results", str(rough)]
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
                trial = f"kill {number} ({chosen.name})"
                one_line(tally, trial, process.returncode, err, EXITS[chosen])
        time.sleep(5)  # kernels whose parent has gone end by themselves
        code, _, err = run(words)
        if code:
            tally.lost.append(f"the run after {count} kills: {code}, {err.strip()[-200:]}")
        compare(tally, f"after {count} kills", rough, expected)
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
                one_line(tally, f"run {number} of {count}", process.returncode, err, {0})
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
            with small_disk(place / f"full-{size}", f"size={size}") as disk:
                words = ["run", *notebooks, *SMOKE, "--results", str(disk)]
                code, _, err = run(words)
                tally.trials += 1
                one_line(tally, f"disk of {size}", code, err, {1, 2})
                subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
                code, _, err = run(words)
                trial = f"disk of {size}, then with room"
                if code:
                    tally.lost.append(f"{trial}: {code}, {err.strip()[-200:]}")
                compare(tally, trial, disk, expected)
        with small_disk(place / "read-only", "ro") as disk:
            code, _, err = run(["run", *notebooks, *SMOKE, "--results", str(disk)])
            tally.trials += 1
            one_line(tally, "read-only disk", code, err, {1, 2})
    return tally


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _field(name: str, value: object):  # type: ignore[no-untyped-def]
    return lambda content: json.dumps(json.loads(content) | {name: value}).encode()


DAMAGES = {
    "cut JSON": (".json", lambda content: content[: len(content) // 2]),
    "empty JSON": (".json", lambda content: b""),
    "another config": (".json", _field("config", {})),
    "a text for seconds": (".json", _field("seconds", "long")),
    "deep JSON": (".json", lambda content: b"[" * 100_000),
    "cut arrays": (".npz", lambda content: content[: len(content) // 2]),
    "a flipped bit": (".npz", _flip),
    "no arrays": (".npz", None),
}


def damage(kinds: list[str], notebooks: list[str]) -> Tally:
    """Damage a record: verify must say so and move nothing, run must compute it again."""
    tally = Tally("damaged record")
    with undisturbed(notebooks) as (place, expected):
        folder, chance = place / "calm", random.Random(0)
        (runs,) = folder.rglob("runs")
        for kind in kinds:
            suffix, hurt = DAMAGES[kind]
            path = chance.choice(sorted(runs.glob(f"*{suffix}")))
            whole = path.read_bytes()
            path.unlink() if hurt is None else path.write_bytes(hurt(whole))
            before = sorted(p.name for p in runs.iterdir())
            shared = [*notebooks, *SMOKE, "--results", str(folder)]
            code, out, err = run(["verify", "--sample", "1", *shared])
            tally.trials += 1
            if "Traceback" in out + err:
                tally.tracebacks.append(f"{kind}: {err.strip().splitlines()[-1]}")
            elif code != 1:
                tally.silent.append(f"{kind}: verify ended with {code}")
            if sorted(p.name for p in runs.iterdir()) != before:
                tally.lost.append(f"{kind}: verify moved files")
            code, out, err = run(["run", *shared])
            if code or "Traceback" in out + err:
                tally.tracebacks.append(f"{kind}: run: {code}, {(out + err).strip()[-200:]}")
            for aside in runs.glob("*.corrupt*"):  # set aside, as was said
                aside.unlink()
            compare(tally, kind, folder, expected)
    return tally


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parts = ("kills", "together", "disks", "damage")
    parser.add_argument("parts", nargs="*", choices=[[], *parts], help="default: all")
    parser.add_argument("--kills", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--longest", type=float, default=30, help="seconds (default: 30)")
    parser.add_argument("--notebooks", nargs="*", default=[], help="default: all, or 02 and 03")
    options = parser.parse_args()
    trials = {
        "kills": lambda: kills(options.kills, options.longest, options.notebooks),
        "together": lambda: together(3, options.notebooks),
        "disks": lambda: disks(["100k", "1m", "3m", "10m"], options.notebooks or STORAGE),
        "damage": lambda: damage(list(DAMAGES), options.notebooks or STORAGE),
    }
    tallies = []
    for name in options.parts or parts:
        begun = time.perf_counter()
        tallies.append(trials[name]())
        seconds = time.perf_counter() - begun
        print(f"{name}: {tallies[-1].trials} trials in {seconds:.0f} s", flush=True)
        tallies[-1].report()
    print("\n| what | trials | wrong in silence | tracebacks | lost |")
    print("| --- | --- | --- | --- | --- |")
    for tally in tallies:
        print(tally.row())
    return int(any(t.silent or t.tracebacks or t.lost for t in tallies))


if __name__ == "__main__":
    sys.exit(main())

"""Hostile days, on purpose: what is left when runs are killed, crowd each other, get nonsense or a full disk.

    python tests/campaign/campaign.py                 all of it (about an hour and a half on two cores)
    python tests/campaign/campaign.py kills inputs    some of it: kills, together, inputs, disks, damage
    python tests/campaign/campaign.py kills --kills 10

Every trial runs the command `fslib` in processes of its own on the profile `smoke`, and compares what it leaves behind
with the results of one undisturbed run. A line per trial that went wrong, then a table: trials, wrong in silence,
tracebacks, lost results. The exit code is 1 if one of them is not zero. The random moments come from a fixed seed.
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
COMMAND = [sys.executable, "-c", "import sys, fslib_command; sys.exit(fslib_command.main())"]
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
        for what, lines in (
            ("in silence", self.silent),
            ("traceback", self.tracebacks),
            ("lost", self.lost),
        ):
            for line in lines:
                print(f"    {what}: {line}", flush=True)


def environment(**changes: str) -> dict[str, str]:
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    kept = {k: v for k, v in os.environ.items() if k not in ("FSLIB_DATA", "FSLIB_RESULTS")}
    return kept | fixed | changes


def start(words: list[str], **changes: str) -> subprocess.Popen:
    """Begin a command in a process group of its own, as a terminal would."""
    options: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    # what a shell starts in the background ignores Ctrl-C, and so would what it starts
    options |= {
        "start_new_session": True,
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }
    return subprocess.Popen([*COMMAND, *words], env=environment(**changes), cwd=ROOT, **options)


def run(words: list[str], **changes: str) -> tuple[int, str, str]:
    process = start(words, **changes)
    out, err = process.communicate(timeout=LONGEST)
    return process.returncode, out, err


def contents(folder: Path) -> dict[str, bytes]:
    """Everything under a results folder but locks and checkpoints; of a record's JSON, all but when and how fast."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if ".locks" in name or "/checkpoints/" in f"/{name}":
            continue
        content = path.read_bytes()
        if "/runs/" in f"/{name}" and path.suffix == ".json":
            record = json.loads(content)
            content = json.dumps(
                {k: v for k, v in record.items() if k not in ("seconds", "commit")}
            ).encode()
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
        tally.silent.append(
            f"{trial}: exit code {code}, not {sorted(wanted)}; {err.strip()[-200:]}"
        )
    elif len(err.strip().splitlines()) > 1:
        tally.tracebacks.append(
            f"{trial}: {len(err.strip().splitlines())} lines for one: {err.strip()!r:.400}"
        )


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
    tally, moments = (
        Tally(f"killed at a random moment ({', '.join(s.name for s in SIGNALS)})"),
        random.Random(0),
    )
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
                os.killpg(process.pid, chosen) if chosen is signal.SIGINT else process.send_signal(
                    chosen
                )
            _, err = process.communicate(timeout=LONGEST)
            tally.trials += 1
            if chosen is not signal.SIGKILL and process.returncode:
                one_line(
                    tally, f"kill {number} ({chosen.name})", process.returncode, err, EXITS[chosen]
                )
        time.sleep(5)  # kernels whose parent has gone end by themselves
        code, _, err = run(words)
        if code:
            tally.lost.append(
                f"the run after {count} kills ended with {code}: {err.strip()[-200:]}"
            )
        compare(tally, f"after {count} kills", rough, expected)
    return tally


def together(count: int, notebooks: list[str]) -> Tally:
    """Several runs at once on one folder."""
    tally = Tally(f"{count} runs at once on one folder")
    with undisturbed(notebooks) as (place, expected):
        shared = place / "shared"
        processes = [
            start(["run", *notebooks, *SMOKE, "--results", str(shared)]) for _ in range(count)
        ]
        for number, process in enumerate(processes):
            _, err = process.communicate(timeout=LONGEST)
            tally.trials += 1
            if process.returncode:
                one_line(tally, f"run {number} of {count}", process.returncode, err, {0})
        compare(tally, f"{count} at once", shared, expected)
    return tally


def bad_inputs() -> list[list[str]]:
    """Command lines that must each be refused in one line, with exit code 2."""
    settings = [
        "stepps=3", "steps", "=3", "steps=0", "steps=-1", "steps=2.5", "steps=true", "steps=", "steps=many",
        "steps=[1]", "steps=2020-01-01", "steps={a: 1}", "lr=0", "lr=-1", "lr=.nan", "lr=fast", "sampling=anealed",
        "small_sampling=no", "fractions=[]", "fractions=[0]", "fractions=[1.5]", "fractions=[0.1, 0.1]",
        "fractions=0.1", "tasks=[]", "tasks=[bbc]", "tasks=[bbc, bbc]", "tasks=[bbc, BBC]", "tasks=[bbc, bbc-pears]",
        "tasks=bbc", "tasks=[a/b, bbc]", "tasks=[bbc", "controls=0", "controls=-1", "controls=100000", "seeds=0",
        "draws=1", "encoder=minilm-l7", "encoder=[]", "encoders=[]", "encoders=[tiny-random, tiny-randon]",
        "small_encoder=nothing", "max_length=0", "max_length=3", "batch_size=0", "alpha=0", "alpha=1.5",
        "alpha=0.001", "delta=0", "delta=1", "other_alphas=[2]", "other_deltas=[0]", "ending_seeds=1",
        "transfer_targets=[bbcs]", "eval_examples=1", "importance_examples=0", "curve_points=0", "epochs=0",
    ]  # fmt: skip
    lines = [["run", "08", *SMOKE, "--set", setting] for setting in settings]
    lines += [
        ["run", "09x"],
        ["run", "--profile", "smok"],
        ["list", "--profile", ""],
        ["verify", "--sample", "-1", *SMOKE],
    ]
    return [
        *lines,
        ["verify", "--draw", "-1", *SMOKE],
        ["run", "--seed", "-1", *SMOKE],
        ["verify", *SMOKE],
    ]


def inputs(lines: list[list[str]]) -> Tally:
    """Nonsense on the command line."""
    tally = Tally("bad input")
    with tempfile.TemporaryDirectory(prefix="fslib-campaign-") as place:
        for number, words in enumerate(lines):
            results = Path(place) / str(number)
            code, _, err = run([*words, "--results", str(results)])
            tally.trials += 1
            one_line(tally, " ".join(words), code, err, {2})
            if list(results.rglob("runs/*.json")):
                tally.silent.append(
                    f"{' '.join(words)}: something was computed before it was refused"
                )
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
                if code:
                    tally.lost.append(
                        f"disk of {size}, then with room: {code}, {err.strip()[-200:]}"
                    )
                compare(tally, f"disk of {size}, then with room", disk, expected)
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
            code, out, err = run(
                ["verify", *notebooks, *SMOKE, "--sample", "1", "--results", str(folder)]
            )
            tally.trials += 1
            if "Traceback" in out + err:
                tally.tracebacks.append(f"{kind}: {err.strip().splitlines()[-1]}")
            elif code != 1:
                tally.silent.append(f"{kind}: verify ended with {code}")
            if sorted(p.name for p in runs.iterdir()) != before:
                tally.lost.append(f"{kind}: verify moved files")
            code, out, err = run(["run", *notebooks, *SMOKE, "--results", str(folder)])
            if code or "Traceback" in out + err:
                tally.tracebacks.append(
                    f"{kind}: run ended with {code}: {(out + err).strip()[-200:]}"
                )
            for aside in runs.glob("*.corrupt*"):  # set aside, as was said
                aside.unlink()
            compare(tally, kind, folder, expected)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("kills", "together", "inputs", "disks", "damage")
    parser.add_argument(
        "parts", nargs="*", choices=[[], *parts], help=f"of: {', '.join(parts)} (default: all)"
    )
    parser.add_argument("--kills", type=int, default=100, help="how many (default: 100)")
    parser.add_argument(
        "--longest",
        type=float,
        default=30,
        help="seconds within which a run is killed (default: 30)",
    )
    parser.add_argument(
        "--notebooks", nargs="*", default=[], help="default: all; 02 and 03 for disks and damage"
    )
    options = parser.parse_args()
    trials = {
        "kills": lambda: kills(options.kills, options.longest, options.notebooks),
        "together": lambda: together(3, options.notebooks),
        "inputs": lambda: inputs(bad_inputs()),
        "disks": lambda: disks(["100k", "1m", "3m", "10m"], options.notebooks or STORAGE),
        "damage": lambda: damage(list(DAMAGES), options.notebooks or STORAGE),
    }
    tallies = []
    for name in options.parts or parts:
        begun = time.perf_counter()
        tallies.append(trials[name]())
        print(
            f"{name}: {tallies[-1].trials} trials in {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
        tallies[-1].report()
    print(
        "\n| what | trials | wrong in silence | tracebacks | lost |\n| --- | --- | --- | --- | --- |"
    )
    for tally in tallies:
        print(tally.row())
    return int(any(t.silent or t.tracebacks or t.lost for t in tallies))


if __name__ == "__main__":
    sys.exit(main())

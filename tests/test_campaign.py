"""Try the campaign itself, shortened: kills, full disks and damaged records."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "campaign"))

import campaign

NOTEBOOK = ["02"]


def nothing_wrong(tally: campaign.Tally, trials: int) -> None:
    assert tally.trials == trials
    assert (tally.silent, tally.tracebacks, tally.lost) == ([], [], [])


def test_killed_runs_end_as_an_undisturbed_one():
    nothing_wrong(campaign.kills(3, 8, NOTEBOOK), 3)


def test_damage_is_said_and_mended():
    nothing_wrong(campaign.damage(["a flipped bit"], NOTEBOOK), 1)


def test_the_campaign_sees_what_is_wrong(tmp_path):
    tally = campaign.Tally("made up")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text('{"key": 1, "seconds": 2}')
    (tmp_path / "left.partial-1").write_text("")
    expected = {"runs/a.json": b'{"key": 2}', "tables/b.csv": b""}
    campaign.compare(tally, "trial", tmp_path, expected)
    assert tally.silent == ["trial: runs/a.json differs"]
    assert tally.lost == ["trial: left.partial-1 was left behind", "trial: tables/b.csv is missing"]
    campaign.one_line(
        tally, "trial", 1, "Traceback (most recent call last):\n  ...\nValueError: x", {2}
    )
    campaign.one_line(tally, "trial", 0, "", {2})
    campaign.one_line(tally, "trial", 2, "fslib: one\nfslib: two", {2})
    campaign.one_line(tally, "trial", 2, "fslib: one", {2})
    assert len(tally.tracebacks) == 2 and len(tally.silent) == 2
    assert tally.row() == "| made up | 0 | 2 | 2 | 2 |"

"""Try the campaign itself, shortened to one kill."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "campaign"))

import campaign


def test_a_killed_run_ends_as_an_undisturbed_one():
    tally = campaign.kills(1, 12, ["02", "--set", "seeds=1", "--set", "steps=10"])
    assert (tally.trials, *tally.wrong.values()) == (1, [], [], [])


def test_the_campaign_sees_what_is_wrong(tmp_path):
    tally = campaign.Tally("made up")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text('{"key": 1, "seconds": 2}')
    (tmp_path / "left.partial-1").write_text("")
    campaign.compare(tally, "trial", tmp_path, {"runs/a.json": b'{"key": 2}', "b.csv": b""})
    for code, said in ((1, "Traceback:\nX"), (0, ""), (2, "fslib: one\nfslib: two"), (2, "one")):
        campaign.one_line(tally, "trial", code, said, {2})
    assert tally.wrong["lost"] == [
        "trial: b.csv is missing",
        "trial: left.partial-1 was left behind",
    ]
    assert tally.row() == "| made up | 0 | 2 | 2 | 2 |"

"""What a profile costs before it is begun: operations and bytes by hand and on the real model, hours, many workers."""

import math
from pathlib import Path

import pytest
import torch
from small_units import TASKS, NumbersUnit, training
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fslib import FslibError, Study
from fslib.data import hub
from fslib.model import footprint
from fslib.model.encoders import load_encoder
from fslib.study import fingerprints
from fslib.study.cli import main
from fslib.study.fingerprints import cached_task, consult, planning
from fslib.study.plan import cost_table, flops, longest, memory, plan_lines, simulate
from fslib.study.records import Record, Store, distinct
from fslib.study.units import ImportanceUnit, PruneUnit, mean_tokens

ROOT = Path(__file__).resolve().parent.parent

NOTEBOOKS = [f"{number:02d}" for number in range(1, 9)]


def every_unit(study: Study):
    return distinct(unit for notebook in NOTEBOOKS for unit in study.plan(notebook))


# Footprint


@pytest.mark.parametrize(("name", "layers", "hidden"), [("bert-mini", 4, 256), ("minilm-l3", 3, 384)])
def test_operations_by_hand(name, layers, hidden):
    tokens = 40  # query, key, value, output: 4 d^2; feed-forward: 8 d^2; scores and their use: 2 n d; each twice
    assert footprint.forward_flops(name, tokens) == 2 * layers * tokens * (12 * hidden**2 + 2 * tokens * hidden)


def test_a_skeleton_takes_what_the_real_encoder_takes():
    encoder, _, _ = load_encoder("minilm-l3")
    assert footprint.weights("minilm-l3") == sum(p.numel() for p in encoder.parameters())
    assert footprint.shape("minilm-l3") == (3, 12)
    texts = torch.ones(2, 24, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(input_ids=texts)
    assert counter.get_total_flops() == 2 * footprint.forward_flops("minilm-l3", 24)
    own, kept = {p.untyped_storage().data_ptr() for p in encoder.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with sdpa_kernel(SDPBackend.MATH), saved_tensors_hooks(keep, lambda tensor: tensor):
        output = encoder.train()(input_ids=texts)
    saved = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    del output
    counted = footprint.training_bytes("minilm-l3", 2, 24) - 16 * footprint.weights("minilm-l3")
    assert counted == pytest.approx(saved, rel=0.02)


def test_an_encoder_of_the_paper_needs_no_file_and_others_say_why_they_cannot_be_counted():
    assert footprint.weights("bert-base") == 108_891_648  # 109,482,240 without the pooler
    assert footprint.shape("roberta-large") == (24, 16)
    with pytest.raises(FslibError, match="what no-such/model takes cannot be counted"):
        footprint.weights("no-such/model")


def test_training_takes_four_floats_a_weight_and_measuring_one():
    less, more = (footprint.training_bytes("tiny-random", texts, 16) for texts in (1, 3))
    kept = (more - less) / 2
    assert less == pytest.approx(16 * footprint.weights("tiny-random") + kept, rel=1e-3)
    assert more - footprint.measuring_bytes("tiny-random", 3, 16) == 12 * footprint.weights("tiny-random")


# Units


def test_a_unit_by_hand(small_tasks):
    model = training()
    tokens = round((mean_tokens("left") + mean_tokens("right")) / 2)
    each = footprint.forward_flops("tiny-random", tokens) / tokens / 2
    assert flops(model) == pytest.approx(model.token_layers() * each)
    importance = ImportanceUnit(model=model, examples=4)
    assert flops(importance) == pytest.approx(importance.token_layers() * each)
    assert flops(NumbersUnit(tasks=TASKS, n=0)) == memory(NumbersUnit(tasks=TASKS, n=0)) == 0
    assert memory(model) == footprint.training_bytes("tiny-random", 16, 16)
    assert memory(importance) == footprint.measuring_bytes("tiny-random", 32, 16)


def test_what_mini_took_is_within_half_of_what_is_planned_for_every_kind_and_encoder():
    study = Study("mini")
    recorded = [(unit, study.store.get(unit)) for unit in every_unit(study)]
    rate = sum(flops(u) for u, _ in recorded) / sum(record.seconds for _, record in recorded)
    table = cost_table([unit for unit, _ in recorded], rate, recorded)
    measured = table[table["PFLOP"] > 0]
    assert len(measured) == len(table) - 1 >= 9  # all but the bag of words
    ratios = measured["recorded hours"] / measured["hours"]
    assert ratios.between(1 / 1.5, 1.5).all(), ratios


# Workers


def numbers(count: int):
    return [NumbersUnit(tasks=TASKS, n=n) for n in range(count)]


@pytest.mark.parametrize(
    ("count", "workers", "hours", "busy"), [(3, 2, 2, 0.75), (4, 2, 2, 1), (3, 64, 1, 3 / 64), (5, 1, 5, 1)]
)
def test_units_of_an_hour_on_workers(small_tasks, tmp_path, count, workers, hours, busy):
    units = numbers(count)
    found = simulate(Store(tmp_path), units, {unit.key: 3600.0 for unit in units}, workers)
    assert (found.workers, found.hours, found.utilisation) == (workers, pytest.approx(hours), pytest.approx(busy))
    assert longest(units, {unit.key: 3600.0 for unit in units}) == 1
    assert not list(tmp_path.iterdir())


def test_a_chain_stays_with_its_worker_and_bounds_every_cluster(small_tasks, tmp_path):
    scored = [ImportanceUnit(model=training(seed), examples=4) for seed in range(2)]
    pruned = [PruneUnit(importance=unit, fractions=(0.25,), controls=1) for unit in scored]
    units = [*(unit.model for unit in scored), *scored, *pruned]
    hours = {unit.key: 3600.0 * (1 + 2 * (unit.kind == "prune")) for unit in units}  # 1 + 1 + 3
    assert longest(units, hours) == 5
    for workers, taken in ((1, 10), (2, 5), (64, 5)):
        assert simulate(Store(tmp_path), units, hours, workers).hours == pytest.approx(taken)


def test_nothing_to_do_takes_no_time(small_tasks, tmp_path):
    found = simulate(Store(tmp_path), [], {}, 8)
    assert (found.hours, found.utilisation, longest([], {})) == (0, 0, 0)


# Data that are not at hand


def test_the_plan_of_the_paper_needs_no_data_and_asks_nobody(monkeypatch, tmp_path):
    monkeypatch.delenv("FSLIB_DATA", raising=False)
    monkeypatch.setattr(hub, "_fetched", lambda *words: pytest.fail("the Hub was asked"))
    monkeypatch.setattr(fingerprints, "_consulted", [])
    consult(ROOT / "results" / "glue-mini")  # another study of this process, on fewer rows of the same tasks
    with planning():
        study = Study("paper", results=tmp_path)
        assert {name: (len(task.train), len(task.eval)) for name, task in study.tasks.items()} == {
            name: hub.REGISTRY[name].rows for name in study.profile.tasks
        }
        snli = cached_task("snli")
        assert (len(snli.train), len(snli.eval)) == (550_152 - 785, 10_000 - 176)
        assert cached_task("sts-b").is_regression and len(cached_task("sst-shift").eval) == 872
        assert math.isinf(mean_tokens("mnli"))
        assert study.units(0).train.tokens("mnli") == 128
        units = every_unit(study)
        lines = list(plan_lines(study.store, units, 150.0, [1, 8, 64]))
    assert lines[0].endswith("greatest length: mnli, qnli, qqp, sst-2, ag-pair, mrpc")
    assert f"{len(units)} units" in lines[-5] and "150 TFLOP/s (given)" in lines[-5]
    assert [line.split()[:2] for line in lines[-4:-1]] == [[n, "workers:"] for n in ("1", "8", "64")]
    assert not list(tmp_path.iterdir())


def test_words_that_were_not_known_are_counted_once_they_are(small_tasks, monkeypatch):
    known = mean_tokens("left")
    with monkeypatch.context() as patched:
        patched.delenv("FSLIB_DATA")
        with planning():
            assert math.isinf(mean_tokens("cola"))
    assert mean_tokens("left") == known < math.inf


def test_what_is_planned_with_is_not_taken_for_data_afterwards(monkeypatch):
    monkeypatch.delenv("FSLIB_DATA", raising=False)
    with planning():
        cached_task("cola")
    with pytest.raises(FslibError, match="cola"):
        cached_task("cola")


def test_nothing_to_plan_and_nothing_that_shows_a_rate(small_tasks, tmp_path):
    store, unit = Store(tmp_path), NumbersUnit(tasks=TASKS, n=0)
    assert list(plan_lines(store, [], 1.0, [1])) == ["nothing to compute"]
    record = Record("numbers", unit.key, {}, {}, {}, {}, 4.0, {}, "", {})
    with pytest.raises(FslibError, match="nothing is recorded that would show how fast"):
        list(plan_lines(store.with_records([record]), [unit], None, [1]))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "modernbert"])
def test_other_architectures_are_counted_as_they_run(zoo, name):
    folder = str(zoo.folder(name))
    encoder = zoo.model(name).encoder
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(input_ids=torch.ones(1, 12, dtype=torch.long))
    assert footprint.forward_flops(folder, 12) == counter.get_total_flops()


def test_an_architecture_that_asks_for_a_value_on_the_way_is_refused(zoo):
    with pytest.raises(FslibError, match=r"what .*deberta-v2 takes cannot be counted: "):
        footprint.forward_flops(str(zoo.folder("deberta-v2")), 12)


def test_texts_that_are_at_hand_are_counted(small_tasks, tmp_path):
    lines = list(plan_lines(Store(tmp_path), [training()], 1.0, [1]))
    assert lines[0].startswith("kind") and "not at hand" not in lines[0]


# The command


def run(capsys, *words):
    code = main(["plan", "--profile", "smoke", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_plan_on_the_command_line(capsys, tmp_path):
    code, out, _ = run(capsys, "03", "--tflops", "0.5", "--workers", "2", "--results", str(tmp_path))
    assert code == 0
    assert "6 units" in out and "0.5 TFLOP/s (given)" in out
    assert "2 workers" in out and "8 workers" not in out
    assert not list(tmp_path.iterdir())


def test_the_rate_is_taken_from_records(tmp_path, small_tasks):
    store, unit = Store(tmp_path), training()
    record = Record("train", unit.key, {}, {}, {}, {}, 4.0, {}, "", {})
    lines = list(plan_lines(store.with_records([record]), [unit, training(1)], None, [1]))
    assert f"{flops(unit) / 4 / 1e12:.3g} TFLOP/s (that 1 records show)" in lines[-3]
    assert f"{8 / 3600:.3g} hours, busy 100%" in lines[-2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing is recorded that would show how fast this is: give --tflops"),
        (("--tflops", "0"), "--tflops 0: give the operations per second"),
        (("--tflops", "nan"), "--tflops nan: give the operations per second"),
        (("--tflops", "inf"), "--tflops inf: give the operations per second"),
        (("--tflops", "1", "--workers", "4", "0"), "--workers 0: give 1 or more"),
    ],
)
def test_what_cannot_be_planned_is_said(capsys, tmp_path, words, message):
    code, _, err = run(capsys, "03", *words, "--results", str(tmp_path))
    assert code == 2 and message in err

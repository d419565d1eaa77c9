"""Every head alone: what it costs, what it attends to, and the units that record both."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from refusal import refused
from scipy import stats
from small_units import TASKS, training
from tinymodels import ARCHITECTURES, HEADS, LAYERS, heads_at, untouched

from fslib import evaluate, head_importance, importance, lesion_heads, pruned
from fslib.lesions import HeadLesions
from fslib.model.attention import attention_weights
from fslib.model.hooked import HOOKED
from fslib.study.store import Store
from fslib.study.units import LesionUnit, PatternUnit, pattern, scored_on, short_texts

SEEN = sorted(ARCHITECTURES.keys() - HOOKED.keys())


# --- what losing a head costs -------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(zoo):
    return zoo.model("bert")


@pytest.fixture(scope="module")
def lesions(zoo, model):
    return lesion_heads(model, zoo.tasks, batch_size=2)


def test_every_head_alone_is_evaluated_as_under_pruned(zoo, model, lesions):
    whole = evaluate(model, zoo.tasks)
    sets = [(), *([place] for place in np.ndindex(LAYERS, HEADS))]
    for number, places in enumerate(sets):
        with pruned(model, heads_at(*places)):
            scores = evaluate(model, zoo.tasks)
        for name, score in scores.items():
            found = lesions.predictions[name][number]
            np.testing.assert_allclose(found, score.predictions, atol=1e-5)
            for place in places:
                lost = 100 * (whole[name].value - score.value)
                assert lesions.cost(name)[place] == pytest.approx(lost, abs=1e-9)
    for name, task in zoo.tasks.items():
        assert np.array_equal(lesions.labels[name], task.eval.labels)
        expected = head_importance(model, task, estimator="ablation", split="eval")
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(lesions.rise(name), expected, atol=atol)
    assert repr(lesions) == "HeadLesions(single, pair, regression; 3 x 4 heads)"


def test_heads_that_are_off_around_the_call_stay_off(zoo, model):
    task = zoo.tasks["single"]
    with pruned(model, heads_at((1, 2))):
        found, expected = lesion_heads(model, task), evaluate(model, task)["single"].predictions
    assert np.array_equal(found.predictions["single"][0], expected)
    assert found.rise("single")[1, 2] == 0, "it is off anyway"
    assert model.control.gate is None


def drawn(correct, losses, shape=(2, 2)) -> HeadLesions:
    """One task: so many right answers of n, and the losses of every example, by set."""
    losses = np.asarray(losses, np.float32)
    n = losses.shape[1]
    answers = {"t": (np.arange(n) < np.array(correct)[:, None]).astype(int)}
    labels = {"t": np.ones(n, np.int64)}
    return HeadLesions(("t",), ("accuracy",), shape, labels, answers, {"t": losses})


def of_worth(rng: np.random.Generator, worth: np.ndarray, n: int = 60) -> HeadLesions:
    """Heads of a known worth, whose loss is measured with noise on n examples."""
    noise = rng.normal(0, 3, (worth.size, n))
    losses = np.concatenate([np.zeros((1, n)), worth.ravel()[:, None] + noise])
    return drawn([0] * len(losses), losses, worth.shape)


ALIKE = drawn([9, 8, 9, 4, 10], np.repeat([[1.0], [1.5], [1.0], [3.0], [0.75]], 10, 1))


def test_costs_by_hand():
    assert ALIKE.cost("t").tolist() == pytest.approx(np.array([[10, 0], [50, -10]]))
    assert ALIKE.rise("t").tolist() == [[0.5, 0.0], [2.0, -0.25]]
    interval = ALIKE.measure("t", 1, 0).interval()
    lost = ALIKE.predictions["t"][0] - ALIKE.predictions["t"][3]
    assert interval.value == pytest.approx(50)
    assert interval.se == pytest.approx(100 * np.std(lost, ddof=1) / np.sqrt(10))
    agree = ALIKE.predicted_by("t", np.array([[0.2, 0.1], [0.9, 0.0]])).interval()
    assert agree[:2] == pytest.approx((1, 0)), "all examples say the same"


def test_wrong_questions_are_refused(zoo, model):
    single, pair, maps = zoo.tasks["single"], zoo.tasks["pair"], np.zeros((2, 2))
    for ask in (ALIKE.cost, ALIKE.rise, lambda task: ALIKE.predicted_by(task, maps)):
        with refused("unknown task of these lesions 'u'"):
            ask("u")
    with refused("importance: got shape (2, 3), where (2, 2) is needed"):
        ALIKE.predicted_by("t", np.zeros((2, 3)))
    for layer, head in ((0, 2), (2, 0), (-1, 0), (0, -1)):
        with refused(f"layer {layer}, head {head} is outside (2, 2)"):
            ALIKE.measure("t", layer, head)
    with refused("unknown task of this model 'mood'"):
        lesion_heads(model, replace(single, name="mood"))
    with refused("batch_size 0"):
        lesion_heads(model, zoo.tasks, batch_size=0)
    with refused("task pair: an interval needs two examples or more, not 1"):
        lesion_heads(model, pair.limited(eval=1))


def test_how_importance_predicts_the_loss_is_spearmans_over_heads():
    rng = np.random.default_rng(0)
    worth = rng.random((2, 12))
    found = of_worth(rng, worth)
    rises = found.losses["t"][1:] - found.losses["t"][0]

    def correlation(means):
        return stats.spearmanr(worth.ravel(), means).statistic

    measure = found.predicted_by("t", worth)
    assert measure.values[0] == pytest.approx(correlation(rises.mean(1)))
    without = correlation(np.delete(rises, 7, axis=1).mean(1))
    assert measure.influence["t"][0, 7] == pytest.approx(59 * (measure.values[0] - without))
    half = found.rise("t", np.arange(30))
    assert half.ravel().tolist() == pytest.approx(rises[:, :30].mean(1).tolist(), abs=1e-6)


def test_reliability_is_high_where_examples_agree_and_near_0_where_they_are_noise():
    rng = np.random.default_rng(0)
    assert ALIKE.reliability("t", splits=3) == pytest.approx(1)
    noise = [of_worth(rng, np.zeros((2, 12))).reliability("t", splits=20) for _ in range(20)]
    assert abs(np.mean(noise)) < 0.1
    assert of_worth(rng, 20 * rng.random((2, 12))).reliability("t", splits=5) > 0.9


def test_its_interval_covers_what_such_measurements_give_on_average():
    """95 % is meant; leaving one out moves ranks in jumps, which makes it somewhat wide."""
    rng = np.random.default_rng(1)
    worth, importance = rng.gamma(1, 1, (2, 2, 12))
    importance = worth + importance
    found = [of_worth(rng, worth).predicted_by("t", importance).interval() for _ in range(200)]
    expected = np.mean([one.value for one in found])
    covered = np.mean([one.low <= expected <= one.high for one in found])
    assert 0.92 <= covered <= 1
    wide = np.mean([one.se for one in found]) / np.std([one.value for one in found])
    assert 0.9 < wide < 1.8


# --- what a head attends to ---------------------------------------------------------------------


@pytest.mark.parametrize("name", SEEN)
def test_weights_are_those_of_transformers_own_eager_attention(zoo, name):
    model = zoo.model(name)
    batch = model.encode(zoo.tasks["pair"].eval).batch(range(4))  # of different lengths
    found = attention_weights(model, batch.inputs)
    eager = untouched(name, zoo.folder(name))
    eager.set_attn_implementation("eager")
    inputs = {k: v for k, v in batch.inputs.items() if k in model.accepts}
    with torch.no_grad():
        expected = torch.stack(eager(**inputs, output_attentions=True).attentions)
    real = batch.mask[None, :, None, :, None].bool()  # what padding attends to is nobody's business
    assert found.shape == expected.shape == (LAYERS, 4, HEADS, *batch.mask.shape[1:] * 2)
    torch.testing.assert_close(found * real, expected * real, atol=1e-5, rtol=0)
    padding = 1 - batch.mask[None, :, None, None, :]
    assert float((found * real * padding).abs().max()) == 0, "padding is not seen"
    assert model.control.weights is None


@pytest.mark.parametrize("name", sorted(HOOKED))
def test_an_architecture_whose_weights_are_not_seen_is_refused(zoo, name):
    model = zoo.model(name)
    with refused("computes attention by itself: its weights cannot be shown"):
        attention_weights(model, model.encode(zoo.tasks["single"].eval).batch([0]).inputs)


def test_a_pattern_says_what_importance_is_made_of(zoo, model):
    task = zoo.tasks["single"]
    found = [pattern(model, task, task.eval.take([i])) for i in range(5)]
    parts = importance.contributions(model, task, split="eval")
    for i, one in enumerate(found):
        tokens = len(one.tokens)
        assert one.weights.shape == (LAYERS, HEADS, tokens, tokens)
        assert one.importance.shape == (LAYERS, HEADS, tokens)
        np.testing.assert_allclose(one.importance.sum(-1), parts.absolute[i], rtol=1e-4, atol=1e-6)
        assert one.tokens[1:-1] == tuple(task.eval.texts[i].split()), "between the two special ones"
        assert one.label == task.label_names[task.eval.labels[i]]
    predictions = evaluate(model, task)["single"].predictions
    assert [one.predicted for one in found] == [task.label_names[p] for p in predictions]


def test_texts_are_the_first_that_are_short_enough(zoo, model):
    task = zoo.tasks["pair"]
    lengths = [len(ids) for ids in model.encode(task.eval).columns["input_ids"]]
    longest = sorted(lengths)[2]
    wanted = [task.eval.texts[i] for i in range(5) if lengths[i] <= longest][:2]
    assert [text.texts[0] for text in short_texts(model, task, 2, longest)] == wanted
    shortest = short_texts(model, task, 2, 4)
    expected = task.eval.texts[int(np.argmin(lengths))]
    assert [text.texts[0] for text in shortest] == [expected], "none has four tokens"


# --- units --------------------------------------------------------------------------------------


def test_the_units_record_what_the_functions_return(small_tasks, tmp_path):
    store, trained = Store(tmp_path), training()
    model = trained.trained(store)
    tasks = {n: scored_on(t, "scored").limited(eval=4) for n, t in trained.load().items()}
    expected = lesion_heads(model, tasks)
    found = LesionUnit(model=trained, on="scored", examples=4).lesions(store)
    assert (found.tasks, found.metrics, found.shape) == (TASKS, expected.metrics, expected.shape)
    patterns = PatternUnit(model=trained, examples=2, longest=32).patterns(store)
    for name, task in trained.load().items():
        for part in ("predictions", "losses", "labels"):
            assert np.array_equal(getattr(found, part)[name], getattr(expected, part)[name])
        for one, text in zip(patterns[name], short_texts(model, task, 2, 32), strict=True):
            again = pattern(model, task, text)
            for field in ("tokens", "label", "predicted"):
                assert getattr(one, field) == getattr(again, field)
            assert np.array_equal(one.importance, again.importance)
            np.testing.assert_allclose(one.weights, again.weights, atol=5e-4)

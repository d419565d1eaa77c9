"""The training loop: which task when, which example when, what a step changes."""

import numpy as np
import pytest
import torch
from refusal import refused
from scipy.stats import chisquare
from tinymodels import at_every_update, changed, weights
from transformers import get_linear_schedule_with_warmup

import fslib
from fslib import training
from fslib.data import batches as drawing
from fslib.data.batches import sampling_weights, task_order
from fslib.data.tasks import Task

# Names whose parameters are vectors: biases and the weights of layer norms
VECTORS = ("bias", "LayerNorm.weight")


@pytest.fixture(scope="module")
def easy():
    """A task that one word decides."""
    texts = [f"w{word} {mood}" for word in range(12) for mood in ("good", "bad")]
    labels = ["plus" if text.endswith("good") else "minus" for text in texts]
    return fslib.make_task(
        "easy", (texts[:16], labels[:16]), (texts[16:], labels[16:]), label_names=["minus", "plus"]
    )


@pytest.fixture(scope="module")
def graded():
    """A regression task: how often a word stands in a text."""
    words = [(word, k) for word in ("river", "cloud", "stone") for k in range(6)]
    texts = [" ".join(["good"] * k + [word] * (6 - k)) for word, k in words]
    values = [k / 3 for _, k in words]
    return fslib.make_task("graded", (texts[:12], values[:12]), (texts[12:], values[12:]))


def fresh(*tasks: Task) -> fslib.MultiTaskModel:
    return fslib.MultiTaskModel.from_pretrained("tiny-random", tasks, max_length=32)


class TestSampling:
    @pytest.mark.parametrize(
        ("sampling", "epoch", "power"),
        [("proportional", 1, 1), ("sqrt", 1, 0.5), ("uniform", 1, 0)]
        + [("annealed", epoch, 1.2 - 0.2 * epoch) for epoch in range(1, 6)],
    )
    def test_weights_by_hand(self, sampling, epoch, power):
        expected = np.array([2 ** (10 * power), 1]) / (2 ** (10 * power) + 1)
        sizes = np.array([1024, 1])
        np.testing.assert_allclose(sampling_weights(sizes, sampling, epoch, 5), expected)
        np.testing.assert_allclose(sampling_weights(sizes, "annealed"), [1024 / 1025, 1 / 1025])
        with refused("epoch 6"):
            sampling_weights(sizes, sampling, 6, 5)

    @pytest.mark.parametrize("sampling", ["sqrt", "annealed"])
    def test_order_is_as_frequent_as_the_weights_say_in_every_epoch(self, sampling):
        sizes = [900, 400, 100]
        order = np.array(task_order(sizes, 2400, sampling, epochs=3, seed=0)).reshape(3, 800)
        for epoch, drawn in enumerate(order, start=1):
            expected = 800 * sampling_weights(np.array(sizes), sampling, epoch, 3)
            assert chisquare(np.bincount(drawn, minlength=3), expected).pvalue > 0.001

    @pytest.mark.parametrize(
        ("steps", "epochs", "expected"),
        [(7, 3, [1, 1, 1, 2, 2, 3, 3]), (3, 1, [1, 1, 1]), (3, 5, [1, 2, 3])],
    )
    def test_epochs_are_equal_parts_of_the_steps(self, monkeypatch, steps, epochs, expected):
        def one_task_an_epoch(sizes, sampling, epoch, epochs):
            return np.eye(len(sizes))[epoch - 1]

        monkeypatch.setattr(drawing, "sampling_weights", one_task_an_epoch)
        order = task_order([1] * epochs, steps, "annealed", epochs, seed=0)
        assert [1 + task for task in order] == expected


class TestSameSeed:
    def test_same_result_bit_by_bit_and_another_seed_another(self, tasks):
        models = [fresh(*tasks.values()) for _ in range(3)]
        first, second, third = (
            fslib.train(model, tasks, steps=6, batch_size=4, seed=seed)
            for model, seed in zip(models, (0, 0, 1), strict=True)
        )
        assert (first.order, first.losses) == (second.order, second.losses)
        assert not changed(weights(models[0]), models[1])
        assert first.order != third.order and first.losses != third.losses

    def test_seed_also_draws_the_dropout(self, easy):
        states = []
        for seed in (0, 0, 1):
            run = training.Training(fresh(easy), easy, training.Settings(steps=1, seed=seed))
            run.advance(1)
            states.append(run.rng[0].tolist())  # torch's, which dropout alone uses
        assert states[0] == states[1] != states[2]

    def test_seed_also_draws_the_batches_and_dropout_is_on(self, easy, monkeypatch):
        orders = []
        for seed in (0, 1):
            model, batches = fresh(easy), []

            def look(batch, name, model=model, batches=batches, plain=model.losses):
                assert model.training
                batches.extend(batch.indices.tolist())
                return plain(batch, name)

            monkeypatch.setattr(model, "losses", look)
            fslib.train(model, easy, steps=4, batch_size=4, seed=seed, evaluate_every=1)
            assert sorted(batches) == list(range(16))
            orders.append(batches)
        assert orders[0] != orders[1]

    def test_gradients_that_the_caller_left_do_not_matter(self, easy, graded):
        results = []
        for leftover in (None, 1e3):
            model = fresh(easy, graded)
            for parameter in model.parameters():
                parameter.grad = None if leftover is None else torch.full_like(parameter, leftover)
            fslib.train(model, easy, steps=2, batch_size=4)
            results.append(model)
        assert not changed(weights(results[0]), results[1])


class TestOneStep:
    def test_no_weight_decay_on_biases_and_norms(self, easy):
        plain, decayed = fresh(easy), fresh(easy)
        for model, decay in ((plain, 0.0), (decayed, 0.9)):
            settings = {"steps": 1, "batch_size": 4, "warmup": 0.0, "lr": 1e-2}
            fslib.train(model, easy, weight_decay=decay, **settings)
        names = {name for name, _ in plain.named_parameters()}
        assert changed(weights(plain), decayed) == {n for n in names if not n.endswith(VECTORS)}

    def test_warm_up_decay_and_clipping(self, easy, monkeypatch):
        rates, norms = [], []

        def look(optimizer):
            rates.append(optimizer.param_groups[0]["lr"] / 1e-3)
            grads = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
            norms.append(torch.stack(grads).norm().item())

        at_every_update(monkeypatch, look)
        settings = {"steps": 10, "batch_size": 4, "lr": 1e-3, "warmup": 0.2}
        fslib.train(fresh(easy), easy, **settings, clip=0.01)
        assert max(norms) == pytest.approx(0.01, rel=1e-3)
        fslib.train(fresh(easy), easy, **settings, lr_floor=0.2)
        falling = np.arange(7, 0, -1)
        np.testing.assert_allclose(rates[:10], [0, 1 / 2, 1, *(falling / 8)])
        np.testing.assert_allclose(rates[10:20], [0, 1 / 2, 1, *(0.2 + falling / 10)])
        fslib.train(fresh(easy), easy, **settings, decay=0.3, clip=None)
        np.testing.assert_allclose(rates[20:], [0, 1 / 2, *[1] * 6, 2 / 3, 1 / 3])
        assert max(norms[20:]) > 1, "of any size"


class TestSchedule:
    @pytest.mark.parametrize(
        ("steps", "warmup", "lr_floor", "delta", "share"),
        [
            (4, 0.0, 0.0, 0.5, 0.3),  # 1, 3/4, 1/2, 1/4
            (4, 0.0, 0.5, 0.5, 1.375 / 3.25),  # 1, 7/8, 3/4, 5/8
            (10, 0.2, 0.0, 0.1, 0.025),  # 0, 1/2, 8/8 to 1/8: 1/8 of 5
            (10, 0.2, 0.5, 0.1, 1 / 12),  # 0, 1/2, 1 to 9/16: 9/16 of 27/4
            (10, 0.2, 0.0, 0.9, 1.0),  # the first step of a warm-up learns nothing
        ],
    )
    def test_share_of_the_last_steps_by_hand(self, steps, warmup, lr_floor, delta, share):
        assert training.lr_share(steps, delta, lr_floor, warmup=warmup) == pytest.approx(share)
        with refused("no steps lie before and after"):
            training.lr_share(steps, 0.01)

    @pytest.mark.parametrize("steps", [1, 7, 40])
    @pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
    def test_without_a_floor_it_is_the_librarys_schedule_bit_by_bit(self, steps, warmup):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        rising, every = round(warmup * steps), range(steps + 2)
        theirs = get_linear_schedule_with_warmup(optimizer, rising, steps).lr_lambdas[0]
        assert [training.lr_factor(s, steps, warmup) for s in every] == [theirs(s) for s in every]


class TestSizes:
    def test_loss_is_the_mean_over_a_ragged_batch_too(self, easy, monkeypatch):
        model = fresh(easy)
        found, plain = [], model.losses
        monkeypatch.setattr(model, "losses", lambda *a: found.append(v := plain(*a)) or v)
        history = fslib.train(model, easy, steps=6, batch_size=7)
        assert sorted(map(len, found)) == [2, 2, 7, 7, 7, 7]  # 16 = 7 + 7 + 2, twice
        assert history.losses == pytest.approx([v.mean().item() for v in found])
        assert history.order == [0] * 6 and history.steps_of("easy") == 6

    def test_loss_goes_down_on_an_easy_task(self, easy):
        model = fresh(easy)
        history = fslib.train(model, easy, steps=60, batch_size=8, lr=3e-3)
        assert np.mean(history.losses[:5]) > 0.5
        assert np.mean(history.losses[-5:]) < 0.1
        assert fslib.evaluate(model, easy)["easy"].value == 1

    def test_regression_trains(self, graded):
        model = fresh(graded)
        history = fslib.train(model, graded, steps=60, batch_size=6, lr=3e-3)
        score = fslib.evaluate(model, graded)["graded"]
        assert np.mean(history.losses[-5:]) < 0.3 * np.mean(history.losses[:5])
        assert (score.metric, score.predictions.dtype) == ("spearman", np.float32)
        assert score.value > 0.5


class TestCurve:
    def test_points_and_looking_does_not_change_the_training(self, easy):
        def trained(every):
            history = fslib.train(fresh(easy), easy, steps=7, batch_size=4, evaluate_every=every)
            return [point["step"] for point in history.evaluations], history.losses

        points, losses = trained(None)
        assert points == []
        for every, expected in ((3, [0, 3, 6, 7]), (7, [0, 7]), (100, [0, 7])):
            assert trained(every) == (expected, losses)

    def test_values_are_those_of_evaluate_on_the_tasks_given(self, tasks, easy):
        model = fresh(easy, tasks["bbc"])
        scored = {"bbc": tasks["bbc"].limited(eval=7), "easy": easy}

        def point(step):
            return {"step": step} | {n: s.value for n, s in fslib.evaluate(model, scored).items()}

        first, options = point(0), {"evaluate_every": 5, "evaluate_on": scored}
        history = fslib.train(model, easy, steps=5, batch_size=4, lr=3e-3, **options)
        assert history.evaluations == [first, point(5)]


class TestRefusals:
    def test_setting_out_of_range(self, easy):
        model = fresh(easy)
        wrong = {"lr": 0.0, "clip": 0.0, "warmup": 1.0, "lr_floor": 1.0, "weight_decay": -1.0}
        for setting, value in wrong.items():
            with refused(f"{setting} {value}"):
                fslib.train(model, easy, **{setting: value})
        for setting, word in (("sampling", "uniforms"), ("precision", "bf17")):
            with refused(f"unknown {setting} '{word}': did you mean '{word[:-1]}"):
                fslib.train(model, easy, **{setting: word})
        with refused("unknown split 'test': valid: train, eval"):
            fslib.evaluate(model, easy, split="test")

    def test_nothing_to_train(self, easy, graded):
        with torch.no_grad(), refused("nothing can be trained"):
            fslib.train(fresh(easy), easy, steps=1)
        with refused("'graded'", "valid: easy"):
            fslib.train(fresh(easy), [easy, graded], steps=1)

    def test_loss_that_is_not_finite_stops_before_it_spreads(self, easy):
        model = fresh(easy)
        model.classifiers["easy"].bias.data.fill_(torch.nan)
        before = weights(model)
        with refused("nan", "step 1", "easy", "lr=0.01"):
            fslib.train(model, easy, steps=3, lr=0.01, warmup=0.0)
        assert changed(before, model) == {"classifiers.easy.bias"}  # nan is not equal to itself
        assert not model.training


class TestPrecision:
    @staticmethod
    def trained(easy, monkeypatch, **settings):
        """Losses of three steps, the types of logits and weights, and what the optimizer holds."""
        model, types = fresh(easy), set()
        plain = model.forward
        monkeypatch.setattr(model, "forward", lambda *a: types.add((out := plain(*a)).dtype) or out)
        run = training.Training(model, easy, training.Settings(steps=3, batch_size=16, **settings))
        run.advance(3)
        moments = [state["exp_avg"].dtype for state in run.optimizer.state.values()]
        kept = {p.dtype for p in model.parameters()} | set(moments)
        assert moments and kept == {torch.float32}
        return run.history.losses, types

    def test_bf16_changes_losses_a_little_and_keeps_weights_in_float32(self, easy, monkeypatch):
        whole, types = self.trained(easy, monkeypatch)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # is not listened to
        assert self.trained(easy, monkeypatch) == (whole, types)
        half, half_types = self.trained(easy, monkeypatch, precision="bf16")
        assert (types, half_types) == ({torch.float32}, {torch.bfloat16})
        assert whole != half and np.allclose(whole, half, atol=0.02)


class TestEvaluate:
    @pytest.mark.parametrize(("name", "split"), [("bbc", "train"), ("bbc-pair", "eval")])
    def test_predictions_stand_in_the_splits_order(self, tiny, tasks, name, split):
        score = fslib.evaluate(tiny, tasks[name], split=split, batch_size=5)[name]
        examples = getattr(tasks[name], split)
        one_by_one = (tiny.encode(examples).batch([i]).inputs for i in range(len(examples)))
        with torch.no_grad():
            alone = [int(tiny(inputs, name).argmax()) for inputs in one_by_one]
        assert np.array_equal(score.labels, examples.labels)
        assert score.predictions.tolist() == alone

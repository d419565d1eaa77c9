"""The training loop: which task when, which example when, what a step changes."""

import numpy as np
import pytest
import torch
from refusal import refused
from scipy.stats import chisquare
from tinymodels import one_thread
from transformers import get_linear_schedule_with_warmup

import fslib
from fslib import training
from fslib.data import batches as drawing
from fslib.data.batches import sampling_weights, task_order
from fslib.data.tasks import Task

# Names whose parameters are vectors: biases and the weights of layer norms
VECTORS = ("bias", "LayerNorm.weight")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


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
    texts = [
        " ".join(["good"] * k + [word] * (6 - k))
        for word in ("river", "cloud", "stone")
        for k in range(6)
    ]
    values = [text.count("good") / 3 for text in texts]
    return fslib.make_task("graded", (texts[:12], values[:12]), (texts[12:], values[12:]))


def fresh(*tasks: Task) -> fslib.MultiTaskModel:
    return fslib.MultiTaskModel.from_pretrained("tiny-random", tasks, max_length=32)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def changed(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    """Names of the parameters that are not bit-equal to what they were."""
    return {
        name for name, value in model.named_parameters() if not torch.equal(value, before[name])
    }


def spied(task: Task, monkeypatch) -> tuple[fslib.MultiTaskModel, list]:
    """Return a new model, and a list that takes every batch it is trained on and its mode then."""
    model, batches = fresh(task), []
    plain = model.losses

    def losses(batch, name):
        batches.append((batch, model.training))
        return plain(batch, name)

    monkeypatch.setattr(model, "losses", losses)
    return model, batches


class TestSampling:
    @pytest.mark.parametrize(
        ("sampling", "expected"),
        [
            ("proportional", [16 / 21, 4 / 21, 1 / 21]),
            ("sqrt", [4 / 7, 2 / 7, 1 / 7]),
            ("uniform", [1 / 3, 1 / 3, 1 / 3]),
            ("annealed", [16 / 21, 4 / 21, 1 / 21]),  # one epoch: a = 1
        ],
    )
    def test_weights_by_hand(self, sampling, expected):
        np.testing.assert_allclose(sampling_weights(np.array([1600, 400, 100]), sampling), expected)

    @pytest.mark.parametrize(("epoch", "power"), [(1, 1.0), (2, 0.8), (3, 0.6), (4, 0.4), (5, 0.2)])
    def test_annealing_by_hand(self, epoch, power):
        # sizes 2**10 and 1, so weights 2**(10 a) and 1
        expected = np.array([2 ** (10 * power), 1]) / (2 ** (10 * power) + 1)
        np.testing.assert_allclose(
            sampling_weights(np.array([1024, 1]), "annealed", epoch, 5), expected
        )

    def test_unknown_sampling_names_the_nearest(self):
        with refused("'anealed'", "did you mean 'annealed'"):
            sampling_weights(np.array([1, 2]), "anealed")

    @pytest.mark.parametrize("epoch", [0, 3])
    def test_epoch_that_does_not_exist(self, epoch):
        with refused(f"epoch {epoch}"):
            sampling_weights(np.array([1, 2]), "annealed", epoch, 2)

    @pytest.mark.parametrize("sampling", ["proportional", "sqrt", "uniform", "annealed"])
    def test_order_is_as_frequent_as_the_weights_say_in_every_epoch(self, sampling):
        sizes = [900, 400, 100]
        order = np.array(task_order(sizes, 2400, sampling, epochs=3, seed=0)).reshape(3, 800)
        for epoch, drawn in enumerate(order, start=1):
            expected = 800 * sampling_weights(np.array(sizes), sampling, epoch, 3)
            assert chisquare(np.bincount(drawn, minlength=3), expected).pvalue > 0.001

    @pytest.mark.parametrize(
        ("steps", "epochs", "expected"),
        [
            (6, 3, [1, 1, 2, 2, 3, 3]),
            (7, 3, [1, 1, 1, 2, 2, 3, 3]),
            (3, 1, [1, 1, 1]),
            (1, 1, [1]),
            (3, 5, [1, 2, 3]),
        ],
    )
    def test_epochs_are_equal_parts_of_the_steps(self, monkeypatch, steps, epochs, expected):
        def one_task_an_epoch(sizes, sampling, epoch, epochs):
            return np.eye(len(sizes))[epoch - 1]

        monkeypatch.setattr(drawing, "sampling_weights", one_task_an_epoch)
        order = task_order([1] * epochs, steps, "annealed", epochs, seed=0)
        assert [1 + task for task in order] == expected

    def test_order_repeats_for_a_seed(self):
        one, again, other = (task_order([5, 5], 40, "uniform", 2, seed) for seed in (0, 0, 1))
        assert one == again
        assert one != other

    @pytest.mark.parametrize(("steps", "epochs"), [(0, 1), (-1, 1), (3, 0)])
    def test_order_of_nothing(self, steps, epochs):
        with refused(f"steps {steps}" if steps < 1 else f"epochs {epochs}"):
            task_order([1, 2], steps, "uniform", epochs, 0)


class TestSameSeed:
    def test_same_result_bit_by_bit_and_another_seed_another(self, tasks):
        runs = []
        for seed in (0, 0, 1):
            model = fresh(*tasks.values())
            history = fslib.train(model, tasks, steps=6, batch_size=4, seed=seed)
            runs.append((model, history))
        (one, first), (again, second), (other, third) = runs
        assert (first.order, first.losses) == (second.order, second.losses)
        assert not changed(weights(one), again)
        assert first.losses != third.losses
        assert changed(weights(one), other)

    def test_seed_also_draws_the_dropout(self, easy):
        options = {"steps": 1, "batch_size": 16}  # one batch of all
        one, other = (fslib.train(fresh(easy), easy, seed=s, **options).losses[0] for s in (0, 1))
        assert abs(one - other) > 1e-4  # more than summing in another order does

    def test_seed_also_draws_the_batches(self, easy, monkeypatch):
        orders = []
        for seed in (0, 1):
            model, batches = spied(easy, monkeypatch)
            fslib.train(model, easy, steps=4, batch_size=4, seed=seed)
            orders.append(np.concatenate([batch.indices for batch, _ in batches]).tolist())
            assert sorted(orders[-1]) == list(range(16))
        assert orders[0] != orders[1]

    def test_callers_random_state_neither_matters_nor_moves(self, easy):
        losses = []
        for state in (1, 2):
            torch.manual_seed(state)
            np.random.seed(state)
            before = torch.get_rng_state(), np.random.get_state()[1].copy()
            losses.append(fslib.train(fresh(easy), easy, steps=3, batch_size=4).losses)
            assert torch.equal(torch.get_rng_state(), before[0])
            assert np.array_equal(np.random.get_state()[1], before[1])
        assert losses[0] == losses[1]

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
    @pytest.mark.parametrize("was_training", [True, False])
    def test_mode_is_restored(self, easy, was_training):
        model = fresh(easy).train(was_training)
        fslib.train(model, easy, steps=2, batch_size=4, evaluate_every=1)
        assert all(module.training is was_training for module in model.modules())

    def test_mode_is_restored_after_an_error(self, easy):
        model = fresh(easy)
        model.classifiers["easy"].bias.data.fill_(torch.nan)
        with refused("loss"):
            fslib.train(model, easy, steps=1)
        assert not model.training

    def test_dropout_is_on(self, easy, monkeypatch):
        model, batches = spied(easy, monkeypatch)
        fslib.train(model, easy, steps=2, batch_size=4, evaluate_every=1)
        assert [model_trains for _, model_trains in batches] == [True, True]

    def test_only_the_classifier_of_the_batchs_task_moves(self, tasks, monkeypatch):
        model = fresh(*tasks.values())
        seen = []
        monkeypatch.setattr(
            training, "evaluate", lambda model, tasks: seen.append(weights(model)) or {}
        )
        pair = [tasks["bbc"], tasks["bbc-shift"]]
        history = fslib.train(
            model, pair, steps=8, batch_size=4, sampling="uniform", warmup=0.0, evaluate_every=1
        )
        assert set(history.order) == {0, 1}
        for before, after, choice in zip(seen, seen[1:], history.order, strict=False):
            moved = {name for name in after if not torch.equal(before[name], after[name])}
            classifiers = {name.split(".")[1] for name in moved if name.startswith("classifiers")}
            assert classifiers == {pair[choice].name}
            assert any(name.startswith("encoder") for name in moved)

    def test_no_weight_decay_on_biases_and_norms(self, easy):
        results = []
        for weight_decay in (0.0, 0.9):
            model = fresh(easy)
            fslib.train(
                model, easy, steps=1, batch_size=4, warmup=0.0, lr=1e-2, weight_decay=weight_decay
            )
            results.append(model)
        differ = changed(weights(results[0]), results[1])
        vectors = {name for name, _ in results[0].named_parameters() if name.endswith(VECTORS)}
        assert not differ & vectors
        assert differ == {name for name, _ in results[0].named_parameters()} - vectors

    def test_warm_up_decay_and_clipping(self, easy, monkeypatch):
        rates, norms = [], []

        class Spy(torch.optim.AdamW):
            def step(self, closure=None):
                rates.append(self.param_groups[0]["lr"])
                gradients = [p.grad.norm() for group in self.param_groups for p in group["params"]]
                norms.append(torch.stack(gradients).norm().item())
                return super().step(closure)

        monkeypatch.setattr(torch.optim, "AdamW", Spy)
        fslib.train(fresh(easy), easy, steps=10, batch_size=4, lr=1e-3, warmup=0.2, clip=0.01)
        np.testing.assert_allclose(
            np.array(rates) / 1e-3, [0, 1 / 2, 1, *(np.arange(7, 0, -1) / 8)]
        )
        assert max(norms) == pytest.approx(0.01, rel=1e-3)
        rates.clear()
        fslib.train(fresh(easy), easy, steps=10, batch_size=4, lr=1e-3, warmup=0.2, lr_floor=0.2)
        np.testing.assert_allclose(
            np.array(rates) / 1e-3, [0, 1 / 2, 1, *(0.2 + np.arange(7, 0, -1) / 10)]
        )

    def test_step_goes_down_the_gradient_by_the_learning_rate(self, easy):
        # Adam's first step is lr * gradient / (|gradient| + eps), whatever the gradient's size
        model = fresh(easy)
        before = weights(model)["classifiers.easy.weight"]
        fslib.train(model, easy, steps=1, batch_size=16, warmup=0.0, lr=1e-3, weight_decay=0.0)
        step = (model.classifiers["easy"].weight - before).abs()
        assert step.median().item() == pytest.approx(1e-3, rel=1e-2)
        assert step.max().item() <= 1.01e-3


class TestSchedule:
    @pytest.mark.parametrize(
        ("steps", "warmup", "lr_floor", "delta", "share"),
        [
            (4, 0.0, 0.0, 0.5, 0.3),  # 1, 3/4, 1/2, 1/4
            (4, 0.0, 0.5, 0.5, 1.375 / 3.25),  # 1, 7/8, 3/4, 5/8
            (10, 0.2, 0.0, 0.1, 0.025),  # 0, 1/2, 8/8 to 1/8: 1/8 of 5
            (10, 0.2, 0.0, 0.5, 0.375),
            (10, 0.2, 0.5, 0.1, 1 / 12),  # 0, 1/2, 1 to 9/16: 9/16 of 27/4
            (10, 0.2, 0.5, 0.5, 55 / 108),
            (10, 0.2, 0.0, 0.9, 1.0),  # the first step of a warm-up learns nothing
        ],
    )
    def test_share_of_the_last_steps_by_hand(self, steps, warmup, lr_floor, delta, share):
        assert training.lr_share(steps, delta, lr_floor, warmup=warmup) == pytest.approx(share)

    @pytest.mark.parametrize("steps", [1, 2, 7, 40])
    @pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
    def test_without_a_floor_it_is_the_librarys_schedule_bit_by_bit(self, steps, warmup):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        theirs = get_linear_schedule_with_warmup(
            optimizer, round(warmup * steps), steps
        ).lr_lambdas[0]
        assert all(
            training.lr_factor(step, steps, warmup) == theirs(step) for step in range(steps + 2)
        )

    def test_the_usual_tenth_is_a_hundredth_of_the_learning_rate_and_a_floor_makes_it_more(self):
        shares = [training.lr_share(600, 0.1, floor) for floor in (0.0, 0.1, 0.5, 0.9)]
        assert shares[0] == pytest.approx(0.011, abs=5e-4)
        assert shares == sorted(shares) and shares[-1] < 0.11

    @pytest.mark.parametrize(
        ("values", "part"),
        [
            ({"lr_floor": 1.0}, "lr_floor 1.0"),
            ({"lr_floor": -0.1}, "lr_floor -0.1"),
            ({"delta": 1.0}, "delta"),
            ({"delta": 0.01}, "steps lie before and after"),
            ({"steps": 0}, "steps 0"),
        ],
    )
    def test_a_share_of_nothing_is_refused(self, values, part):
        with refused(part):
            training.lr_share(**({"steps": 10, "delta": 0.1} | values))

    def test_endings_share_the_trunk_under_a_floor_as_without(self, easy, graded):
        tasks, settings = [easy, graded], {"steps": 6, "batch_size": 4, "lr": 1e-3, "lr_floor": 0.3}
        whole, branched = fresh(*tasks), fresh(*tasks)
        fslib.train(whole, tasks, **settings)
        endings = {"mixed": fslib.PCGrad(delta=0.5), "plain": None}
        names = [name for name, _ in fslib.branch(branched, tasks, endings, **settings)]
        assert names == ["mixed", "plain"] and not changed(weights(whole), branched)


class TestSizes:
    @pytest.mark.parametrize(
        ("option", "value"), [("steps", 1), *(("batch_size", b) for b in (1, 7, 99)), ("epochs", 9)]
    )
    def test_one_task(self, easy, option, value):
        options = {"steps": 4, "batch_size": 8, option: value}
        history = fslib.train(fresh(easy), easy, **options)
        assert history.tasks == ["easy"] and history.order == [0] * options["steps"]
        assert history.steps_of("easy") == len(history.losses) == options["steps"]
        assert np.isfinite(history.losses).all()

    def test_loss_is_the_mean_over_a_ragged_batch_too(self, easy, monkeypatch):
        model, batches = spied(easy, monkeypatch)
        means, plain = [], model.losses
        monkeypatch.setattr(
            model, "losses", lambda *a: means.append((v := plain(*a)).mean().item()) or v
        )
        history = fslib.train(model, easy, steps=6, batch_size=7)
        sizes = [len(batch.labels) for batch, _ in batches]
        assert sorted(sizes) == [2, 2, 7, 7, 7, 7]  # 16 = 7 + 7 + 2, twice
        assert history.losses == pytest.approx(means)

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
    @pytest.mark.parametrize(
        ("every", "expected"), [(3, [0, 3, 6, 7]), (7, [0, 7]), (100, [0, 7]), (None, [])]
    )
    def test_points(self, easy, every, expected):
        history = fslib.train(fresh(easy), easy, steps=7, batch_size=4, evaluate_every=every)
        assert [point["step"] for point in history.evaluations] == expected

    def test_values_are_those_of_evaluate_on_the_tasks_given(self, tasks, easy):
        model = fresh(easy, tasks["bbc"])
        scored = {"bbc": tasks["bbc"].limited(eval=7), "easy": easy}
        first = {name: score.value for name, score in fslib.evaluate(model, scored).items()}
        history = fslib.train(
            model, easy, steps=5, batch_size=4, lr=3e-3, evaluate_every=5, evaluate_on=scored
        )
        last = {name: score.value for name, score in fslib.evaluate(model, scored).items()}
        assert history.evaluations == [{"step": 0, **first}, {"step": 5, **last}]

    def test_looking_does_not_change_the_training(self, easy):
        runs = [
            fslib.train(fresh(easy), easy, steps=4, batch_size=4, evaluate_every=e).losses
            for e in (None, 1)
        ]
        assert runs[0] == runs[1]


class TestRefusals:
    @pytest.mark.parametrize(
        ("setting", "values"),
        [
            *((name, [0, -1]) for name in ("batch_size", "steps", "epochs")),
            *((name, [1.0, -0.1, float("nan")]) for name in ("warmup", "lr_floor")),
            *((name, [0.0, -1e-3, float("nan")]) for name in ("lr", "clip")),
            *(("weight_decay", [-1.0]), ("seed", [-1]), ("evaluate_every", [0])),
        ],
    )
    def test_setting_out_of_range(self, easy, setting, values):
        model = fresh(easy)
        before = weights(model)
        for value in values:
            with refused(setting, repr(value)):
                fslib.train(model, easy, **{setting: value})
        assert not changed(before, model)

    def test_nothing_to_train(self, easy):
        with torch.no_grad(), refused("nothing can be trained"):
            fslib.train(fresh(easy), easy, steps=1)
        with refused("nothing can be trained"):
            fslib.train(fresh(easy).requires_grad_(False), easy, steps=1)

    def test_unknown_sampling(self, easy):
        with refused("'uniforms'", "did you mean 'uniform'"):
            fslib.train(fresh(easy), easy, sampling="uniforms")

    def test_task_without_a_classifier(self, easy, graded):
        with refused("'graded'", "valid: easy"):
            fslib.train(fresh(easy), [easy, graded], steps=1)

    def test_loss_that_is_not_finite_stops_before_it_spreads(self, easy):
        model = fresh(easy)
        model.classifiers["easy"].bias.data.fill_(torch.nan)
        before = weights(model)
        with refused("nan", "step 1", "easy", "lr=0.01"):
            fslib.train(model, easy, steps=3, lr=0.01, warmup=0.0)
        assert changed(before, model) == {"classifiers.easy.bias"}  # nan is not equal to itself

    def test_unknown_precision(self, easy):
        with refused("unknown precision 'bf17': did you mean 'bf16'"):
            fslib.train(fresh(easy), easy, steps=1, precision="bf17")


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
        half, half_types = self.trained(easy, monkeypatch, precision="bf16")
        assert (types, half_types) == ({torch.float32}, {torch.bfloat16})
        assert whole != half and np.allclose(whole, half, atol=0.02)

    def test_float32_is_the_default_whatever_the_environment_says(self, easy, monkeypatch):
        whole, _ = self.trained(easy, monkeypatch)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        assert self.trained(easy, monkeypatch) == (whole, {torch.float32})


class TestEvaluate:
    @pytest.mark.parametrize("name", ["bbc", "bbc-pair"])
    @pytest.mark.parametrize("split", ["eval", "train"])
    def test_predictions_stand_in_the_splits_order(self, tiny, tasks, name, split):
        task = tasks[name]
        score = fslib.evaluate(tiny, task, split=split, batch_size=5)[name]
        examples = getattr(task, split)
        encoded = tiny.encode(examples)
        with torch.no_grad():
            alone = [
                int(tiny(encoded.batch([i]).inputs, name).argmax()) for i in range(len(examples))
            ]
        assert np.array_equal(score.labels, examples.labels)
        assert score.predictions.tolist() == alone

    def test_trained_model_scores_each_task_with_its_own_classifier(self, easy, tasks):
        model = fresh(easy, tasks["bbc"])
        fslib.train(model, easy, steps=60, batch_size=8, lr=3e-3)
        scores = fslib.evaluate(model, [easy, tasks["bbc"]], split="train")
        assert list(scores) == ["easy", "bbc"]
        assert scores["easy"].value == 1
        assert len(scores["bbc"].predictions) == 48

    def test_unknown_split(self, tiny, tasks):
        with refused("'test'", "train, eval"):
            fslib.evaluate(tiny, tasks, split="test")

    def test_task_without_a_classifier(self, tiny, easy):
        with refused("'easy'", "bbc"):
            fslib.evaluate(tiny, easy)

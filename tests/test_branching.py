"""Branching: every ending is, bit by bit, what it would be alone; and PCGrad by plain sums."""

import copy
import inspect
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from refusal import refused
from tinymodels import one_thread, save

import fslib
from fslib import IAT, PCGrad, Stop, iat
from fslib.endings import projected
from fslib.training import MIXED, Settings, Training

SETTINGS = {
    "batch_size": 6,
    "lr": 1e-2,
    "weight_decay": 0.1,
    "sampling": "uniform",
    "steps": 12,
    "evaluate_every": 5,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def fresh(zoo, tmp_path_factory):
    """Makes models that are all the same, with dropout."""
    folder = tmp_path_factory.mktemp("dropping")
    save("bert", folder, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    model = fslib.MultiTaskModel.from_pretrained(folder, zoo.tasks)
    return lambda: copy.deepcopy(model)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def told(history):
    """What a history says, without the seconds."""
    heads = {task: chosen.tolist() for task, chosen in history.heads.items()}
    return history.tasks, history.order, history.losses, history.evaluations, heads


def alone(model, tasks, ending, **changes):
    """The same ending without branching: (history, weights)."""
    options = SETTINGS | changes
    if isinstance(ending, Stop):
        run = Training(model, tasks, Settings(**options))
        run.advance(ending.start(run.settings.steps))
        return run.history, weights(model)
    kind = {IAT: "iat", PCGrad: "pcgrad"}.get(type(ending))
    return fslib.train(model, tasks, **({kind: ending} if kind else {}), **options), weights(model)


ENDINGS = {
    "iat": IAT(delta=0.25),
    "pcgrad": PCGrad(delta=0.25),
    "plain": None,
    "random": IAT(delta=0.5, heads="random", others="freeze"),
    "mixed": PCGrad(delta=0.5, project=False),
    "leak": IAT(delta=0.25, strict=False, alpha=0.5),
    "stop": Stop(delta=0.4),
    "plain again": None,
}


# --- each ending against itself, unbroken


def test_every_ending_equals_its_own_unbroken_training_bit_by_bit(fresh, zoo):
    expected = {name: alone(fresh(), zoo.tasks, ending) for name, ending in ENDINGS.items()}
    model = fresh()
    found = {
        name: (h, weights(model)) for name, h in fslib.branch(model, zoo.tasks, ENDINGS, **SETTINGS)
    }
    assert found.keys() == expected.keys()
    for name, (history, end) in found.items():
        assert told(history) == told(expected[name][0]), name
        assert same(end, expected[name][1]), name
    ends = {name: end for name, (_, end) in found.items() if name != "plain again"}
    assert not any(same(ends[a], ends[b]) for a in ends for b in ends if a != b)
    assert same(found["plain"][1], found["plain again"][1])


@pytest.mark.parametrize(
    "others", [("iat",), ("pcgrad", "random"), ("stop", "leak"), ("mixed", "iat")]
)
def test_plain_training_is_unbroken_whatever_ran_before_it(fresh, zoo, others):
    history, end = alone(fresh(), zoo.tasks, None)
    model = fresh()
    endings = {name: ENDINGS[name] for name in (*others, "plain")}
    *_, (name, found) = fslib.branch(model, zoo.tasks, endings, **SETTINGS)
    assert name == "plain"
    assert told(found) == told(history)
    assert same(weights(model), end)
    assert [point["step"] for point in found.evaluations] == [0, 5, 10, 12]


@pytest.mark.parametrize("name", ["gpt2", "albert", "qwen3"])
def test_other_architectures_branch_alike(zoo, name):
    endings = {"iat": IAT(delta=0.5), "plain": None, "random": IAT(delta=0.5, heads="random")}
    model = zoo.model(name)
    for ending, history in fslib.branch(model, zoo.tasks, endings, **SETTINGS):
        expected, end = alone(zoo.model(name), zoo.tasks, endings[ending])
        assert told(history) == told(expected), ending
        assert same(weights(model), end), ending


def test_what_the_loops_body_does_changes_no_other_ending(fresh, zoo):
    endings = {"iat": IAT(delta=0.25), "pcgrad": PCGrad(delta=0.25), "plain": None}
    expected = {name: alone(fresh(), zoo.tasks, ending) for name, ending in endings.items()}
    model = fresh()
    for name, history in fslib.branch(model, zoo.tasks, endings, **SETTINGS):
        assert told(history) == told(expected[name][0])
        assert same(weights(model), expected[name][1])
        torch.rand(3), np.random.rand(3)
        fslib.evaluate(model, zoo.tasks)
        fslib.head_importance(model, zoo.tasks["pair"])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
                parameter.grad = torch.ones_like(parameter)
        history.losses.clear()
        history.heads.clear()


def test_a_random_state_of_the_callers_neither_matters_nor_moves(fresh, zoo):
    ends = []
    for state in (1, 2):
        model = fresh().train(state == 1)
        torch.manual_seed(state)
        np.random.seed(state)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        for _ in fslib.branch(
            model, zoo.tasks, {"iat": IAT(delta=0.25), "plain": None}, **SETTINGS
        ):
            assert torch.equal(torch.get_rng_state(), before[0])
            assert np.array_equal(np.random.get_state()[1], before[1])
            assert all(module.training is (state == 1) for module in model.modules())
        ends.append(weights(model))
    assert same(*ends)


def test_stop_leaves_the_trunk(fresh, zoo):
    model = fresh()
    (_, history), (_, plain) = fslib.branch(
        model, zoo.tasks, {"stop": Stop(delta=0.25), "plain": None}, **SETTINGS
    )
    assert (history.branched, len(history.losses)) == (9, 9)
    assert plain.losses[:9] == history.losses
    assert [point["step"] for point in history.evaluations] == [0, 5]


def test_an_exception_in_the_loops_body_does_no_harm(fresh, zoo):
    endings = {"iat": IAT(delta=0.25), "plain": None}
    model = fresh()
    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="body"):
        for _ in fslib.branch(model, zoo.tasks, endings, **SETTINGS):
            raise KeyError("body")
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert same(weights(model), alone(fresh(), zoo.tasks, endings["iat"])[1])
    twin = fresh()
    twin.load_state_dict(weights(model))
    assert told(alone(model, zoo.tasks, None)[0]) == told(alone(twin, zoo.tasks, None)[0])


# --- order and cost


def test_endings_come_in_the_order_in_which_they_branch_off(fresh, zoo):
    found = [
        (name, h.branched) for name, h in fslib.branch(fresh(), zoo.tasks, ENDINGS, **SETTINGS)
    ]
    early = [("random", 6), ("mixed", 6), ("stop", 7)]
    assert found == [
        *early,
        ("iat", 9),
        ("pcgrad", 9),
        ("plain", 9),
        ("leak", 9),
        ("plain again", 9),
    ]


def test_plain_endings_alone_branch_off_at_the_start(fresh, zoo):
    found = list(fslib.branch(fresh(), zoo.tasks, {"a": None, "b": None}, **SETTINGS))
    assert [(name, h.branched, len(h.losses)) for name, h in found] == [("a", 0, 12), ("b", 0, 12)]
    assert told(found[0][1]) == told(found[1][1])


@pytest.fixture
def updates(monkeypatch):
    """Counts the optimizer's updates."""
    made = Counter()

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            made["updates"] += 1
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    return made


def test_m_endings_cost_one_trunk_and_m_short_ends(fresh, zoo, updates):
    delta, steps = 0.25, SETTINGS["steps"]
    endings = {
        "iat": IAT(delta),
        "random": IAT(delta, heads="random"),
        "pcgrad": PCGrad(delta),
        "plain": None,
    }
    histories = dict(fslib.branch(fresh(), zoo.tasks, endings, **SETTINGS))
    assert updates["updates"] == (1 - delta) * steps + len(endings) * delta * steps == 21
    assert updates["updates"] == sum(steps - h.branched for h in histories.values()) + 9
    assert all(len(h.losses) == len(h.order) == steps for h in histories.values())


def test_the_trunk_is_trained_once_for_different_deltas(fresh, zoo, updates):
    endings = {
        "late": IAT(delta=0.25),
        "early": IAT(delta=0.5),
        "plain": None,
        "stop": Stop(delta=0.4),
    }
    histories = dict(fslib.branch(fresh(), zoo.tasks, endings, **SETTINGS))
    made = [len(h.losses) - h.branched for h in histories.values()]
    assert (
        updates["updates"]
        == sum(made) + max(h.branched for h in histories.values())
        == 3 + 6 + 3 + 0 + 9
    )


def test_importance_is_scored_once_where_endings_begin_together(fresh, zoo, monkeypatch):
    scored = []
    plain = iat.contributions
    monkeypatch.setattr(
        iat, "contributions", lambda m, t, **k: scored.append(t.name) or plain(m, t, **k)
    )
    endings = {"a": IAT(delta=0.25), "b": IAT(delta=0.25, heads="least"), "c": IAT(delta=0.5)}
    found = dict(fslib.branch(fresh(), zoo.tasks, endings, **SETTINGS))
    assert Counter(scored) == dict.fromkeys(zoo.tasks, 2)
    assert found["a"].scoring_seconds == found["b"].scoring_seconds > 0


# --- PCGrad's update


def pcgrad_directly(gradients, rng):
    """Yu et al. (2020), algorithm 1, on the gradients themselves: (tasks, size) -> (size,)."""
    changed = []
    for i, own in enumerate(gradients):
        own = own.copy()
        for j in rng.permutation(len(gradients)):
            if i != j and own @ gradients[j] < 0:
                own -= own @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
        changed.append(own)
    return np.mean(changed, axis=0)


def by_weights(gradients, seed=0):
    each = torch.tensor(np.asarray(gradients), dtype=torch.float64)
    return (projected(each @ each.T, np.random.default_rng(seed)) @ each).numpy()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 8))
def test_projection_equals_the_algorithm_on_whole_gradients(seed, tasks, size):
    gradients = np.random.default_rng(seed).normal(size=(tasks, size))
    expected = pcgrad_directly(gradients, np.random.default_rng(seed))
    np.testing.assert_allclose(by_weights(gradients, seed), expected, atol=1e-8)


def test_two_tasks_by_hand():
    # (1, 0) loses its part along (-1, 1), which is -1/2 of it: (1/2, 1/2)
    # and (-1, 1) its part along (1, 0): (0, 1)
    np.testing.assert_allclose(by_weights([[1, 0], [-1, 1]]), [0.25, 0.75])


@given(arrays(float, (3, 4), elements=st.floats(0, 5)))
def test_without_conflict_the_update_is_the_mean(gradients):
    assert np.allclose(by_weights(gradients), gradients.mean(0))
    gram = torch.tensor(gradients @ gradients.T)
    assert torch.equal(
        projected(gram, np.random.default_rng(0)), torch.full((3,), 1 / 3, dtype=torch.float64)
    )


def test_when_all_conflict_none_of_two_is_left_against_the_other():
    gradients = np.array([[1.0, 0.2, 0.0], [-1.0, 0.3, 0.1]])
    update = by_weights(gradients)
    assert gradients[0] @ gradients[1] < 0
    assert (gradients @ update >= -1e-12).all()
    assert not np.allclose(update, gradients.mean(0))
    three = np.array([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]])  # every two conflict
    assert (three @ three.T - np.diag(np.diag(three @ three.T)) < 0).sum() == 6
    np.testing.assert_allclose(
        by_weights(three), pcgrad_directly(three, np.random.default_rng(0)), atol=1e-12
    )


def test_opposite_gradients_cancel_and_a_zero_gradient_takes_no_part():
    np.testing.assert_allclose(by_weights([[2, -1], [-2, 1]]), [0, 0], atol=1e-12)
    np.testing.assert_allclose(by_weights([[1, 0], [0, 0], [-1, 1]]), np.array([0.5, 1.5]) / 3)
    np.testing.assert_allclose(by_weights(np.zeros((3, 2))), [0, 0])


def test_a_gradient_too_small_to_square_does_no_harm():
    each = torch.tensor([[1.0, 0.0], [-1e-30, 0.0]])  # its square is 0 in single precision
    assert projected(each @ each.T, np.random.default_rng(0)).isfinite().all()


def test_the_order_of_projections_is_drawn():
    gradients = np.random.default_rng(3).normal(size=(4, 3))
    drawn = {tuple(by_weights(gradients, seed).round(9)) for seed in range(20)}
    assert len(drawn) > 1
    assert np.array_equal(by_weights(gradients, 5), by_weights(gradients, 5))


# --- PCGrad in training


@pytest.fixture
def rivals(zoo):
    """Two tasks with the same texts and opposite labels: their gradients conflict."""
    task = zoo.tasks["pair"]
    options = {"label_names": task.label_names}
    texts = list(zip(task.train.texts, task.train.pairs, strict=True))
    labels = task.train.labels.tolist()
    yes = fslib.make_task("yes", (texts, labels), (texts, labels), **options)
    flipped = [1 - label for label in labels]
    no = fslib.make_task("no", (texts, flipped), (texts, flipped), **options)
    return {"yes": yes, "no": no}


def one_mixed_step(zoo, rivals, monkeypatch, ending):
    """Return of the first step of an ending: model before, batches, gradients, history."""
    model, before = (
        fslib.MultiTaskModel.from_pretrained(zoo.folder("bert"), rivals) for _ in range(2)
    )
    model.dropout.p = before.dropout.p = 0.0
    with torch.no_grad():
        model.classifiers["yes"].weight.mul_(20)
        model.classifiers["no"].weight.copy_(model.classifiers["yes"].weight)
    seen = {}

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            seen.update(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    run = Training(model, rivals, Settings(steps=10, batch_size=8, lr=1e-3, clip=1e9))
    run.begin(ending)
    before.load_state_dict(weights(model))
    batches = {}
    plain = model.losses
    monkeypatch.setattr(
        model, "losses", lambda batch, task: batches.update({task: batch}) or plain(batch, task)
    )
    run.advance(1)
    assert run.history.order == [MIXED]
    return before, batches, seen, run.history


def task_gradients(model, batches):
    """Return each task's gradient of the encoder, all gradients by name, and its mean loss."""
    vectors, named, losses = {}, {}, {}
    for task, batch in batches.items():
        model.zero_grad()
        loss = model.losses(batch, task).mean()
        loss.backward()
        losses[task] = loss.item()
        named[task] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        vectors[task] = torch.cat(
            [
                torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                for p in model.encoder.parameters()
            ]
        )
    return vectors, named, losses


@pytest.mark.parametrize("project", [True, False])
def test_a_step_by_hand(zoo, rivals, monkeypatch, project):
    model, batches, seen, history = one_mixed_step(
        zoo, rivals, monkeypatch, PCGrad(project=project)
    )
    assert {task: len(batch.labels) for task, batch in batches.items()} == {"yes": 4, "no": 4}
    vectors, named, losses = task_gradients(model, batches)
    a, b = vectors["yes"].double(), vectors["no"].double()
    assert a @ b < 0
    mean = (a + b) / 2
    expected = mean - (a @ b) * (a / (a @ a) + b / (b @ b)) / 2 if project else mean
    found = torch.cat(
        [
            seen.get(f"encoder.{n}", torch.zeros_like(p)).flatten()
            for n, p in model.encoder.named_parameters()
        ]
    )
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-4)
    assert torch.allclose(found.double(), mean, atol=1e-5) is not project
    for task in batches:  # whose loss has half a share in the step's
        for kind in ("weight", "bias"):
            name = f"classifiers.{task}.{kind}"
            torch.testing.assert_close(seen[name], named[task][name] / 2)
    assert history.losses == pytest.approx([np.mean(list(losses.values()))], rel=1e-5)


def test_without_projection_the_step_is_that_of_the_mixed_batch(zoo, rivals, monkeypatch):
    model, batches, seen, _ = one_mixed_step(zoo, rivals, monkeypatch, PCGrad(project=False))
    model.zero_grad()
    torch.cat([model.losses(batch, task) for task, batch in batches.items()]).mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(seen[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_a_mixed_step_is_told_as_one_and_takes_every_task(fresh, zoo):
    model = fresh()
    history = fslib.train(model, zoo.tasks, **SETTINGS, pcgrad=PCGrad(delta=0.25))
    assert history.order[9:] == [MIXED] * 3 and MIXED not in history.order[:9]
    assert len(history.losses) == 12 and np.isfinite(history.losses).all()
    assert history.heads == {}


# --- what is refused


@pytest.mark.parametrize("wrong", ["IAT", IAT, 0.1], ids=["text", "class", "number"])
def test_what_is_no_ending(bert, zoo, monkeypatch, wrong):
    monkeypatch.setattr(Training, "advance", lambda *args: pytest.fail("a step was made"))
    branch = inspect.unwrap(fslib.branch)  # without the check of types that tests add
    with refused(repr(wrong), "is no ending", "fslib.IAT()"):
        branch(bert, zoo.tasks, {"plain": None, "it": wrong}, **SETTINGS)
    with refused(repr(wrong), "is no ending"):
        inspect.unwrap(fslib.train)(bert, zoo.tasks, iat=wrong, steps=12)


def test_no_endings(bert, zoo):
    with refused("no endings", "{'plain': None}"):
        fslib.branch(bert, zoo.tasks, {}, **SETTINGS)


def test_bad_settings_are_refused_when_branch_is_called_not_when_it_is_looped_over(bert, zoo):
    with refused("lr -1.0"):
        fslib.branch(bert, zoo.tasks, {"plain": None}, **(SETTINGS | {"lr": -1.0}))

"""Branching: every ending is, bit by bit, what it would be alone; and PCGrad by plain sums."""

import copy
import inspect
from collections import Counter

import numpy as np
import pytest
import torch
from refusal import refused
from tinymodels import at_every_update, save, weights

import fslib
from fslib import IAT, PCGrad, Stop, iat
from fslib.endings import Ending, projected
from fslib.training import MIXED, Settings, Training

SETTINGS = {"batch_size": 6, "lr": 1e-2, "lr_floor": 0.1, "weight_decay": 0.1}
SETTINGS |= {"sampling": "uniform", "steps": 12, "evaluate_every": 5}


@pytest.fixture(scope="module")
def fresh(zoo, tmp_path_factory):
    """Makes models that are all the same, with dropout."""
    folder = tmp_path_factory.mktemp("dropping")
    save("bert", folder, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    model = fslib.MultiTaskModel.from_pretrained(folder, zoo.tasks)
    return lambda: copy.deepcopy(model)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def told(history):
    """What a history says, without the seconds."""
    heads = {task: chosen.tolist() for task, chosen in history.heads.items()}
    return history.tasks, history.order, history.losses, history.evaluations, heads


def alone(model, tasks, ending):
    """The same ending without branching: (history, weights)."""
    if isinstance(ending, Stop):
        run = Training(model, tasks, Settings(**SETTINGS))
        run.advance(ending.start(run.settings.steps))
        return run.history, weights(model)
    kind = {IAT: "iat", PCGrad: "pcgrad"}.get(type(ending))
    return fslib.train(model, tasks, **({kind: ending} if kind else {}), **SETTINGS), weights(model)


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
    model, ends, order = fresh(), {}, []
    for name, history in fslib.branch(model, zoo.tasks, ENDINGS, **SETTINGS):
        expected, end = alone(fresh(), zoo.tasks, ENDINGS[name])
        assert told(history) == told(expected), name
        ends[name] = weights(model)
        assert same(ends[name], end), name
        order.append((name, history.branched))
    assert not any(module.training for module in model.modules()), "as it came"
    early = [("random", 6), ("mixed", 6), ("stop", 7)]
    late = ("iat", "pcgrad", "plain", "leak", "plain again")
    assert order == [*early, *((name, 9) for name in late)]
    assert [point["step"] for point in history.evaluations] == [0, 5, 10, 12]
    assert same(ends["plain"], ends.pop("plain again"))
    assert not any(same(ends[a], ends[b]) for a in ends for b in ends if a != b)


@pytest.mark.parametrize("name", ["gpt2", "albert", "qwen3"])
def test_other_architectures_branch_alike(zoo, name):
    endings = {"iat": IAT(delta=0.5), "plain": None, "random": IAT(delta=0.5, heads="random")}
    model = zoo.model(name)
    for ending, history in fslib.branch(model, zoo.tasks, endings, **SETTINGS):
        expected, end = alone(zoo.model(name), zoo.tasks, endings[ending])
        assert told(history) == told(expected), ending
        assert same(weights(model), end), ending


def random_states():
    return torch.get_rng_state().tolist(), str(np.random.get_state())


def test_what_the_loops_body_does_changes_no_other_ending(fresh, zoo):
    endings = {"iat": IAT(delta=0.25), "pcgrad": PCGrad(delta=0.25), "plain": None}
    expected = {name: alone(fresh(), zoo.tasks, ending) for name, ending in endings.items()}
    model, before = fresh().train(), random_states()
    for name, history in fslib.branch(model, zoo.tasks, endings, **SETTINGS):
        assert told(history) == told(expected[name][0])
        assert same(weights(model), expected[name][1])
        assert random_states() == before and all(m.training for m in model.modules())
        fslib.head_importance(model, zoo.tasks["pair"])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
                parameter.grad = torch.ones_like(parameter)
        history.losses.clear()
        history.heads.clear()
        torch.rand(3), np.random.rand(3)
        before = random_states()


# --- order and cost


@pytest.mark.parametrize(
    ("endings", "expected"),
    [
        ({"iat": IAT(0.25), "pcgrad": PCGrad(0.25), "plain": None}, 9 + 3 + 3 + 3),
        ({"late": IAT(0.25), "early": IAT(0.5), "plain": None, "stop": Stop(0.4)}, 9 + 3 + 6 + 3),
        ({"a": None, "b": None}, 12 + 12),
    ],
)
def test_endings_cost_one_trunk_and_their_short_ends(fresh, zoo, monkeypatch, endings, expected):
    updates = []
    at_every_update(monkeypatch, updates.append)
    histories = dict(fslib.branch(fresh(), zoo.tasks, endings, **SETTINGS))
    assert len(updates) == expected
    lengths = {len(h.losses) for name, h in histories.items() if name != "stop"}
    assert lengths == {12} and all(len(h.losses) == len(h.order) for h in histories.values())


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


@pytest.mark.parametrize("seed", range(20))
def test_projection_equals_the_algorithm_on_whole_gradients(seed):
    gradients = np.random.default_rng(seed).normal(size=(2 + seed % 5, 1 + seed % 7))
    expected = pcgrad_directly(gradients, np.random.default_rng(seed))
    np.testing.assert_allclose(by_weights(gradients, seed), expected, atol=1e-8)
    gradients = np.abs(gradients)  # no conflict
    np.testing.assert_allclose(by_weights(gradients, seed), gradients.mean(0))


def test_two_tasks_by_hand():
    # (1, 0) loses its part along (-1, 1), which is -1/2 of it: (1/2, 1/2)
    # and (-1, 1) its part along (1, 0): (0, 1)
    np.testing.assert_allclose(by_weights([[1, 0], [-1, 1]]), [0.25, 0.75])


def test_opposite_gradients_cancel_and_a_zero_gradient_takes_no_part():
    np.testing.assert_allclose(by_weights([[2, -1], [-2, 1]]), [0, 0], atol=1e-12)
    np.testing.assert_allclose(by_weights([[1, 0], [0, 0], [-1, 1]]), np.array([0.5, 1.5]) / 3)
    np.testing.assert_allclose(by_weights(np.zeros((3, 2))), [0, 0])


def test_a_gradient_too_small_to_square_does_no_harm():
    each = torch.tensor([[1.0, 0.0], [-1e-30, 0.0]])  # its square is 0 in single precision
    assert projected(each @ each.T, np.random.default_rng(0)).isfinite().all()


# --- PCGrad in training


@pytest.fixture
def rivals(zoo):
    """Two tasks with the same texts and opposite labels: their gradients conflict."""
    task = zoo.tasks["pair"]
    texts = list(zip(task.train.texts, task.train.pairs, strict=True))
    rows = {"yes": (texts, task.train.labels.tolist())}
    rows["no"] = (texts, [1 - label for label in rows["yes"][1]])
    names = {"label_names": task.label_names}
    return {name: fslib.make_task(name, mine, mine, **names) for name, mine in rows.items()}


def gradients_of(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def of_encoder(gradients):
    """One vector of all gradients of the encoder."""
    names = sorted(name for name in gradients if name.startswith("encoder"))
    return torch.cat([gradients[name].flatten() for name in names]).double()


@pytest.mark.parametrize("project", [True, False])
def test_a_step_by_hand(zoo, rivals, monkeypatch, project):
    model = fslib.MultiTaskModel.from_pretrained(zoo.folder("bert"), rivals)
    model.dropout.p = 0.0
    with torch.no_grad():
        model.classifiers["yes"].weight.mul_(20)
        model.classifiers["no"].weight.copy_(model.classifiers["yes"].weight)
    before, batches, seen, plain = copy.deepcopy(model), {}, {}, model.losses
    at_every_update(monkeypatch, lambda _: seen.update(gradients_of(model)))
    run = Training(model, rivals, Settings(steps=10, batch_size=8, lr=1e-3, clip=1e9))
    run.begin(PCGrad(project=project))
    monkeypatch.setattr(
        model, "losses", lambda batch, task: batches.update({task: batch}) or plain(batch, task)
    )
    run.advance(1)
    assert run.history.order == [MIXED]
    assert {task: len(batch.labels) for task, batch in batches.items()} == {"yes": 4, "no": 4}
    named, losses = {}, []
    for task, batch in batches.items():
        before.zero_grad()
        losses.append(before.losses(batch, task).mean())
        losses[-1].backward()
        named[task] = gradients_of(before)
        for kind in ("weight", "bias"):  # a task's loss has half a share in the step's
            name = f"classifiers.{task}.{kind}"
            torch.testing.assert_close(seen[name], named[task][name] / 2)
    a, b, found = of_encoder(named["yes"]), of_encoder(named["no"]), of_encoder(seen)
    assert a @ b < 0
    mean = (a + b) / 2
    expected = mean - (a @ b) * (a / (a @ a) + b / (b @ b)) / 2 if project else mean
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert torch.allclose(found, mean, atol=1e-5) is not project
    assert run.history.losses == pytest.approx([float(sum(losses)) / 2], rel=1e-5)


def test_what_the_released_importance_pass_leaves_behind(fresh, zoo, monkeypatch):
    """Its gradient enters the first update and no other; dropout is off in an ending without it."""
    seen = []
    at_every_update(monkeypatch, lambda optimizer: seen.append(gradients_of(model)))
    model, steps = fresh(), SETTINGS["steps"]
    options = SETTINGS | {"clip": None, "evaluate_every": None}
    left = copy.deepcopy(model)
    endings = {
        "plain": None,
        "leak": Ending(delta=0.5, leak=8),
        "quiet": Ending(0.5, dropout=False),
    }
    found = {}
    for name, _ in fslib.branch(model, zoo.tasks, endings, **options):
        found[name] = seen[-(steps // 2)]  # of its first update
    run = Training(left, zoo.tasks, Settings(**options))
    run.advance(steps // 2)
    left.zero_grad()
    left.eval()
    for task in zoo.tasks.values():  # eight examples are one batch
        left.losses(left.encode(task.part("train", 8)).batch(range(8)), task.name).mean().backward()
    own, nothing = gradients_of(left), torch.zeros(())
    assert own.keys() == found["leak"].keys() > found["plain"].keys()
    for name, leaked in found["leak"].items():
        assert torch.allclose(leaked, found["plain"].get(name, nothing) + own[name], atol=1e-5)
    assert any(not torch.equal(found["quiet"][name], g) for name, g in found["plain"].items())
    with refused("leak -1"):
        Ending(leak=-1)


def test_a_mixed_step_is_told_as_one_and_takes_every_task(fresh, zoo):
    model = fresh()
    history = fslib.train(model, zoo.tasks, **SETTINGS, pcgrad=PCGrad(delta=0.25))
    assert history.order[9:] == [MIXED] * 3 and MIXED not in history.order[:9]
    assert len(history.losses) == 12 and np.isfinite(history.losses).all()
    assert history.heads == {}


# --- what is refused


def test_what_is_no_ending_is_refused_before_the_first_step(bert, zoo, monkeypatch):
    monkeypatch.setattr(Training, "advance", lambda *args: pytest.fail("a step was made"))
    branch = inspect.unwrap(fslib.branch)  # without the check of types that tests add
    for wrong in ("IAT", IAT, 0.1):
        with refused(repr(wrong), "is no ending", "fslib.IAT()"):
            branch(bert, zoo.tasks, {"plain": None, "it": wrong}, **SETTINGS)
        with refused(repr(wrong), "is no ending"):
            inspect.unwrap(fslib.train)(bert, zoo.tasks, iat=wrong, steps=12)
    with refused("no endings", "{'plain': None}"):
        fslib.branch(bert, zoo.tasks, {}, **SETTINGS)
    with refused("lr -1.0"):  # when it is called, not when it is looped over
        fslib.branch(bert, zoo.tasks, {"plain": None}, **(SETTINGS | {"lr": -1.0}))

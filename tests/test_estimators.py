"""Every estimator is what its definition says, from losses and outputs taken by hand, at the cost it states."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from refusal import refused
from tinymodels import HEAD_DIM, HEADS, LAYERS, at_projections, projections

from fslib import contributions, head_importance, mean_context, pruned
from fslib.importance import ESTIMATORS, estimate, passes
from fslib.model.attention import gated

MEASURED = ("ablation", "integrated", "norm")
CASES = pytest.mark.parametrize(
    ("name", "kind"),
    [("bert", "single"), ("gpt2", "regression"), ("llama", "pair"), ("t5", "single")],
)
EVERY = pytest.mark.parametrize("estimator", ESTIMATORS)
OTHERS = pytest.mark.parametrize("estimator", ESTIMATORS[1:])


@pytest.fixture
def task(zoo):
    return zoo.tasks["single"]


def only(*places):
    """The head set of these (layer, head)."""
    chosen = np.zeros((LAYERS, HEADS), dtype=bool)
    for place in places:
        chosen[place] = True
    return chosen


def losses(model, task):
    """(n,) every training example's loss, one at a time, so without padding."""
    encoded = model.encode(task.train)
    with torch.no_grad():
        return np.array(
            [model.losses(encoded.batch([i]), task.name).item() for i in range(len(encoded))]
        )


def losses_without(model, task, *places):
    with pruned(model, only(*places)):
        return losses(model, task)


# --- ablation -----------------------------------------------------------------------------------------------------


@CASES
def test_ablation_is_the_loss_with_the_head_pruned_minus_the_loss(zoo, name, kind):
    model, task = zoo.model(name), zoo.tasks[kind]
    whole = losses(model, task)
    expected = np.stack(
        [losses_without(model, task, place) - whole for place in np.ndindex(LAYERS, HEADS)], axis=1
    )
    expected = expected.reshape(len(whole), LAYERS, HEADS)
    values = estimate(model, task, estimator="ablation", batch_size=4).values
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=2e-5)
    found = head_importance(model, task, estimator="ablation")
    np.testing.assert_allclose(found, expected.mean(0), rtol=1e-4, atol=2e-5)
    assert found.min() < 0 < found.max()  # signed: some heads are in the way
    assert np.abs(found).min() > 1e-4


def test_heads_that_hardly_matter_have_one_importance_by_three_estimators(bert, task):
    model = bert.double()
    with torch.no_grad():
        for projection in projections("bert", model.encoder):
            projection.weight.mul_(1e-4)  # the loss is then close to linear in the gates
    slope = contributions(model, task).signed
    ablated, integrated = (
        estimate(model, task, estimator=e).values for e in ("ablation", "integrated")
    )
    near = {"rtol": 0.02, "atol": 0.02 * np.abs(slope).mean()}
    np.testing.assert_allclose(-ablated, slope, **near)
    np.testing.assert_allclose(integrated, slope, **near)
    by_gradient = (
        head_importance(model, task, reduction="example") * contributions(model, task).tokens.mean()
    )
    np.testing.assert_allclose(by_gradient, np.abs(ablated).mean(0), **near)


# --- integrated ---------------------------------------------------------------------------------------------------


@CASES
def test_integrated_values_sum_to_the_change_of_the_loss_they_all_make(zoo, name, kind):
    model, task = zoo.model(name), zoo.tasks[kind]
    change = losses(model, task) - losses_without(model, task, *np.ndindex(LAYERS, HEADS))
    assert np.abs(change).max() > 0.1

    def error(steps):
        values = estimate(model, task, estimator="integrated", steps=steps).values
        return np.abs(values.sum((1, 2)) - change).max()

    few, many = (
        error(16),
        error(256),
    )  # weights this large make a jagged path: a real encoder needs fewer points
    assert few > 20 * many
    assert many < 4e-3 * np.abs(change).max()


def test_integrated_at_one_point_is_the_slope_of_the_loss_at_gates_of_one_half(bert, task):
    model, step = bert.double(), 1e-3

    def loss_at(place, change):
        gate = torch.full((LAYERS, HEADS), 0.5, dtype=torch.float64)
        gate[place] += change
        with gated(model, gate):
            return losses(model, task)

    found = estimate(model, task, estimator="integrated", steps=1).values
    for place in [(0, 1), (1, 3), (2, 0)]:
        near, far = (loss_at(place, h) - loss_at(place, -h) for h in (step, 2 * step))
        np.testing.assert_allclose(
            found[:, *place], (8 * near - far) / (12 * step), rtol=1e-5, atol=1e-7
        )


def test_integrated_drops_signs_example_by_example(bert, task):
    values = estimate(bert, task, estimator="integrated", steps=3).values
    found = head_importance(bert, task, estimator="integrated", steps=3)
    np.testing.assert_allclose(found, np.abs(values).mean(0), rtol=1e-6)
    assert (found > 1.01 * np.abs(values.mean(0))).any()


# --- norm and random ----------------------------------------------------------------------------------------------


@CASES
def test_norm_is_the_mean_length_of_a_heads_output_over_real_tokens(zoo, name, kind):
    model, task = zoo.model(name), zoo.tasks[kind]
    encoded, rows = model.encode(task.train), [[] for _ in range(LAYERS)]
    with (
        torch.no_grad(),
        at_projections(name, model.encoder, lambda layer, x: rows[layer].extend(x[0])),
    ):
        for i in range(len(encoded)):
            model(encoded.batch([i]).inputs, task.name)
    outputs = torch.stack(
        [torch.stack(layer) for layer in rows]
    )  # (layers, all tokens, heads, head_dim)
    expected = outputs.pow(2).sum(-1).sqrt().mean(1).numpy()
    np.testing.assert_allclose(head_importance(model, task, estimator="norm"), expected, rtol=1e-4)


def test_norm_does_not_know_the_labels_and_the_others_do(bert, task):
    other = replace(task, train=replace(task.train, labels=(task.train.labels + 1) % 3))
    for estimator in ("gradient", *MEASURED):
        one, two = (head_importance(bert, t, estimator=estimator) for t in (task, other))
        assert np.array_equal(one, two) == (estimator == "norm"), estimator


def test_random_depends_on_seed_and_task_name_alone(zoo, bert, task):
    def found(task=task, **options):
        return head_importance(bert, task, estimator="random", **options)

    first = found(seed=1)
    assert first.shape == (LAYERS, HEADS) and len(np.unique(first)) == LAYERS * HEADS
    assert first.min() >= 0 and first.max() < 1
    torch.manual_seed(5)
    np.random.seed(5)
    assert np.array_equal(first, found(seed=1, examples=3, split="eval", batch_size=2))
    assert not np.isin(found(seed=2), first).any()
    assert not np.isin(found(zoo.tasks["pair"], seed=1), first).any()


def test_random_scores_are_uniform(bert, task):
    many = np.stack(
        [head_importance(bert, task, estimator="random", seed=seed) for seed in range(200)]
    )
    assert abs(many.mean() - 0.5) < 0.03 and abs(many.var() - 1 / 12) < 0.01


# --- what holds for all -------------------------------------------------------------------------------------------


def test_gradient_is_the_default_and_what_contributions_give(bert, task):
    for reduction in ("token", "example"):
        expected = contributions(bert, task).importance(reduction=reduction)
        assert np.array_equal(head_importance(bert, task, reduction=reduction), expected)
        named = estimate(bert, task, estimator="gradient", reduction=reduction)
        assert np.array_equal(named.importance(), expected)


@EVERY
@CASES
def test_padding_and_a_ragged_rest_do_not_matter(zoo, estimator, name, kind):
    one, seven, eight = (
        head_importance(zoo.model(name), zoo.tasks[kind], estimator=estimator, batch_size=size)
        for size in (1, 7, 8)
    )
    np.testing.assert_allclose(seven, one, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-5)


@EVERY
@pytest.mark.parametrize("normalize", [None, "layer"])
def test_a_subset_of_the_values_scores_as_that_part_of_the_task(zoo, bert, estimator, normalize):
    whole, part = zoo.tasks["regression"], zoo.tasks["regression"].limited(train=4, seed=1)
    found = estimate(bert, whole, estimator=estimator)
    assert found.values.shape == (10, LAYERS, HEADS)
    places = np.array([whole.train.texts.index(text) for text in part.train.texts])
    expected = head_importance(bert, part, estimator=estimator, normalize=normalize)
    for subset in (places, np.concatenate([places, places])):
        np.testing.assert_allclose(
            found.importance(normalize=normalize, subset=subset), expected, rtol=1e-4, atol=1e-5
        )
    if normalize:
        np.testing.assert_allclose((expected**2).sum(1), 1)
    with refused("at least one example"):
        found.importance(subset=places[:0])


@OTHERS
def test_examples_split_and_seed_choose_what_is_measured(bert, task, estimator):
    def found(**options):
        return head_importance(bert, task, estimator=estimator, **options)

    assert np.array_equal(found(), found(split="train"))
    assert np.array_equal(found(examples=4, seed=1), found(examples=4, seed=1))
    assert not np.allclose(found(examples=4, seed=1), found(examples=4, seed=2), rtol=1e-2)
    assert np.allclose(found(), found(split="eval"), rtol=1e-2) == (estimator == "random")


@pytest.mark.parametrize("estimator", MEASURED)
def test_a_head_that_the_projection_ignores_has_output_but_changes_nothing(bert, task, estimator):
    with torch.no_grad():
        projections("bert", bert.encoder)[1].weight[:, 2 * HEAD_DIM : 3 * HEAD_DIM] = 0
    found = head_importance(bert, task, estimator=estimator)
    assert np.argwhere(found == 0).tolist() == ([] if estimator == "norm" else [[1, 2]])


# --- inside `pruned` ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize(
    ("name", "kind"), [("bert", "single"), ("gpt2", "regression"), ("llama", "pair")]
)
def test_pruned_heads_score_nothing_and_the_others_as_they_now_are(zoo, name, kind, how):
    model, task, off = zoo.model(name), zoo.tasks[kind], only((0, 1), (2, 3))
    mean = mean_context(model, task) if how == "mean" else None
    with pruned(model, off, ablation=how, mean=mean):
        gate = model.control.gate
        for estimator in MEASURED:
            assert np.array_equal(head_importance(model, task, estimator=estimator) == 0, off), (
                estimator
            )
        ablated, integrated = (
            estimate(model, task, estimator=e, steps=256).values for e in ("ablation", "integrated")
        )
        now = losses(model, task)
        assert model.control.gate is gate

    def zeroed(*places):
        """Losses with these heads zeroed on top of what is off."""

        def zero(layer, x):
            for at, head in places:
                if at == layer and not off[at, head]:
                    x = x.clone()
                    x[:, :, head] = 0
            return x

        with pruned(model, off, ablation=how, mean=mean), at_projections(name, model.encoder, zero):
            return losses(model, task)

    np.testing.assert_allclose(ablated[:, 1, 2], zeroed((1, 2)) - now, rtol=1e-4, atol=2e-5)
    change = now - zeroed(*np.ndindex(LAYERS, HEADS))
    np.testing.assert_allclose(integrated.sum((1, 2)), change, atol=4e-3 * np.abs(change).max())


# --- cost ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(bert, monkeypatch):
    """[forward passes of the model over batches, backward passes] so far."""
    counts = [0, 0]

    def forward(*_):
        counts[0] += 1

    def counting(function):
        def call(*args, **kwargs):
            counts[1] += 1
            return function(*args, **kwargs)

        return call

    bert.register_forward_hook(forward)
    for owner, name in [
        (torch.autograd, "grad"),
        (torch.autograd, "backward"),
        (torch.Tensor, "backward"),
    ]:
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    return counts


@EVERY
@pytest.mark.parametrize("steps", [1, 3])
def test_an_estimator_takes_the_passes_that_it_states(bert, task, counted, estimator, steps):
    head_importance(
        bert, task, estimator=estimator, steps=steps, batch_size=5
    )  # 10 examples: two batches
    assert tuple(counted) == tuple(2 * n for n in passes(estimator, LAYERS, HEADS, steps))


def test_passes_of_a_base_encoder():
    found = {estimator: passes(estimator, 12, 16) for estimator in ESTIMATORS}
    assert found == {
        "gradient": (1, 1),
        "ablation": (193, 0),
        "integrated": (8, 8),
        "norm": (1, 0),
        "random": (0, 0),
    }


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"estimator": "ablations"}, "unknown estimator 'ablations': did you mean 'ablation'"),
        ({"estimator": "integrated", "steps": 0}, "steps 0: give a whole number of at least 1"),
        ({"estimator": "gradient", "steps": -1}, "steps -1: give a whole number of at least 1"),
        *[
            (
                {"estimator": e, "reduction": "example"},
                "reduction 'example' is for estimator \"gradient\" alone",
            )
            for e in ESTIMATORS[1:]
        ],
        (
            {"estimator": "norm", "reduction": "tokens"},
            "unknown reduction 'tokens': did you mean 'token'",
        ),
        (
            {"estimator": "norm", "normalize": "layers"},
            "unknown normalize 'layers': valid: None, \"layer\"",
        ),
        ({"estimator": "ablation", "split": "test"}, "unknown split 'test': valid: train, eval"),
        ({"estimator": "random", "split": "test"}, "unknown split 'test': valid: train, eval"),
        ({"estimator": "norm", "examples": 0}, "examples 0: give a whole number of at least 1"),
        ({"estimator": "random", "seed": -1}, "seed -1: give a whole number of at least 0"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_before_any_pass(bert, task, counted, wrong, message):
    with refused(message):
        head_importance(bert, task, **wrong)
    assert counted == [0, 0]


def test_a_task_without_classifier_is_refused(bert, task):
    for estimator in MEASURED:
        with refused("unknown task of this model 'mood'"):
            head_importance(bert, replace(task, name="mood"), estimator=estimator)

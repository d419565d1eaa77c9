"""Importance is what each estimator's formula says, at the cost it states, and leaves no trace.

Expectations come from finite differences, from losses and outputs taken one example at a time, and
from a naive loop over I[l,h] = (1/N) * sum over x, i of | < ctx, d loss / d ctx > |.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tinymodels
import torch
from refusal import refused
from tinymodels import HEADS, LAYERS, at_projections, heads_at, heads_outputs, projections

from fslib import head_importance, mean_context, pruned
from fslib.importance import ESTIMATORS, ablation, contributions, gradients_for, integrated, passes
from fslib.model.attention import gated

MEASURED = ("ablation", "integrated", "norm")
CASES = pytest.mark.parametrize(
    ("name", "kind"), [("bert", "single"), ("gpt2", "regression"), ("llama", "pair")]
)
EVERY = pytest.mark.parametrize("estimator", ESTIMATORS)
EVERY_HEAD = list(np.ndindex(LAYERS, HEADS))


@pytest.fixture
def task(zoo):
    return zoo.tasks["single"]


def loss_of(model, task, batch):
    """The loss of a batch of one example, written out."""
    (logits,), (label,) = model(batch.inputs, task.name), batch.labels
    if task.is_regression:
        return (logits[0] - label) ** 2
    return torch.logsumexp(logits, 0) - logits[label]


def alone(model, task, split="train"):
    """Every example by itself, so without padding."""
    encoded = model.encode(getattr(task, split))
    return [encoded.batch([i]) for i in range(len(encoded))]


@torch.no_grad()
def losses(model, task):
    return np.array([loss_of(model, task, batch).item() for batch in alone(model, task)])


def outputs_of(name, model, task, split="train"):
    """(layers, all real tokens, heads, head_dim): what enters the output projections."""
    batches = alone(model, task, split)
    return torch.cat([heads_outputs(name, model, b, task.name)[:, 0] for b in batches], 1)


def values_of(model, task, estimate):
    """(n, layers, heads) of an estimator of one batch, all examples in it."""
    batch = model.encode(task.train).batch(range(len(task.train)))
    with gradients_for(model):
        return estimate(model, batch, task.name).cpu().numpy()


# --- the gradient -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "single"),
        ("bert", "regression"),
        ("albert", "pair"),
        ("distilbert", "single"),
        ("gpt2", "regression"),
        ("modernbert", "single"),
        ("llama", "pair"),
        ("t5", "pair"),
    ],
)
def test_gradient_importance_equals_a_naive_loop(zoo, name, kind):
    model, task = zoo.model(name), zoo.tasks[kind]
    absolute, signed, tokens = [], [], []
    for batch in alone(model, task):
        contexts = []

        def keep(layer, x, contexts=contexts):
            x.retain_grad()
            contexts.append(x)
            return x

        with at_projections(name, model.encoder, keep):
            loss_of(model, task, batch).backward()
        products = np.stack([(ctx * ctx.grad).sum(-1)[0].detach().numpy() for ctx in contexts])
        absolute.append(np.abs(products).sum(1))  # (layers, heads)
        signed.append(products.sum(1))
        tokens.append(products.shape[1])
    found = contributions(model, task, batch_size=3)  # with padding
    assert found.tokens.tolist() == tokens
    near = {"rtol": 1e-3, "atol": 1e-6}
    np.testing.assert_allclose(found.absolute, absolute, **near)
    np.testing.assert_allclose(found.signed, signed, **near)
    for reduction, parts in (("token", absolute), ("example", np.abs(signed))):
        expected = np.sum(parts, 0) / np.sum(tokens)
        importance = head_importance(model, task, reduction=reduction)
        np.testing.assert_allclose(importance, expected, rtol=1e-3, atol=1e-7)
    assert (np.sum(absolute, 0) > 1.01 * np.abs(signed).sum(0)).any(), "signs cancel within"
    assert (np.abs(signed).sum(0) > 1.01 * np.abs(np.sum(signed, 0))).any(), "and between examples"


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_importance_over_a_subset_is_that_of_that_part(zoo, bert, reduction):
    whole = zoo.tasks["regression"]
    found, part = contributions(bert, whole), whole.limited(train=4, seed=1)
    places = np.array([whole.train.texts.index(text) for text in part.train.texts])
    expected = head_importance(bert, part, reduction=reduction, normalize="layer")
    for subset in (places, np.concatenate([places, places])):
        options = {"reduction": reduction, "normalize": "layer", "subset": subset}
        np.testing.assert_allclose(found.importance(**options), expected, rtol=1e-4)
    with refused("one example"):
        found.importance(subset=places[:0])
    with refused("(1, 4)"):
        found.importance(subset=places[None])


# --- the other estimators -----------------------------------------------------------------------


@CASES
def test_ablation_is_the_loss_with_the_head_pruned_minus_the_loss(zoo, name, kind):
    model, task = zoo.model(name), zoo.tasks[kind]
    whole, expected = losses(model, task), []
    for place in EVERY_HEAD:
        with pruned(model, heads_at(place)):
            expected.append(losses(model, task) - whole)
    expected = np.stack(expected, 1).reshape(len(whole), LAYERS, HEADS)
    near = {"rtol": 1e-4, "atol": 2e-5}
    np.testing.assert_allclose(values_of(model, task, ablation), expected, **near)
    found = head_importance(model, task, estimator="ablation", batch_size=4)
    np.testing.assert_allclose(found, expected.mean(0), **near)
    assert found.min() < 0 < found.max(), "signed: some heads are in the way"


@CASES
def test_integrated_values_sum_to_the_change_of_the_loss_they_all_make(zoo, name, kind):
    model, task = zoo.model(name), zoo.tasks[kind]
    change = losses(model, task)
    with pruned(model, ~heads_at()):
        change -= losses(model, task)
    assert np.abs(change).max() > 0.1

    def error(steps):
        values = values_of(model, task, partial(integrated, steps=steps))
        return np.abs(values.sum((1, 2)) - change).max()

    # weights this large make a jagged path: a real encoder needs fewer points
    many = error(256)
    assert error(16) > 20 * many and many < 4e-3 * np.abs(change).max()
    values = values_of(model, task, partial(integrated, steps=3))
    found = head_importance(model, task, estimator="integrated", steps=3, batch_size=4)
    np.testing.assert_allclose(found, np.abs(values).mean(0), rtol=1e-4, atol=1e-5)
    assert (found > 1.01 * np.abs(values.mean(0))).any(), "signs are dropped example by example"


def test_integrated_at_one_point_is_the_slope_at_gates_of_one_half(bert, task):
    model, step = bert.double(), 1e-3
    found = values_of(model, task, partial(integrated, steps=1))

    def loss_at(place, change):
        gate = torch.full((LAYERS, HEADS), 0.5, dtype=torch.float64)
        gate[place] += change
        with gated(model, gate):
            return losses(model, task)

    for place in [(0, 1), (1, 3), (2, 0)]:
        near, far = (loss_at(place, h) - loss_at(place, -h) for h in (step, 2 * step))
        slope = (8 * near - far) / (12 * step)  # central differences on four points
        np.testing.assert_allclose(found[:, *place], slope, rtol=1e-5, atol=1e-7)


@CASES
def test_norm_is_the_mean_length_of_a_heads_output_over_real_tokens(zoo, name, kind):
    model, task = zoo.model(name), zoo.tasks[kind]
    expected = outputs_of(name, model, task).pow(2).sum(-1).sqrt().mean(1).numpy()
    found = head_importance(model, task, estimator="norm", batch_size=4)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_random_depends_on_seed_and_task_name_alone_and_is_uniform(zoo, bert, task):
    found = partial(head_importance, bert, estimator="random")
    first = found(task, seed=1)
    torch.manual_seed(5)
    np.random.seed(5)
    assert np.array_equal(first, found(task, seed=1, examples=3, split="eval", batch_size=2))
    assert not np.isin(found(task, seed=2), first).any()
    assert not np.isin(found(zoo.tasks["pair"], seed=1), first).any()
    many = np.stack([found(task, seed=seed) for seed in range(200)])
    assert many.min() >= 0 and many.max() < 1 and len(np.unique(first)) == LAYERS * HEADS
    assert abs(many.mean() - 0.5) < 0.03 and abs(many.var() - 1 / 12) < 0.01


# --- what holds for all -------------------------------------------------------------------------


@EVERY
def test_examples_split_and_seed_choose_what_is_measured(bert, task, estimator):
    found = partial(head_importance, bert, task, estimator=estimator)
    assert found().shape == (LAYERS, HEADS) and np.array_equal(found(), found(split="train"))
    assert np.array_equal(found(), found(examples=999))
    for split in ("train", "eval"):
        part = partial(found, examples=4, split=split)
        assert np.array_equal(part(seed=1), part(seed=1))
        assert not np.allclose(part(seed=1), part(seed=2), rtol=1e-2)
    assert np.allclose(found(), found(split="eval"), rtol=1e-2) == (estimator == "random")


@EVERY
def test_layer_normalization_gives_every_layer_norm_one(bert, task, estimator):
    with torch.no_grad():
        projections("bert", bert.encoder)[0].weight.zero_()  # nobody reads its heads
    raw, normal = (
        head_importance(bert, task, estimator=estimator, normalize=how) for how in (None, "layer")
    )
    layers = range(estimator not in ("norm", "random"), LAYERS)
    for layer in layers:
        assert np.linalg.norm(normal[layer]) == pytest.approx(1)
        np.testing.assert_allclose(normal[layer] / normal[layer, 0], raw[layer] / raw[layer, 0])
    assert not normal[: layers.start].any()


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_pruned_heads_score_nothing_and_the_others_as_they_now_are(bert, task, how):
    off = heads_at((0, 1), (2, 3))
    mean = mean_context(bert, task) if how == "mean" else None

    def without(*places):
        """Losses with these heads zeroed on top of what is off."""
        kept = ~torch.from_numpy(heads_at(*places) & ~off)[..., None]
        with at_projections("bert", bert.encoder, lambda layer, x: x * kept[layer]):
            return losses(bert, task)

    with pruned(bert, off, ablation=how, mean=mean):
        gate = bert.control.gate
        for estimator in ("gradient", *MEASURED):
            found = head_importance(bert, task, estimator=estimator)
            assert np.array_equal(found == 0, off), estimator
        ablated = values_of(bert, task, ablation)
        summed = values_of(bert, task, partial(integrated, steps=256)).sum((1, 2))
        expected = np.stack([without(place) - without() for place in EVERY_HEAD], 1)
        change = without() - without(*EVERY_HEAD)
        assert bert.control.gate is gate
    np.testing.assert_allclose(ablated.reshape(len(ablated), -1), expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(summed, change, atol=1e-2 * np.abs(change).max())


@pytest.fixture
def counted(bert, monkeypatch):
    """How many forward and backward passes have been made."""
    counts, grad = [0, 0], torch.autograd.grad

    def forward(*_):
        counts[0] += 1

    def backward(*args, **kwargs):
        counts[1] += 1
        return grad(*args, **kwargs)

    bert.register_forward_hook(forward)
    monkeypatch.setattr(torch.autograd, "grad", backward)
    return counts


@EVERY
@pytest.mark.parametrize("steps", [1, 3])
def test_an_estimator_takes_the_passes_that_it_states(bert, task, counted, estimator, steps):
    options = {"estimator": estimator, "steps": steps, "batch_size": 5}
    head_importance(bert, task, **options)  # 10 examples: two batches
    assert tuple(counted) == tuple(2 * n for n in passes(estimator, LAYERS, HEADS, steps))
    assert passes("ablation", 12, 16) == (193, 0) and passes("integrated", 12, 16) == (8, 8)


WRONG = [
    ({"estimator": "ablations"}, "unknown estimator 'ablations': did you mean 'ablation'"),
    ({"reduction": "tokens"}, "unknown reduction 'tokens': did you mean 'token'"),
    (
        {"normalize": "layers"},
        "unknown normalize 'layers': did you mean 'layer'? valid: layer, or None",
    ),
    ({"split": "test", "examples": 3}, "unknown split 'test': valid: train, eval"),
    *[
        ({"estimator": e, "reduction": "example"}, "reduction 'example' is for estimator")
        for e in ESTIMATORS[1:]
    ],
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=str)
def test_wrong_settings_are_refused_before_any_pass(bert, task, counted, wrong, message):
    with refused(message):
        head_importance(bert, task, **wrong)
    with refused("unknown task of this model 'mood'"):
        head_importance(bert, replace(task, name="mood"))
    assert counted == [0, 0]


@pytest.mark.parametrize(
    ("name", "kind", "split"), [("bert", "pair", "train"), ("albert", "single", "eval")]
)
def test_mean_context_is_the_average_over_all_real_tokens(zoo, name, kind, split):
    model, task = zoo.model(name), zoo.tasks[kind]
    found, expected = mean_context(model, task, split=split), outputs_of(name, model, task, split)
    torch.testing.assert_close(found, expected.mean(1), atol=1e-5, rtol=1e-4)
    one, again, other = (mean_context(model, task, examples=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.allclose(one, other)


# --- a measurement leaves no trace --------------------------------------------------------------


MEASURES = {e: partial(head_importance, estimator=e, steps=2) for e in ("gradient", *MEASURED)}
MEASURES["mean context"] = mean_context


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_measurement_leaves_no_trace_nor_does_an_exception_in_it(zoo, bert, task, measure):
    expected = np.asarray(measure(zoo.model("bert"), task))
    for module in bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    before = tinymodels.trace(tinymodels.disturbed(bert))
    with torch.no_grad():
        assert np.array_equal(measure(bert, task), expected), "whatever state the model is in"
    assert tinymodels.trace(bert) == before

    def fail(layer, x):
        assert not bert.training  # it is under way, and no weight gets a gradient
        assert measure is mean_context or not any(p.requires_grad for p in bert.parameters())
        if layer == 1:
            raise KeyError

    with at_projections("bert", bert.encoder, fail), pytest.raises(KeyError):
        measure(bert, task)
    assert tinymodels.trace(bert) == before

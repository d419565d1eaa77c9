"""Importance is what each estimator's formula says, at the cost it states, and leaves no trace.

Expectations come from finite differences, from losses and outputs taken one example at a time, and
from a naive loop over I[l,h] = (1/N) * sum over x, i of | < ctx, d loss / d ctx > |.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from refusal import refused
from tinymodels import HEAD_DIM, HEADS, LAYERS, at_projections, projections

from fslib import head_importance, mean_context, pruned
from fslib.importance import ESTIMATORS, ablation, contributions, gradients_for, integrated, passes
from fslib.model.attention import gated

MEASURED = ("ablation", "integrated", "norm")
CASES = pytest.mark.parametrize(
    ("name", "kind"),
    [("bert", "single"), ("gpt2", "regression"), ("llama", "pair"), ("t5", "single")],
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


def only(*places):
    """The head set of these (layer, head)."""
    chosen = np.zeros((LAYERS, HEADS), dtype=bool)
    for place in places:
        chosen[place] = True
    return chosen


def outputs_of(name, model, task, split="train"):
    """(layers, all real tokens, heads, head_dim): what enters the output projections."""
    rows = [[] for _ in range(LAYERS)]
    with (
        torch.no_grad(),
        at_projections(name, model.encoder, lambda layer, x: rows[layer].extend(x[0])),
    ):
        for batch in alone(model, task, split):
            model(batch.inputs, task.name)
    return torch.stack([torch.stack(layer) for layer in rows])


def values_of(model, task, estimate):
    """(n, layers, heads) of an estimator of one batch, all examples in it."""
    batch = model.encode(task.train).batch(range(len(task.train)))
    with gradients_for(model):
        return estimate(model, batch, task.name).cpu().numpy()


# --- the gradient -------------------------------------------------------------------------------

EXACT = (1e-3, 1e-6, 1e-8)  # step of the difference, relative and absolute tolerance
ROUNDED = (2e-3, 1e-3, 2e-4)  # norms or positions in single precision, whatever is given


@pytest.mark.parametrize(
    ("name", "kind", "precision"),
    [
        ("bert", "pair", EXACT),
        ("albert", "single", EXACT),
        ("gpt2", "regression", EXACT),
        ("qwen3", "pair", ROUNDED),
        ("t5", "single", ROUNDED),
    ],
    ids=str,
)
def test_example_reduction_is_the_slope_of_the_loss_by_the_gate(zoo, name, kind, precision):
    model, task, (step, rtol, atol) = zoo.model(name).double(), zoo.tasks[kind], precision
    found = contributions(model, task)

    def loss_at(place, change, batch):
        gate = torch.ones(LAYERS, HEADS, dtype=torch.float64)
        gate[place] += change
        with torch.no_grad(), gated(model, gate):
            return float(loss_of(model, task, batch))

    def slope(place, batch):
        near, far = (loss_at(place, h, batch) - loss_at(place, -h, batch) for h in (step, 2 * step))
        return (8 * near - far) / (12 * step)  # central differences on four points

    for i in (0, 3):
        batch = alone(model, task)[i]
        slopes = np.array([slope(place, batch) for place in EVERY_HEAD]).reshape(LAYERS, HEADS)
        importance = found.importance(reduction="example", subset=np.array([i]))
        np.testing.assert_allclose(importance * batch.mask.sum().item(), np.abs(slopes), rtol, atol)
        np.testing.assert_allclose(found.signed[i], slopes, rtol, atol)
        assert np.median(np.abs(slopes)) > 100 * atol  # nothing is compared with nothing


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "single"),
        ("bert", "regression"),
        ("albert", "pair"),
        ("distilbert", "single"),
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
        assert np.array_equal(
            contributions(model, task).importance(reduction=reduction), importance
        )
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
    for subset, word in (
        (places[:0], "one example"),
        (places[None], "(1, 4)"),
        (places / 2, "(4,)"),
    ):
        with refused(word):
            found.importance(subset=subset)


def test_no_weight_gets_a_gradient_graph(bert, task):
    asked = []

    def look(*_):
        asked.extend(p.requires_grad for p in bert.parameters())

    with at_projections("bert", bert.encoder, look):
        head_importance(bert, task)
    assert asked and not any(asked)


# --- the other estimators -----------------------------------------------------------------------


@CASES
def test_ablation_is_the_loss_with_the_head_pruned_minus_the_loss(zoo, name, kind):
    model, task = zoo.model(name), zoo.tasks[kind]
    whole, expected = losses(model, task), []
    for place in EVERY_HEAD:
        with pruned(model, only(place)):
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
    with pruned(model, ~only()):
        change = losses(model, task)
    change = losses(model, task) - change
    assert np.abs(change).max() > 0.1

    def error(steps):
        values = values_of(model, task, partial(integrated, steps=steps))
        return np.abs(values.sum((1, 2)) - change).max()

    # weights this large make a jagged path: a real encoder needs fewer points
    many = error(256)
    assert error(16) > 20 * many and many < 4e-3 * np.abs(change).max()
    values = values_of(model, task, partial(integrated, steps=3))
    found = head_importance(model, task, estimator="integrated", steps=3)
    np.testing.assert_allclose(found, np.abs(values).mean(0), rtol=1e-4, atol=1e-7)
    assert (found > 1.01 * np.abs(values.mean(0))).any(), "signs are dropped example by example"


def test_integrated_at_one_point_is_the_slope_at_gates_of_one_half(bert, task):
    model, step = bert.double(), 1e-3

    def loss_at(place, change):
        gate = torch.full((LAYERS, HEADS), 0.5, dtype=torch.float64)
        gate[place] += change
        with gated(model, gate):
            return losses(model, task)

    found = values_of(model, task, partial(integrated, steps=1))
    for place in [(0, 1), (1, 3), (2, 0)]:
        near, far = (loss_at(place, h) - loss_at(place, -h) for h in (step, 2 * step))
        slope = (8 * near - far) / (12 * step)
        np.testing.assert_allclose(found[:, *place], slope, rtol=1e-5, atol=1e-7)


def test_heads_that_hardly_matter_have_one_importance_by_three_estimators(bert, task):
    model = bert.double()
    with torch.no_grad():
        for projection in projections("bert", model.encoder):
            projection.weight.mul_(1e-4)  # the loss is then close to linear in the gates
    slope = contributions(model, task).signed
    near = {"rtol": 0.02, "atol": 0.02 * np.abs(slope).mean()}
    np.testing.assert_allclose(-values_of(model, task, ablation), slope, **near)
    np.testing.assert_allclose(values_of(model, task, partial(integrated, steps=8)), slope, **near)


@CASES
def test_norm_is_the_mean_length_of_a_heads_output_over_real_tokens(zoo, name, kind):
    model, task = zoo.model(name), zoo.tasks[kind]
    expected = outputs_of(name, model, task).pow(2).sum(-1).sqrt().mean(1).numpy()
    np.testing.assert_allclose(head_importance(model, task, estimator="norm"), expected, rtol=1e-4)


def test_norm_does_not_know_the_labels_and_the_others_do(bert, task):
    other = replace(task, train=replace(task.train, labels=(task.train.labels + 1) % 3))
    for estimator in ("gradient", *MEASURED):
        one, two = (head_importance(bert, t, estimator=estimator) for t in (task, other))
        assert np.array_equal(one, two) == (estimator == "norm"), estimator


def test_random_depends_on_seed_and_task_name_alone_and_is_uniform(zoo, bert, task):
    def found(task=task, **options):
        return head_importance(bert, task, estimator="random", **options)

    first = found(seed=1)
    torch.manual_seed(5)
    np.random.seed(5)
    assert np.array_equal(first, found(seed=1, examples=3, split="eval", batch_size=2))
    assert not np.isin(found(seed=2), first).any()
    assert not np.isin(found(zoo.tasks["pair"], seed=1), first).any()
    many = np.stack([found(seed=seed) for seed in range(200)])
    assert many.min() >= 0 and many.max() < 1 and len(np.unique(first)) == LAYERS * HEADS
    assert abs(many.mean() - 0.5) < 0.03 and abs(many.var() - 1 / 12) < 0.01


# --- what holds for all -------------------------------------------------------------------------


@EVERY
@CASES
def test_padding_and_a_ragged_rest_do_not_matter(zoo, estimator, name, kind):
    model, task = zoo.model(name), zoo.tasks[kind]
    one, *others = (
        head_importance(model, task, estimator=estimator, batch_size=size) for size in (1, 7, 8)
    )
    for found in others:
        np.testing.assert_allclose(found, one, rtol=1e-4, atol=1e-5)


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
    measure = partial(head_importance, bert, task, estimator=estimator)
    raw, normal = measure(), measure(normalize="layer")
    np.testing.assert_allclose((normal**2).sum(1), 1)
    np.testing.assert_allclose(normal / normal[:, :1], raw / raw[:, :1])
    with torch.no_grad():
        projections("bert", bert.encoder)[0].weight.zero_()
        projections("bert", bert.encoder)[1].weight[:, 2 * HEAD_DIM : 3 * HEAD_DIM] = 0
    ignored = np.isin(np.arange(LAYERS * HEADS), [0, 1, 2, 3, HEADS + 2]).reshape(LAYERS, HEADS)
    if estimator in ("norm", "random"):
        ignored[:] = False  # such heads have an output all the same
    normal = measure(normalize="layer")
    assert np.array_equal(normal == 0, ignored) and np.isfinite(normal).all()


@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize(("name", "kind"), [("bert", "single"), ("gpt2", "regression")])
def test_pruned_heads_score_nothing_and_the_others_as_they_now_are(zoo, name, kind, how):
    model, task, off = zoo.model(name), zoo.tasks[kind], only((0, 1), (2, 3))
    mean = mean_context(model, task) if how == "mean" else None

    def without(*places):
        """Losses with these heads zeroed on top of what is off."""
        chosen = torch.from_numpy(only(*places) & ~off)

        def zero(layer, x):
            return x * (~chosen[layer])[:, None]

        with at_projections(name, model.encoder, zero):
            return losses(model, task)

    with pruned(model, off, ablation=how, mean=mean):
        gate = model.control.gate
        for estimator in ("gradient", *MEASURED):
            found = head_importance(model, task, estimator=estimator)
            assert np.array_equal(found == 0, off), estimator
        ablated = values_of(model, task, ablation)
        summed = values_of(model, task, partial(integrated, steps=256)).sum((1, 2))
        expected = np.stack([without(place) - without() for place in EVERY_HEAD], 1)
        change = without() - without(*EVERY_HEAD)
        assert model.control.gate is gate
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"estimator": "ablations"}, "unknown estimator 'ablations': did you mean 'ablation'"),
        ({"steps": 0}, "steps 0: give a whole number of at least 1"),
        *[
            ({"estimator": e, "reduction": "example"}, "reduction 'example' is for estimator")
            for e in ESTIMATORS[1:]
        ],
        *[
            ({"estimator": e} | wrong, message)
            for e in ("gradient", "norm", "random")
            for wrong, message in (
                ({"reduction": "tokens"}, "unknown reduction 'tokens': did you mean 'token'"),
                ({"normalize": "layers"}, "unknown normalize 'layers': valid: None, \"layer\""),
                ({"split": "test", "examples": 3}, "unknown split 'test': valid: train, eval"),
                ({"examples": 0}, "examples 0: give a whole number of at least 1"),
                ({"seed": -1, "examples": 4}, "seed -1: give a whole number of at least 0"),
            )
        ],
    ],
    ids=str,
)
def test_wrong_settings_are_refused_before_any_pass(bert, task, counted, wrong, message):
    with refused(message):
        head_importance(bert, task, **wrong)
    assert counted == [0, 0]


def test_a_task_without_classifier_is_refused(bert, task):
    for estimator in ESTIMATORS:
        with refused("unknown task of this model 'mood'"):
            head_importance(bert, replace(task, name="mood"), estimator=estimator)


@pytest.mark.parametrize(("name", "kind"), [("bert", "pair"), ("albert", "single")])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_mean_context_is_the_average_over_all_real_tokens(zoo, name, kind, split):
    model, task = zoo.model(name), zoo.tasks[kind]
    expected, found = (
        outputs_of(name, model, task, split).mean(1),
        mean_context(model, task, split=split),
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    one, again, other = (mean_context(model, task, examples=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.allclose(one, other)


# --- a measurement leaves no trace --------------------------------------------------------------


def mixed(model):
    model.train()
    model.encoder.embeddings.eval()
    model.classifiers["pair"].eval()


def partly_frozen(model):
    model.train()
    for parameter in model.encoder.embeddings.parameters():
        parameter.requires_grad_(False)


def all_frozen(model):
    model.requires_grad_(False)


def with_gradients(model):
    model.train()
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(i)) if i % 2 else None


STATES = pytest.mark.parametrize(
    "prepare", [mixed, partly_frozen, all_frozen, with_gradients], ids=lambda f: f.__name__
)
MEASURES = {e: partial(head_importance, estimator=e, steps=2) for e in ("gradient", *MEASURED)}
MEASURES["mean context"] = mean_context


def trace(model):
    """Everything that a measurement could disturb, as comparable values."""
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "weights": [p.tolist() for p in (*model.parameters(), *model.buffers())],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "forwards": ["forward" in vars(m) for m in model.modules()],
        "control": (model.control.gate, model.control.fill, model.control.tap),
        "torch RNG": torch.get_rng_state().tolist(),
        "numpy RNG": str(np.random.get_state()),
        "grad mode": torch.is_grad_enabled(),
    }


@STATES
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_measurement_leaves_no_trace_nor_does_an_exception_in_it(
    zoo, bert, task, prepare, measure
):
    expected = np.asarray(measure(zoo.model("bert"), task))
    for module in bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    prepare(bert)
    before = trace(bert)
    with torch.no_grad():
        assert np.array_equal(measure(bert, task), expected), "whatever state the model is in"
    assert trace(bert) == before

    def fail(layer, x):
        assert not bert.training  # it is under way
        if layer == 1:
            raise KeyError

    with at_projections("bert", bert.encoder, fail), pytest.raises(KeyError):
        measure(bert, task)
    assert trace(bert) == before

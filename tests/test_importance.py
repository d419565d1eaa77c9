"""Importance is what its formula says, from finite differences and from a naive loop, and measuring changes nothing.

I[l,h] = (1/N) * sum over examples x, tokens i of | < ctx[l,h,i](x), d loss(x) / d ctx[l,h,i](x) > |
"""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from tinymodels import HEAD_DIM, HEADS, LAYERS, at_projections, projections

from fslib import FslibError, contributions, head_importance, mean_context, pruned
from fslib.importance import ESTIMATORS
from fslib.model.attention import gated

KINDS = pytest.mark.parametrize("kind", ["single", "pair", "regression"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["token", "example"])


@pytest.fixture
def task(zoo):
    return zoo.tasks["single"]


def loss_of(model, task, batch):
    """The loss of a batch of one example, written out."""
    (logits,), (label,) = model(batch.inputs, task.name), batch.labels
    return (
        (logits[0] - label) ** 2
        if task.is_regression
        else torch.logsumexp(logits, 0) - logits[label]
    )


def naive_products(name, model, task):
    """< ctx, d loss / d ctx > one unpadded example at a time, weight gradients on: a list of (layers, seq, heads)."""
    encoded, found = model.encode(task.train), []
    for i in range(len(encoded)):
        contexts = []

        def keep(layer, x, contexts=contexts):
            x.retain_grad()
            contexts.append(x)
            return x

        with at_projections(name, model.encoder, keep):
            loss_of(model, task, encoded.batch([i])).backward()
        assert len(contexts) == LAYERS
        found.append(
            torch.stack([(ctx.detach() * ctx.grad).sum(-1)[0] for ctx in contexts]).numpy()
        )
    return found


def naive_importance(products, reduction):
    total, tokens = np.zeros((LAYERS, HEADS)), 0
    for example in products:
        tokens += example.shape[1]
        for layer, head in itertools.product(range(LAYERS), range(HEADS)):
            values = example[layer, :, head].astype(float)
            total[layer, head] += (
                sum(abs(v) for v in values) if reduction == "token" else abs(sum(values))
            )
    return total / tokens


# --- the formula --------------------------------------------------------------------------------------------------


EXACT = (1e-3, 1e-6, 1e-8)  # step of the difference, relative and absolute tolerance
ROUNDED = (
    2e-3,
    1e-3,
    2e-4,
)  # these models compute norms or positions in single precision, whatever they are given


@pytest.mark.parametrize(
    ("name", "kind", "precision"),
    [
        ("bert", "single", EXACT),
        ("bert", "pair", EXACT),
        ("albert", "single", EXACT),
        ("gpt2", "regression", EXACT),
        ("modernbert", "regression", ROUNDED),
        ("llama", "single", ROUNDED),
        ("qwen3", "pair", ROUNDED),
        ("t5", "single", ROUNDED),
    ],
    ids=str,
)
def test_example_reduction_is_the_slope_of_the_loss_by_the_gate(zoo, name, kind, precision):
    model, task, (step, rtol, atol) = zoo.model(name).double(), zoo.tasks[kind], precision
    found, encoded = contributions(model, task), model.encode(task.train)

    def loss_at(place, change, batch):
        gate = torch.ones(LAYERS, HEADS, dtype=torch.float64)
        gate[place] += change
        with torch.no_grad(), gated(model, gate):
            return float(loss_of(model, task, batch))

    def slope(place, batch):
        near, far = (loss_at(place, h, batch) - loss_at(place, -h, batch) for h in (step, 2 * step))
        return (8 * near - far) / (12 * step)  # central differences on four points

    for i in (0, 3):
        batch = encoded.batch([i])
        slopes = np.array(
            [[slope((layer, head), batch) for head in range(HEADS)] for layer in range(LAYERS)]
        )
        importance = found.importance(reduction="example", subset=np.array([i]))
        np.testing.assert_allclose(importance * batch.mask.sum().item(), np.abs(slopes), rtol, atol)
        np.testing.assert_allclose(found.signed[i], slopes, rtol, atol)
        assert np.median(np.abs(slopes)) > 100 * atol  # nothing is compared with nothing


@REDUCTIONS
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "single"),
        ("bert", "pair"),
        ("bert", "regression"),
        ("albert", "pair"),
        ("distilbert", "single"),
        ("modernbert", "single"),
        ("gpt2", "regression"),
        ("llama", "pair"),
        ("qwen3", "single"),
        ("t5", "pair"),
    ],
)
def test_importance_equals_a_naive_loop(zoo, name, kind, reduction):
    model, task = zoo.model(name), zoo.tasks[kind]
    expected = naive_importance(naive_products(name, model, task), reduction)
    found = head_importance(model, task, reduction=reduction)  # one batch, with padding
    assert found.shape == (LAYERS, HEADS) and expected.min() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@KINDS
@REDUCTIONS
def test_batch_size_and_so_padding_and_a_ragged_rest_do_not_matter(zoo, bert, kind, reduction):
    one, three, seven = (
        head_importance(bert, zoo.tasks[kind], reduction=reduction, batch_size=size)
        for size in (1, 3, 7)
    )
    np.testing.assert_allclose(three, one, rtol=1e-4)
    np.testing.assert_allclose(seven, one, rtol=1e-4)


def test_reductions_differ_and_signs_cancel_only_within_an_example(bert, task):
    token, example = (head_importance(bert, task, reduction=r) for r in ("token", "example"))
    assert (token >= example).all() and (token > 1.01 * example).any()
    signed = contributions(bert, task).signed.sum(0) / contributions(bert, task).tokens.sum()
    assert (example > 1.01 * np.abs(signed)).any()


def test_contributions_tell_tokens_and_parts_of_every_example(bert, task):
    found, products = contributions(bert, task, batch_size=3), naive_products("bert", bert, task)
    assert found.tokens.tolist() == [len(text.split()) + 2 for text in task.train.texts]
    for i, example in enumerate(products):
        np.testing.assert_allclose(found.absolute[i], np.abs(example).sum(1), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found.signed[i], example.sum(1), rtol=1e-3, atol=1e-6)


@REDUCTIONS
def test_importance_over_a_subset_equals_importance_of_that_part(zoo, bert, reduction):
    for seed in (0, 1):
        found = contributions(bert, zoo.tasks["regression"])
        part = zoo.tasks["regression"].limited(train=4, seed=seed)
        places = np.array(
            [zoo.tasks["regression"].train.texts.index(text) for text in part.train.texts]
        )
        expected = head_importance(bert, part, reduction=reduction)
        np.testing.assert_allclose(
            found.importance(reduction=reduction, subset=places), expected, rtol=1e-4
        )
    repeated = found.importance(reduction=reduction, subset=np.concatenate([places, places]))
    np.testing.assert_allclose(repeated, expected, rtol=1e-4)


# --- normalization ------------------------------------------------------------------------------------------------


def test_layer_normalization_gives_every_layer_norm_one_and_keeps_proportions(bert, task):
    raw, normal = head_importance(bert, task), head_importance(bert, task, normalize="layer")
    np.testing.assert_allclose((normal**2).sum(1), 1)
    np.testing.assert_allclose(normal / normal[:, :1], raw / raw[:, :1])
    assert np.ptp(np.sqrt((raw**2).sum(1))) > 0.01  # layers did differ


def test_a_head_without_columns_in_the_projection_has_no_importance(zoo, bert, task):
    with torch.no_grad():
        projections("bert", bert.encoder)[1].weight[:, 2 * HEAD_DIM : 3 * HEAD_DIM] = 0
    raw = head_importance(bert, task)
    assert np.argwhere(raw == 0).tolist() == [[1, 2]]


def test_a_layer_without_importance_stays_at_zero_when_normalized(bert, task):
    with torch.no_grad():
        projections("bert", bert.encoder)[0].weight.zero_()
    normal = head_importance(bert, task, normalize="layer")
    assert (normal[0] == 0).all() and np.isfinite(normal).all()
    np.testing.assert_allclose((normal[1:] ** 2).sum(1), 1)


def test_a_head_that_is_switched_off_around_the_measurement_has_no_importance(bert, task):
    chosen = np.zeros((LAYERS, HEADS), dtype=bool)
    chosen[2, 1] = True
    with pruned(bert, chosen):
        assert np.array_equal(head_importance(bert, task) == 0, chosen)


# --- a measurement leaves no trace --------------------------------------------------------------------------------


def fresh(model):
    model.eval()


def in_training(model):
    model.train()


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


def trace(model):
    """Everything that a measurement could disturb, as comparable values."""
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "weights": [p.tolist() for p in (*model.parameters(), *model.buffers())],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "control": (model.control.gate, model.control.fill, model.control.tap),
        "torch RNG": torch.get_rng_state().tolist(),
        "numpy RNG": str(np.random.get_state()),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


STATES = pytest.mark.parametrize(
    "prepare",
    [fresh, in_training, mixed, partly_frozen, all_frozen, with_gradients],
    ids=lambda f: f.__name__,
)


# "random" does not run the model
BY_ESTIMATOR = {
    e: partial(head_importance, estimator=e, steps=2) for e in ESTIMATORS if e != "random"
}


def measurements(model, task):
    head_importance(model, task, examples=4, batch_size=3, reduction="example", normalize="layer")
    contributions(model, task)
    for estimator in ESTIMATORS:
        head_importance(model, task, estimator=estimator, examples=4, batch_size=3, steps=2)
    mean_context(model, task, examples=4)


@STATES
def test_a_measurement_leaves_no_trace(bert, task, prepare):
    prepare(bert)
    before = trace(bert)
    measurements(bert, task)
    assert trace(bert) == before


@STATES
@pytest.mark.parametrize(
    "measure", [*BY_ESTIMATOR.values(), mean_context], ids=[*BY_ESTIMATOR, "mean context"]
)
def test_an_exception_inside_a_measurement_leaves_no_trace(bert, task, prepare, measure):
    prepare(bert)
    before = trace(bert)

    def fail(layer, x):
        assert not bert.training  # it is under way
        if layer == 1:
            raise KeyError

    with at_projections("bert", bert.encoder, fail), pytest.raises(KeyError):
        measure(bert, task)
    assert trace(bert) == before


@STATES
def test_state_of_the_model_does_not_change_the_measurement(zoo, bert, task, prepare):
    expected = {name: measure(zoo.model("bert"), task) for name, measure in BY_ESTIMATOR.items()}
    prepare(bert)
    with torch.no_grad():
        for name, measure in BY_ESTIMATOR.items():
            assert np.array_equal(measure(bert, task), expected[name]), name


@pytest.mark.parametrize("measure", BY_ESTIMATOR.values(), ids=BY_ESTIMATOR)
def test_dropout_is_off_while_measuring(zoo, task, measure):
    model = zoo.model("bert")
    expected = measure(model, task)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    assert np.array_equal(measure(model, task), expected)


def test_no_weight_gets_a_gradient_graph(bert, task):
    asked = []
    with at_projections(
        "bert", bert.encoder, lambda *_: asked.extend(p.requires_grad for p in bert.parameters())
    ):
        head_importance(bert, task)
    assert asked and not any(asked)


# --- which examples -----------------------------------------------------------------------------------------------


def test_training_data_is_the_default(bert, task):
    default = head_importance(bert, task)
    assert np.array_equal(default, head_importance(bert, task, split="train"))
    assert not np.allclose(default, head_importance(bert, task, split="eval"), rtol=1e-2)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_part_of_the_examples_depends_on_the_seed_alone(bert, task, split):
    first, again, other = (
        head_importance(bert, task, split=split, examples=4, seed=seed) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, rtol=1e-2)


def test_more_examples_than_there_are_means_all(bert, task):
    assert np.array_equal(head_importance(bert, task, examples=999), head_importance(bert, task))


def test_one_example(bert, zoo):
    found = contributions(bert, zoo.tasks["regression"], examples=1)
    assert found.absolute.shape == (1, LAYERS, HEADS)
    importance = head_importance(bert, zoo.tasks["regression"], examples=1)
    np.testing.assert_allclose(importance, found.absolute[0] / found.tokens[0], rtol=1e-6)
    assert importance.min() > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"examples": 0}, "examples 0: give a whole number of at least 1"),
        ({"examples": -3}, "examples -3: give a whole number of at least 1"),
        ({"reduction": "tokens"}, "unknown reduction 'tokens': did you mean 'token'"),
        ({"normalize": "layers"}, "unknown normalize 'layers': valid: None, \"layer\""),
        ({"split": "test"}, "unknown split 'test': valid: train, eval"),
        ({"split": "test", "examples": 3}, "unknown split 'test': valid: train, eval"),
    ],
)
def test_wrong_settings_are_one_clear_line(bert, task, wrong, message):
    with pytest.raises(FslibError, match=message):
        head_importance(bert, task, **wrong)


def test_an_empty_subset_is_refused(bert, task):
    with pytest.raises(FslibError, match="at least one example"):
        contributions(bert, task).importance(subset=np.array([], dtype=int))


# --- mean context -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("bert", "pair"), ("albert", "single"), ("llama", "single")]
)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_mean_context_is_the_average_over_all_real_tokens(zoo, name, kind, split):
    model, task = zoo.model(name), zoo.tasks[kind]
    encoded, rows = model.encode(getattr(task, split)), [[] for _ in range(LAYERS)]
    with (
        torch.no_grad(),
        at_projections(name, model.encoder, lambda layer, x: rows[layer].extend(x[0])),
    ):
        for i in range(len(encoded)):
            model(encoded.batch([i]).inputs, task.name)
    expected = torch.stack([torch.stack(layer).mean(0) for layer in rows])
    torch.testing.assert_close(
        mean_context(model, task, split=split), expected, atol=1e-5, rtol=1e-4
    )


def test_mean_context_of_a_part_depends_on_the_seed_alone(bert, task):
    first, again, other = (mean_context(bert, task, examples=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)

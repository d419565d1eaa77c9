"""IAT: a batch updates the query, key and value rows of its own task's heads, and no others."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf
from refusal import refused
from tinymodels import (
    ARCHITECTURES,
    BARE,
    HEAD_DIM,
    HEADS,
    LAYERS,
    LLAMA_LIKE,
    one_thread,
    save,
    tokenizer,
    toy_task,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fslib
from fslib.data.tasks import Task
from fslib.iat import HeadRows, head_rows
from fslib.model.attention import tapped
from fslib.training import READ_EVERY, Settings, Training

EVERY = pytest.mark.parametrize("name", ARCHITECTURES)
KINDS = pytest.mark.parametrize("name", ["bert", "gpt2", "albert", "llama", "modernbert"])
QKV = re.compile(
    r"\b(query|key|value|[qkv]_lin|[qkv]_proj|(query|key|value)_proj|c_attn|Wqkv|(SelfAttention|attn)\.[qkv])"
    r"\.(weight|bias)$"
)
SHARED_LAYERS = ("albert",)
GROUPED = ("llama", "qwen3")
# a rate at which every step is visible, and weight decay that would be, too
SETTINGS = {
    "batch_size": 4,
    "lr": 1e-2,
    "weight_decay": 0.1,
    "warmup": 0.0,
    "sampling": "uniform",
    "steps": 16,
}
TRUNK = 6


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def of(rows: HeadRows, model, values):
    """These rows in a dict of weights by name."""
    name = next(name for name, p in model.named_parameters() if p is rows.parameter)
    return rows.of(values[name])


def moved(rows: HeadRows, model, before) -> bool:
    return not torch.equal(rows.of(rows.parameter.data), of(rows, model, before))


def begun(model, tasks, iat=None, **settings) -> Training:
    """A run whose trunk is done and whose ending has begun: Adam has moments, and IAT its heads."""
    run = Training(model, tasks, Settings(**(SETTINGS | settings)))
    run.advance(TRUNK)
    assert all(torch.count_nonzero(state["exp_avg"]) for state in run.optimizer.state.values())
    run.begin(iat)
    return run


def ours(rows: list[HeadRows], heads) -> list[bool]:
    """For each of the rows, whether a head of the set needs it."""
    return [bool((r.owners & heads).any()) for r in rows]


@torch.no_grad()
def contexts(model, task):
    """Every layer's context on a few examples: (layers, batch, seq, heads, head_dim)."""
    seen = []
    with tapped(model, lambda layer, ctx: seen.append(ctx.clone()) or ctx):
        model(model.encode(task.train).batch(range(3)).inputs, task.name)
    return torch.stack(seen)


# --- where the rows are


@EVERY
def test_rows_cover_every_query_key_and_value_projection_once_and_nothing_else(zoo, name):
    model = zoo.model(name)
    times = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for rows in head_rows(model):
        of(rows, model, times).add_(1)
    expected = {n for n in times if QKV.search(n)}
    assert len(expected) >= (1 if name in SHARED_LAYERS else LAYERS)
    assert {n for n, count in times.items() if count.any()} == expected
    assert all((times[n] == 1).all() for n in expected)


@EVERY
def test_changing_rows_changes_their_owners_and_no_other_head_of_the_layer(zoo, name):
    model, task = zoo.model(name), zoo.tasks["single"]
    before = contexts(model, task)
    noise = torch.Generator().manual_seed(0)
    for rows in head_rows(model):
        layers = rows.owners.any(1).nonzero()[0]
        assert len(layers) == (LAYERS if name in SHARED_LAYERS else 1)
        values = rows.of(rows.parameter.data)
        saved = values.clone()
        values += torch.randn(values.shape, generator=noise)
        after = contexts(model, task)
        values.copy_(saved)
        first = layers[0]  # later ones see what this one has changed
        assert torch.equal(after[:first], before[:first])
        heads = {
            h
            for h in range(HEADS)
            if not torch.equal(after[first][..., h, :], before[first][..., h, :])
        }
        owners = set(rows.owners[first].nonzero()[0].tolist())
        if values.ndim > 1:
            assert heads == owners
        else:  # a key's bias adds the same to all scores of a query: nothing
            assert heads <= owners
            assert len(owners) == 1


@EVERY
def test_every_head_owns_rows_of_its_size(zoo, name):
    rows = head_rows(zoo.model(name))
    matrices = [r for r in rows if r.parameter.ndim > 1]
    for layer, head in np.ndindex(LAYERS, HEADS):
        mine = [r for r in matrices if r.owners[layer, head]]
        assert [r.stop - r.start for r in mine] == [HEAD_DIM] * 3
        shared = [r for r in mine if r.owners[layer].sum() == 2]
        assert len(shared) == (2 if name in GROUPED else 0)  # key and value of a group
        assert all(r.owners[layer, head // 2 * 2 : head // 2 * 2 + 2].all() for r in shared)


@pytest.mark.parametrize("training", [True, False])
def test_looking_for_rows_leaves_the_model_as_it_was(bert, training):
    bert.train(training)
    frozen = bert.encoder.embeddings.word_embeddings.weight.requires_grad_(False)
    bert.classifiers["single"].weight.grad = kept = torch.ones_like(
        bert.classifiers["single"].weight
    )
    before, state = weights(bert), torch.get_rng_state()
    head_rows(bert)
    assert all(torch.equal(p, before[n]) for n, p in bert.named_parameters())
    assert all(m.training is training for m in bert.modules())
    assert all(p.requires_grad is (p is not frozen) for p in bert.parameters())
    assert [p.grad for p in bert.parameters() if p.grad is not None] == [kept]
    assert torch.equal(torch.get_rng_state(), state)
    assert bert.control.inputs is None and not any(
        m._forward_pre_hooks for m in bert.encoder.encoder.modules()
    )


def test_rows_of_zeros_are_found_too(bert):
    expected = [(r.start, r.stop, r.owners.tolist()) for r in head_rows(bert)]
    with torch.no_grad():
        for rows in head_rows(bert):
            if rows.owners[1, 2] or rows.owners[0].any():
                rows.of(rows.parameter.data).zero_()
    assert [(r.start, r.stop, r.owners.tolist()) for r in head_rows(bert)] == expected


def test_one_key_and_value_for_all_heads_belong_to_all(zoo, tmp_path):
    model = fslib.MultiTaskModel.from_pretrained(
        save("llama", tmp_path, num_key_value_heads=1), zoo.tasks
    )
    sizes = Counter((int(r.owners.sum()), r.stop - r.start) for r in head_rows(model))
    assert sizes == {(1, HEAD_DIM): LAYERS * HEADS, (HEADS, HEAD_DIM): LAYERS * 2}


def test_a_model_that_mixes_its_heads_is_refused_before_the_first_step(zoo, tmp_path, monkeypatch):
    config = tf.Olmo2Config(**LLAMA_LIKE | {"num_key_value_heads": HEADS})
    tf.Olmo2Model(config).save_pretrained(tmp_path)
    tokenizer(BARE).save_pretrained(tmp_path)
    model = fslib.MultiTaskModel.from_pretrained(tmp_path, zoo.tasks)
    monkeypatch.setattr(Training, "advance", None)
    with refused("Olmo2Attention mixes its heads", "rows"):
        fslib.train(model, zoo.tasks, iat=fslib.IAT())


# --- what a step moves


@KINDS
@pytest.mark.parametrize("others", ["train", "freeze"])
def test_a_step_moves_the_rows_of_its_tasks_heads_and_no_others(zoo, name, others):
    model = zoo.model(name)
    run = begun(model, zoo.tasks, fslib.IAT(alpha=0.25, others=others))
    rows = head_rows(model)
    in_rows = {id(r.parameter) for r in rows}
    encoder = [
        n for n, p in model.named_parameters() if n.startswith("encoder") and id(p) not in in_rows
    ]
    seen, outside_seen = set(), 0
    for step in range(run.step + 1, run.step + 7):
        before = weights(model)
        run.advance(step)
        task = run.history.tasks[run.history.order[-1]]
        mine = ours(rows, run.history.heads[task])
        assert [moved(r, model, before) for r in rows] == mine
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert {n.split(".")[1] for n in changed if n.startswith("classifiers")} == {task}
        assert {n for n in encoder if n in changed} == (
            set(encoder) if others == "train" else set()
        )
        seen.add(task)
        outside_seen += mine.count(False)
    assert len(seen) > 1 and outside_seen


@KINDS
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_rows_outside_every_set_and_their_moments_stay_bit_by_bit(zoo, name, steps):
    model = zoo.model(name)
    run = begun(model, zoo.tasks)
    trunk, before = run.snapshot(), weights(model)
    run.restore(trunk)
    # by parameter, as the optimizer has them before rows are told apart
    moments = {
        n: {k: v.clone() for k, v in run.optimizer.state[p].items()}
        for n, p in model.named_parameters()
    }
    run.begin(fslib.IAT(alpha=0.09))  # one head each
    views = {v.data_ptr(): v for group in run.optimizer.param_groups for v in group["params"]}
    assert sum(v.numel() for v in views.values()) == sum(p.numel() for p in model.parameters())
    run.advance(run.step + steps)
    trained = [run.history.heads[run.history.tasks[i]] for i in run.history.order[-steps:]]
    rows = head_rows(model)
    inside = ours(rows, np.logical_or.reduce(trained))
    assert 0 < sum(inside) < len(rows)
    assert [moved(r, model, before) for r in rows] == inside
    for r, is_in in zip(rows, inside, strict=True):
        name_of = next(n for n, p in model.named_parameters() if p is r.parameter)
        state = run.optimizer.state[views[r.of(r.parameter.data).data_ptr()]]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[moment], r.of(moments[name_of][moment])) is not is_in
        assert (state["step"] == moments[name_of]["step"]) == (not is_in)


def test_without_strict_adam_moves_the_other_rows_by_moments_and_decay(bert, zoo):
    run = begun(bert, zoo.tasks, fslib.IAT(alpha=0.25, strict=False))
    before = weights(bert)
    run.advance(run.step + 1)
    assert all(moved(r, bert, before) for r in head_rows(bert))


def test_without_strict_the_gradient_of_other_rows_is_zero(bert, zoo):
    # no first moment and no decay: only a gradient could move them
    run = begun(bert, zoo.tasks, fslib.IAT(alpha=0.25, strict=False), weight_decay=0.0)
    for state in run.optimizer.state.values():
        state["exp_avg"].zero_()
    before = weights(bert)
    run.advance(run.step + 1)
    rows = head_rows(bert)
    mine = ours(rows, run.history.heads[run.history.tasks[run.history.order[-1]]])
    assert [moved(r, bert, before) for r in rows] == mine


def test_a_step_on_rows_is_adams_step_on_the_whole(bert, zoo):
    # without clipping, a trained row goes where plain training takes it in the next step
    run = begun(bert, zoo.tasks, clip=1e9)
    trunk = run.snapshot()
    run.advance(run.step + 1)
    plain = weights(bert)
    run.restore(trunk)
    run.begin(fslib.IAT(alpha=0.25))
    run.advance(run.step + 1)
    rows = head_rows(bert)
    mine = ours(rows, run.history.heads[run.history.tasks[run.history.order[-1]]])
    assert [torch.equal(r.of(r.parameter.data), of(r, bert, plain)) for r in rows] == mine
    in_rows = {id(r.parameter) for r in rows}
    assert all(torch.equal(p, plain[n]) for n, p in bert.named_parameters() if id(p) not in in_rows)


@KINDS
@pytest.mark.parametrize("clip", [1e9, 0.1])
def test_all_heads_for_all_tasks_are_plain_training(zoo, name, clip):
    """Bit by bit where nothing is clipped and the same kernel runs.

    The norm is a sum over other parts, so the factor of a clipped gradient may differ in the last
    bit; and columns (GPT-2) are updated by another kernel than AdamW's fused one. Not compared
    then: biases, since a key's has a gradient of nothing but rounding, which Adam blows up and
    which no output feels.
    """
    models = [zoo.model(name), zoo.model(name)]
    plain = fslib.train(models[0], zoo.tasks, **SETTINGS, clip=clip)
    iat = fslib.train(
        models[1], zoo.tasks, **SETTINGS, clip=clip, iat=fslib.IAT(alpha=1.0, delta=0.5)
    )
    assert (iat.branched, len(iat.losses)) == (8, 16)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        if clip == 1e9 and name != "gpt2":
            assert torch.equal(a, b)
        elif a.ndim > 1:
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    np.testing.assert_allclose(iat.losses, plain.losses, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "iat", [fslib.IAT(alpha=0.25), fslib.IAT(others="freeze"), fslib.IAT(strict=False)]
)
def test_the_gradient_is_clipped_over_what_the_step_updates(bert, zoo, monkeypatch, iat):
    norms = []

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            given = [
                p.grad.norm()
                for group in self.param_groups
                for p in group["params"]
                if p.grad is not None
            ]
            norms.append(torch.stack(given).norm().item())
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    run = begun(bert, zoo.tasks, iat, clip=1e-3)
    run.advance(run.step + 4)
    assert len(norms) == TRUNK + 4
    np.testing.assert_allclose(norms, 1e-3, rtol=2e-3)


@KINDS
def test_no_parameter_is_added_or_renamed(zoo, name):
    model = zoo.model(name)
    before = {n: (v.shape, v.dtype) for n, v in model.state_dict().items()}
    parameters = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    fslib.train(model, zoo.tasks, **SETTINGS, iat=fslib.IAT())
    assert {n: (v.shape, v.dtype) for n, v in model.state_dict().items()} == before
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == parameters


def test_frozen_parameters_stay_frozen(bert, zoo):
    bert.encoder.encoder.layer[0].attention.self.query.weight.requires_grad_(False)
    before = weights(bert)
    fslib.train(bert, zoo.tasks, **SETTINGS, iat=fslib.IAT(alpha=1.0, delta=0.5))
    name = "encoder.encoder.layer.0.attention.self.query.weight"
    assert {n for n, p in bert.named_parameters() if torch.equal(p, before[n])} == {name}


# --- which heads


def maps(tasks=("a", "b", "c"), seed=0):
    rng = np.random.default_rng(seed)
    return {task: rng.random((LAYERS, HEADS)) for task in tasks}


def test_top_least_and_random_sets():
    scores = maps()
    top = fslib.IAT(alpha=0.5).choose(scores, np.random.default_rng(0))
    least = fslib.IAT(alpha=0.5, heads="least").choose(scores, np.random.default_rng(0))
    drawn, again, other = (
        fslib.IAT(alpha=0.5, heads="random").choose(scores, np.random.default_rng(s))
        for s in (0, 0, 1)
    )
    for task, values in scores.items():
        assert top[task].sum() == least[task].sum() == 6
        assert values[top[task]].min() > values[~top[task]].max()
        assert values[least[task]].max() < values[~least[task]].min()
        assert np.array_equal(drawn[task].sum(1), top[task].sum(1))
        assert np.array_equal(drawn[task], again[task])
    assert any(not np.array_equal(drawn[t], top[t]) for t in scores)
    assert any(not np.array_equal(drawn[t], other[t]) for t in scores)


def test_heads_in_every_set_are_kept_or_left_out():
    scores = maps()
    for values in scores.values():
        values[1, 2], values[0, 3] = 5, 4  # important to all
    scores["a"][2, 1] = scores["b"][2, 1] = 3  # to two of three
    kept = fslib.IAT(alpha=0.25).choose(scores, np.random.default_rng(0))
    left = fslib.IAT(alpha=0.25, shared=False).choose(scores, np.random.default_rng(0))
    for task in scores:
        assert kept[task][1, 2] and kept[task][0, 3] and kept[task].sum() == 3
        assert not left[task][1, 2] and not left[task][0, 3] and left[task].sum() == 1
    assert left["a"][2, 1] and left["b"][2, 1]


def test_heads_are_those_that_importance_on_training_data_says(bert, zoo):
    iat = fslib.IAT(alpha=0.5, examples=4, reduction="example", normalize="layer")
    run = begun(bert, zoo.tasks, iat)
    options = {"examples": 4, "reduction": "example", "normalize": "layer", "split": "train"}
    for name, task in zoo.tasks.items():
        expected = fslib.top_heads(fslib.head_importance(bert, task, **options), 0.5)
        assert np.array_equal(run.history.heads[name], expected)
    assert run.history.scoring_seconds > 0


def test_random_heads_repeat_by_seed(zoo):
    iat = fslib.IAT(alpha=0.5, heads="random")
    one, again, other = (
        fslib.train(zoo.model("bert"), zoo.tasks, **SETTINGS, iat=iat, seed=s).heads
        for s in (0, 0, 1)
    )
    assert all(np.array_equal(one[t], again[t]) for t in one)
    assert any(not np.array_equal(one[t], other[t]) for t in one)


def test_a_head_of_every_task_stays_if_shared_heads_are_left_out(bert, zoo):
    run = begun(bert, zoo.tasks, fslib.IAT(alpha=0.75, shared=False))
    before = weights(bert)
    top = fslib.IAT(alpha=0.75).choose(
        {t: fslib.head_importance(bert, task) for t, task in zoo.tasks.items()},
        np.random.default_rng(0),
    )
    everywhere = np.logical_and.reduce(list(top.values()))
    assert everywhere.any()
    run.advance(run.step + 6)
    rows = [r for r in head_rows(bert) if (r.owners & everywhere).any()]
    assert rows and not any(moved(r, bert, before) for r in rows)


# --- what a step costs


class Operations(TorchDispatchMode):
    """Counts the operations of torch that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


def copies(n: int) -> dict[str, Task]:
    """`n` tasks with the same examples under different names."""
    return {f"t{i}": replace(toy_task("single"), name=f"t{i}") for i in range(n)}


@pytest.mark.parametrize(
    "iat", [fslib.IAT(), fslib.IAT(heads="random", others="freeze"), fslib.IAT(strict=False)]
)
def test_a_step_costs_the_same_with_two_tasks_and_with_six(zoo, iat):
    counts = []
    for n in (2, 6):
        tasks = copies(n)
        run = begun(fslib.MultiTaskModel.from_pretrained(zoo.folder("bert"), tasks), tasks, iat)
        with Operations() as operations:
            run.advance(run.step + 1)
        counts.append(operations.seen)
    assert sum(counts[0].values()) > 100
    assert counts[0] == counts[1]


@KINDS
def test_handing_out_gradients_only_looks_at_memory_that_is_there(zoo, name):
    model = zoo.model(name)
    run = begun(model, zoo.tasks, fslib.IAT())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Operations() as operations:
        run.rule.collect("single")
        updated = run.rule.gradients()
    assert set(operations.seen) <= {
        "aten::slice.Tensor",
        "aten::narrow",
        "aten::alias",
        "aten::detach",
    }
    assert sum(operations.seen.values()) >= 3
    rows = head_rows(model)
    assert sum(v.grad is not None for v in updated) >= sum(ours(rows, run.history.heads["single"]))
    storages = {
        p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None
    }
    assert {v.grad.untyped_storage().data_ptr() for v in updated} <= storages


def test_losses_on_another_device_are_read_now_and_then(bert, zoo, monkeypatch):
    run = Training(bert, zoo.tasks, Settings(**SETTINGS))
    read = []
    monkeypatch.setattr(
        run, "_read_losses", lambda: read.append(len(run._unread)) or run._unread.clear()
    )
    for _ in range(2 * READ_EVERY + 3):
        run._record(torch.empty((), device="meta"))
    assert read == [READ_EVERY, READ_EVERY]
    assert len(run._unread) == 3
    run._record(torch.zeros(()))
    assert read[2:] == [4]


# --- what is refused


def nothing_may_be_trained(monkeypatch):
    monkeypatch.setattr(Training, "advance", lambda *args: pytest.fail("a step was made"))


@pytest.mark.parametrize("ending", [fslib.IAT, fslib.PCGrad, fslib.Stop])
@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_delta_outside_0_to_1(ending, delta):
    with refused(f"delta {delta}", "(0, 1)"):
        ending(delta=delta)


@pytest.mark.parametrize("ending", [fslib.IAT, fslib.PCGrad, fslib.Stop])
@pytest.mark.parametrize(("delta", "steps"), [(0.1, 4), (0.9, 2), (0.5, 1)])
def test_delta_that_leaves_no_step_before_or_after(bert, zoo, monkeypatch, ending, delta, steps):
    nothing_may_be_trained(monkeypatch)
    with refused(f"delta {delta}", f"{steps} steps"):
        fslib.branch(bert, zoo.tasks, {"it": ending(delta=delta)}, **(SETTINGS | {"steps": steps}))
    if ending is fslib.IAT:
        with refused(f"delta {delta}", f"{steps} steps"):
            fslib.train(bert, zoo.tasks, iat=ending(delta=delta), steps=steps)


@pytest.mark.parametrize("alpha", [0.0, 1.1, -0.3, float("nan")])
def test_alpha_outside_0_to_1(alpha):
    with refused(f"alpha {alpha}", "(0, 1]"):
        fslib.IAT(alpha=alpha)


@pytest.mark.parametrize(
    ("option", "word", "near"),
    [
        ("heads", "tops", "did you mean 'top'"),
        ("others", "freez", "did you mean 'freeze'"),
        ("reduction", "tokens", "did you mean 'token'"),
        ("normalize", "layers", 'None, "layer"'),
    ],
)
def test_unknown_words_get_the_nearest_one(option, word, near):
    with refused(option, f"'{word}'", near):
        fslib.IAT(**{option: word})


@pytest.mark.parametrize("examples", [0, -1])
def test_importance_without_examples(examples):
    with refused(f"examples {examples}", "at least 1"):
        fslib.IAT(examples=examples)


@pytest.mark.parametrize("start", [fslib.train, fslib.branch], ids=["train", "branch"])
class TestBeforeTheFirstStep:
    def begin(self, start, model, tasks, ending, **settings):
        if start is fslib.branch:
            return fslib.branch(model, tasks, {"plain": None, "it": ending}, **settings)
        kind = "iat" if isinstance(ending, fslib.IAT) else "pcgrad"
        return fslib.train(model, tasks, **{kind: ending}, **settings)

    @pytest.mark.parametrize("ending", [fslib.IAT(), fslib.PCGrad()])
    def test_one_task(self, bert, zoo, monkeypatch, start, ending):
        nothing_may_be_trained(monkeypatch)
        with refused(type(ending).__name__, "at least two tasks", "single"):
            self.begin(start, bert, zoo.tasks["single"], ending)

    def test_alpha_that_is_no_head(self, bert, zoo, monkeypatch, start):
        nothing_may_be_trained(monkeypatch)
        with refused("alpha 0.08", "12 heads", "at least 0.083"):
            self.begin(start, bert, zoo.tasks, fslib.IAT(alpha=0.08))

    def test_fewer_examples_than_tasks_in_a_batch(self, bert, zoo, monkeypatch, start):
        nothing_may_be_trained(monkeypatch)
        with refused("batch_size 2", "3 tasks"):
            self.begin(start, bert, zoo.tasks, fslib.PCGrad(), batch_size=2)


def test_two_endings_of_one_training(bert, zoo, monkeypatch):
    nothing_may_be_trained(monkeypatch)
    with refused("iat or pcgrad", "fslib.branch"):
        fslib.train(bert, zoo.tasks, iat=fslib.IAT(), pcgrad=fslib.PCGrad())

"""IAT: a batch updates the query, key and value rows of its own task's heads, and no others."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tinymodels
import torch
import transformers as tf
from refusal import refused
from tinymodels import HEAD_DIM, HEADS, LAYERS, changed, heads_outputs, trace, weights
from torch.utils._python_dispatch import TorchDispatchMode

import fslib
from fslib.iat import HeadRows, head_rows
from fslib.training import READ_EVERY, Settings, Training

EVERY = pytest.mark.parametrize("name", tinymodels.ARCHITECTURES)
KINDS = pytest.mark.parametrize("name", ["bert", "gpt2", "albert", "llama", "modernbert"])
QKV = re.compile(
    r"\b(query|key|value|[qkv]_lin|[qkv]_proj|(query|key|value)_proj|c_attn|Wqkv|(SelfAttention|attn)\.[qkv])"
    r"\.(weight|bias)$"
)
SHARED_LAYERS = ("albert",)
GROUPED = ("llama", "qwen3")
# a rate at which every step is visible, and weight decay that would be, too
SETTINGS = {"batch_size": 4, "lr": 1e-2, "weight_decay": 0.1, "warmup": 0.0}
SETTINGS |= {"sampling": "uniform", "steps": 16}
TRUNK = 6


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
    model = zoo.model(name)
    batch = model.encode(zoo.tasks["single"].train).batch(range(3))
    before = heads_outputs(name, model, batch)
    noise = torch.Generator().manual_seed(0)
    for rows in head_rows(model):
        layers = rows.owners.any(1).nonzero()[0]
        assert len(layers) == (LAYERS if name in SHARED_LAYERS else 1)
        assert rows.stop - rows.start == HEAD_DIM
        values = rows.of(rows.parameter.data)
        saved = values.clone()
        values += torch.randn(values.shape, generator=noise)
        after = heads_outputs(name, model, batch)
        values.copy_(saved)
        first = layers[0]  # later ones see what this one has changed
        assert torch.equal(after[:first], before[:first])
        differ = (after[first] != before[first]).flatten(0, 1).any(0).any(1).numpy()
        owners = rows.owners[first]
        if values.ndim > 1:
            assert np.array_equal(differ, owners)
            assert owners.sum() == 1 or name in GROUPED
        else:  # a key's bias adds the same to all scores of a query: nothing
            assert owners.sum() == 1 and not (differ & ~owners).any()


@pytest.mark.parametrize("prepare", [tinymodels.disturbed, lambda model: model])
def test_looking_for_rows_leaves_the_model_as_it_was(bert, prepare):
    before = trace(prepare(bert))
    head_rows(bert)
    assert trace(bert) == before


def test_rows_of_zeros_are_found_too(bert):
    expected = [(r.start, r.stop, r.owners.tolist()) for r in head_rows(bert)]
    with torch.no_grad():
        for rows in head_rows(bert):
            if rows.owners[1, 2] or rows.owners[0].any():
                rows.of(rows.parameter.data).zero_()
    assert [(r.start, r.stop, r.owners.tolist()) for r in head_rows(bert)] == expected


def test_one_key_and_value_for_all_heads_belong_to_all(zoo, tmp_path):
    model = fslib.MultiTaskModel.from_pretrained(
        tinymodels.save("llama", tmp_path, num_key_value_heads=1), zoo.tasks
    )
    sizes = Counter((int(r.owners.sum()), r.stop - r.start) for r in head_rows(model))
    assert sizes == {(1, HEAD_DIM): LAYERS * HEADS, (HEADS, HEAD_DIM): LAYERS * 2}


def test_a_model_that_mixes_its_heads_is_refused_before_the_first_step(zoo, tmp_path, monkeypatch):
    config = tf.Olmo2Config(**tinymodels.LLAMA_LIKE | {"num_key_value_heads": HEADS})
    tf.Olmo2Model(config).save_pretrained(tmp_path)
    tinymodels.tokenizer(tinymodels.BARE).save_pretrained(tmp_path)
    model = fslib.MultiTaskModel.from_pretrained(tmp_path, zoo.tasks)
    monkeypatch.setattr(Training, "advance", None)
    with refused("Olmo2Attention mixes its heads", "rows"):
        fslib.train(model, zoo.tasks, iat=fslib.IAT())


# --- what a step moves


@KINDS
@pytest.mark.parametrize("others", ["train", "freeze"])
def test_a_step_moves_the_rows_of_its_tasks_heads_and_no_others(zoo, name, others):
    model = zoo.model(name)
    shape = {n: (p.shape, id(p), p.requires_grad) for n, p in model.named_parameters()}
    run = begun(model, zoo.tasks, fslib.IAT(alpha=0.25, others=others))
    rows = head_rows(model)
    in_rows = {id(r.parameter) for r in rows}
    rest = {n for n, p in model.encoder.named_parameters("encoder") if id(p) not in in_rows}
    seen, outside_seen = set(), 0
    for step in range(run.step + 1, run.step + 7):
        before = weights(model)
        run.advance(step)
        task = run.history.tasks[run.history.order[-1]]
        mine = ours(rows, run.history.heads[task])
        assert [moved(r, model, before) for r in rows] == mine
        names = changed(before, model)
        assert {n.split(".")[1] for n in names if n.startswith("classifiers")} == {task}
        assert rest & names == (rest if others == "train" else set())
        seen.add(task)
        outside_seen += mine.count(False)
    assert len(seen) > 1 and outside_seen
    assert {n: (p.shape, id(p), p.requires_grad) for n, p in model.named_parameters()} == shape


@KINDS
def test_rows_outside_every_set_and_their_moments_stay_bit_by_bit(zoo, name):
    model = zoo.model(name)
    run = begun(model, zoo.tasks)
    trunk, before = run.snapshot(), weights(model)
    run.restore(trunk)
    # by parameter, as the optimizer has them before rows are told apart
    states = {n: run.optimizer.state[p] for n, p in model.named_parameters()}
    moments = {n: {k: v.clone() for k, v in state.items()} for n, state in states.items()}
    run.begin(fslib.IAT(alpha=0.09))  # one head each
    views = {v.data_ptr(): v for group in run.optimizer.param_groups for v in group["params"]}
    assert sum(v.numel() for v in views.values()) == sum(p.numel() for p in model.parameters())
    run.advance(run.step + 4)
    trained = [run.history.heads[run.history.tasks[i]] for i in run.history.order[-4:]]
    rows = head_rows(model)
    inside = ours(rows, np.logical_or.reduce(trained))
    assert 0 < sum(inside) < len(rows)
    assert [moved(r, model, before) for r in rows] == inside
    for r, is_in in zip(rows, inside, strict=True):
        old = next(moments[n] for n, p in model.named_parameters() if p is r.parameter)
        state = run.optimizer.state[views[r.of(r.parameter.data).data_ptr()]]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[moment], r.of(old[moment])) is not is_in
        assert (state["step"] == old["step"]) == (not is_in)


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_without_strict_the_gradient_of_other_rows_is_zero(bert, zoo, decay):
    """Adam's moments and decay move them; without either, only a gradient could."""
    run = begun(bert, zoo.tasks, fslib.IAT(alpha=0.25, strict=False), weight_decay=decay)
    for state in run.optimizer.state.values() if not decay else ():
        state["exp_avg"].zero_()
    before = weights(bert)
    run.advance(run.step + 1)
    rows = head_rows(bert)
    mine = ours(rows, run.history.heads[run.history.tasks[run.history.order[-1]]])
    assert [moved(r, bert, before) for r in rows] == ([True] * len(rows) if decay else mine)


@KINDS
@pytest.mark.parametrize("clip", [1e9, 0.1])
def test_all_heads_for_all_tasks_are_plain_training(zoo, name, clip):
    """Bit by bit where nothing is clipped and the same kernel runs.

    The norm is a sum over other parts, so the factor of a clipped gradient may differ in the last
    bit; and columns (GPT-2) are updated by another kernel than AdamW's fused one. Not compared
    then: biases, since a key's has a gradient of nothing but rounding, which Adam blows up and
    which no output feels.
    """
    one, other = zoo.model(name), zoo.model(name)
    plain = fslib.train(one, zoo.tasks, **SETTINGS, clip=clip)
    every = fslib.IAT(alpha=1.0, delta=0.5)
    iat = fslib.train(other, zoo.tasks, **SETTINGS, clip=clip, iat=every)
    assert (iat.branched, len(iat.losses)) == (8, 16)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        if clip == 1e9 and name != "gpt2":
            assert torch.equal(a, b)
        elif a.ndim > 1:
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    np.testing.assert_allclose(iat.losses, plain.losses, rtol=1e-3, atol=1e-4)


VARIANTS = [fslib.IAT(), fslib.IAT(heads="random", others="freeze"), fslib.IAT(strict=False)]


@pytest.mark.parametrize("iat", VARIANTS, ids=str)
def test_the_gradient_is_clipped_over_what_the_step_updates(bert, zoo, monkeypatch, iat):
    norms = []

    def look(optimizer):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([g.norm() for g in grads if g is not None]).norm().item())

    tinymodels.at_every_update(monkeypatch, look)
    run = begun(bert, zoo.tasks, iat, clip=1e-3)
    run.advance(run.step + 4)
    assert len(norms) == TRUNK + 4
    np.testing.assert_allclose(norms, 1e-3, rtol=2e-3)


def test_frozen_parameters_stay_frozen(bert, zoo):
    bert.encoder.encoder.layer[0].attention.self.query.weight.requires_grad_(False)
    before = weights(bert)
    fslib.train(bert, zoo.tasks, **SETTINGS, iat=fslib.IAT(alpha=1.0, delta=0.5))
    name = "encoder.encoder.layer.0.attention.self.query.weight"
    assert before.keys() - changed(before, bert) == {name}


# --- which heads


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    return {task: rng.random((LAYERS, HEADS)) for task in "abc"}


def test_top_least_and_random_sets(maps):
    def chosen(heads, seed=0):
        return fslib.IAT(alpha=0.5, heads=heads).choose(maps, np.random.default_rng(seed))

    top, least, drawn, again = chosen("top"), chosen("least"), chosen("random"), chosen("random")
    other = chosen("random", seed=1)
    for task, values in maps.items():
        assert top[task].sum() == least[task].sum() == 6
        assert values[top[task]].min() > values[~top[task]].max()
        assert values[least[task]].max() < values[~least[task]].min()
        assert np.array_equal(drawn[task].sum(1), top[task].sum(1))
        assert np.array_equal(drawn[task], again[task])
    for different in (top, other):
        assert any(not np.array_equal(drawn[t], different[t]) for t in maps)


def test_heads_in_every_set_are_kept_or_left_out(maps):
    for values in maps.values():
        values[1, 2], values[0, 3] = 5, 4  # important to all
    maps["a"][2, 1] = maps["b"][2, 1] = 3  # to two of three
    kept = fslib.IAT(alpha=0.25).choose(maps, np.random.default_rng(0))
    left = fslib.IAT(alpha=0.25, shared=False).choose(maps, np.random.default_rng(0))
    for task in maps:
        assert kept[task][1, 2] and kept[task][0, 3] and kept[task].sum() == 3
        assert not left[task][1, 2] and not left[task][0, 3] and left[task].sum() == 1
    assert left["a"][2, 1] and left["b"][2, 1]


def test_heads_are_those_that_importance_on_training_data_says(bert, zoo):
    scoring = {"examples": 4, "reduction": "example", "normalize": "layer"}
    run = begun(bert, zoo.tasks, fslib.IAT(alpha=0.5, **scoring))
    for name, task in zoo.tasks.items():
        importance = fslib.head_importance(bert, task, split="train", **scoring)
        assert np.array_equal(run.history.heads[name], fslib.top_heads(importance, 0.5))
    assert run.history.scoring_seconds > 0


def test_random_heads_repeat_by_seed(zoo):
    iat = fslib.IAT(alpha=0.5, heads="random")
    runs = [begun(zoo.model("bert"), zoo.tasks, iat, seed=seed) for seed in (0, 0, 1)]
    one, again, other = (np.stack([*run.history.heads.values()]) for run in runs)
    assert np.array_equal(one, again) and not np.array_equal(one, other)


# --- what a step costs


class Operations(TorchDispatchMode):
    """Counts the operations of torch that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("iat", VARIANTS, ids=str)
def test_a_step_costs_the_same_with_two_tasks_and_with_six(zoo, iat):
    counts = []
    for n in (2, 6):
        tasks = [replace(tinymodels.toy_task("single"), name=f"t{i}") for i in range(n)]
        run = begun(fslib.MultiTaskModel.from_pretrained(zoo.folder("bert"), tasks), tasks, iat)
        with Operations() as operations:
            run.advance(run.step + 1)
        counts.append(operations.seen)
    assert sum(counts[0].values()) > 100
    assert counts[0] == counts[1]


def test_losses_on_another_device_are_read_now_and_then(bert, zoo, monkeypatch):
    run, read = Training(bert, zoo.tasks, Settings(**SETTINGS)), []
    monkeypatch.setattr(
        run, "_read_losses", lambda: read.append(len(run._unread)) or run._unread.clear()
    )
    for _ in range(2 * READ_EVERY + 3):
        run._record(torch.empty((), device="meta"))
    run._record(torch.zeros(()))
    assert read == [READ_EVERY, READ_EVERY, 4]


# --- what is refused


def test_unknown_words_get_the_nearest_one():
    words = {"heads": "tops", "others": "freez", "reduction": "tokens"}
    for option, word in words.items():
        with refused(option, f"'{word}': did you mean '{word[:3]}"):
            fslib.IAT(**{option: word})
    with refused("normalize 'layers'", "layer, or None"):
        fslib.IAT(normalize="layers")
    for ending in (fslib.IAT, fslib.PCGrad, fslib.Stop):
        with refused("delta 1.0", "(0, 1)"):
            ending(delta=1.0)


THREE = ("single", "pair", "regression")
IMPOSSIBLE = [
    (fslib.IAT(), ["single"], {}, ["IAT", "at least two tasks", "single"]),
    (fslib.PCGrad(), ["single"], {}, ["PCGrad", "at least two tasks", "single"]),
    (fslib.IAT(alpha=0.08), THREE, {}, ["alpha 0.08", "at least 0.083"]),
    (fslib.PCGrad(), THREE, {"batch_size": 2}, ["batch_size 2", "tasks"]),
    (fslib.IAT(0.1), THREE, {"steps": 4}, ["delta 0.1", "4 steps"]),
    (fslib.Stop(0.9), THREE, {"steps": 2}, ["delta 0.9", "2 steps"]),
]


@pytest.mark.parametrize(("ending", "names", "settings", "words"), IMPOSSIBLE, ids=str)
def test_an_ending_that_cannot_be_is_refused_before_the_first_step(
    bert, zoo, monkeypatch, ending, names, settings, words
):
    monkeypatch.setattr(Training, "advance", lambda *args: pytest.fail("a step was made"))
    tasks, settings = [zoo.tasks[name] for name in names], SETTINGS | settings
    with refused(*words):
        fslib.branch(bert, tasks, {"plain": None, "it": ending}, **settings)
    kind = {fslib.IAT: "iat", fslib.PCGrad: "pcgrad"}.get(type(ending))
    if kind:
        with refused(*words):
            fslib.train(bert, tasks, **{kind: ending}, **settings)
    with refused("iat or pcgrad", "fslib.branch"):
        fslib.train(bert, tasks, iat=fslib.IAT(), pcgrad=fslib.PCGrad())

"""Layers below a switched-off head hand back what they gave: the same bits, fewer layers run."""

from functools import partial

import numpy as np
import pytest
import torch
from tinymodels import ARCHITECTURES, HEADS, LAYERS, heads_at, projections

import fslib
from fslib.model import reuse


def measured(model, tasks, lesions=True):
    """All arrays that the two users of the mechanism compute."""
    options = {"estimator": "ablation", "batch_size": 4}
    found = [fslib.head_importance(model, task, **options) for task in tasks]
    if lesions:
        alone = fslib.lesion_heads(model, tasks, batch_size=3)
        found += [*alone.predictions.values(), *alone.losses.values()]
    return found


@pytest.mark.parametrize("around", ["nothing", "zero", "mean"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_results_are_the_bits_of_whole_passes(zoo, name, around, monkeypatch):
    model, tasks = zoo.model(name).train(), list(zoo.tasks.values())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5  # is switched off while measuring
    mean = fslib.mean_context(model, tasks[0]) if around == "mean" else None
    options = {"ablation": "mean", "mean": mean} if around == "mean" else {}
    off = heads_at() if around == "nothing" else heads_at((0, 1), (2, 3))
    with fslib.pruned(model, off, **options):
        # a lesion is zeros, which do not nest in means
        reused = measured(model, tasks, lesions=around != "mean")
        monkeypatch.setattr(reuse, "_layers_of", lambda model: [])
        whole = measured(model, tasks, lesions=around != "mean")
    assert all(np.array_equal(a, b) for a, b in zip(reused, whole, strict=True))
    assert not any("forward" in vars(module) for module in model.modules()), "all is put back"


LESIONS = [fslib.lesion_heads, partial(fslib.head_importance, estimator="ablation")]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("measure", LESIONS, ids=["lesions", "ablation"])
def test_a_layer_runs_for_lesions_of_its_heads_and_of_those_below(zoo, name, measure):
    model, runs = zoo.model(name), []
    for number, module in enumerate(projections(name, model.encoder)):
        module.register_forward_pre_hook(lambda *_, at=number: runs.append(at))
    measure(model, zoo.tasks["single"], batch_size=99)
    counts = np.bincount(runs, minlength=LAYERS).tolist()
    if name == "albert":  # its layers are one module: whole passes
        assert counts == [LAYERS * (1 + LAYERS * HEADS)] * LAYERS
    else:
        assert counts == [1 + HEADS * (layer + 1) for layer in range(LAYERS)]


def test_an_output_that_cannot_be_handed_back_means_whole_passes(bert, zoo, monkeypatch):
    layer, runs = bert.encoder.encoder.layer[0], []
    plain = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda *a, **k: [plain(*a, **k)])  # a list
    for each in bert.encoder.encoder.layer:
        each.register_forward_hook(lambda module, args, odd: runs.append(1) or odd[0])
    found = fslib.lesion_heads(bert, zoo.tasks["single"], batch_size=99)
    assert len(runs) == LAYERS * (1 + LAYERS * HEADS) and np.isfinite(found.rise("single")).all()


def test_layers_are_whole_again_after_an_error_and_inside_each_other(bert, zoo):
    batch, other = (bert.encode(zoo.tasks["single"].eval).batch(part) for part in ([0, 1], [2, 3]))
    with pytest.raises(KeyError), reuse.reused_layers(bert):
        raise KeyError
    with torch.no_grad():
        of_other = bert(other.inputs, "single")
    with torch.no_grad(), reuse.reused_layers(bert) as changed:
        changed(None)
        whole = bert(batch.inputs, "single")
        with reuse.reused_layers(bert) as inner:  # the outer one has the layers: whole passes
            inner(None)
            inner(2)
            assert torch.equal(bert(batch.inputs, "single"), whole)
        changed(2)
        with fslib.pruned(bert, heads_at((2, 3))):
            assert not torch.equal(bert(batch.inputs, "single"), whole)
        for again in range(2):  # what was kept of one batch is not handed back in the next
            changed(2 if again else None)
            assert torch.equal(bert(other.inputs, "single"), of_other)
    assert not any("forward" in vars(module) for module in bert.modules())

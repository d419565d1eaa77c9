"""Layers below a switched-off head hand back what they gave: the same bits, fewer layers run."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tinymodels import ARCHITECTURES, HEADS, LAYERS, projections

import fslib
from fslib.model import reuse

OFF = np.zeros((LAYERS, HEADS), dtype=bool)
OFF[0, 1] = OFF[2, 3] = True


def measured(model, tasks, lesions=True):
    """All arrays that the two users of the mechanism compute."""
    options = {"estimator": "ablation", "batch_size": 4}
    found = [fslib.head_importance(model, task, **options) for task in tasks]
    if lesions:
        alone = fslib.lesion_heads(model, tasks, batch_size=3)
        found += [*alone.predictions.values(), *alone.losses.values()]
    return found


def same_as_whole_passes(model, tasks, monkeypatch, **options):
    reused = measured(model, tasks, **options)
    with monkeypatch.context() as patch:
        patch.setattr(reuse, "_layers_of", lambda model: [])
        whole = measured(model, tasks, **options)
    assert not any("forward" in vars(module) for module in model.modules()), "all is put back"
    return all(np.array_equal(a, b) for a, b in zip(reused, whole, strict=True))


@pytest.mark.parametrize("around", ["nothing", "zero", "mean"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_results_are_the_bits_of_whole_passes(zoo, name, around, monkeypatch):
    model, tasks = zoo.model(name).train(), list(zoo.tasks.values())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5  # is switched off while measuring
    mean = fslib.mean_context(model, tasks[0]) if around == "mean" else None
    options = {"ablation": "mean", "mean": mean} if around == "mean" else {}
    with nullcontext() if around == "nothing" else fslib.pruned(model, OFF, **options):
        # a lesion is zeros, which do not nest in means
        assert same_as_whole_passes(model, tasks, monkeypatch, lesions=around != "mean")


@pytest.mark.parametrize("name", ["minilm-l3", "minilm-l6"])
def test_results_of_a_real_encoder_are_the_bits_of_whole_passes(name, tasks, monkeypatch):
    part = tasks["bbc"].limited(train=4, eval=4)
    model = fslib.MultiTaskModel.from_pretrained(name, part, max_length=24)
    assert same_as_whole_passes(model, [part], monkeypatch)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("measure", ["lesions", "ablation"])
def test_a_layer_runs_for_lesions_of_its_heads_and_of_those_below(zoo, name, measure):
    model, task, runs = zoo.model(name), zoo.tasks["single"], []
    for number, module in enumerate(projections(name, model.encoder)):
        module.register_forward_pre_hook(lambda *_, at=number: runs.append(at))
    if measure == "lesions":
        fslib.lesion_heads(model, task, batch_size=99)
    else:
        fslib.head_importance(model, task, estimator="ablation", batch_size=99)
    counts = np.bincount(runs, minlength=LAYERS).tolist()
    if name == "albert":  # its layers are one module: whole passes
        assert counts == [LAYERS * (1 + LAYERS * HEADS)] * LAYERS
    else:
        assert counts == [1 + HEADS * (layer + 1) for layer in range(LAYERS)]


class Odd:
    """What a layer may give that is no tensor, and that nobody can hand back."""

    def __init__(self, hidden):
        self.hidden = hidden


def test_an_output_that_cannot_be_handed_back_means_whole_passes(bert, zoo, monkeypatch):
    layer, runs = bert.encoder.encoder.layer[0], []
    plain = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda *a, **k: Odd(plain(*a, **k)))
    for each in bert.encoder.encoder.layer:
        each.register_forward_hook(lambda module, args, odd: runs.append(1) or odd.hidden)
    found = fslib.lesion_heads(bert, zoo.tasks["single"], batch_size=99)
    assert len(runs) == LAYERS * (1 + LAYERS * HEADS) and np.isfinite(found.rise("single")).all()


def test_layers_are_whole_again_after_an_error_and_inside_each_other(bert, zoo):
    batch = bert.encode(zoo.tasks["single"].eval).batch(range(5))
    with pytest.raises(KeyError), reuse.reused_layers(bert):
        raise KeyError
    with torch.no_grad(), reuse.reused_layers(bert) as changed:
        changed(None)
        whole = bert(batch.inputs, "single")
        with reuse.reused_layers(bert) as inner:  # the outer one has the layers: whole passes
            inner(None)
            inner(2)
            assert torch.equal(bert(batch.inputs, "single"), whole)
        changed(2)
        with fslib.pruned(bert, OFF & (np.arange(LAYERS) == 2)[:, None]):
            assert not torch.equal(bert(batch.inputs, "single"), whole)
        changed(None)
        assert torch.equal(bert(batch.inputs, "single"), whole)
    assert not any("forward" in vars(module) for module in bert.modules())


def test_what_was_kept_of_one_batch_is_not_handed_back_in_the_next(bert, zoo):
    one, other = (bert.encode(zoo.tasks["single"].eval).batch([i]) for i in (0, 1))
    with torch.no_grad():
        expected = bert(other.inputs, "single")
        with reuse.reused_layers(bert) as changed:
            for batch in (one, other):
                changed(None)
                bert(batch.inputs, "single")
            changed(2)
            assert torch.equal(bert(other.inputs, "single"), expected)

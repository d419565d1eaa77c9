"""No number in silence: what is not what was asked for is refused, or done as it should be."""

import copy
import json
import shutil
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from refusal import refused

import fslib
from fslib import make_task, similarity
from fslib.finetuning import fresh
from fslib.importance import contributions
from fslib.model.attention import ATTENTION, gated
from fslib.model.multitask import MultiTaskModel

TEXTS = ["w1 w2", "w3", "w4 w5 w6", "w7", "w8 w9", "w10"]
ESTIMATORS = ("gradient", "ablation", "integrated", "norm")


def task_called(name, names=("no", "yes"), **options):
    labels = [names[i % len(names)] for i in range(6)]
    scored = (["w20", "w21", "w22"], labels[:3])
    return make_task(name, (TEXTS, labels), scored, label_names=names, **options)


def test_broken_weights_are_not_used(bert, zoo, tmp_path):
    bert.classifiers["single"].bias.data[0] = torch.nan
    for call in (fslib.evaluate, fslib.head_importance, similarity.task_embedding):
        with refused("NaN", "single"):
            call(bert, zoo.tasks["single"])
    bert.encoder.embeddings.LayerNorm.bias.data[0] = torch.nan
    with refused("NaN"):
        fslib.mean_context(bert, zoo.tasks["single"])
    with refused("NaN"):
        similarity.representations(bert, ["w1 w2"])
    bert.save(tmp_path / "saved")
    with refused(tmp_path / "saved", "NaN", "LayerNorm.bias"):
        MultiTaskModel.load(tmp_path / "saved")


def test_a_tokenizer_of_another_model(bert, zoo):
    bert.encoder.resize_token_embeddings(20)  # the words go to 43
    with refused("token id", "embeddings for 20 tokens"):
        fslib.evaluate(bert, zoo.tasks)


class TestTasksOfOneName:
    """A model knows what its tasks ask, not only their names."""

    OWN, ELSE = task_called("own"), task_called("else")
    OTHERS: ClassVar = {
        "regression": make_task("own", (TEXTS, [0, 1, 2, 3, 4, 5]), (["w20", "w21"], [1, 2])),
        "metric": task_called("own", metric="f1"),
        "order": task_called("own", ("yes", "no")),
        "classes": task_called("own", ("a", "b", "c")),
    }

    @pytest.fixture(scope="class")
    def model(self, zoo, tmp_path_factory):
        model = MultiTaskModel.from_pretrained(zoo.folder("bert"), [self.OWN, self.ELSE])
        folder = tmp_path_factory.mktemp("saved")
        model.save(folder / "model")
        return MultiTaskModel.load(folder / "model")

    @pytest.mark.parametrize("name", OTHERS)
    def test_another_task_is_refused_wherever_it_meets_the_model(self, model, name):
        few = {"steps": 1, "evaluate_every": 1}
        both = [self.OWN, self.ELSE]
        for call in (
            partial(fslib.evaluate, model),
            partial(fslib.head_importance, model, estimator="random"),
            partial(contributions, model),
            partial(fslib.mean_context, model),
            partial(similarity.task_embedding, model),
            lambda task: fslib.prune_important_heads(model, [task, self.ELSE], [0.5], 0),
            lambda task: fslib.train(copy.deepcopy(model), [task, self.ELSE], steps=1),
            lambda t: fslib.train(copy.deepcopy(model), both, **few, evaluate_on={"own": t}),
        ):
            with refused(
                "task own is not the one this model was made for", "not no, yes (accuracy)"
            ):
                call(self.OTHERS[name])
            call(self.OWN)

    def test_transfer_keeps_what_the_new_task_asks(self, model):
        new = make_task("new", (TEXTS, [0, 1] * 3), (["w20"], [0]), label_names=["x", "y"])
        started = fresh(model, new)
        with refused("unknown task", "own"):
            fslib.evaluate(started, self.OWN)
        score = fslib.evaluate(started, new)["new"]
        assert repr(score).endswith("; all eval labels are alike)")
        assert fslib.evaluate(started, new, split="train")["new"].doubts == ""


class TestNamesOfTasks:
    NAMES = ("train", "type", "keys", "to", "half", "_modules", "forward")

    def test_every_name_that_is_no_row_of_tables_works(self, zoo, tmp_path):
        tasks = {name: task_called(name) for name in self.NAMES}
        model = MultiTaskModel.from_pretrained(zoo.folder("bert"), tasks)
        assert list(model.classifiers) == list(self.NAMES)
        settings = {"steps": 12, "batch_size": 2, "sampling": "uniform"}
        fslib.train(model, tasks, **settings, iat=fslib.IAT(delta=0.5))
        assert not any(module.training for module in model.modules())
        with refused("unknown task of this model"):
            fslib.evaluate(model, task_called("mode"))
        before = fslib.evaluate(model, tasks)
        model.save(tmp_path / "saved")
        for other in (MultiTaskModel.load(tmp_path / "saved"), copy.deepcopy(model).train().eval()):
            for name, score in fslib.evaluate(other, tasks).items():
                assert np.array_equal(score.predictions, before[name].predictions)

    def test_state_has_the_names_it_always_had(self, bert):
        names = {name for name in bert.state_dict() if name.startswith("classifiers")}
        wanted = [f"classifiers.{t}" for t in ("single", "pair", "regression")]
        assert names == {f"{name}.{kind}" for name in wanted for kind in ("weight", "bias")}


def test_max_length_leaves_a_word_of_each_text_of_the_task_at_hand(zoo):
    single = MultiTaskModel.from_pretrained(zoo.folder("bert"), zoo.tasks["single"], max_length=4)
    fslib.evaluate(single, zoo.tasks["single"])
    with refused("max_length 4", "at least 5"):
        similarity.text_embedding(single, zoo.tasks["pair"])
    model = MultiTaskModel.from_pretrained(zoo.folder("bert"), zoo.tasks, max_length=5)
    assert not any(model.encode(task.eval).lost.any() for task in zoo.tasks.values())


class TestFrozen:
    def test_endings_of_a_frozen_encoder(self, bert, zoo):
        bert.encoder.requires_grad_(False)
        head = "IAT cannot train head 0"
        for said, ending in (("PCGrad", fslib.PCGrad(delta=0.5)), (head, fslib.IAT(delta=0.5))):
            with refused(said, "frozen"):
                list(fslib.branch(bert, zoo.tasks, {"it": ending}, steps=4))
        mixed = fslib.PCGrad(delta=0.5, project=False)
        list(fslib.branch(bert, zoo.tasks, {"mixed": mixed}, steps=4))
        bert.requires_grad_(False)
        with refused("nothing can be trained"):
            fslib.train(bert, zoo.tasks, steps=2)

    def test_iat_of_a_frozen_layer(self, bert, zoo):
        bert.encoder.encoder.layer[1].attention.requires_grad_(False)
        with refused("IAT cannot train head 0 of layer 1", "frozen"):
            fslib.train(bert, zoo.tasks, steps=4, iat=fslib.IAT(delta=0.5))

    def test_pcgrad_leaves_what_no_gradient_reaches(self, bert, zoo):
        first, second = bert.encoder.encoder.layer[:2]
        first.register_forward_hook(lambda module, args, output: output.detach())
        unreached = [*bert.encoder.embeddings.parameters(), *first.parameters()]
        before, after = ([p.clone() for p in some] for some in (unreached, second.parameters()))
        settings = {"steps": 6, "lr": 0.01, "weight_decay": 0.5}
        fslib.train(bert, zoo.tasks, **settings, pcgrad=fslib.PCGrad(delta=0.5))
        assert all(torch.equal(a, b) for a, b in zip(before, unreached, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(after, second.parameters(), strict=True))


class TestWhereGradientsAreHard:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_inference_mode_changes_nothing(self, bert, zoo, estimator):
        task, off = zoo.tasks["single"], np.zeros((3, 4), dtype=bool)
        off[1, 2] = True
        with fslib.pruned(bert, off):
            expected = fslib.head_importance(bert, task, estimator=estimator)
        with torch.inference_mode(), fslib.pruned(bert, off):
            assert np.array_equal(fslib.head_importance(bert, task, estimator=estimator), expected)

    def test_a_model_made_in_inference_mode_can_be_trained(self, zoo):
        with torch.inference_mode():
            model = MultiTaskModel.from_pretrained(zoo.folder("bert"), zoo.tasks)
            similarity.task_embedding(model, zoo.tasks["single"])
        fslib.train(model, zoo.tasks, steps=1)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("how", ["weights", "autocast"])
    def test_half_precision_ranks_as_full(self, bert, zoo, estimator, how):
        task = zoo.tasks["single"]
        expected = fslib.head_importance(bert, task, estimator=estimator)
        full = similarity.task_embedding(bert, task)
        model = bert.to(torch.bfloat16) if how == "weights" else bert
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found = fslib.head_importance(model, task, estimator=estimator)
            half = similarity.task_embedding(model, task)
            fslib.prune_important_heads(model, zoo.tasks, [0.25], 1, ablation="mean", examples=4)
        assert not np.array_equal(found, expected)
        assert fslib.rank_correlation(found, expected) > 0.6
        assert similarity.task_similarity(full, half) > 0.9


MODES = {"cls_token": "first", "mean_tokens": "mean", "lasttoken": "last"}


@pytest.mark.parametrize("mode", MODES)
def test_pooling_is_what_a_folder_declares(zoo, tmp_path, mode):
    folder = shutil.copytree(zoo.folder("bert"), tmp_path / "model")
    (folder / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{known}": known == mode for known in MODES} | {"include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    assert MultiTaskModel.from_pretrained(folder, zoo.tasks).pooling == MODES[mode]


def test_another_attention_implementation(bert, zoo):
    bert.encoder.set_attn_implementation("eager")
    with refused("BertModel", "0 times for 3 layers", ATTENTION):
        fslib.evaluate(bert, zoo.tasks)
    bert.encoder.set_attn_implementation(ATTENTION)
    fslib.evaluate(bert, zoo.tasks)


def test_two_models_on_one_encoder(bert, zoo):
    second = MultiTaskModel(bert.encoder, bert.tokenizer, bert.answers, "first", 32, "second")
    assert second.control is bert.control
    gate = torch.ones(3, 4)
    gate[0, 0] = 0
    with gated(bert, gate):
        for model in (bert, second):
            norm = fslib.head_importance(model, zoo.tasks["single"], estimator="norm")
            assert norm[0, 0] == 0 < norm[0, 1]
    fslib.evaluate(bert, zoo.tasks)  # hooks that count calls are there once

"""No number in silence: what would be scored, pruned or trained, but is not what was asked for, is refused by name."""

import copy
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from refusal import refused
from tinymodels import save, toy_task

import fslib
from fslib import make_task, similarity
from fslib.data.batches import Encoded
from fslib.data.loading import load_task
from fslib.model.attention import ATTENTION, gated
from fslib.model.multitask import MultiTaskModel

TEXTS = ["w1 w2", "w3", "w4 w5 w6", "w7", "w8 w9", "w10"]


def task_called(name, names=("no", "yes"), **options):
    labels = [names[i % len(names)] for i in range(6)]
    return make_task(
        name, (TEXTS, labels), (["w20", "w21", "w22"], labels[:3]), label_names=names, **options
    )


class TestTokenizers:
    def test_a_folder_or_checkpoint_without_tokenizer_files(self, zoo, tmp_path):
        shutil.copytree(zoo.folder("bert"), tmp_path / "bare")
        zoo.model("bert").save(tmp_path / "saved")
        for folder in (tmp_path / "bare", tmp_path / "saved" / "encoder"):
            for path in folder.glob("*token*"):
                path.unlink()
        with refused(tmp_path / "bare", "no tokenizer files", "tokenizer.json"):
            MultiTaskModel.from_pretrained(tmp_path / "bare", zoo.tasks)
        with refused(tmp_path / "saved", "no tokenizer files"):
            MultiTaskModel.load(tmp_path / "saved")

    def test_a_tokenizer_of_another_model(self, bert, zoo):
        bert.encoder.resize_token_embeddings(20)  # the words go to 43
        with refused("token id", "embeddings for 20 tokens"):
            fslib.evaluate(bert, zoo.tasks)


class TestNotANumber:
    def test_broken_weights_are_not_evaluated(self, bert, zoo, tmp_path):
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

    def test_correlations_and_scores(self):
        flat, broken = np.arange(24.0).reshape(2, 12), np.full((2, 12), np.nan)
        with refused("finite"):
            fslib.rank_correlation(flat, broken)
        with refused("spearman", "NaN"):
            float(fslib.Score("spearman", np.array([0.0, np.nan]), np.array([0.0, 1.0])))


class TestTasksOfOneName:
    """A model knows what its tasks ask, not only their names."""

    @pytest.fixture(scope="class")
    def own(self):
        return task_called("own")

    @pytest.fixture(params=["model", "checkpoint"])
    def model(self, request, own, zoo, tmp_path):
        model = MultiTaskModel.from_pretrained(zoo.folder("bert"), [own, task_called("else")])
        if request.param == "checkpoint":
            model.save(tmp_path / "saved")
            model = MultiTaskModel.load(tmp_path / "saved")
        return model

    @pytest.fixture(params=["order", "classes", "regression", "metric"])
    def other(self, request):
        if request.param == "regression":
            return make_task("own", (TEXTS, [0, 1, 2, 3, 4, 5]), (["w20", "w21"], [1, 2]))
        if request.param == "metric":
            return task_called("own", metric="f1")
        return task_called("own", ("yes", "no") if request.param == "order" else ("a", "b", "c"))

    def test_another_task_is_refused_wherever_it_meets_the_model(self, model, own, other):
        third = task_called("else")
        for call in (
            lambda task: fslib.evaluate(model, task),
            lambda task: fslib.head_importance(model, task),
            lambda task: fslib.head_importance(model, task, estimator="random"),
            lambda task: fslib.contributions(model, task),
            lambda task: fslib.mean_context(model, task),
            lambda task: similarity.task_embedding(model, task),
            lambda task: fslib.prune_important_heads(model, [task, third], [0.5], 0),
            lambda task: fslib.train(model, [task, third], steps=1),
            lambda task: fslib.train(
                model, [own, third], steps=1, evaluate_every=1, evaluate_on={"own": task}
            ),
        ):
            with refused("task own is not the one this model was made for", "no, yes (accuracy)"):
                call(other)
            call(own)

    def test_transfer_keeps_what_the_new_task_asks(self, model, other):
        from fslib.finetuning import fresh

        new = make_task("new", (TEXTS, [0, 1] * 3), (["w20"], [0]), label_names=["x", "y"])
        with refused("no, yes" if "own" in fresh(model, new).answers else "unknown task", "own"):
            fslib.evaluate(fresh(model, new), other)
        assert fslib.evaluate(fresh(model, new), new)["new"].doubts == "all eval labels are alike"


class TestNamesOfTasks:
    NAMES = (
        "train",
        "eval",
        "type",
        "keys",
        "to",
        "half",
        "training",
        "values",
        "_modules",
        "forward",
        "items",
        "pop",
    )

    def test_every_name_that_is_no_row_of_tables_works(self, zoo, tmp_path):
        tasks = {name: task_called(name) for name in self.NAMES}
        model = MultiTaskModel.from_pretrained(zoo.folder("bert"), tasks)
        assert list(model.classifiers) == list(self.NAMES)
        history = fslib.train(
            model, tasks, steps=14, batch_size=2, sampling="uniform", iat=fslib.IAT(delta=0.5)
        )
        assert len(history.losses) == 14
        assert not any(module.training for module in model.modules())
        with refused("unknown task of this model"):
            fslib.evaluate(model, task_called("mode"))
        before = fslib.evaluate(model, tasks)
        model.save(tmp_path / "saved")
        for other in (MultiTaskModel.load(tmp_path / "saved"), copy.deepcopy(model).train().eval()):
            assert other.n_parameters() == model.n_parameters()
            for name, score in fslib.evaluate(other, tasks).items():
                assert np.array_equal(score.predictions, before[name].predictions)
        fslib.prune_important_heads(model, tasks, [0.25], 1)

    def test_state_has_the_names_it_always_had(self, bert):
        names = {name for name in bert.state_dict() if name.startswith("classifiers")}
        assert names == {
            f"classifiers.{t}.{kind}"
            for t in ("single", "pair", "regression")
            for kind in ("weight", "bias")
        }

    @pytest.mark.parametrize("name", ["mean", "step", "random"])
    def test_rows_of_tables(self, name):
        with refused(f"task name '{name}'", "row of tables"):
            task_called(name)


class TestMaxLength:
    @pytest.mark.parametrize("wrong", [0, -5, 1, 2, 3, 4])
    def test_nothing_would_be_left_of_a_text(self, zoo, wrong):
        with refused(f"max_length {wrong}"):
            MultiTaskModel.from_pretrained(zoo.folder("bert"), zoo.tasks, max_length=wrong)

    def test_the_least_leaves_a_word_of_each_text(self, zoo):
        model = MultiTaskModel.from_pretrained(zoo.folder("bert"), zoo.tasks, max_length=5)
        for task in zoo.tasks.values():
            assert not model.encode(task.eval).lost.any()
        assert (
            MultiTaskModel.from_pretrained(
                zoo.folder("bert"), zoo.tasks["single"], max_length=3
            ).max_length
            == 3
        )

    def test_what_is_truncated_and_lost(self, bert):
        texts = ["w1 w2", "w1 w2 w3", "", "zebra gnu", "w1 zebra"]
        split = make_task(
            "own", (texts, [0, 1, 0, 1, 0]), (["w1"], [0]), label_names=["x", "y"]
        ).train
        encoded = Encoded(split, bert.tokenizer, 4)  # [CLS] and [SEP] take two
        assert encoded.truncated.tolist() == [False, True, False, False, False]
        assert encoded.lost.tolist() == [False, False, True, True, False]
        assert not Encoded(split, bert.tokenizer, 5).truncated.any()
        pairs = make_task(
            "own",
            ([("w1", "w2"), ("w1 w2", "w3")], [0, 1]),
            ([("w1", "w9")], [0]),
            label_names=["x", "y"],
        )
        for length, truncated, lost in (
            (6, [0, 0], [0, 0]),
            (5, [0, 1], [0, 0]),
            (4, [1, 1], [1, 1]),
        ):
            encoded = Encoded(pairs.train, bert.tokenizer, length)
            assert (encoded.truncated.tolist(), encoded.lost.tolist()) == (truncated, lost)

    def test_the_room_is_that_of_the_task_at_hand(self, zoo):
        model = MultiTaskModel.from_pretrained(
            zoo.folder("bert"), zoo.tasks["single"], max_length=4
        )
        fslib.evaluate(model, zoo.tasks["single"])
        with refused("max_length 4", "at least 5"):
            fslib.transfer(model, zoo.tasks["pair"], steps=1)
        with refused("max_length 4", "at least 5"):
            similarity.text_embedding(model, zoo.tasks["pair"])


class TestFrozen:
    @pytest.fixture
    def tasks(self):
        return [task_called("one"), task_called("other")]

    @pytest.fixture
    def model(self, zoo, tasks):
        return MultiTaskModel.from_pretrained(zoo.folder("bert"), tasks)

    def test_endings_of_a_frozen_encoder(self, model, tasks):
        model.encoder.requires_grad_(False)
        for ending, said in (
            (fslib.PCGrad(delta=0.5), "PCGrad"),
            (fslib.IAT(delta=0.5), "IAT cannot train head 0"),
        ):
            with refused(said, "frozen"):
                list(fslib.branch(model, tasks, {"it": ending}, steps=4))
        list(fslib.branch(model, tasks, {"mixed": fslib.PCGrad(delta=0.5, project=False)}, steps=4))
        model.requires_grad_(False)
        with refused("nothing can be trained"):
            fslib.train(model, tasks, steps=2)

    def test_iat_of_a_frozen_layer(self, model, tasks):
        model.encoder.encoder.layer[1].attention.requires_grad_(False)
        with refused("IAT cannot train head 0 of layer 1", "frozen"):
            fslib.train(model, tasks, steps=4, iat=fslib.IAT(delta=0.5))

    def test_pcgrad_leaves_what_no_gradient_reaches(self, model, tasks):
        first = model.encoder.encoder.layer[0]
        first.register_forward_hook(lambda module, args, output: output.detach())
        unreached = [*model.encoder.embeddings.parameters(), *first.parameters()]
        before = [p.clone() for p in unreached]
        after = [p.clone() for p in model.encoder.encoder.layer[1].parameters()]
        fslib.train(
            model, tasks, steps=6, lr=0.01, weight_decay=0.5, pcgrad=fslib.PCGrad(delta=0.5)
        )
        assert all(torch.equal(a, b) for a, b in zip(before, unreached, strict=True))
        pairs = zip(after, model.encoder.encoder.layer[1].parameters(), strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs)


class TestHeadSets:
    def test_a_mean_that_is_not_finite(self, bert):
        broken = torch.full((3, 4, 8), torch.nan)
        with (
            refused("finite"),
            fslib.pruned(bert, np.ones((3, 4), bool), ablation="mean", mean=broken),
        ):
            pass

    @pytest.mark.parametrize("shape", [(2, 2), (5, 2), (1, 4, 2)])
    def test_a_baseline_that_would_be_broadcast(self, shape):
        with refused("unpruned", shape, "(4, 2, 2)"):
            fslib.iap(np.ones((4, 2, 2)), np.ones(shape))


class TestOwnData:
    NAMES = ("no", "yes")

    def test_a_data_frame_is_a_table(self):
        frame = pd.DataFrame(
            {"id": [1, 2, 3, 4], "text": ["a", "b", "c", "d"], "label": ["no", "yes", "no", "yes"]}
        )
        task = make_task("own", frame, frame.iloc[2:], label_names=self.NAMES)
        assert (task.train.texts, task.train.labels.tolist()) == (
            ("a", "b", "c", "d"),
            [0, 1, 0, 1],
        )
        assert task.eval.texts == ("c", "d")
        pairs = frame.rename(columns={"label": "score"}).assign(
            other=["e", "f", "g", "h"], score=[0.5, 1, 2, 3]
        )
        assert make_task("own", pairs, pairs[:2]).train.pairs == ("e", "f", "g", "h")
        with refused("own", "no column label"):
            make_task("own", frame.drop(columns="label"), label_names=self.NAMES)
        with refused("own", "two columns", "'text'"):
            make_task("own", frame.rename(columns={"id": "text"}), label_names=self.NAMES)
        with refused("own", "example 1"):
            make_task(
                "own",
                frame.assign(label=pd.array([0, None, 1, 1], "Int64")),
                label_names=self.NAMES,
            )

    def test_letters_are_no_texts_and_no_names(self):
        for data, names in (
            (("abcd", [0, 1, 0, 1]), self.NAMES),
            ((["a", "b"], "xy"), "xy"),
            ((["a", "b"], ["x", "y"]), "xy"),
        ):
            with refused("own"):
                make_task("own", data, data, label_names=names)

    def test_an_index_that_may_be_a_name(self):
        with refused("own", "example 0", "label 0", "'0'", "index 1"):
            make_task("own", (["a", "b", "c"], [0, 1, 0]), label_names=["1", "0"])
        inverted = make_task(
            "own", (["a", "b"], ["0", "1"]), (["c"], ["1"]), label_names=["1", "0"]
        )
        assert inverted.train.labels.tolist() == [1, 0]
        assert make_task(
            "own", (["a", "b"], [0, 1]), (["c"], [1]), label_names=["0", "1"]
        ).eval.labels.tolist() == [1]

    def test_class_labels_in_another_order(self):
        import datasets

        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
        )
        data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
        assert make_task(
            "own", data, (["c"], ["no"]), label_names=["yes", "no"]
        ).train.labels.tolist() == [1, 0]
        assert make_task("own", data, (["c"], [0])).train.labels.tolist() == [0, 1]
        more = make_task("own", data, (["c"], ["other"]), label_names=["yes", "no", "other"])
        assert more.train.labels.tolist() == [1, 0]
        assert make_task(
            "own", data, (["c"], [0]), label_names=["x", "y"]
        ).train.labels.tolist() == [0, 1]
        with refused("label of task own, example 1, 'yes'"):
            make_task("own", data, (["c"], [0]), label_names=["no", "perhaps"])

    def test_a_gap_in_the_first_row_hides_no_column(self):
        frame = pd.DataFrame({"one": ["a", "b", "c"], "two": [None, "e", "f"], "label": [0, 1, 0]})
        with refused("own", "example 0", "pairs of strings"):
            make_task("own", frame, label_names=["x", "y"])

    def test_a_score_says_what_makes_it_mean_little(self, bert):
        names = ("a", "b", "c")
        same = make_task("single", (TEXTS, [0, 1, 2] * 2), (TEXTS[:2], [0, 1]), label_names=names)
        alike = make_task(
            "single", (TEXTS, [0, 1, 2] * 2), (["w30", "w31"], [1, 1]), label_names=names
        )
        good = make_task(
            "single", (TEXTS, [0, 1, 2] * 2), (["w30", "w31"], [0, 1]), label_names=names
        )
        for task, said in (
            (same, "train holds every text of eval"),
            (alike, "all eval labels are alike"),
            (good, ""),
        ):
            score = fslib.evaluate(bert, task)["single"]
            assert score.doubts == said
            assert repr(score).endswith(f"; {said})" if said else "n=2)")
        assert fslib.evaluate(bert, same, split="train")["single"].doubts == ""


class TestFolders:
    @pytest.fixture
    def glue(self, tmp_path):
        for folder, text in (("Dup", "upper"), ("dup", "lower"), ("One", "one")):
            (tmp_path / folder).mkdir()
            for side in ("train", "dev"):
                (tmp_path / folder / f"{side}.tsv").write_text(
                    f"sentence\tlabel\n{text}\t0\n{text} {side}\t1\n"
                )
        return tmp_path

    def test_two_folders_of_one_name(self, glue):
        assert load_task("Dup", glue).train.texts[0] == "upper"
        assert load_task("dup", glue).train.texts[0] == "lower"
        with refused("task DUP", glue / "Dup", glue / "dup", "rename"):
            load_task("DUP", glue)
        assert load_task("ONE", glue).train.texts[0] == "one"

    def test_paths_mean_the_same_everywhere(self, glue, zoo, monkeypatch):
        save("bert", glue / "model")
        monkeypatch.chdir(glue.parent)
        monkeypatch.setenv("FSLIB_DATA", glue.name)
        assert load_task("one").source == load_task(f"{glue.name}/One").source == str(glue / "One")
        model = MultiTaskModel.from_pretrained(f"{glue.name}/model", toy_task("single"))
        assert model.source == str(glue / "model")


class TestWhereGradientsAreHard:
    ESTIMATORS = ("gradient", "ablation", "integrated", "norm")

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_inference_mode_changes_nothing(self, bert, zoo, estimator):
        task, off = zoo.tasks["single"], np.zeros((3, 4), dtype=bool)
        off[1, 2] = True
        with fslib.pruned(bert, off):
            expected = fslib.head_importance(bert, task, estimator=estimator)
        with torch.inference_mode(), fslib.pruned(bert, off):
            assert np.array_equal(fslib.head_importance(bert, task, estimator=estimator), expected)

    def test_inference_mode_and_what_else_needs_gradients(self, zoo):
        with torch.inference_mode():
            model = MultiTaskModel.from_pretrained(zoo.folder("bert"), zoo.tasks)
            similarity.task_embedding(model, zoo.tasks["single"])
            with refused("torch.inference_mode"):
                fslib.train(model, zoo.tasks, steps=1)
        fslib.train(model, zoo.tasks, steps=1)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("how", ["weights", "autocast"])
    def test_half_precision_ranks_as_full(self, bert, zoo, estimator, how):
        task = zoo.tasks["single"]
        expected = fslib.head_importance(bert, task, estimator=estimator)
        model = bert.to(torch.bfloat16) if how == "weights" else bert
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found = fslib.head_importance(model, task, estimator=estimator)
            fslib.prune_important_heads(model, zoo.tasks, [0.25], 1, ablation="mean")
        assert not np.array_equal(found, expected)
        assert fslib.rank_correlation(found, expected) > 0.6

    def test_a_task_embedding_in_half_precision(self, bert, zoo):
        full = similarity.task_embedding(bert, zoo.tasks["single"])
        half = similarity.task_embedding(bert.to(torch.bfloat16), zoo.tasks["single"])
        assert all(values.dtype == np.float32 for values in half.values())
        assert similarity.task_similarity(full, half) > 0.9


class TestPooling:
    @pytest.mark.parametrize(
        ("mode", "pooling"),
        [("cls_token", "first"), ("mean_tokens", "mean"), ("lasttoken", "last")],
    )
    def test_what_a_folder_declares(self, zoo, tmp_path, mode, pooling):
        folder = tmp_path / "model"
        shutil.copytree(zoo.folder("bert"), folder)
        (folder / "1_Pooling").mkdir()
        modes = {
            f"pooling_mode_{known}": known == mode
            for known in ("cls_token", "mean_tokens", "lasttoken")
        }
        (folder / "1_Pooling" / "config.json").write_text(
            json.dumps(modes | {"include_prompt": True})
        )
        assert MultiTaskModel.from_pretrained(folder, zoo.tasks).pooling == pooling


class TestWords:
    """A message blames what is at fault."""

    def test_a_hidden_size_that_heads_do_not_divide(self, zoo, tmp_path):
        folder = tmp_path / "odd"
        shutil.copytree(zoo.folder("bert"), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
        with refused(folder, "hidden size", "number of attention heads") as caught:
            MultiTaskModel.from_pretrained(folder, zoo.tasks)
        assert caught is None

    def test_another_attention_implementation(self, bert, zoo):
        bert.encoder.set_attn_implementation("eager")
        with refused("BertModel", "no longer passes", ATTENTION):
            fslib.evaluate(bert, zoo.tasks)
        bert.encoder.set_attn_implementation(ATTENTION)
        fslib.evaluate(bert, zoo.tasks)

    def test_two_models_on_one_encoder(self, bert, zoo):
        second = MultiTaskModel(bert.encoder, bert.tokenizer, bert.answers, "first", 32, "second")
        assert second.control is bert.control
        gate = torch.ones(3, 4)
        gate[0, 0] = 0
        with gated(bert, gate):
            for model in (bert, second):
                norm = fslib.head_importance(model, zoo.tasks["single"], estimator="norm")
                assert norm[0, 0] == 0 < norm[0, 1]
        fslib.evaluate(bert, zoo.tasks)  # hooks that count calls are there once

"""The registry: entries, saved copies, the Hub's cache, AG-Pair; encoders by name."""

import re
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from datasets.arrow_writer import ArrowWriter
from refusal import refused
from tinymodels import HEAD_DIM, HEADS, LAYERS, save

import fslib
from fslib.data import hub
from fslib.data.bbc import EMBEDDED
from fslib.data.hub import hub_task, registry
from fslib.data.loading import DERIVED, load_tasks, task_names
from fslib.data.tasks import METRIC_OF
from fslib.model import encoders

ONE_TEXT = "cola ag imdb yelp_p yelp_f dbpedia yahoo sst-2 sogou"
LANGUAGES = "ar bg de el en es fr hi ru sw th tr ur vi zh"
XNLI = [f"xnli-{language}" for language in LANGUAGES.split()]
TWO_TEXTS = "mrpc mnli qqp qnli cmnli sts-b wnli rte scitail snli"
MRPC = registry()["mrpc"]
SHAPE = ("bert", LAYERS, HEADS, HEADS * HEAD_DIM)


@pytest.fixture(autouse=True)
def no_other_data(monkeypatch, tmp_path):
    """Neither data nor cache of whoever runs the tests, and nothing known of the Hub."""
    monkeypatch.delenv("FSLIB_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_silent_until", -np.inf)


def table(source, side, n=12, labels=None) -> datasets.Dataset:
    """A split as the Hub has it; row i is of class i % classes, names in reverse order."""
    names = source.labels[::-1]
    columns = [column for text in source.texts for column in text]
    data = {column: [f"{column} {side} {i}" for i in range(n)] for column in columns}
    data |= {"idx": [str(i) for i in range(n)]}
    features = dict.fromkeys(data, datasets.Value("string"))
    kind = datasets.ClassLabel(names=list(names))
    found = [len(names) - 1 - i % len(names) if names else i % 11 / 2 for i in range(n)]
    if source.label == "gold_label":  # SciTail's labels are strings
        kind, found = datasets.Value("string"), [names[y] for y in found]
    elif not names:
        kind = datasets.Value("float32")
    data[source.label], features[source.label] = found if labels is None else labels, kind
    return datasets.Dataset.from_dict(data, features=datasets.Features(features))


def both(source, n=42, **options) -> datasets.DatasetDict:
    sides = enumerate(source.splits)
    return datasets.DatasetDict({split: table(source, i, n, **options) for i, split in sides})


def write(data: datasets.DatasetDict, folder: Path, kind: str = "disk") -> Path:
    """Save a dataset in one of the ways that are read."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "disk":
        data.save_to_disk(folder)
    for split, rows in data.items() if kind != "disk" else ():
        names = getattr(rows.features["label"], "names", None)
        if names and kind != "parquet":  # only parquet keeps the names beside the numbers
            named = ["-1" if y == -1 else names[y] for y in rows["label"]]
            rows = rows.remove_columns("label").add_column("label", named)
        getattr(rows, f"to_{kind.removesuffix('l')}")(folder / f"{split}.{kind}")
    return folder


class TestRegistry:
    def test_all_35_tasks_are_there_and_the_table_is_read_once(self):
        names = {*ONE_TEXT.split(), *TWO_TEXTS.split(), *XNLI, "ag-pair"}
        assert set(registry()) == names and len(names) == 35 and registry() is registry()
        assert task_names(hub_too=True) == [*EMBEDDED, *DERIVED, *registry()]
        assert set(DERIVED.values()) <= set(registry())
        labels = {name: source.labels for name, source in registry().items()}
        assert labels["mrpc"] == ("not_equivalent", "equivalent")  # F1 counts the second
        assert labels["qqp"][1] == "duplicate" and labels["sst-2"] == ("negative", "positive")
        assert {labels[n] for n in ("cmnli", "snli", *XNLI)} == {labels["mnli"]}
        scored = {s.splits[1] for s in registry().values() if s.hub == MRPC.hub}
        assert scored == {"validation", "validation_matched"}  # GLUE's test has no labels

    @pytest.mark.parametrize("name", registry())
    def test_an_entry_has_what_it_needs(self, name):
        source = registry()[name]
        assert re.fullmatch(r"[\w-]+/[\w-]+", source.hub)  # no script of the datasets library
        assert re.fullmatch("[0-9a-f]{40}", source.revision)
        assert all((source.config, source.label, source.description, *source.splits))
        assert source.splits[0] == "train"
        assert len(source.texts) == (2 if name in [*TWO_TEXTS.split(), *XNLI] else 1)
        assert len(set(source.labels)) == len(source.labels) != 1
        counts = zip(source.rows, source.unlabelled, strict=True)
        assert all(rows > unlabelled >= 0 for rows, unlabelled in counts)
        metric = METRIC_OF.get(name, "accuracy")
        assert (metric == "spearman") == (not source.labels)
        assert metric != "f1" or len(source.labels) == 2
        assert source.pairs == (name == "ag-pair")


class TestSavedCopies:
    @pytest.mark.parametrize("name", registry())
    def test_texts_are_joined_and_labels_go_by_name(self, tmp_path, name):
        source = registry()[name]
        task = hub_task(name, write(both(source), tmp_path), check_rows=False)
        assert (task.source, task.description) == (str(tmp_path), source.description)
        assert task.metric == METRIC_OF.get(name, "accuracy")
        assert task.label_names == (("different", "same") if source.pairs else source.labels)
        for side, split in enumerate((task.train, task.eval) if not source.pairs else ()):
            texts = [" ".join(f"{column} {side} 41" for column in text) for text in source.texts]
            assert [split.texts[41], *(split.pairs or [""] * 42)[41:]] == [*texts, ""][:2]
            n = len(source.labels)
            assert split.labels.tolist() == [i % n if n else i % 11 / 2 for i in range(42)]

    @pytest.mark.parametrize("kind", ["parquet", "csv", "json", "jsonl"])
    @pytest.mark.parametrize("name", ["mrpc", "sts-b"])
    def test_all_ways_to_save_give_the_same_task(self, tmp_path, name, kind):
        source = registry()[name]
        data = both(source)
        if source.labels:
            data["train"] = table(source, 0, 42, labels=[-1, *data["train"]["label"][1:]])
        first = source.texts[0][0]
        texts = ["nan" if i == 3 else f"a {i}" for i in range(42)]  # a word, not a missing text
        data["train"] = data["train"].remove_columns(first).add_column(first, texts)
        folders = [write(data, tmp_path / each, each) for each in ("disk", kind)]
        one, two = (hub_task(name, folder, check_rows=False) for folder in folders)
        assert one.fingerprint == two.fingerprint and "nan" in two.train.texts
        assert one.source != two.source  # which is no part of what the data are
        assert len(one.train) == 42 - bool(source.labels)

    def test_rows_without_a_label_are_dropped_and_counted(self, tmp_path, monkeypatch):
        """And missing parts of a joined text leave no gap."""
        source = replace(registry()["yahoo"], rows=(9, 9), unlabelled=(3, 0))
        data, part = both(source, 9), "question_content"
        train = table(source, 0, 9, labels=[2, -1, 0, None, 1, -1, 2, 1, 0])
        data["train"] = train.remove_columns(part).add_column(part, [None, "x", "", *["c"] * 6])
        folder = write(data, tmp_path / "yahoo")
        monkeypatch.setitem(registry(), "yahoo", source)
        task = hub_task("yahoo", folder)
        wanted = (f"question_title 0 {i} best_answer 0 {i}" for i in (0, 2))
        assert task.train.texts[:3] == (*wanted, "question_title 0 4 c best_answer 0 4")
        assert task.train.labels.tolist() == [7, 9, 8, 7, 8, 9]
        for without in (2, 4):
            monkeypatch.setitem(registry(), "yahoo", replace(source, unlabelled=(without, 0)))
            with refused("yahoo", "split train", f"6 labelled rows found, {9 - without} expected"):
                hub_task("yahoo", folder)

    def test_own_data_come_before_a_download(self, tmp_path, monkeypatch):
        write(both(MRPC), tmp_path / "MRPC")
        monkeypatch.setenv("FSLIB_DATA", str(tmp_path))
        assert load_tasks("Mrpc", check_rows=False)["mrpc"].source == str(tmp_path / "MRPC")
        for side in ("train", "dev"):  # GLUE's layout comes first
            content = "sentence1\tsentence2\tlabel\na\tb\t0\nc\td\t1\n"
            (tmp_path / "MRPC" / f"{side}.tsv").write_text(content)
        task = load_tasks(["mrpc"])["mrpc"]
        assert (task.metric, task.description) == ("f1", MRPC.description)
        assert (task.label_names, len(task.train)) == (("0", "1"), 2)

    @pytest.mark.parametrize(
        ("change", "parts"),
        [
            (lambda d: d, ["split train", "42 labelled rows found, 3668 expected"]),
            (lambda d: d.remove_columns("sentence2"), ["column of", "'sentence2'", "idx"]),
            (lambda d: d.remove_columns("label"), ["split train", "'label'"]),
            (lambda d: d.pop("validation") and d, ["no split 'validation'", "train"]),
            (lambda d: both(MRPC, labels=[-1] * 42), ["split train", "every label is -1"]),
            (
                lambda d: both(replace(MRPC, labels=("x", "y"))),
                ["labels of", "'not_e", "['y', 'x']"],
            ),
            (lambda d: both(replace(MRPC, labels=(*MRPC.labels, "z"))), ["labels of", "'z'"]),
            (lambda d: d.map(lambda row: {"sentence1": None}), ["example 0", "strings"]),
        ],
    )
    def test_data_that_are_not_as_expected_are_refused(self, tmp_path, change, parts):
        folder = write(change(both(MRPC)), tmp_path)
        with refused("mrpc", *parts):
            hub_task("mrpc", folder, check_rows="rows" in parts[-1])

    def test_a_damaged_or_empty_copy_is_refused(self, tmp_path):
        folder = write(both(MRPC), tmp_path / "mrpc", "parquet")
        (folder / "train.parquet").write_bytes(b"PAR1 not really")
        with refused(folder, "cannot be read"):
            hub_task("mrpc", folder)
        (tmp_path / "rte").mkdir()
        with refused("rte", "no split 'train'", "it has []"):
            load_tasks(["rte"], tmp_path)
        texts = both(registry()["sts-b"]).cast_column("label", datasets.Value("string"))
        folder = write(texts.map(lambda row: {"label": "high"}), tmp_path / "sts-b")
        with refused("sts-b", "no numbers", "high"):
            hub_task("sts-b", folder, check_rows=False)

    def test_an_unknown_name_gets_the_nearest_one_and_xnli_its_languages(self):
        for name, near in {"yelp-p": "yelp_p", "sst2": "sst-2", "xnli-xx": "xnli-"}.items():
            for load in (load_tasks, hub_task):
                with refused("unknown task", repr(name), f"did you mean '{near}"):
                    load(name)
        with refused("xnli", "xnli-ar", "xnli-en", "xnli-zh"):
            load_tasks(["XNLI"])


def into_the_hubs_cache(data: datasets.DatasetDict, source, revision: str) -> None:
    """What remains on the disk after a download of this revision."""
    organisation, name = source.hub.split("/")
    place = Path(datasets.config.HF_DATASETS_CACHE, f"{organisation}___{name}", source.config)
    folder = place / "0.0.0" / revision
    folder.mkdir(parents=True)
    splits = datasets.SplitDict(dataset_name=name)
    for split, rows in data.items():
        path = str(folder / f"{name}-{split}.arrow")
        with ArrowWriter(path=path, features=rows.features) as writer:
            writer.write_table(rows.data.table)
            writer.finalize()
        splits.add(datasets.SplitInfo(split, num_examples=len(rows), dataset_name=name))
    told = {"dataset_name": name, "config_name": source.config, "version": "0.0.0"}
    features = data["train"].features
    info = datasets.DatasetInfo(features=features, splits=splits, **told)
    info.write_to_directory(str(folder))


class TestHub:
    """The Hub, which tests do not reach."""

    @pytest.fixture
    def waits(self, monkeypatch):
        """Seconds that were waited: nobody answers at the Hub's address."""
        waited = []
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(time, "sleep", waited.append)  # between attempts
        return waited

    def test_offline_is_one_clear_line(self, waits):
        with refused("task mrpc", "nyu-mll/glue", MRPC.revision, "check the network", "FSLIB_DATA"):
            load_tasks(["mrpc"])
        assert waits == []

    def test_only_the_first_task_waits_for_a_hub_out_of_reach(self, waits, monkeypatch):
        for place in (datasets.config, huggingface_hub.constants):
            monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
        with refused("task mrpc", "check the network"):
            load_tasks(["mrpc"])
        first = len(waits)
        assert first > 1
        with refused("task rte", "check the network", "asked again in a minute"):
            load_tasks(["rte"])
        source = registry()["sst-2"]
        into_the_hubs_cache(both(source), source, source.revision)  # which is asked all the time
        assert len(load_tasks(["sst-2"], check_rows=False)["sst-2"].train) == 42
        assert len(waits) == first and not datasets.config.HF_HUB_OFFLINE
        monkeypatch.setattr(time, "monotonic", lambda: hub._silent_until)
        with refused("task rte", "check the network"):
            load_tasks(["rte"])
        assert len(waits) == 2 * first

    @pytest.mark.parametrize("said", ["'nyu-mll/glue' doesn't exist\nor is private", "no script"])
    def test_a_dataset_that_has_gone_is_one_clear_line(self, monkeypatch, said):
        def gone(*args, **options) -> None:
            raise RuntimeError(said)

        monkeypatch.setattr(datasets, "load_dataset_builder", gone)
        with refused("task mrpc", "nyu-mll/glue", said.splitlines()[0], "FSLIB_DATA"):
            load_tasks(["mrpc"])
        assert hub._silent_until == -np.inf  # the Hub has answered

    def test_what_was_downloaded_is_loaded_offline_if_it_is_of_the_revision(self):
        into_the_hubs_cache(both(MRPC), MRPC, MRPC.revision)
        task = hub_task("mrpc", check_rows=False)
        assert task.source == f"nyu-mll/glue (mrpc) at {MRPC.revision}"
        assert task.train.labels[:4].tolist() == [0, 1, 0, 1] and len(task.eval) == 42
        source = registry()["rte"]
        into_the_hubs_cache(both(source), source, "0" * 40)
        with refused("task rte", "nyu-mll/glue", "0" * 40, source.revision):
            load_tasks(["rte"], check_rows=False)


class TestAGPair:
    @pytest.fixture
    def ag_news(self, tmp_path):
        """News of four topics, not in order; texts repeat within train, and from train in eval."""
        source = registry()["ag"]
        sizes = zip(source.splits, (400, 80), strict=True)
        data = {s: table(source, i, n).shuffle(seed=1) for i, (s, n) in enumerate(sizes)}
        repeats = [data["train"].select([0, 9]), data["test"].select([0, 9])]
        data["train"] = datasets.concatenate_datasets([data["train"], *repeats])
        write(datasets.DatasetDict(data), tmp_path / "ag")
        columns = [zip(rows["text"], rows["label"], strict=True) for rows in data.values()]
        return tmp_path, {text: topic for rows in columns for text, topic in rows}

    def test_every_text_is_used_twice_once_per_class(self, ag_news):
        place, topic = ag_news  # found in the folder of AG News
        task = load_tasks(["ag-pair"], place, check_rows=False)["ag-pair"]
        for split, n in ((task.train, 400), (task.eval, 80)):
            assert np.bincount(split.labels).tolist() == [n // 2, n // 2]
            uses = Counter()
            for one, other, label in zip(split.texts, split.pairs, split.labels, strict=True):
                assert (topic[one] == topic[other]) == bool(label) and one != other
                uses.update([(one, label), (other, label)])
            assert set(uses.values()) == {1} and len(uses) == 2 * n
        assert not task.shared_texts()
        again = hub_task("ag-pair", place / "ag", check_rows=False)
        assert task.fingerprint == again.fingerprint

    def test_the_rows_of_ag_news_are_counted(self, ag_news):
        with refused("ag-pair", "split train", "404 labelled rows found, 120000 expected"):
            hub_task("ag-pair", ag_news[0] / "ag")


class TestEncoders:
    def test_the_papers_seven_are_there_and_do_not_mix_with_the_embedded_ones(self):
        sizes = {"bert": "mini small medium base large", "roberta": "base large"}
        names = [f"{kind}-{size}" for kind in sizes for size in sizes[kind].split()]
        assert list(encoders.PRETRAINED) == names and not set(names) & set(encoders.ENCODERS)
        for name, (source, (kind, layers, heads, width)) in encoders.PRETRAINED.items():
            assert name.startswith(f"{kind}-") and re.fullmatch(r"[\w-]+/[\w-]+", source)
            assert width == 64 * heads and 4 <= layers <= 24

    @pytest.mark.parametrize("name", ["bert-base", "roberta-base"])
    def test_an_encoder_loads_by_name(self, zoo, monkeypatch, name):
        family = name.split("-")[0]
        entry = (str(zoo.folder(family)), (family, *SHAPE[1:]))
        monkeypatch.setitem(encoders.PRETRAINED, name, entry)
        model = fslib.MultiTaskModel.from_pretrained(name, zoo.tasks)
        assert (model.source, model.n_layers, model.n_heads) == (name, LAYERS, HEADS)
        assert model.pooling == "first"

    @pytest.mark.parametrize(
        ("family", "changes"),
        [("bert", {"num_hidden_layers": 2}), ("roberta", {}), ("bert", {"num_attention_heads": 2})],
    )
    def test_another_architecture_is_refused(self, zoo, tmp_path, monkeypatch, family, changes):
        source = str(save(family, tmp_path / "other", **changes))
        (tmp_path / "other" / "model.safetensors").unlink()  # refused before weights are looked for
        monkeypatch.setitem(encoders.PRETRAINED, "bert-mini", (source, SHAPE))
        wanted = "not bert of 3 layers x 4 heads, 32 wide"
        with refused("bert-mini", source, "of another architecture", wanted):
            fslib.MultiTaskModel.from_pretrained("bert-mini", zoo.tasks)

    @pytest.mark.parametrize("pickled", [True, False], ids=["pickled weights", "not reached"])
    def test_one_that_the_hub_does_not_supply(self, zoo, tmp_path, monkeypatch, pickled):
        if pickled:
            folder = Path(shutil.copytree(zoo.folder("bert"), tmp_path / "mini"))
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
            monkeypatch.setitem(encoders.PRETRAINED, "bert-mini", (str(folder), SHAPE))
        source = encoders.PRETRAINED["bert-mini"][0]
        with refused("model bert-mini", source, "safetensors", "check the network"):
            fslib.MultiTaskModel.from_pretrained("bert-mini", zoo.tasks)

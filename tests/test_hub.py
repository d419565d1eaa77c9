"""The registry: its entries, loading through a saved copy and through the Hub's cache, AG-Pair, encoders by name."""

import re
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
from datasets.arrow_writer import ArrowWriter
from refusal import refused
from tinymodels import HEAD_DIM, HEADS, LAYERS, save

import fslib
from fslib.data.bbc import EMBEDDED
from fslib.data.hub import REGISTRY, Source, hub_task
from fslib.data.loading import DERIVED, load_tasks, task_names
from fslib.data.tasks import METRIC_OF, METRICS
from fslib.model import encoders as models

ONE_TEXT = ["cola", "ag", "imdb", "yelp_p", "yelp_f", "dbpedia", "yahoo", "sst-2", "sogou"]
TWO_TEXTS = ["mrpc", "mnli", "qqp", "qnli", "cmnli", "sts-b", "wnli", "rte", "scitail", "snli"]
LANGUAGES = "ar bg de el en es fr hi ru sw th tr ur vi zh"
XNLI = [f"xnli-{language}" for language in LANGUAGES.split()]
MRPC = REGISTRY["mrpc"]


@pytest.fixture(autouse=True)
def no_other_data(monkeypatch, tmp_path):
    """Neither data nor cache of whoever runs the tests."""
    monkeypatch.delenv("FSLIB_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def columns_of(source: Source) -> list[str]:
    return [column for columns in source.texts for column in columns]


def table(
    source: Source, side: int, n: int = 12, labels: list[Any] | None = None
) -> datasets.Dataset:
    """A split as the Hub has it, but with class names in reverse order; row i is of registry class i % classes."""
    names = source.labels[::-1]
    data: dict[str, list[Any]] = {
        c: [f"{c} {side} {i}" for i in range(n)] for c in columns_of(source)
    }
    features = {c: datasets.Value("string") for c in data}
    if source.label == "gold_label":  # SciTail's labels are strings
        kind, found = (
            datasets.Value("string"),
            [source.labels[i % len(source.labels)] for i in range(n)],
        )
    elif names:
        kind, found = (
            datasets.ClassLabel(names=list(names)),
            [len(names) - 1 - i % len(names) for i in range(n)],
        )
    else:
        kind, found = datasets.Value("float32"), [i % 11 / 2 for i in range(n)]
    features["idx"] = datasets.Value("int32")
    data |= {source.label: found if labels is None else labels, "idx": list(range(n))}
    return datasets.Dataset.from_dict(
        data, features=datasets.Features({**features, source.label: kind})
    )


def both(source: Source, n: int = 42, **options: Any) -> datasets.DatasetDict:
    return datasets.DatasetDict(
        {split: table(source, i, n, **options) for i, split in enumerate(source.splits)}
    )


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


# The registry


def test_all_35_tasks_are_there():
    assert set(REGISTRY) == {*ONE_TEXT, *TWO_TEXTS, *XNLI, "ag-pair"}
    assert len(REGISTRY) == 35
    assert task_names(hub_too=True) == [*EMBEDDED, *DERIVED, *REGISTRY]
    assert set(DERIVED.values()) <= set(REGISTRY)


@pytest.mark.parametrize("name", REGISTRY)
def test_an_entry_is_complete(name):
    source = REGISTRY[name]
    assert re.fullmatch(
        r"[\w-]+/[\w-]+", source.hub
    )  # organisation and name: no script of the datasets library
    assert re.fullmatch("[0-9a-f]{40}", source.revision)
    assert source.config and source.label and source.description
    assert source.splits[0] == "train" and source.splits[1] in (
        "validation",
        "validation_matched",
        "test",
    )
    assert len(source.texts) == (2 if name in TWO_TEXTS + XNLI else 1) and all(source.texts)
    assert len(set(columns_of(source))) == len(columns_of(source))
    assert len(set(source.labels)) == len(source.labels) != 1
    assert all(
        rows > unlabelled >= 0
        for rows, unlabelled in zip(source.rows, source.unlabelled, strict=True)
    )
    metric = METRIC_OF.get(name, "accuracy")
    assert metric in METRICS and (metric == "spearman") == (not source.labels)
    assert metric != "f1" or len(source.labels) == 2


def test_labels_of_glue_are_in_glues_order_and_f1_counts_the_second():
    assert (
        MRPC.labels == ("not_equivalent", "equivalent") and REGISTRY["qqp"].labels[1] == "duplicate"
    )
    assert REGISTRY["sst-2"].labels == ("negative", "positive")
    assert {REGISTRY[n].labels for n in ("mnli", "cmnli", "snli", *XNLI)} == {
        REGISTRY["mnli"].labels
    }
    assert REGISTRY["mnli"].splits[1] == "validation_matched"
    assert {
        n for n, s in REGISTRY.items() if "glue" in s.hub and s.splits[1] == "test"
    } == set()  # unlabelled there


# Loading, through saved copies


@pytest.mark.parametrize("name", REGISTRY)
def test_every_task_loads_with_texts_joined_and_labels_by_name(tmp_path, name):
    source = REGISTRY[name]
    write(both(source), tmp_path / name)
    task = load_tasks([name], tmp_path, check_rows=False)[name]
    assert task.metric == METRIC_OF.get(name, "accuracy")
    assert task.source == str(tmp_path / name) and task.description == source.description
    if name == "ag-pair":
        assert task.label_names == ("different", "same")
        return
    assert task.label_names == source.labels
    for side, split in enumerate((task.train, task.eval)):
        assert len(split) == 42
        assert split.texts[41] == " ".join(f"{column} {side} 41" for column in source.texts[0])
        assert (split.pairs is not None) == (name in TWO_TEXTS + XNLI)
        if split.pairs:
            assert split.pairs[41] == f"{source.texts[1][0]} {side} 41"
        classes = len(source.labels)
        assert split.labels.tolist() == [i % classes if classes else i % 11 / 2 for i in range(42)]


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "jsonl"])
@pytest.mark.parametrize("name", ["mrpc", "snli", "sts-b", "yelp_p"])
def test_all_ways_to_save_give_the_same_task(tmp_path, name, kind):
    source = REGISTRY[name]
    data = both(source)
    if source.labels:
        code = [-1, *data["train"]["label"][1:]]
        data["train"] = table(source, 0, 42, labels=code)
    data["train"] = data["train"].map(
        lambda row, i: {columns_of(source)[0]: "nan" if i == 3 else f"a {i}"}, with_indices=True
    )
    tasks = [
        hub_task(name, write(data, tmp_path / each / name, each), check_rows=False)
        for each in ("disk", kind)
    ]
    assert tasks[0].fingerprint == tasks[1].fingerprint
    assert "nan" in tasks[1].train.texts  # a word, not a missing text


def test_missing_parts_of_a_joined_text_leave_no_gap(tmp_path):
    source = REGISTRY["yahoo"]
    data = both(source)
    gaps = {"question_content": [None, "", *["c"] * 40]}
    data["train"] = (
        data["train"]
        .remove_columns(list(gaps))
        .add_column("question_content", gaps["question_content"])
    )
    task = hub_task("yahoo", write(data, tmp_path / "yahoo"), check_rows=False)
    assert task.train.texts[:3] == (
        "question_title 0 0 best_answer 0 0",
        "question_title 0 1 best_answer 0 1",
        "question_title 0 2 c best_answer 0 2",
    )


def test_rows_without_a_label_are_dropped_and_counted(tmp_path, monkeypatch):
    source = REGISTRY["snli"]
    data = both(source, 9)
    data["train"] = table(source, 0, 9, labels=[2, -1, 0, None, 1, -1, 2, 1, 0])
    folder = write(data, tmp_path / "snli")
    monkeypatch.setitem(REGISTRY, "snli", replace(source, rows=(9, 9), unlabelled=(3, 0)))
    task = hub_task("snli", folder)
    assert [text[-1] for text in task.train.texts] == list("024678")
    assert task.train.pairs is not None and task.train.pairs[1] == "hypothesis 0 2"
    assert task.train.labels.tolist() == [0, 2, 1, 0, 1, 2]
    monkeypatch.setitem(REGISTRY, "snli", replace(source, rows=(9, 9), unlabelled=(2, 0)))
    with refused("snli", "split train", "6 labelled rows found, 7 expected", "check_rows=False"):
        hub_task("snli", folder)


def test_own_data_come_before_a_download(tmp_path, monkeypatch):
    write(both(MRPC), tmp_path / "MRPC")
    monkeypatch.setenv("FSLIB_DATA", str(tmp_path))
    assert load_tasks("Mrpc", check_rows=False)["mrpc"].source == str(tmp_path / "MRPC")
    for side in ("train", "dev"):  # GLUE's layout comes first
        (tmp_path / "MRPC" / f"{side}.tsv").write_text(
            "sentence1\tsentence2\tlabel\na\tb\t0\nc\td\t1\n"
        )
    task = load_tasks(["mrpc"])["mrpc"]
    assert (task.metric, task.label_names, len(task.train)) == ("f1", ("0", "1"), 2)


def test_where_the_data_came_from_is_no_part_of_what_they_are(tmp_path):
    tasks = [
        hub_task("mrpc", write(both(MRPC), tmp_path / place), check_rows=False) for place in "ab"
    ]
    assert tasks[0].source != tasks[1].source
    assert (
        tasks[0].fingerprint == tasks[1].fingerprint
        and tasks[0].limited(train=20).source == tasks[0].source
    )


def test_the_largest_tables_load_in_seconds(tmp_path):
    source = REGISTRY["dbpedia"]
    data = {
        split: table(source, i, rows)
        for i, (split, rows) in enumerate(zip(source.splits, source.rows, strict=True))
    }
    write(datasets.DatasetDict(data), tmp_path / "dbpedia")
    start = time.perf_counter()
    task = load_tasks(["dbpedia"], tmp_path)["dbpedia"]
    assert time.perf_counter() - start < 30
    assert (len(task.train), len(task.eval)) == source.rows == (560_000, 70_000)


# What is refused


def without(data: datasets.DatasetDict, column: str) -> datasets.DatasetDict:
    return data.remove_columns([column])


def renamed(old: str, new: str) -> datasets.DatasetDict:
    return both(replace(MRPC, labels=tuple(new if n == old else n for n in MRPC.labels)))


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (
            renamed("equivalent", "paraphrase"),
            ["split train", "no label 'equivalent'", "paraphrase, not_equivalent"],
        ),
        (both(MRPC), ["split train", "42 rows found, 3668 expected", "check_rows=False"]),
        (without(both(MRPC), "sentence2"), ["split train", "no column 'sentence2'", "sentence1"]),
        (without(both(MRPC), "label"), ["split train", "no column 'label'", "idx"]),
        (datasets.DatasetDict({"train": both(MRPC)["train"]}), ["no split 'validation'", "train"]),
        (both(MRPC, labels=[-1] * 42), ["split train", "every label is -1"]),
        (
            both(replace(MRPC, labels=(*MRPC.labels, "unsure"))),
            ["split train", "label 'unsure'", "none of not_equivalent, equivalent"],
        ),
    ],
    ids=["label", "rows", "text column", "label column", "split", "unlabelled", "one label more"],
)
def test_data_that_are_not_as_expected_are_refused(tmp_path, data, parts):
    write(data, tmp_path / "mrpc")
    with refused("mrpc", *parts):
        load_tasks(["mrpc"], tmp_path)


def test_scores_that_are_no_numbers_and_texts_that_are_none_are_refused(tmp_path):
    data = both(REGISTRY["sts-b"]).cast_column("label", datasets.Value("string"))
    data["train"] = data["train"].map(lambda row: {"label": "high"})
    with refused("sts-b", "split train", "'label' must hold numbers", "high"):
        hub_task("sts-b", write(data, tmp_path / "sts-b"))
    data = both(REGISTRY["cola"]).map(lambda row: {"sentence": None})
    with refused("cola", "example 0", "strings"):
        hub_task("cola", write(data, tmp_path / "cola"), check_rows=False)


def test_a_damaged_or_empty_copy_is_refused(tmp_path):
    folder = write(both(MRPC), tmp_path / "mrpc", "parquet")
    (folder / "train.parquet").write_bytes(b"PAR1 not really")
    with refused(folder, "cannot be read"):
        hub_task("mrpc", folder)
    (tmp_path / "rte").mkdir()
    with refused("rte", "no split 'train'", "it has none"):
        load_tasks(["rte"], tmp_path)


@pytest.mark.parametrize(
    ("name", "near"),
    [("yelp-p", "yelp_p"), ("sst2", "sst-2"), ("xnli-xx", "xnli-"), ("stsb", "sts-b")],
)
def test_an_unknown_name_gets_the_nearest_one(name, near):
    for load in (load_tasks, hub_task):
        with refused("unknown task", repr(name), f"did you mean '{near}"):
            load(name)


def test_xnli_alone_names_its_languages():
    with refused("xnli", "xnli-ar", "xnli-en", "xnli-zh"):
        load_tasks(["XNLI"])


# The Hub, which tests do not reach


@pytest.mark.parametrize("offline", [True, False], ids=["told to be offline", "no connection"])
def test_an_unreachable_hub_is_one_clear_line(monkeypatch, offline):
    for constants, setting in (
        (huggingface_hub.constants, "ENDPOINT"),
        (datasets.config, "HF_ENDPOINT"),
    ):
        monkeypatch.setattr(constants, setting, "http://127.0.0.1:9")  # nobody listens there
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    with refused("task mrpc", "nyu-mll/glue", MRPC.revision, "check the network", "FSLIB_DATA"):
        load_tasks(["mrpc"])


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError(
            "Dataset 'nyu-mll/glue' doesn't exist on the Hub\nor is private"
        ),
        ValueError("BuilderConfig 'mrpc' not found"),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
    ids=["gone", "config gone", "script"],
)
def test_a_dataset_that_has_gone_is_one_clear_line(monkeypatch, error):
    def gone(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", gone)
    with refused("task mrpc", "nyu-mll/glue", str(error).splitlines()[0], "FSLIB_DATA"):
        load_tasks(["mrpc"])


def into_the_hubs_cache(data: datasets.DatasetDict, source: Source, revision: str) -> None:
    """What remains on the disk after a download of this revision."""
    organisation, name = source.hub.split("/")
    folder = Path(
        datasets.config.HF_DATASETS_CACHE,
        f"{organisation}___{name}",
        source.config,
        "0.0.0",
        revision,
    )
    folder.mkdir(parents=True)
    splits = datasets.SplitDict(dataset_name=name)
    for split, rows in data.items():
        with ArrowWriter(
            path=str(folder / f"{name}-{split}.arrow"), features=rows.features
        ) as writer:
            writer.write_table(rows.data.table)
            writer.finalize()
        splits.add(datasets.SplitInfo(split, num_examples=len(rows), dataset_name=name))
    info = datasets.DatasetInfo(
        features=data["train"].features,
        splits=splits,
        dataset_name=name,
        config_name=source.config,
        version="0.0.0",
    )
    info.write_to_directory(str(folder))


def test_what_was_downloaded_is_loaded_offline_and_its_revision_is_recorded():
    into_the_hubs_cache(both(MRPC), MRPC, MRPC.revision)
    task = hub_task("mrpc", check_rows=False)
    assert task.source == f"nyu-mll/glue (mrpc) at {MRPC.revision}"
    assert task.label_names == MRPC.labels and len(task.eval) == 42
    assert task.train.labels[:4].tolist() == [0, 1, 0, 1]


def test_another_revision_in_the_cache_is_refused_unless_it_is_asked_for():
    other = "0" * 40
    into_the_hubs_cache(both(MRPC), MRPC, other)
    with refused("task mrpc", "nyu-mll/glue", f"of revision {other}, not {MRPC.revision}"):
        load_tasks(["mrpc"], check_rows=False)
    assert hub_task("mrpc", revision="main", check_rows=False).source.endswith(
        other
    )  # resolved, not "main"
    with refused("task mrpc", "42 rows found"):
        hub_task("mrpc", revision=other)


# AG-Pair


def topics_of(task: fslib.Task, data: datasets.DatasetDict) -> dict[str, int]:
    return {
        text: y
        for rows in data.values()
        for text, y in zip(rows["text"], rows["label"], strict=True)
    }


@pytest.fixture
def ag_news(tmp_path):
    """400 and 80 news items of four topics, not in order; two texts repeat within train and two stand in eval too."""
    source = REGISTRY["ag"]
    rng = np.random.default_rng(0)
    data = datasets.DatasetDict(
        {
            s: table(source, i, n).shuffle(seed=1)
            for i, (s, n) in enumerate(zip(source.splits, (400, 80), strict=True))
        }
    )
    repeats = [data["train"].select(rng.choice(400, 2)), data["test"].select(rng.choice(80, 2))]
    data["train"] = datasets.concatenate_datasets([data["train"], *repeats])
    return data, write(data, tmp_path / "ag")


def test_ag_pair_uses_every_text_twice_once_per_class(ag_news):
    data, folder = ag_news
    task = load_tasks(["ag-pair"], folder.parent, check_rows=False)[
        "ag-pair"
    ]  # found in AG News's folder
    topic = topics_of(task, data)
    for split, n in ((task.train, 400), (task.eval, 80)):
        assert len(split) == n and np.bincount(split.labels).tolist() == [n // 2, n // 2]
        rows = list(zip(split.texts, split.pairs, split.labels.tolist(), strict=True))
        uses = Counter((text, y) for one, other, y in rows for text in (one, other))
        assert set(uses.values()) == {1} and len(uses) == 2 * n
        assert all(
            (topic[one] == topic[other]) == bool(y) and one != other for one, other, y in rows
        )
    assert not task.shared_texts() and not task.train.sources() & task.eval.sources()


def test_ag_pair_is_repeatable_and_follows_its_seed(ag_news):
    _, folder = ag_news
    tasks = [hub_task("ag-pair", folder, check_rows=False, seed=seed) for seed in (0, 0, 1)]
    assert tasks[0].fingerprint == tasks[1].fingerprint != tasks[2].fingerprint


def test_ag_pair_counts_the_rows_of_ag_news(ag_news):
    with refused("ag-pair", "split train", "404 rows found, 120000 expected"):
        hub_task("ag-pair", ag_news[1])


def test_ag_pair_at_full_size_is_made_in_seconds(tmp_path):
    source = REGISTRY["ag"]
    data = {split: table(source, i, source.rows[i]) for i, split in enumerate(source.splits)}
    folder = write(datasets.DatasetDict(data), tmp_path / "ag-pair")
    start = time.perf_counter()
    task = load_tasks(["ag-pair"], tmp_path)["ag-pair"]
    assert time.perf_counter() - start < 20
    assert (len(task.train), len(task.eval)) == (120_000, 7_600)
    assert task.source == str(folder)


# Encoders by name


def test_the_papers_seven_encoders_are_there_and_do_not_mix_with_the_embedded_ones():
    assert list(models.PRETRAINED) == [
        *(f"bert-{size}" for size in ("mini", "small", "medium", "base", "large")),
        *(f"roberta-{size}" for size in ("base", "large")),
    ]
    assert not set(models.PRETRAINED) & set(models.ENCODERS)
    for name, (source, (kind, layers, heads, width)) in models.PRETRAINED.items():
        assert name.startswith(f"{kind}-") and re.fullmatch(r"[\w-]+/[\w-]+", source)
        assert width == 64 * heads and 4 <= layers <= 24


@pytest.mark.parametrize("name", ["bert-base", "roberta-base"])
def test_an_encoder_loads_by_name(zoo, monkeypatch, name):
    family = name.split("-")[0]
    shape = (family, LAYERS, HEADS, HEADS * HEAD_DIM)
    monkeypatch.setitem(models.PRETRAINED, name, (str(zoo.folder(family)), shape))
    model = fslib.MultiTaskModel.from_pretrained(name, zoo.tasks)
    assert (model.source, model.n_layers, model.n_heads, model.pooling) == (
        name,
        LAYERS,
        HEADS,
        "first",
    )


@pytest.mark.parametrize(
    ("family", "changes"),
    [("bert", {"num_hidden_layers": 2}), ("roberta", {}), ("bert", {"num_attention_heads": 2})],
)
def test_a_checkpoint_of_another_architecture_is_refused(
    zoo, tmp_path, monkeypatch, family, changes
):
    source = str(save(family, tmp_path / "other", **changes))
    (tmp_path / "other" / "model.safetensors").unlink()  # refused before the weights are looked for
    monkeypatch.setitem(
        models.PRETRAINED, "bert-mini", (source, ("bert", LAYERS, HEADS, HEADS * HEAD_DIM))
    )
    with refused(
        "bert-mini", source, "of another architecture", "not bert of 3 layers x 4 heads, 32 wide"
    ):
        fslib.MultiTaskModel.from_pretrained("bert-mini", zoo.tasks)


@pytest.mark.parametrize("pickled", [True, False], ids=["pickled weights only", "not reached"])
def test_an_encoder_that_the_hub_does_not_supply_is_one_clear_line(
    zoo, tmp_path, monkeypatch, pickled
):
    if pickled:
        folder = Path(shutil.copytree(zoo.folder("bert"), tmp_path / "mini"))
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        monkeypatch.setitem(
            models.PRETRAINED, "bert-mini", (str(folder), ("bert", LAYERS, HEADS, HEADS * HEAD_DIM))
        )
    with refused(
        "model bert-mini", models.PRETRAINED["bert-mini"][0], "safetensors", "check the network"
    ):
        fslib.MultiTaskModel.from_pretrained("bert-mini", zoo.tasks)


def test_an_unknown_encoder_hears_of_both_kinds(zoo):
    with refused("unknown model 'bert_base'", "did you mean 'bert-base'", "minilm-l6"):
        fslib.MultiTaskModel.from_pretrained("bert_base", zoo.tasks)


@pytest.mark.parametrize("family", ["roberta", "gpt2", "t5"])
def test_a_saved_model_whose_encoder_was_swapped_is_refused(zoo, tmp_path, family):
    """RoBERTa and GPT-2 here are as wide as BERT, so nothing else would notice."""
    zoo.model("bert").save(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "encoder")
    shutil.copytree(zoo.folder(family), tmp_path / "model" / "encoder")
    with refused(
        tmp_path / "model", "of another architecture", f"{family} of 3 layers", "encoder does not fit"
    ):
        fslib.MultiTaskModel.load(tmp_path / "model")

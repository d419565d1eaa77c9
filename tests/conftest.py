"""Share what tests need: shapes checked at run time, no Hub, results elsewhere, tiny models."""

import os
import re
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Models here are tiny: a second thread only waits, and on a busy machine it makes others wait, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

# Every signature's shapes and types are enforced while tests run.
install_import_hook("fslib", "beartype.beartype")

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Let notebooks under test read a copy of the committed records, and write beside it."""
    scratch = Path(tempfile.mkdtemp(prefix="fslib-results-"))
    config.add_cleanup(lambda: shutil.rmtree(scratch, ignore_errors=True))
    if (ROOT / "results" / "mini").is_dir():
        ignored = shutil.ignore_patterns("checkpoints", ".locks")
        shutil.copytree(ROOT / "results" / "mini", scratch / "mini", ignore=ignored)
        # notebook 08 shows the claims of this profile, too
        shutil.copytree(ROOT / "results" / "evidence" / "tables", scratch / "evidence" / "tables")
    os.environ["FSLIB_RESULTS"] = str(scratch)


@pytest.fixture(scope="session")
def tasks():
    """The four embedded tasks that profiles take, a few examples of each."""
    import fslib

    names = ("bbc", "bbc-pair", "bbc-headline", "bbc-shift")
    return {name: task.limited(train=48, eval=24) for name, task in fslib.load_tasks(names).items()}


@pytest.fixture
def tiny(tasks):
    """A new 2-layer, 12-head model with random weights for these four tasks, not trained."""
    import fslib

    return fslib.MultiTaskModel.from_pretrained("tiny-random", tasks, max_length=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of small tasks in GLUE's layout."""
    from small_units import write_tasks

    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture
def small_tasks(data, monkeypatch):
    """Tasks are those of the folder `data`, as long as a test runs."""
    from fslib.study.fingerprints import cached_task

    monkeypatch.setenv("FSLIB_DATA", str(data))
    cached_task.cache_clear()
    yield
    cached_task.cache_clear()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Tiny random models of every architecture, made once a module, run on one thread."""
    from tinymodels import Zoo, one_thread

    with one_thread():
        yield Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def bert(zoo):
    return zoo.model("bert")


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = [path for path in map(shutil.which, BROWSERS) if path]


@pytest.fixture(scope="module")
def chromium():
    """A browser without a window."""
    if not CHROMIUM:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM[0], args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium, tmp_path, request):
    """A new page that may ask this machine alone; its errors fail the test, with a picture."""
    page = chromium.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(60_000)
    troubles: list[str] = []

    def guarded(route) -> None:
        if re.match(r"https?://(?!(127\.0\.0\.1|localhost)[:/])", route.request.url):
            troubles.append(f"asked for {route.request.url}")
            route.abort()
        else:
            route.continue_()

    page.route("**/*", guarded)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    mine = lambda m: m.type == "error" and "/api/" not in m.text  # noqa: E731
    page.on("console", lambda m: mine(m) and troubles.append(m.text))
    page.troubles = troubles
    yield page
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    page.close()
    assert troubles == [], f"see {tmp_path / 'page.png'}"

"""report.html: complete, self-contained, readable, and safe whatever the texts contain."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import main
from conftest import ROWS, write_csv
from evaluation.plots import BLUE, FEW, Run, learning_curves, merge_sparse, run_plots, svg
from test_main import load

pytestmark = pytest.mark.pictures
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"


@pytest.fixture
def evil_files(tmp_path) -> list[str]:
    """Write files with HTML in texts and labels, and a $ that no plot may read as a formula."""
    names = {"0": "<b>zero</b>", "1": "$1", "2": "two & more"}
    rows = [(f"{text} {EVIL}", names[label]) for text, label in ROWS]
    files = []
    for name in ("train", "validation", "test"):
        files += [f"--{name}_file", write_csv(tmp_path / f"{name}-evil.csv", rows)]
    return files


class Page(HTMLParser):
    """Counts elements and collects attributes that could load something from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.links: list[str] = []
        self.labels: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.links.append(value)
            if name == "aria-label":
                self.labels.append(value)


def in_chromium(path: Path) -> str:
    """Return the DOM of a page in a browser, after its scripts (if any) have run."""
    found = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return found.stdout


@pytest.mark.parametrize("flags", [("--prefix",), ("--eval_strategy", "no")])
def test_a_run_writes_a_self_contained_page_and_the_same_one_again(run, flags):
    """But for times and names."""

    def page(name: str) -> str:
        return (run(*flags, name=name) / "report.html").read_text(encoding="utf-8")

    text = page("first-run")
    counted = Page(text)
    curves = 1 if "no" in flags else 2
    assert counted.count["svg"] == curves + 3 == len(counted.labels)  # with a text alternative
    assert counted.count["table"] == 5 and "script" not in counted.count
    assert all(link.startswith("#") for link in counted.links)  # within the page
    assert not re.search(r"url\((?!#)|@import", text)
    assert "How to reproduce it" in text
    if "no" in flags:
        again = page("second-run")
        one, other = (re.sub(r"[0-9.]+ s\b|(first|second)-run", "", each) for each in (text, again))
        assert one == other


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (apt install chromium)")
def test_html_in_texts_and_labels_is_shown_and_never_executed(run, evil_files):
    """In a browser, too."""
    path = run(*evil_files) / "report.html"
    text = path.read_text(encoding="utf-8")
    assert EVIL not in text and "&lt;script&gt;" in text
    assert Page(text).count.get("script", 0) == Page(text).count.get("img", 0) == 0
    assert "&lt;b&gt;zero&lt;/b&gt;" in text and "$1" in text and "<b>zero" not in text
    dom = in_chromium(path)
    assert "hacked" not in re.search("<title>(.*?)</title>", dom)[1]
    page = Page(dom)
    assert page.count["svg"] == 5 and page.count["table"] == 5
    assert page.count.get("img", 0) == page.count.get("script", 0) == 0


def test_the_words_that_a_mistake_depends_on_are_shaded(run, predict, tmp_path):
    """The figures are those of predicting the text again without each word."""
    folder = run("--pooling", "mean")
    shown = load(folder, "evaluation.json")["test"]["mistakes"]
    mistake = next(one for one in shown if len(one["text"].split()) > 1)
    words = mistake["text"].split()
    left = [" ".join(words[:n] + words[n + 1 :]) for n in range(len(words))]
    write_csv(tmp_path / "left.csv", [[text] for text in left], header=["text"])
    assert predict(folder, "--test_file", str(tmp_path / "left.csv"))[0] == 0
    table = pd.read_csv(tmp_path / "predicted" / "predictions.csv")
    without = table[f"probability_{mistake['predicted']}"]
    expected = mistake["confidence"] - without.to_numpy()
    assert [word for word, _ in mistake["words"]] == words
    np.testing.assert_allclose([fall for _, fall in mistake["words"]], expected, atol=1e-4)
    assert "<mark style" in (folder / "report.html").read_text(encoding="utf-8")


def test_without_test_labels_the_page_shows_the_validation_file(run, tmp_path):
    test = write_csv(tmp_path / "no labels.csv", [["a dog"], ["a tune"]], header=["text"])
    folder = run("--test_file", test)
    assert "Results on the validation file" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_of_predictions_alone_names_no_tuning_method(run, files, tmp_path):
    model = str(run("--prefix"))
    argv = ["--do_predict", "--model_name_or_path", model, "--test_file", files[5]]
    assert main.main([*argv, "--output_dir", str(tmp_path / "scored")]) == 0
    text = (tmp_path / "scored" / "report.html").read_text(encoding="utf-8")
    assert "Full fine-tuning" not in text and "accuracy on unseen texts" not in text
    assert f"<h1>Predictions of {model}</h1>" in text and "This run trained nothing" in text
    assert "Results on the test file" in text


def test_several_labels_per_row_have_no_confusion_matrix(run, tmp_path):
    rows = [(text, f"{label}|{(int(label) + 1) % 3}") for text, label in ROWS]
    path = write_csv(tmp_path / "several.csv", rows)
    flags = [word for name in ("train", "validation", "test") for word in (f"--{name}_file", path)]
    text = (run("--problem_type", "multi_label_classification", *flags) / "report.html").read_text(
        encoding="utf-8"
    )
    assert "Confusion matrix" not in text and "Reliability curve" in text


def test_every_point_of_the_reliability_curve_stands_for_enough_rows():
    random = np.random.default_rng(0)
    for rows in random.integers(0, 40, size=(200, 10)):
        bins = np.stack([rows, rows * 0.5, rows * 0.7])
        merged = merge_sparse(bins)
        assert (merged[0] >= FEW).all() or len(merged[0]) == 1
        assert np.allclose(merged.sum(axis=1), bins.sum(axis=1))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["정치", "文化", "ไทย", "עברית", "😂", "ENTERTAINMENT NEWS"])
@pytest.mark.parametrize("times", [10])
def test_labels_of_any_script_and_length_are_drawn_as_text_without_a_warning(name, times):
    """The browser has fonts that matplotlib lacks; long labels left no room for the picture."""
    labels = [(name * times)[:60], "b"]
    bins = {"rows": [9], "hits": [5], "confidence": [6]}
    details = {"confusion": [[1, 0], [0, 1]], "f1": [1, 1], "support": [1, 1], "reliability": bins}
    plots = run_plots(Run(labels, details | {"coverage": {"all": [[0, 1, 1]]}}, []))
    assert "".join(map("".join, plots.values())).count(f">{labels[0]}") == 2  # two axes


def test_the_curve_of_a_short_run_begins_at_its_first_step_and_shows_its_points(run):
    """It had one point, without a mark, at the end."""
    lines = (run() / "metrics.jsonl").read_text().splitlines()  # 6 steps, one line in 50
    records = [line for line in map(json.loads, lines) if "loss" in line]
    assert [(line["step"], line["epoch"]) for line in records] == [(1, 1 / 3), (6, 2)]
    for count in (1, 2):
        (picture,) = (
            svg(axis.figure, words) for axis, words in learning_curves(Run([], {}, records[:count]))
        )
        marks = re.findall(rf"<use [^>]*fill: {BLUE.lower()}", picture)
        assert len(marks) == count + 1  # and one in the legend

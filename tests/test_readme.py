"""The documentation: its headline figures, commands, links and length."""

import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from arguments import parse_args

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("[!.]*/README.md"), ROOT / "results" / "LOG.md"])
SINGLES = "published_split.csv"  # single runs
# Rows of the headline table: the method in the studies, and the files of the published split and of
# unseen titles. results/README.md says how these studies differ.
ROWS = {
    "a dictionary of titles": ("look-up", "study_published.json", "study_raw.json"),
    "TF-IDF of words, linear": ("TF-IDF, linear", "study_published.json", "study_new_texts.json"),
    "words, characters and embeddings, linear": (
        "combined, linear", "study_published.json", "study_new_texts.json",
    ),
    "full fine-tuning": ("full", "study_published.json", "study_new_texts.json"),
    "prefix, 128 tokens in every layer": (
        "prefix", "study_published.json", "study_new_texts.json",
    ),
    "both and linear models, averaged": (
        "ensemble", "study_published.json", "study_new_texts.json",
    ),
    "prefix, 16 tokens at the input": ("input prefix", "study.json", "study_raw.json"),
    "bias tuning": ("bias", SINGLES, "study_raw.json"),
    "linear probing": ("probe", SINGLES, "study_raw.json"),
}  # fmt: skip


def read_study(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def study_row(name: str, protocol: str, method: str) -> dict:
    """One method's row in a study, or its single run."""
    if name == SINGLES:
        runs = pd.read_csv(ROOT / "results" / name).set_index("command")
        run = runs.loc[f"script/run_og.sh --tuning_method {method} --seed 42"]
        return {"accuracy": run["test_accuracy"], "accuracy sd": None}
    rows = read_study(name)["summary"]
    return next(row for row in rows if (row["protocol"], row["method"]) == (protocol, method))


def headline_rows() -> dict[str, list[str]]:
    """The cells of the README's first table, by method, without bold type."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").replace("**", "").split("\n")
    table = [line for line in lines[: lines.index("```bash")] if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    return {method: rest for method, *rest in cells}


def study_cells(method: str, published: str, unseen: str) -> list[str]:
    """The same cells of one row, from the files of the studies."""

    def percent(row: dict, digits: int) -> str:
        spread = row["accuracy sd"]
        shown = f"{100 * row['accuracy']:.{digits}f}"
        return f"{shown} ± {100 * spread:.{digits}f} %" if spread else f"{shown} %"

    row = study_row(unseen, "unseen", method)
    trained, size = row["trained"], row["bytes"]
    stored = f"{size / 1e3:.0f} kB" if size < 1e6 else f"{size / 1e6:.2g} MB"
    return [
        f"{trained:,.0f}" if size else "",
        percent(study_row(published, "original", method), 2),
        percent(row, 1),
        stored if size else "",
    ]


def test_the_headline_figures_are_those_of_the_studies():
    (title, original), *rows = headline_rows().items()
    assert title.startswith("[the original work](") and original == ["", "93.46 %", "", ""]
    assert dict(rows) == {title: study_cells(*files) for title, files in ROWS.items()}


def test_the_best_free_baseline_is_that_of_the_validation_files():
    """The headline table has it, for both columns, and the advice compares with it."""
    chosen = {"study_published.json": "TF-IDF, linear", "study_new_texts.json": "combined, linear"}
    for name, method in chosen.items():
        found: dict[str, list[float]] = {}
        for run in read_study(name)["runs"]:
            kind = run["folder"].split("-", 1)[1].rsplit("-", 1)[0]
            found.setdefault(kind, []).append(run["results"]["eval_accuracy"])
        free = {kind: sum(each) for kind, each in found.items() if kind.endswith("-linear")}
        assert max(free, key=free.get) == method.replace(", ", "-")
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for test in read_study("study_new_texts.json")["tests"]:
        if (test["one"], test["other"]) == ("combined, linear", "full"):
            assert f"{100 * test['difference']:.1f} points above `combined`" in text
            assert f"(p = {test['p']:.4f}, paired by distinct title)" in text
        if (test["one"], test["other"]) == ("combined, linear", "prefix"):
            points = f"{100 * test['difference']:.1f} points above `combined`"
            assert f"{points}, which could be chance (p = {test['p']:.2f})" in text


def test_the_figures_of_the_free_baselines_are_those_of_their_study():
    page = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    rows = {row["method"]: row for row in read_study("study_free_baselines.json")["summary"]}
    for row in rows.values():
        low, high = (100 * end for end in row["on unseen interval"])
        shown = f"{100 * row['on unseen']:.1f} % ({low:.1f} to {high:.1f})"
        figures = f"{row['ECE']:.3f} ({row['by chance']:.3f})"
        assert f"{shown} | {row['log loss']:.2f} | {figures}" in page.replace("**", "")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"has {100 * rows['combined, SVM']['on unseen']:.1f} %" in readme


def test_the_commands_of_the_documentation_are_accepted():
    task = ["--do_train", "--do_eval", "--do_predict", "--output_dir", "out"]
    given = {"run_og.sh": task, "run_prefix.sh": [*task, "--prefix"], "main.py": []}
    count = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", "")
        for files in re.findall('FILES="(.*)"', text):
            text = text.replace("$FILES", files)
        for program, flags in re.findall(rf"({'|'.join(given)}) +(--[^`\n]+)", text):
            if flags == "--help" or "..." in flags or "{" in flags:
                continue
            if program != "main.py" and "--validation_file" not in flags:  # script/data.sh adds it
                flags += " --validation_file b.csv --test_file c.csv"
            parse_args([*given[program], *shlex.split(flags)])
            count += 1
    assert count >= 15


def test_the_readme_has_at_most_1800_words():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1800


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings]
            assert anchor in anchors, link


def test_no_path_of_a_machine_is_in_the_documentation_or_the_results():
    files = [*PAGES, *(path for path in (ROOT / "results").iterdir() if path.suffix != ".svg")]
    for path in files:
        found = re.search(
            r"(?<![\w.])/(home|root|work|tmp|Users|mnt)/|\.\./shared", path.read_text()
        )
        assert not found, f"{path.name}: {found}"

"""The documentation: its headline figures, commands, links and length."""

import ast
import gzip
import json
import re
import shlex
from pathlib import Path

import pytest

from arguments import parse_args
from script.study import front_page, reproduce

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("[!.]*/README.md"), ROOT / "results" / "LOG.md"])
# Rows of the headline table: the method in the studies, and the files of the published split and of
# unseen titles. results/README.md says how these studies differ.
PUBLISHED, NEW = "study_published.json", "study_new_texts.json"
ROWS = {
    "a dictionary of titles": ("look-up", PUBLISHED, "study_raw.json"),
    "TF-IDF of words, linear": ("TF-IDF, linear", PUBLISHED, NEW),
    "words, characters and embeddings, linear": ("combined, linear", PUBLISHED, NEW),
    "full fine-tuning": ("full", PUBLISHED, NEW),
    "prefix, 128 tokens in every layer": ("prefix", PUBLISHED, NEW),
    "both and linear models, averaged": ("ensemble", PUBLISHED, NEW),
}
# Columns of the tables of new texts: the files that have the methods, the first one first.
RAW, CLEANED = "raw, mean pooling", "cleaned, mean pooling"
STUDIES = {
    "raw, [CLS]": (NEW,),
    RAW: (
        "study_second_seeds.json",
        "study_second_seeds_4_prefixes.json",
        "study_calibration_raw.json",
    ),
    CLEANED: ("study_calibration_cleaned.json", "study_cleaned_4_prefixes.json"),
    "published split": (PUBLISHED,),
}
METHODS = {  # names of the tables: names of the studies
    "dictionary": "look-up",
    "TF-IDF of words, linear": "TF-IDF, linear",
    "words and characters, linear": "characters, linear",
    "prefix at the input": "input prefix",
    "average": "ensemble",
    "average of these and embeddings": "ensemble",
}


def read_study(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def study_row(name: str, protocol: str, method: str) -> dict | None:
    """One method's row in a study, or None."""
    rows = read_study(name)["summary"]
    return next(
        (row for row in rows if (row["protocol"], row["method"]) == (protocol, method)), None
    )


def study_test(name: str, protocol: str, one: str, other: str) -> dict | None:
    """The paired test of two methods in a study, or None."""
    names = (protocol, one, other)
    tests = read_study(name)["tests"]
    return next((t for t in tests if (t["protocol"], t["one"], t["other"]) == names), None)


def read_table(page: str, header: str) -> dict[str, list[str]]:
    """The cells of the table with this header, by the first of each row, without bold type."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("**", "")
    assert text.count(f"\n| {header} |\n") == 1, header
    lines = text.split(f"\n| {header} |\n")[1].split("\n\n")[0].split("\n")[1:]
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    return {name: rest for name, *rest in cells}


def percent(row: dict, digits: int, column: str = "accuracy") -> str:
    shown, spread = f"{100 * row[column]:.{digits}f}", row[f"{column} sd"]
    return f"{shown} ± {100 * spread:.{digits}f} %" if spread else f"{shown} %"


def stored(size: float) -> str:
    return f"{size / 1e3:.0f} kB" if size < 1e6 else f"{size / 1e6:.2g} MB"


def study_cells(method: str, published: str, unseen: str) -> list[str]:
    """The cells of a row of the headline table, from the files of the studies."""
    row = study_row(unseen, "unseen", method)
    return [
        f"{row['trained']:,.0f}" if row["bytes"] else "",
        percent(study_row(published, "original", method), 2),
        percent(row, 1),
        stored(row["bytes"]) if row["bytes"] else "",
    ]


def test_the_headline_figures_are_those_of_the_studies():
    header = "method | trained parameters | published split | unseen titles | size on disk"
    (title, original), *rows = read_table("README.md", header).items()
    assert title.startswith("[the original work](") and original == ["", "93.46 %", "", ""]
    assert dict(rows) == {title: study_cells(*files) for title, files in ROWS.items()}


def test_the_sizes_of_the_tuning_methods_are_those_of_the_studies():
    table = read_table("model/README.md", "method | trainable | parameters | stored")
    for name, (_, parameters, size) in table.items():
        method = "input prefix" if "input" in name else name.strip("`")
        row = study_row("study_raw.json", "unseen", method)
        if row:
            assert parameters == f"{row['trained']:,.0f}"
            assert size.endswith(stored(row["bytes"]))


def test_the_tables_of_results_are_those_of_the_studies():
    page = "results/README.md"
    table = read_table(page, "method | all test rows | unseen titles")
    for name, cells in table.items():
        row = study_row(PUBLISHED, "original", METHODS.get(name, name))
        assert cells == [percent(row, 2), percent(row, 1, "on unseen")]
    columns = list(STUDIES)[:3]
    table = read_table(page, f"method | {' | '.join(columns)}")
    tests = read_table(page, f"method | {' | '.join(STUDIES)}")
    for name, cells in table.items():
        for column, cell in zip(columns, cells, strict=True):
            rows = [study_row(file, "unseen", METHODS.get(name, name)) for file in STUDIES[column]]
            assert cell == percent(next(filter(None, rows)), 1) if any(rows) else cell == ""
    for name, cells in tests.items():
        for column, cell in zip(STUDIES, cells, strict=True):
            protocol = "original" if column == "published split" else "unseen"
            names = ("combined, linear", METHODS.get(name, name))
            pairs = [study_test(file, protocol, *names) for file in STUDIES[column]]
            assert cell == contrast(next(filter(None, pairs))) if any(pairs) else cell == ""


def contrast(test: dict) -> str:
    return f"{100 * test['difference']:+.1f} ({test['p']:.4f})"


def test_the_comparisons_of_prefix_and_full_are_those_of_the_studies():
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| (.*?) \|.*\| ([+-].*) \| (.*) \| `(study.*json)` \|", text)
    assert len(rows) == 11
    for texts, difference, p, name in rows:
        protocol = "original" if texts.startswith("published") else "unseen"
        assert f"{difference} ({p})" == contrast(study_test(name, protocol, "full", "prefix"))
    assert [row[1][0] for row in rows if "titles" in row[0]] == ["-"] * 9  # "nine of nine"


def test_the_learning_curve_is_that_of_its_file():
    header = "training titles | 250 | 500 | 1,000 | 2,000 | 2,359"
    sizes = read_study("learning_curve.json")["sizes"]
    for method, cells in read_table("results/README.md", header).items():
        rows = [row for row in sizes if row["method"] == method]
        assert cells == [percent({"a": row["mean"], "a sd": row["sd"]}, 1, "a") for row in rows]


def test_the_speeds_are_those_of_the_benchmarks():
    """In the order of the files, but for the contenders that the tables leave out."""
    benchmark, gib = read_study("benchmark.json"), 2**30
    header = "training | examples/s | peak memory | times as fast"
    shown = list(read_table("results/README.md", header).values())
    rows = [row for name, row in benchmark["tuning"].items() if "20" not in name]
    for cells, row in zip(shown, rows, strict=True):
        memory = f"{row['peak_memory_bytes'] / gib:.2f} GiB"
        rivals = [row["ratios"][name] for name in row["ratios"] if name.startswith(("HF", "PEFT"))]
        assert cells == [f"{row['rate']:.0f}", memory, f"{rivals[0]:.2f}" if rivals else ""]
    header = "scoring 2,048 distinct texts | texts/s | peak memory"
    rows = benchmark["scoring distinct texts"]
    rows = [row for name, row in rows.items() if name != "HF pipeline, compiled"]
    for cells, row in zip(read_table("results/README.md", header).values(), rows, strict=True):
        assert cells == [f"{row['rate']:,.0f}", f"{row['peak_memory_bytes'] / gib:.2f} GiB"]
    header = "one text at a time, one thread | texts/s | peak memory"
    rows = benchmark["scoring one text at a time, on one thread"].values()
    for cells, row in zip(read_table("results/README.md", header).values(), rows, strict=True):
        assert cells == [f"{row['rate']:,.0f}", f"{row['peak_memory_bytes'] / gib:.2f} GiB"]
    header = "a whole run on the published split | seconds | validation | test"
    rows = [row for row in read_study("whole_runs.json").values() if isinstance(row, dict)]
    for cells, row in zip(read_table("results/README.md", header).values(), rows, strict=True):
        shares = [f"{100 * row[f'{name}_accuracy']:.1f} %" for name in ("eval", "test")]
        assert cells == [f"{row['seconds']:.0f}", *shares]
    header = "models | texts/s | lone request | p50, p95, p99 at half load | p99 at 90 % | memory"
    rows = read_study("serving.json").values()
    for cells, row in zip(read_table("results/README.md", header).values(), rows, strict=True):
        loads, memory = row["loads"], f"{row['memory_bytes'] / gib:.2f} GiB"
        half = ", ".join(f"{loads['50%'][f'p{q}_ms']:.0f}" for q in (50, 95, 99))
        lone, busy = f"{loads['lone']['p50_ms']:.0f} ms", f"{loads['90%']['p99_ms']:.0f} ms"
        assert cells == [f"{row['texts_per_second']:.0f}", lone, f"{half} ms", busy, memory]


def test_the_tables_of_the_study_come_from_the_published_predictions():
    def rounded(text: str) -> list:
        return json.loads(text, parse_float=lambda figure: round(float(figure), 6))

    code = json.loads((reproduce.RESULTS / "runs.json").read_text())["code"]
    for name, rows in reproduce.Results(reproduce.RESULTS, code).tables().items():
        stored = (reproduce.RESULTS / f"{name}.json").read_text()
        assert rounded(json.dumps(rows)) == rounded(stored), name
    for page in front_page.PAGES:
        text = page.read_text(encoding="utf-8")
        assert front_page.filled(text) == text, "run: python -m script.study.front_page"


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
        text = re.sub("  +#.*", "", text)  # comments say what a command gives
        for files in re.findall('FILES="(.*)"', text):
            text = text.replace("$FILES", files)
        for program, flags in re.findall(rf"({'|'.join(given)}) +(--[^`\n]+)", text):
            if flags == "--help" or "..." in flags or "{" in flags:
                continue
            if program != "main.py" and "--validation_file" not in flags:  # script/data.sh adds it
                flags += " --validation_file b.csv --test_file c.csv"
            parse_args([*given[program], *shlex.split(flags)])
            count += 1
    assert count >= 12


def test_the_pages_are_short():
    pages = [*PAGES, ROOT / "evaluation" / "card.md"]
    words = {page: len(page.read_text(encoding="utf-8").split()) for page in pages}
    assert words[ROOT / "README.md"] <= 1200
    assert sum(words.values()) <= 14_000


def test_the_scripts_and_tests_that_the_pages_name_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        names = re.findall(r"`(?:tests/)?(test_[\w*]+\.py)`", text)
        files = [f"tests/{name}" for name in names] + re.findall(r"script/\w+\.sh", text)
        files += [f"{name.replace('.', '/')}.py" for name in re.findall(r"-m ([\w.]+)", text)]
        for name in files:
            assert list(ROOT.glob(name)), f"{page}: {name}"


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
        text = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8").read()
        found = re.search(r"(?<![\w.])/(home|root|work|tmp|Users|mnt)/|\.\./shared", text)
        assert not found, f"{path.name}: {found}"


def test_the_reading_path_is_as_long_as_it_says():
    """Each step names a file and, unless the whole file is meant, some of its definitions."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("30 minutes, about ")[2]
    lines = 0
    for step in re.findall(r"^\d\. .*", section, re.MULTILINE):
        files = re.findall(r"`([\w/]+\.py)`([^;.]*)", step.replace(", with `LastLayer` of", ";"))
        for path, rest in files:
            source = (ROOT / path).read_text(encoding="utf-8")
            wanted = re.findall(r"`(\w+)`", rest) or ["LastLayer"] * path.endswith("bert.py")
            known = {getattr(node, "name", None): node for node in ast.parse(source).body}
            nodes = [known[name] for name in wanted]
            lines += sum(node.end_lineno - node.lineno + 1 for node in nodes)
            lines += source.count("\n") * (not wanted)
    assert lines == pytest.approx(int(section.split()[0]), rel=0.07)

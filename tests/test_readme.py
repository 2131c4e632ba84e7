"""The documentation: its headline figures, commands, links and length."""

import ast
import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, f1_score

from arguments import parse_args
from script.study import front_page, reproduce

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("[!.]*/README.md"), ROOT / "results" / "LOG.md"])


def read_study(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def read_table(page: str, header: str) -> dict[str, list[str]]:
    """The cells of the table with this header, by the first of each row, without bold type."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("**", "")
    assert text.count(f"\n| {header} |\n") == 1, header
    lines = text.split(f"\n| {header} |\n")[1].split("\n\n")[0].split("\n")[1:]
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    return {name: rest for name, *rest in cells}


def stored(size: float) -> str:
    return f"{size / 1e3:.0f} kB" if size < 1e6 else f"{size / 1e6:.2g} MB"


def test_the_sizes_and_scores_in_the_text_are_those_of_the_study():
    sizes = front_page.methods_of("raw")
    for name, (_, parameters, size) in read_table(
        "model/README.md", "method | trainable | parameters | stored"
    ).items():
        row = sizes.get("input prefix" if "input" in name else name.strip("`"))
        if row:
            assert parameters == f"{row['trained']:,.0f}"
            assert size.endswith(stored(row["bytes"]))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"a prefix takes {stored(sizes['prefix']['bytes'])}" in " ".join(text.split())
    dictionary = front_page.methods_of("published")["look-up"]["of rows"]
    assert f"{100 * dictionary:.2f} %" in text


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
    results = reproduce.Results(reproduce.RESULTS, code)
    for key, run in results.runs.items():
        rows, figures = results.rows[key], run["results"]
        accuracy = accuracy_score(rows["label"], rows["predicted"])
        assert accuracy == pytest.approx(figures["test_accuracy"]), key
        macro = f1_score(rows["label"], rows["predicted"], average="macro", zero_division=0)
        assert macro == pytest.approx(figures["test_macro_f1"]), key
    for name, rows in results.tables().items():
        stored = (reproduce.RESULTS / f"{name}.json").read_text()
        assert rounded(json.dumps(rows)) == rounded(stored), name
    for page in front_page.PAGES:
        text = page.read_text(encoding="utf-8")
        assert front_page.filled(text) == text, "run: python -m script.study.front_page"


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

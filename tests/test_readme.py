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
METHODS = {  # of the headline table, by their names in the studies
    "look-up": "a dictionary of titles",
    "TF-IDF, linear": "TF-IDF, logistic regression",
    "full": "full fine-tuning",
    "prefix": "prefix, 128 tokens in every layer",
    "input prefix": "prefix, 16 tokens at the input",
    "bias": "bias tuning",
    "probe": "linear probing",
    "ensemble": "both and linear models, averaged",
}


def headline_rows() -> dict[str, list[str]]:
    """The cells of the README's first table, by method, without bold type."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").replace("**", "").split("\n")
    table = [line for line in lines[: lines.index("```bash")] if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    return {method: rest for method, *rest in cells}


def study_rows() -> dict[str, list[str]]:
    """The same cells, from the files of the studies and of the single runs."""
    study = {}  # the newest of each protocol and method
    for name in ("study", "study_published", "study_raw", "study_new_texts"):
        read = json.loads((ROOT / "results" / f"{name}.json").read_text())
        rows = {(row["protocol"], row["method"]): row for row in read["summary"]}
        # of the first, unseen titles are cleaned ones
        study |= {key: row for key, row in rows.items() if name != "study" or key[0] == "original"}
    singles = pd.read_csv(ROOT / "results" / "published_split.csv").set_index("command")

    def percent(row: dict, digits: int) -> str:
        spread = row["accuracy sd"]
        shown = f"{100 * row['accuracy']:.{digits}f}"
        return f"{shown} ± {100 * spread:.{digits}f} %" if spread else f"{shown} %"

    rows = {}
    for method, title in METHODS.items():
        unseen = study["unseen", method]
        command = f"script/run_og.sh --tuning_method {method} --seed 42"
        if ("original", method) in study:
            published = study["original", method]
        else:
            published = {"accuracy": singles.loc[command, "test_accuracy"], "accuracy sd": None}
        trained, size = unseen["trained"], unseen["bytes"]
        stored = f"{size / 1e3:.0f} kB" if size < 1e6 else f"{size / 1e6:.2g} MB"
        rows[title] = [
            f"{trained:,.0f}" if size else "",
            percent(published, 2),
            percent(unseen, 1),
            stored if size else "",
        ]
    return rows


def test_the_headline_figures_are_those_of_the_studies():
    headline = headline_rows()
    assert headline.pop("the original work") == ["", "93.46 %", "", ""]
    assert headline == study_rows()


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

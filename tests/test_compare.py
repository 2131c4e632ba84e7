"""The study: which runs it makes, which it does not repeat, and what it computes."""

import json
import shutil
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import arguments
import main
from conftest import ROWS, one_line, write_csv
from runtime.files import UserError
from script import baseline, ensemble
from script.study import compare, reproduce, runs, search, summary
from script.study.runs import METHODS, Run, plan
from script.study.significance import COMPARISONS, compare_named


@pytest.fixture
def folders(tmp_path) -> list[str]:
    """Write an original split that repeats training texts in test, and two folds that do not."""
    test = {"original": ROWS[:4], "fold 0": [("big team", "2"), ("a dog", "0")]}
    test["fold 1"] = [("small song", "1")]
    for name, rows in test.items():
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name / "train_simple.csv", ROWS)
        write_csv(tmp_path / name / "val_simple.csv", [("a new dog", "0"), ("song", "1")])
        write_csv(tmp_path / name / "test_simple.csv", rows)
    return [str(tmp_path / name) for name in test]


@pytest.fixture
def in_process(monkeypatch) -> None:
    """Make a study's runs function calls, because each process would load torch again."""
    modules = {"main.py": main, "script.baseline": baseline, "script.ensemble": ensemble}

    def call(command, **streams):
        monkeypatch.setattr(sys, "orig_argv", command)
        start = 2 if command[1] == "main.py" else 3
        status = modules[command[start - 1]].main(command[start:])
        return Namespace(wait=lambda: status)

    monkeypatch.setattr(runs.subprocess, "Popen", call)


@pytest.fixture
def study(folders, tmp_path, backbone, in_process, capsys):
    """Call the study on the tiny backbone; returns its output."""
    original, *unseen = folders

    def call(*flags: str) -> str:
        argv = ["--original", original, "--unseen", *unseen]
        argv += ["--output_dir", str(tmp_path / "study")]
        argv += ["--methods", "majority", "prefix", *flags, "--", "--model_name_or_path", backbone]
        argv += ["--max_seq_length", "16", "--pre_seq_len", "3", "--num_train_epochs", "1"]
        compare.run(argv)
        return capsys.readouterr().out

    return call


def test_a_study_runs_once_and_reports_its_results(study, tmp_path):
    first = study("--seeds", "1", "2")
    assert "7 runs, 0 of them already finished" in first  # 1 + 2 baselines, 2 + 2 prefixes
    found = json.loads((tmp_path / "study" / "study.json").read_text())
    counts = {(row["protocol"], row["method"]): row["runs"] for row in found["summary"]}
    original = {("original", "majority"): 1, ("original", "prefix"): 2}
    assert counts == original | {("unseen", "majority"): 2, ("unseen", "prefix"): 2}
    assert found["tests"] == []  # neither full nor an ensemble was run
    assert "unseen: one seed per folder, so the intervals do not cover" in first
    assert "original: one seed" not in first and "new, 0 %" in first  # the schedule
    page = (tmp_path / "study" / "report.html").read_text()
    assert page.count("<svg") == 1 and "script/compare.sh" in page
    single = found["runs"][-1]
    assert single["folder"] == "unseen-prefix-1" and single["results"]["train_rows"] == len(ROWS)
    assert (tmp_path / "study" / "accuracy.svg").read_text().startswith("<?xml")
    again = study("--seeds", "1", "2")
    assert "7 runs, 7 of them already finished" in again
    end = first.index("protocol")
    assert first[end:] == again[again.index("protocol") :]


def test_a_study_shows_caveats_and_is_not_mixed_with_another(study, tmp_path):
    """The other one is refused before it starts: the logs of the finished study are kept."""
    assert "--quick: --num_train_epochs" in study("--quick", "--seeds", "1")
    log = tmp_path / "study" / "unseen-prefix-0.log"
    log.write_text("of the finished run")
    with pytest.raises(UserError, match="contains a run with different flags, data or seed"):
        study("--quick", "--seeds", "7")
    assert log.read_text() == "of the finished run"


def test_a_study_shows_caveats(study, folders, tmp_path):
    assert "--quick: --num_train_epochs" in study("--quick", "--seeds", "1")
    page = (tmp_path / "study" / "report.html").read_text()
    assert "Trained only briefly, to check that it works" in page
    folder = tmp_path / "study" / "unseen-prefix-0"
    for answers, collapsed in (("01", False), ("11", True)):
        rows = [("a", "0", answers[0], 1), ("b", "1", answers[1], 1)]
        write_csv(folder / "predictions.csv", rows, ("text", "label", "predicted", "confidence"))
        run = Run("unseen", "prefix", folders[1], 1, None, folder, ())
        said = " ".join(compare.caveats([run], False, None, True))
        assert ("unseen-prefix-0 predicts one label for every row" in said) == collapsed
        assert ("meaningless: try --learning_rate 1e-02." in said) == collapsed
    assert not compare.caveats([replace(run, method="majority")], False, None, True)


def test_a_study_of_the_original_protocol_alone_ends_well(study, tmp_path):
    """It has no texts to review."""
    assert "in " in study("--unseen").splitlines()[-1]
    assert not (tmp_path / "study" / "label_review.csv").exists()


def test_a_failed_run_ends_the_study_with_the_last_line_of_its_log(folders, tmp_path, capfd):
    """Here the run is a process of its own."""
    write_csv(tmp_path / "fold 0" / "train_simple.csv", [("one", "1"), ("two", "1")])
    flags = ["--output_dir", str(tmp_path / "study"), "--methods", "majority"]
    status = compare.main(["--original", "--unseen", folders[1], *flags])
    said = one_line((status, capfd.readouterr().err))
    assert "has only one label" in said and "repeat the command to resume the study" in said


def test_folds_use_the_seeds_in_turn_and_baselines_run_once_each():
    args = Namespace(original=["o"], unseen=["a", "b", "c"], seeds=[1, 2], quick=True, flags=[])
    args.train_sizes = [None]
    args.output_dir, args.methods = "out", list(METHODS)
    planned = plan(args)
    full = [(run.data, run.seed) for run in planned if run.method == "full"]
    assert full == [("o", 1), ("o", 2), ("a", 1), ("b", 2), ("c", 1)]
    assert [run.data for run in planned if run.method == "look-up"] == ["o", "a", "b", "c"]
    assert len({run.folder for run in planned}) == len(planned)
    assert {run.protocol for run in planned} == {"original", "unseen"}
    args.original, args.unseen, args.seeds = [], ["a", "b"], [1, 2, 3]
    assert [run.data for run in plan(args) if run.method == "full"] == ["a", "b", "a", "b"]
    baselines = {run.method for run in planned if "--num_train_epochs" not in run.command}
    linear = {f"{name}, linear" for name in ("TF-IDF", "characters", "embeddings", "combined")}
    linear |= {"characters, SVM", "combined, SVM"}
    assert baselines == {"majority", "look-up", "ensemble", *linear}
    tuned = {*arguments.METHODS, "input prefix", "4 prefixes"}
    assert {run.method for run in planned} - baselines == tuned


def test_an_ensemble_combines_the_runs_on_the_same_rows():
    args = Namespace(original=[], unseen=["a", "b"], seeds=[1, 2, 3, 4], quick=False, flags=[])
    args.output_dir, args.train_sizes = "out", [None, 99]
    args.methods = ["majority", "TF-IDF, linear", "full", "ensemble"]
    ensembles = [run for run in plan(args) if run.method == "ensemble"]
    members = {
        run.folder.name: [Path(word).name for word in run.command[2:-2]] for run in ensembles
    }
    assert members["unseen-ensemble-3"] == ["unseen-TF-IDF-linear-1", "unseen-full-3"]
    assert members["unseen-ensemble-2-n99"] == ["unseen-TF-IDF-linear-2-n99", "unseen-full-2-n99"]
    assert len(members) == 8 and not runs.is_tuned("ensemble")


def test_the_study_lists_the_least_plausible_labels(study, folders, tmp_path):
    """Labels of the folds' test files, by the average of two models that did not see the texts."""
    methods = ("--seeds", "1", "--methods", "TF-IDF, linear", "prefix", "ensemble")
    study(*methods)
    listed = pd.read_csv(tmp_path / "study" / "label_review.csv")
    found = {}
    for number in range(2):
        each = [
            pd.read_csv(tmp_path / "study" / f"unseen-{name}-{number}" / "predictions.csv")
            for name in ("TF-IDF-linear", "prefix")
        ]
        mean = np.mean([one.filter(like="probability_").to_numpy() for one in each], axis=0)
        for text, label, row in zip(each[0]["text"], each[0]["label"], mean, strict=True):
            rest = np.delete(row, label)
            if row[label] < rest.max():
                suggestion = [0, 1, 2][list(row).index(rest.max())]
                found[text] = (label, suggestion, pytest.approx(row[label] - rest.max(), abs=2e-6))
        assert set(listed["file"]) <= {f"{one}/test_simple.csv" for one in folders[1:]}
    assert found
    rows = zip(listed["text"], listed["label"], listed["suggestion"], listed["margin"], strict=True)
    assert {text: tuple(rest) for text, *rest in rows} == found
    assert listed["margin"].is_monotonic_increasing
    assert "Labels to review" in (tmp_path / "study" / "report.html").read_text()
    # an ensemble is stale once a member is
    assert "9 of them already finished" in study(*methods)
    path = tmp_path / "study" / "unseen-prefix-0" / "validation_predictions.csv"
    path.write_text(path.read_text() + " ")
    with pytest.raises(UserError, match="unseen-ensemble-0 contains a run with different"):
        study(*methods)


def predicted(
    method: str, name: str, right: list, seen: list, size: int | None = None, **results
) -> Run:
    """A run with one text for each value of `right`, all with confidence 0.6."""
    run = Run("unseen", method, "a", 1, size, Path(name), ())
    table = pd.DataFrame({"text": range(len(right)), "run": name, "right": right, "seen": seen})
    vars(run).update(predictions=table.assign(confidence=0.6), results=results)
    return run


def test_predictions_are_right_if_their_label_is_the_same(study, tmp_path):
    """However its number is written."""
    study("--seeds", "1", "--unseen", "--methods", "majority")
    folder = tmp_path / "study" / "original-majority-0"
    rows = [("a", "1.0", "1", 1), ("b", "2", "1", 1)]
    write_csv(folder / "predictions.csv", rows, ("text", "label", "predicted", "confidence"))
    run = Run("original", "majority", str(tmp_path / "original"), 1, None, folder, ())
    assert run.predictions["right"].tolist() == [True, False]


def test_the_table_averages_distinct_texts_and_says_how_sure_it_is():
    """A text that has all rows but one counts once. Half of the rows are right, confidence 0.6."""
    both = [
        predicted("full", name, [one] * 100, [False] * 100) for name, one in (("a", 1), ("b", 0))
    ]
    (row,) = summary.summarise(both)
    assert row["pooled ECE"] == pytest.approx(0.1)
    assert (row["accuracy"], row["on seen"]) == (0.5, None)
    assert np.ptp(row["accuracy interval"]) > 0.6
    assert summary.format_summary([row])["on seen"].tolist() == ["-"]
    run = predicted("full", "a", [1, 0, 0, 0], [False] * 4)
    run.predictions["text"] = ["a", "b", "b", "b"]
    (row,) = summary.summarise([run])
    assert row["on unseen"] == 0.5
    assert 0.6 < np.ptp(row["on unseen interval"]) < 1  # as of two texts


def test_only_named_comparisons_are_tested_on_unseen_texts():
    """Of 60 texts 12 are right for one method only and 3 for the other: p = 0.035 by McNemar."""
    right = {"full": [1] * 40 + [0] * 12 + [1] * 3 + [0] * 5, "majority": [0] * 60}
    right["prefix"] = [1] * 40 + [1] * 12 + [0] * 3 + [0] * 5
    right["TF-IDF, linear"] = [1] * 30 + [0] * 30
    best = {"majority": 0.9, "TF-IDF, linear": 0.5}  # on validation files, the former is better
    planned = [
        predicted(
            method,
            name,
            [*values, method == "full"],
            [False] * 60 + [True],
            eval_accuracy=0,
            eval_accuracy_unseen=best.get(method, 0.1),
        )
        for method, values in right.items()
        for name in "ab"
    ]
    first, second = compare_named(planned, COMPARISONS)
    assert (first["other"], first["one"]) == ("full", "majority")
    assert (second["other"], second["one"], second["texts"]) == ("prefix", "full", 60)
    assert second["difference"] == pytest.approx(9 / 60)
    assert second["p"] == second["p_holm"] == pytest.approx(0.0352, abs=0.01)
    low, high = second["interval"]
    assert 0 < low < 9 / 60 < high and second["shown"]
    assert first["p_holm"] == 2 * first["p"]
    assert [test["one"] for test in compare_named(planned, ["full:TF-IDF, linear"])] == [
        "TF-IDF, linear"
    ]
    assert compare_named(planned, ["full:best single", "bias:full"])[0]["one"] == "majority"


def test_comparisons_are_named_before_the_first_run(study, tmp_path, capsys):
    free = ("--unseen", "--methods", "majority", "look-up")  # train nothing
    for _ in "ab":
        assert "exploratory" not in study(*free, "--compare", "look-up:majority")
    assert "read them as exploratory" in study(*free)
    for given, said in (("prefix:bias", "'bias' is not run"), ("prefix", "name two methods")):
        with pytest.raises(SystemExit):
            study("--compare", given)
        assert said in capsys.readouterr().err


def test_sizes_are_further_runs_of_the_unseen_protocol_on_the_same_rows():
    args = Namespace(original=["o"], unseen=["a", "b"], seeds=[1, 2], quick=False, flags=[])
    args.output_dir, args.methods, args.train_sizes = "out", ["TF-IDF, linear", "full"], [None]
    before = plan(args)
    args.train_sizes = [250, 500, None]
    planned = plan(args)
    assert [run for run in planned if not run.size] == before  # what is finished stays so
    sized = [run for run in planned if run.size]
    assert {run.protocol for run in sized} == {"unseen"}
    assert [(run.method, run.data, run.size) for run in sized[:2]] == [
        ("TF-IDF, linear", "a", 250),
        ("TF-IDF, linear", "a", 500),
    ]
    assert len({run.folder for run in planned}) == len(planned) == len(before) + 8
    for run in sized:
        assert f"--seed {run.seed} --max_train_samples {run.size}" in run.line
        assert run.folder.name.endswith(f"-n{run.size}")


def test_the_curve_says_what_the_last_doublings_brought():
    def run(method, size, rows, accuracy):
        right = [number < 100 * accuracy for number in range(100)]
        return predicted(method, f"{rows}", right, [False] * 100, size, train_rows=rows)

    curve = [run("full", 100, 100, 0.2), run("full", 200, 200, 0.5), run("full", 400, 400, 0.56)]
    curve += [run("full", None, 790, 0.60), run("full", None, 810, 0.64)]  # 0.06 a doubling
    points = summary.learning_curve(curve)
    assert [(p["size"], p["runs"]) for p in points] == [(100, 1), (200, 1), (400, 1), (800, 2)]
    note, said = summary.doublings(points)
    assert said == "full: +6.0 points for each doubling."
    assert "extrapolates nothing" in note
    assert summary.format_curve(points)["800"][0].startswith("62.0 (")
    assert 0.18 < np.ptp(points[-1]["interval"]) < 0.5  # over 100 texts, and over two runs


def test_a_study_over_sizes_draws_a_curve(study, tmp_path):
    printed = study("--seeds", "1", "--train_sizes", "8", "all")
    assert "accuracy on unseen texts by number of training texts" in printed
    found = json.loads((tmp_path / "study" / "study.json").read_text())
    assert {(p["method"], p["size"]) for p in found["sizes"]} == {
        (method, size) for method in ("majority", "prefix") for size in (8, len(ROWS))
    }
    assert {r["runs"] for r in found["summary"] if r["protocol"] == "unseen"} == {2}
    assert (tmp_path / "study" / "learning_curve.svg").exists()
    page = (tmp_path / "study" / "report.html").read_text()
    assert "How much data do I need?" in page and page.count("<svg") == 2
    assert 'aria-label="Accuracy on unseen texts by number of training texts: majority' in page
    with pytest.raises(UserError, match="leaves none out, use 'all' instead"):
        study("--train_sizes", str(len(ROWS)))


# ------------------------------------------------------------------ search and reproduce


@pytest.fixture
def tiny_probe(backbone, monkeypatch) -> None:
    flags = ["--model_name_or_path", backbone, "--max_seq_length", "16"]
    monkeypatch.setitem(METHODS, "probe", [*METHODS["probe"], *flags])


def test_the_search_tries_each_change_without_the_test_files(
    folders, tmp_path, in_process, tiny_probe, capsys
):
    for folder in folders:
        (Path(folder) / "test_simple.csv").unlink()
    output = str(tmp_path / "search")
    argv = [*folders[1:], "--methods", "probe", "--output_dir", output]
    assert search.main(argv) == 0
    found = json.loads((tmp_path / "search" / "search.json").read_text())["probe"]
    assert [*found][:4] == [*search.changes("probe")]
    assert found["half the epochs"]["seconds"] > 0
    first = capsys.readouterr().out
    assert search.main(argv) == 0
    assert "2 runs, 2 of them already finished" in capsys.readouterr().out and "defaults" in first


def test_of_the_changes_those_that_help_are_tried_together():
    names = [*search.changes("full")]
    gains = dict(zip(names, (0.5, 0.4, 0.6, 0.5, 0.7, 0.8), strict=True))
    table = {name: {"accuracy": gain} for name, gain in gains.items()}
    assert search.helpful(table) == ["the other pooling", "a contrastive start, half the epochs"]


def test_the_published_predictions_give_the_published_figures(
    folders, tmp_path, in_process, tiny_probe, monkeypatch, capsys
):
    """Whether one machine makes them, or two; runs of other code are not kept."""

    def prepare(source: Path, folder: Path) -> None:
        for number, name in enumerate(folders[1:]):
            shutil.copytree(name, folder / "small" / str(number), dirs_exist_ok=True)

    monkeypatch.setattr(reproduce.data, "prepare", prepare)
    code = ["abc"]
    monkeypatch.setattr(reproduce, "git", lambda name, *_: name != "status" and code[0])
    part = reproduce.Part("small", 4, ("majority", "probe", "ensemble"), folds=2)

    def call(seeds: int, machine: str, results: str) -> dict[str, bytes]:
        (tmp_path / results).mkdir(exist_ok=True)
        monkeypatch.setattr(reproduce, "RESULTS", tmp_path / results)
        monkeypatch.setattr(reproduce, "PARTS", (part._replace(seeds=seeds),))
        assert reproduce.main(["source", "--output_dir", str(tmp_path / machine)]) == 0
        return {path.name: path.read_bytes() for path in (tmp_path / results).iterdir()}

    whole = call(4, "one", "results")
    assert not [*(tmp_path / "one").rglob("*.safetensors")]
    predictions = pd.read_csv(tmp_path / "results" / "predictions.csv.gz", dtype={"text": str})
    assert len(predictions) == 3 * (2 + 2 + 1)  # rows of both folds: two seeds of two, majority
    right = predictions["label"] == predictions["predicted"]
    for row in json.loads(whole["methods.json"]):
        own = right[predictions["method"] == row["method"]]
        assert row["accuracy"] == pytest.approx(own.groupby(predictions["text"]).mean().mean())
        assert row["pooled ECE on unseen"] == row["pooled ECE"]  # no text is seen
    capsys.readouterr()
    assert call(4, "one", "results") == whole
    assert not capsys.readouterr().out  # nothing is run again

    runs = json.loads(whole["runs.json"])  # killed before it was written
    runs["runs"].pop()
    (tmp_path / "results" / "runs.json").write_text(json.dumps(runs))
    assert call(4, "one", "results")["predictions.csv.gz"] == whole["predictions.csv.gz"]
    assert set(call(4, "one", "results")) == set(whole)
    capsys.readouterr()

    call(2, "two", "others")
    both = call(4, "three", "others")
    assert both["predictions.csv.gz"] == whole["predictions.csv.gz"]
    assert capsys.readouterr().out.count("small\n3 runs, 0 of them") == 4  # two on each machine
    code[0] = "def"
    assert len(json.loads(call(2, "three", "others")["runs.json"])["runs"]) == 6
    assert "are of other code" in capsys.readouterr().err
    monkeypatch.setattr(reproduce, "git", lambda *_: " M main.py")
    assert "commit them" in one_line((reproduce.main(["source"]), capsys.readouterr().err))

"""Nothing wrong in silence: each is right, or status 2 and one line, and earlier results stay."""

import ast
import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import packages_distributions

import numpy as np
import pytest
import torch

import main
import trainer
from conftest import ROOT, ROWS, bash, one_line, within, write_csv
from dataset import read_split
from evaluation.metrics import Score
from killing import fork_main, ranks
from model.folders import locate
from model.loading import load_tokenizer
from model.predictions import Predictions
from model.source import read_model_config
from runtime import batches, machine, record
from runtime.csv_reader import text_key
from runtime.file_format import FileFormat
from runtime.files import UserError
from test_main import hashes

# -------------------------------------------------------------------------------- files of data

CHANGES = {
    "a column more": lambda text: text.replace("text,label", "text,label,more").replace(
        "\n", ",\n"
    ),
    "columns swapped": lambda text: text.replace("text,label", "label,text"),
    "a text changed": lambda text: text.replace("big team", "big race"),
    "a row more": lambda text: text + "a dog,0\n",
    "a row less": lambda text: text[: text.rindex("drum")],
    "empty": lambda text: "",
    "only a header": lambda text: "text,label\n",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_test_file_that_changes_while_it_is_used_is_refused(run, tmp_path, monkeypatch, change):
    """Defect 1: it is checked, and read again later."""
    run()
    before, score = hashes(tmp_path / "out"), main.score
    path = tmp_path / "test.csv"
    text = path.read_text().replace("\r\n", "\n")
    path.write_text(text)

    def changed(*args, **options):
        path.write_text(CHANGES[change](text))
        return score(*args, **options)

    monkeypatch.setattr(main, "score", changed)
    run("--seed", "1", "--overwrite_output_dir", status=2)
    after = {k: v for k, v in hashes(tmp_path / "out").items() if "/unfinished/" not in k}
    assert after == before


def test_texts_are_the_same_if_bert_reads_the_same(backbone):
    """Defect 7: the leak audit counted such texts as unseen."""
    same = ["Beyoncé  Live", "beyonce live", "Beyonce\u0301 Live", "BEYONCE\u200b LIVE"]
    assert len({text_key(text) for text in same}) == 1
    assert len({text_key(text) for text in ("a cat", "a bat", "acat")}) == 3


@pytest.mark.parametrize("kind", ["pipe", "device", "piped stdin"])
def test_pipes_and_devices_are_refused(predict, trained, tmp_path, kind):
    """Defect 16: a pipe hung, a piped stdin was "empty", /dev/zero had no end."""
    folder = trained()
    path = {"device": "/dev/zero", "piped stdin": "/dev/stdin"}.get(kind, str(tmp_path / "pipe"))
    if kind == "pipe":
        os.mkfifo(path)
    if kind != "piped stdin":
        assert "is a pipe or a device" in one_line(predict(folder, "--test_file", path))
        return
    reader, writer = os.pipe()
    os.write(writer, b"text\na cat\n")
    os.close(writer)
    usual = os.dup(0)
    os.dup2(reader, 0)
    try:
        assert "/dev/stdin is a pipe" in one_line(predict(folder, "--test_file", path))
    finally:
        os.dup2(usual, 0)
        os.close(usual)
        os.close(reader)


def test_files_that_are_no_csv_get_a_hint(tmp_path, caplog):
    """Defect 19."""

    path = tmp_path / "x.csv"

    def refusal(data: bytes, **options) -> str:
        path.write_bytes(data)
        with pytest.raises(UserError) as error:
            read_split(path, FileFormat(**options))
        return str(error.value)

    assert "unpack it with gunzip" in refusal(b"\x1f\x8b\x08\x00\x00")
    assert "half of a surrogate pair" in refusal(b"text,label\na +2AA- b,1\n", encodings=("utf-7",))
    for encoding in "utf-16-le", "utf-16-be":
        said = refusal("text,label\na,1\n".encode(encoding))
        assert f"pass --csv_encoding {encoding}, which reads 'text,label'" in said
        assert read_split(path, FileFormat(encodings=(encoding,))).texts == ["a"]
    path.write_bytes(b"\n\r\ntext,label\na,1\n")
    assert read_split(path, FileFormat()).texts == ["a"]


def test_a_few_equal_predictions_are_no_collapse(run, tmp_path, caplog, monkeypatch):
    """Defect 19."""

    def one_class(model, data, *rest):
        return torch.eye(1, 3).repeat(len(data), 1)

    monkeypatch.setattr(trainer, "predict", one_class)
    write_csv(tmp_path / "val.csv", [ROWS[0], ROWS[4]])
    run()
    assert "every prediction is the same class" not in caplog.text
    write_csv(tmp_path / "val.csv", ROWS)
    run(name="more")
    assert caplog.text.count("every prediction is the same class") == 1  # of two epochs
    assert "try --learning_rate 7e-05" in caplog.text


@pytest.mark.upgrade
def test_long_texts_are_cut_before_they_are_tokenized(backbone, tmp_path, monkeypatch):
    """Defect 18: a field of 50 MB took minutes and 3 GiB. The tokens are the same."""
    config, _ = read_model_config(locate(backbone))
    config.max_seq_length = 8
    tokenizer = load_tokenizer(locate(backbone).backbone, config)
    lengths = []

    def noted(texts, **options):
        lengths.extend(map(len, texts))
        return tokenizer(texts, **options)

    noted.pad_token_id = tokenizer.pad_token_id
    random = np.random.default_rng(0)
    pieces = ["cat", "dog", " ", " ", ",", "x" * 30, "\u0301", "中", "-", "song "]
    texts = ["".join(random.choice(pieces, size)) for size in random.integers(1, 60, 300)]
    rows = type("Rows", (), {"path": "", "texts": texts, "label_ids": None, "rows": [1] * 300})
    rows.__len__ = lambda self: 300
    expected = batches.encode(noted, rows(), 8).token_ids
    assert (
        expected == tokenizer(list(dict.fromkeys(texts)), truncation=True, max_length=8).input_ids
    )
    monkeypatch.setattr(batches, "CHARACTERS_PER_TOKEN", 2)
    assert batches.encode(noted, rows(), 8).token_ids == expected
    monkeypatch.undo()
    lengths.clear()
    rows.texts = ["a cat, " * 1_000_000]
    rows.__len__ = lambda self: 1
    ids = batches.encode(noted, rows(), 8).token_ids
    assert ids == tokenizer(["a cat, " * 9], truncation=True, max_length=8).input_ids
    assert max(lengths) <= 800
    rows.texts = ["中" * 100_000]  # without a blank
    batches.encode(noted, rows(), 8)
    assert max(lengths) <= 800


# ------------------------------------------------------------------------- processes and shells


def test_processes_with_other_settings_or_files_are_refused(backbone, files, tmp_path):
    """Defect 5: a second node's rows were mixed in, or another seed published, in silence."""
    other = write_csv(tmp_path / "other.csv", ROWS[::-1])
    argv = ["--do_train", *files[:2], "--model_name_or_path", backbone]
    argv += ["--output_dir", str(tmp_path / "out"), "--max_seq_length", "16"]
    others = ([], ["--seed", "1", "--train_file", other])
    outputs = [tmp_path / "said 0", tmp_path / "said 1"]
    children = [
        fork_main([*argv, *flags], tmp_path, None, tmp_path / "points", path, **env)
        for flags, path, env in zip(others, outputs, ranks(), strict=True)
    ]
    with within(60):
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ends == [2, 2]
    said = [path.read_text() for path in outputs]
    assert "process 1: data.train, settings.seed differ" in one_line((2, said[0]))
    assert "error" not in said[1]
    assert not (tmp_path / "out" / "run.json").exists()


def test_closed_streams_and_lone_variables_are_no_traceback(
    trained, predict, tmp_path, files, monkeypatch, capsys
):
    """Defect 14."""
    folder = trained()
    argv = [sys.executable, "main.py", "--do_predict", "--model_name_or_path", str(folder)]
    call = " ".join([*argv, *files[4:]])

    def shell(command: str):
        done = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stderr

    status, said = shell(f"{call} --output_dir {tmp_path / 'closed'} <&- >&-")
    assert status == 0 and "Traceback" not in said
    assert (tmp_path / "closed" / "predictions.csv").exists()
    assert shell(f"{call} --output_dir {tmp_path / 'silent'} >&- 2>&-") == (0, "")
    with pytest.raises(SystemExit) as end:
        predict(folder, "--csv_encoding", "punycode")
    assert "--csv_encoding" in one_line((end.value.code, capsys.readouterr().err))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start several processes with torchrun" in one_line(predict(folder))


@pytest.mark.parametrize(
    "program", [["main.py"], ["-m", "script.study.compare"], ["-m", "script.serve"]]
)
def test_an_interrupt_while_libraries_load_is_one_line(tmp_path, program):
    for name in ("torch", "numpy", "uvicorn"):
        (tmp_path / f"{name}.py").write_text("import time; print(flush=True); time.sleep(60)")
    argv = [sys.executable, *program, "--do_eval", "--output_dir", "none"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    child = subprocess.Popen(
        argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[1].removeprefix("loading libraries ...\n")
    assert (child.returncode, said) == (130, "interrupted\n")


def test_a_notebook_can_call_main(run):
    """Its standard output is no file."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run()
    assert "accuracy" in printed.getvalue()


def test_help_needs_no_installation(clone):
    """Defect 22: it installed packages and ran the notebook first."""
    done = bash(clone, "run_og.sh", "--help", virtual_env=str(clone / "none"))
    assert done.returncode == 0 and "--num_train_epochs" in done.stdout
    assert not (clone / ".venv").exists() and not (clone / "csv" / "train_simple.csv").exists()


def test_only_interpreters_that_exist_are_tried(clone):
    """Defect 22: without an active environment /bin/python came before .venv."""
    code = "unset VIRTUAL_ENV; set -x; source script/environment.sh requirements.txt"
    env = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").write_text("#!/bin/sh\n")  # it says that it has all
    (clone / ".venv" / "bin" / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", code], cwd=clone, env=env, capture_output=True, text=True, timeout=60
    )
    tried = re.findall(r"^\++ has_pins '?(.*?)'? requirements.txt", done.stderr, re.MULTILINE)
    assert tried == [str(clone / ".venv" / "bin" / "python")]


@pytest.mark.pictures
def test_the_commit_of_another_repository_is_not_recorded(tmp_path, monkeypatch):
    """Defect 19: the project was copied into it and is not tracked there."""
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True)
    (tmp_path / "runtime").mkdir()
    copy = tmp_path / "runtime" / "record.py"
    shutil.copy(ROOT / "runtime" / "record.py", copy)
    monkeypatch.setattr(record, "__file__", str(copy))
    assert record.commit() is None
    subprocess.run(["git", "add", "runtime"], cwd=tmp_path, check=True)
    assert len(record.commit()) == 41  # 40 digits and "+"


# ---------------------------------------------------------------------------- results and rooms


@pytest.mark.parametrize("flags", [(), ("--prefix",), ("--tuning_method", "probe")])
def test_a_model_has_the_same_shapes_in_every_mode(make_model, flags):
    """Defect 8."""
    model, ids = make_model(*flags), torch.randint(5, 20, (3, 4))

    def shapes() -> list:
        seen = []
        hooks = [
            module.register_forward_hook(
                lambda module, inputs, out: seen.append(
                    [one.shape for one in (out, *inputs) if isinstance(one, torch.Tensor)]
                )
            )
            for module in model.modules()
        ]
        model(ids, torch.ones_like(ids))
        for hook in hooks:
            hook.remove()
        return seen

    expected = shapes()
    with torch.inference_mode():
        assert shapes() == expected
    with torch.no_grad():
        assert shapes() == expected


@pytest.mark.pictures
def test_many_and_long_labels_cost_little(run, tmp_path):
    """Defect 17: 5,000 labels made 550 MB of JSON, and two long ones took 30 s to draw."""
    rows, classes = 50, 5000
    labels = np.arange(rows) * 100
    logits = torch.zeros(rows, classes)
    logits[torch.arange(rows), torch.from_numpy(labels) + 1] = 1
    keys = [str(number) for number in range(rows)]
    score = Score(False).add(Predictions.from_logits(logits, False), labels, keys, keys, None)
    assert len(json.dumps(score.details())) < 1e6
    assert score.details()["confusion"] is None
    for name in ("train", "val", "test"):
        rows = [(text, "xyz"[int(label)] * 100_000) for text, label in ROWS]
        write_csv(tmp_path / f"{name}.csv", rows)
    with within(30):
        folder = run()
    assert (folder / "report.html").stat().st_size < 1e6


def test_formulas_in_predictions_can_be_disarmed(run, tmp_path):
    """Defect 20."""
    formulas = ["=1+1", "+1", "-1", "@x", "\ta", "plain"]
    write_csv(tmp_path / "test.csv", [(text, "0") for text in formulas])
    usual = (run() / "predictions.csv").read_text()
    safe = (run("--safe_csv", name="safe") / "predictions.csv").read_text()
    assert '"=1+1"' in usual and "'" not in usual
    for text in formulas[:-1]:
        assert f'"\'{text}"' in safe
    assert '"plain"' in safe


def test_every_imported_package_is_pinned():
    """Defect 23: the interface of another version may differ."""
    pins = {
        line.split("==")[0].lower().replace("-", "_")
        for file in (ROOT / "requirements.txt", *(ROOT / "script").glob("requirements*.txt"))
        for line in file.read_text().splitlines()
        if "==" in line
    }
    folders = ("model", "runtime", "evaluation", "script")
    paths = [*ROOT.glob("*.py"), *(path for name in folders for path in (ROOT / name).glob("*.py"))]
    imported = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    known = packages_distributions()
    own = {"arguments", "dataset", "main", "trainer", *folders}
    foreign = {n for n in imported - own if n not in sys.stdlib_module_names and n in known}
    names = {known[name][0].lower().replace("-", "_") for name in foreign}
    assert names - OPTIONAL <= pins


OPTIONAL = {"tensorboard", "datasets", "nbformat"}


def test_openmp_threads_do_not_spin_for_long():
    """Defect 24, first remedy: set before torch loads, unless the user has set it."""
    code = """
import os, sys
sys.modules["torch"] = None  # cannot be imported
try:
    import main
except ImportError:
    print(os.environ["GOMP_SPINCOUNT"])
"""
    for given, expected in ((None, "5000"), ("7", "7")):
        env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
        env |= {"GOMP_SPINCOUNT": given} if given else {}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
        assert done.stdout.decode().split() == [expected], done.stderr


@pytest.mark.parametrize(("gain", "precision"), [(0.5, "fp32"), (2.0, "bf16")])
def test_bfloat16_is_used_only_where_it_is_faster(monkeypatch, gain, precision):
    """Some processors have its instructions, but take twice as long for them."""
    monkeypatch.setattr(machine, "bfloat16_gain", lambda: gain)
    assert machine.pick_machine("auto").precision == precision
    assert machine.pick_machine("bf16").precision == "bf16"


@pytest.mark.parametrize(
    ("seconds", "threads"),
    [({4: 1, 2: 1, 1: 1.2}, 4), ({4: 1, 2: 0.8, 1: 2}, 4), ({4: 3, 2: 1, 1: 2}, 2)],
)
def test_fewer_threads_are_used_only_where_they_are_much_faster(monkeypatch, seconds, threads):
    chosen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(machine, "product_seconds", seconds.__getitem__)
    assert machine.fastest_threads() == threads
    assert chosen[-1] == 4


def test_a_container_with_few_cores_gets_few_threads(tmp_path, monkeypatch):
    """Defect 24: its quota was ignored."""
    assert machine.cpu_quota(tmp_path) == math.inf
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.cpu_quota(tmp_path) == math.inf
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("250000\n")
    assert machine.cpu_quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert machine.cpu_quota(tmp_path) == 1.5
    chosen = []
    monkeypatch.setattr(machine, "cpu_quota", lambda: 2.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    machine.set_up_process()
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine.set_up_process()
    assert chosen == [2]

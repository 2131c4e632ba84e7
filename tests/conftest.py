"""A tiny random BERT with a small vocabulary, CSV files and a runner. No network, no GPU."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# One thread, here and in processes that tests start: each core runs its own tests, so small a model
# is no slower, and sums have the same order everywhere.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # see main.py

import pytest
import torch
import uvicorn
from jinja2 import Environment, FileSystemBytecodeCache
from transformers import BertConfig, BertModel, BertTokenizer

import main
import trainer
from arguments import parse_args
from evaluation import pages
from leftovers import no_process_left  # noqa: F401 - a fixture of every test
from model.source import new_model
from runtime import checkpoint, record
from runtime.machine import pick_machine, set_up_process
from runtime.processes import end_with_parent
from serving.app import create_app
from serving.engine import Settings
from serving.models import Registry

torch.set_num_threads(1)


def start_process(self, *args, usual=subprocess.Popen.__init__, **options) -> None:
    """Start a process that ends with this one, even if pytest-xdist kills it."""
    options.setdefault("preexec_fn", partial(end_with_parent, os.getpid()))
    usual(self, *args, **options)


subprocess.Popen.__init__ = start_process

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = (
    "cat dog bird fish lion song band drum bass tune goal team ball race coach "
    "the a of and with big small new old red blue one two three four"
).split()
ROWS = [
    ("the big cat and the dog", "0"),
    ("a small bird", "0"),
    ("fish", "0"),
    ("old lion with a new cat and one small dog", "0"),
    ("new song of the band", "1"),
    ("drum and bass", "1"),
    ("a tune", "1"),
    ("the red band with two drum", "1"),
    ("goal of the team", "2"),
    ("coach", "2"),
    ("three race and four ball and a big old team of blue", "2"),
]
ROOT = Path(__file__).parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"


def make_backbone(folder: Path, **settings) -> str:
    """Write a BERT with 2 layers, 2 heads of 8 and 64 positions; returns its folder.

    settings: of BertConfig, to change these.
    """
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS), encoding="utf-8")
    sizes = {
        "vocab_size": len(SPECIAL + WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes | settings)).save_pretrained(folder)
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    return str(folder)


def write_csv(path: Path, rows: list, header=("text", "label")) -> str:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def make_files(folder: Path) -> list[str]:
    """Write three small split files, with some seen texts; returns the flags that name them."""
    train = write_csv(folder / "train.csv", ROWS)
    val = write_csv(folder / "val.csv", [ROWS[0], ("a new dog", "0"), ("song", "1"), ROWS[8]])
    test = write_csv(folder / "test.csv", [ROWS[5], ("big team", "2"), ("a dog", "0"), ROWS[5]])
    return ["--train_file", train, "--validation_file", val, "--test_file", test]


def pytest_addoption(parser) -> None:
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")


def pytest_configure(config) -> None:
    """Show the tests a GPU only with `--device cuda`; main.py uses one that it finds."""
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch finds no CUDA GPU here")
    set_up_process()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # so does a job under nohup
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # float32 that can be compared with a CPU's
    config.addinivalue_line("markers", "pictures: with the pictures of a run's page")


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """Keep the pages' compiled templates: compiling them takes a third of a small run."""
    cache = FileSystemBytecodeCache(str(tmp_path_factory.mktemp("templates")))
    return partial(Environment, bytecode_cache=cache)


@pytest.fixture(autouse=True)
def fast(request, monkeypatch, templates) -> None:
    """Leave out what takes longer than a small run: waiting for the disk, pictures, git's commit.

    Tests that are marked with `pictures` have the last two; commands that a test starts have all.
    """
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(pages, "Environment", templates)
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr(pages, "run_plots", lambda run: {})
        monkeypatch.setattr(record, "commit", lambda: "0" * 40)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> str:
    return make_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def files(tmp_path) -> list[str]:
    return make_files(tmp_path)


def train(backbone: str, files: list[str], folder: Path, *flags: str) -> int:
    """Train, evaluate and predict on the small files with main; returns its status."""
    argv = ["--do_train", "--do_eval", "--do_predict", *files]
    argv += ["--model_name_or_path", backbone, "--output_dir", str(folder)]
    argv += ["--num_train_epochs", "2", "--per_device_train_batch_size", "4"]
    argv += ["--precision", "fp32", "--max_seq_length", "16"]
    argv += ["--hidden_dropout_prob", "0"] if "--rdrop_alpha" not in flags else []
    argv += ["--rdrop_alpha", "0"]
    if not {"--load_best_model_at_end", "--eval_strategy"} & {*flags}:
        argv += ["--load_best_model_at_end"]
    argv += ["--pre_seq_len", "3"] if "--prefix" in flags else []
    return main.main([*argv, *flags])


@pytest.fixture
def run(backbone, files, tmp_path):
    """Train as `train` does; returns the output folder."""

    def call(*flags: str, name: str = "out", status: int = 0) -> Path:
        assert train(backbone, files, tmp_path / name, *flags) == status
        return tmp_path / name

    return call


@contextmanager
def within(seconds: int):
    """Fail, instead of waiting forever, if the block takes longer."""

    def fail(*_):
        raise TimeoutError(f"not done within {seconds} s")

    usual = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, usual)


@pytest.fixture
def predict(tmp_path, capsys):
    """Predict a file with a model folder in at most 10 s; returns the status and what it said."""

    def call(model: Path | str, *flags: str, name: str = "predicted") -> tuple[int, str]:
        argv = ["--do_predict", "--output_dir", str(tmp_path / name), "--precision", "fp32"]
        argv += [] if "--prefix_paths" in flags else ["--model_name_or_path", str(model)]
        argv += [] if "--test_file" in flags else ["--test_file", str(tmp_path / "test.csv")]
        capsys.readouterr()
        with within(10):
            status = main.main([*argv, "--overwrite_output_dir", *flags])
        return status, capsys.readouterr().err

    return call


def one_line(outcome: tuple[int, str]) -> str:
    """Check for status 2 and one line; returns the line."""
    status, said = outcome
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (status, len(lines)) == (2, 1), said
    assert "Traceback" not in said
    return lines[0]


@pytest.fixture
def clone(tmp_path) -> Path:
    """Copy the project to a folder with a blank in its name, without user data and results."""
    folder = tmp_path / "a clone"
    names = ["*.py", "*.ipynb", "requirements.txt", "csv/USvideos_sample.csv"]
    names += ["model", "runtime", "evaluation", "script"]
    for path in (path for name in names for path in ROOT.glob(name)):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        copy(path, folder / path.relative_to(ROOT))
    return folder


def bash(folder: Path, script: str, *flags: str, virtual_env: str = sys.prefix):
    """Call a script of a clone, with the tests' own environment active."""
    return subprocess.run(
        ["bash", f"script/{script}", *flags],
        cwd=folder,
        env=os.environ | {"VIRTUAL_ENV": virtual_env},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def make_model(backbone):
    """Build the model that the flags of the command line describe, with 3 classes, in eval mode."""

    def make(*flags: str):
        argv = ["--do_train", "--output_dir", "out", "--model_name_or_path", backbone]
        argv += ["--seed", "1", "--max_seq_length", "16", "--hidden_dropout_prob", "0.1"]
        argv += ["--attention_probs_dropout_prob", "0.1"]
        if "--prefix" in flags:
            argv += ["--pre_seq_len", "5"]
        if "--prefix_projection" in flags:
            argv += ["--prefix_hidden_size", "7"]
        args = parse_args([*argv, *flags])
        source = new_model(vars(args))
        source.set_labels(["a", "b", "c"])
        source.set_dropout(0.1, 0.1)
        model = source.build_trainable(args.seed, args.gradient_checkpointing).eval()
        if args.prefix:  # as large as keys and values, to have an effect
            torch.nn.init.normal_(model.prefix_encoder.embedding.weight)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # it starts as 0
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """Turn all dropout off, for comparisons in training mode; returns the model."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def stop_at(monkeypatch):
    """Send this process a signal in the middle of a given training step, counted from 0."""
    usual = trainer.training_step

    def arrange(at: int | None, number: int = signal.SIGTERM) -> None:
        def step(*args):
            if args[4] == at:
                os.kill(os.getpid(), number)
            return usual(*args)

        monkeypatch.setattr(trainer, "training_step", step)

    return arrange


@pytest.fixture(scope="session")
def masters(tmp_path_factory) -> dict[str, Path]:
    """Folders of results that several tests copy, by name; each is made when it is first used."""
    return defaultdict(lambda: tmp_path_factory.mktemp("master"))


@pytest.fixture
def stopped(run, stop_at, masters, tmp_path):
    """Return the folder of an unfinished run with checkpoints 3 and 5."""
    master = masters["stopped"] / "out"
    if not master.exists():
        stop_at(4)
        shutil.copytree(run("--save_strategy", "epoch", status=143), master)
        stop_at(None)
    folder = shutil.copytree(master, tmp_path / "out", dirs_exist_ok=True) / "unfinished"
    assert set(checkpoint.steps(folder)) == {3, 5}
    return folder


@pytest.fixture
def trained(run, masters, tmp_path):
    """Copy the model folder of a run with these flags, which only the first test makes."""

    def call(*flags: str) -> Path:
        master = masters[" ".join(("trained", *flags))] / "out"
        if not master.exists():
            shutil.copytree(run(*flags), master)
        return shutil.copytree(master, tmp_path / "out", dirs_exist_ok=True)

    return call


@contextmanager
def serving(registry, **limits):
    """Serve in a thread, on a real socket; yields the base URL and the application."""
    app = create_app(registry, Settings(**limits))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    # uvicorn's own logging closes all handlers, and absl's, which OpenVINO loads, closes the stream
    # that pytest captures with
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with within(30):
            while not server.started:
                time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join()


def registry_of(
    folders: dict[str, Path], cache_bytes: int = 2**30, precision: str = "fp32"
) -> Registry:
    """Load models to serve."""
    registry = Registry(pick_machine(precision, engine="auto"), cache_bytes)
    for name, folder in folders.items():
        registry.add(name, folder)
    return registry


@pytest.fixture(scope="session")
def served(backbone, tmp_path_factory) -> dict[str, Path]:
    """Models of every kind: two prefixes have different lengths, `several` are averaged."""
    root = tmp_path_factory.mktemp("served")
    files = make_files(root)
    flags = {
        "full": [],
        "short": ["--prefix"],
        "long": ["--prefix", "--pre_seq_len", "5", "--seed", "7"],
        "several": ["--prefix", "--num_prefixes", "2"],
        "input": ["--prefix", "--prefix_depth", "input"],
        "lora": ["--tuning_method", "lora"],
    }
    for name, given in flags.items():
        assert train(backbone, files, root / "models" / name, *given) == 0
    return {name: root / "models" / name for name in flags}

"""The scripts, end to end, with the bundled backbone on the sample: what a new user types."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from transformers import pipeline

from conftest import REAL_DATA, bash

SHORT = ["--max_train_samples", "320", "--num_train_epochs", "2"]


@pytest.mark.parametrize(
    ("script", "name", "parameters"),
    [("run_og.sh", "og", 22_715_526), ("run_prefix.sh", "prefix", 297_222)],
)
def test_a_script_does_the_whole_job(clone, script, name, parameters):
    done = bash(clone, script, *SHORT)
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC SAMPLE" in done.stderr
    assert not (clone / ".venv").exists()  # the active environment served
    folder = clone / "checkpoints" / name
    results = json.loads((folder / "all_results.json").read_text())
    assert results["trainable_parameters"] == parameters
    assert results["eval_accuracy"] > 0.4  # the most frequent label has 0.37
    assert f"in checkpoints/{name}: README.md, " in done.stdout
    table = pd.read_csv(folder / "predictions.csv")
    sample = pd.read_csv(clone / "csv/test_simple.csv")
    assert table[["text", "label"]].equals(sample)
    accuracy = (table["predicted"] == table["label"]).mean()
    assert accuracy == pytest.approx(results["test_accuracy"])
    if name == "og":
        found = pipeline("text-classification", model=str(folder))(table["text"].tolist()[:20])
        # bfloat16 in the run, float32 in the pipeline: the same but for near ties
        same = [int(item["label"]) for item in found] == table["predicted"][:20]
        assert same.mean() >= 0.9


def test_the_original_command_line_runs_as_it_stands(clone):
    assert bash(clone, "preprocess.sh").returncode == 0
    line = (
        "--model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --do_train --do_eval "
        "--do_predict --max_seq_length 256 --per_device_train_batch_size 16 --learning_rate 5e-5 "
        "--num_train_epochs 1 --pre_seq_len 4 --output_dir checkpoints/prefix/ "
        "--overwrite_output_dir --hidden_dropout_prob 0.1 --seed 11 --load_best_model_at_end True "
        "--save_strategy epoch --evaluation_strategy epoch --prefix --max_train_samples 320"
    )
    done = subprocess.run(
        [sys.executable, "main.py", *line.split()], cwd=clone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--learning_rate 5e-05 is low for prefix tuning" in done.stderr
    assert (clone / "checkpoints/prefix/checkpoint-20/adapter_model.safetensors").exists()


def test_flags_can_be_appended_and_errors_come_through(clone):
    done = bash(clone, "run_prefix.sh", "--pre_seq_len", "500")
    assert done.returncode == 2
    assert "--pre_seq_len 500 + --max_seq_length 128 is above the 512 positions" in done.stderr


def test_an_active_environment_without_the_pins_does_not_serve(clone, tmp_path):
    """Then .venv is taken; here it is one that serves, so that nothing is installed."""
    other = tmp_path / "other"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(other)], check=True)
    (clone / ".venv").symlink_to(sys.prefix)
    done = bash(clone, "run_og.sh", "--num_train_epochs", "0", virtual_env=str(other))
    assert done.stderr.splitlines()[-1].startswith("error: --num_train_epochs: 0 is out of range")
    assert "installing" not in done.stderr


@pytest.mark.skipif(not REAL_DATA.exists(), reason="the real data is not on this machine")
def test_padding_on_the_real_titles_is_under_five_percent(clone):
    files = [REAL_DATA / "seed_splits" / f"{name}_simple.csv" for name in ("train", "val", "test")]
    flags = ["--train_file", "--validation_file", "--test_file"]
    named = [str(word) for pair in zip(flags, files, strict=True) for word in pair]
    command = """
import numpy, dataset, sys
from arguments import parse_args
from model import utils
args = parse_args(["--do_train", "--output_dir", "x", *sys.argv[1:]])
tokenizer = utils.AutoTokenizer.from_pretrained(utils.bundled_folder())
data = dataset.encode(tokenizer, dataset.read_splits(args)["train"], None, 128)
lengths = data.lengths[data.text_of_row]
print(dataset.padding_share(lengths, dataset.training_batches(lengths, 32, 42, 0)))
"""
    done = subprocess.run(
        [sys.executable, "-c", command, *named], cwd=clone, capture_output=True, text=True
    )
    assert float(done.stdout) < 0.05, done.stderr

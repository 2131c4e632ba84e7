"""The schedule for repeated and for new texts, and R-Drop."""

from pathlib import Path

import pandas as pd
import pytest
import torch

import main
from arguments import SCHEDULE, SCHEDULES
from conftest import ROWS, write_csv
from model.sequence_classification import divergence
from test_main import load


@pytest.mark.parametrize("flags", [(), ("--prefix", "--pre_seq_len", "3")])
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_schedule_depends_on_the_repeated_texts(backbone, files, tmp_path, flags, repeats):
    write_csv(Path(files[1]), ROWS[:8] * repeats)
    argv = ["--do_train", *files[:2], "--model_name_or_path", backbone, "--max_seq_length", "16"]
    assert main.main([*argv, *flags, "--output_dir", str(tmp_path / "out")]) == 0
    settings = load(tmp_path / "out", "run.json")["settings"]
    expected = SCHEDULES["prefix" if flags else "full"][repeats == 1]
    assert tuple(settings[name] for name in SCHEDULE) == expected
    steps = load(tmp_path / "out", "all_results.json")["train_steps"]
    assert steps == settings["num_train_epochs"]


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_divergence_of_two_predictions_is_symmetric_and_zero_if_they_agree(multi_label):
    """Compared with torch's; several labels are Bernoulli distributions."""
    torch.manual_seed(0)
    one, other = torch.randn(2, 5, 3)
    found = divergence(torch.cat([one, other]), multi_label)
    torch.testing.assert_close(found, divergence(torch.cat([other, one]), multi_label))
    assert divergence(torch.cat([one, one]), multi_label) == 0
    kind = torch.distributions.Bernoulli if multi_label else torch.distributions.Categorical
    p, q = kind(logits=one), kind(logits=other)
    kl = torch.distributions.kl_divergence
    both = (kl(p, q) + kl(q, p)) / 2
    torch.testing.assert_close(found, both.mean(dim=1).sum() if multi_label else both.sum())


def test_r_drop_needs_dropout_to_change_anything(run):
    flags = ("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0")
    plain, same = run(*flags, name="plain"), run(*flags, "--rdrop_alpha", "5", name="same")
    other = run("--rdrop_alpha", "5", "--hidden_dropout_prob", "0.1", name="other")
    tables = [
        pd.read_csv(folder / "predictions.csv").filter(like="probability_")
        for folder in (plain, same, other)
    ]
    assert (tables[0] - tables[1]).abs().max(axis=None) < 1e-5
    assert (tables[0] - tables[2]).abs().max(axis=None) > 1e-4

"""The start for few training texts: when it is the default, and what it does."""

import numpy as np
import pytest
import torch

import main
from arguments import parse_args
from conftest import ROWS
from model import contrastive
from model.schedule import fill_schedule, fill_start
from test_main import load
from test_trainer import FP32, data  # noqa: F401 - a fixture

TASK = ["--do_train", "--do_eval", "--output_dir", "out"]


@pytest.mark.parametrize(
    ("rows", "seen_share", "fresh", "flags", "steps"),
    [
        (32, 0.1, True, "", 50),
        (256, 0.1, True, "--learning_rate 1e-4", 50),  # 8 batches, 4 epochs
        (257, 0.1, True, "", 100),
        (128, 0.1, True, "--per_device_train_batch_size 8 --gradient_accumulation_steps 2", 50),
        (129, 0.1, True, "--per_device_train_batch_size 8 --gradient_accumulation_steps 2", 100),
        (32, 0.5, True, "", 0),
        (257, 0.5, True, "", 0),
        (32, 0.1, False, "", 0),
        (32, 0.1, True, "--num_train_epochs 4", 0),
        (257, 0.1, True, "--num_train_epochs 4", 100),
        (32, 0.1, True, "--pooling cls", 0),
        (257, 0.1, True, "--pooling mean", 100),
        (32, 0.1, True, "--pooling mean", 50),
        (32, 0.1, True, "--contrastive_steps 0", 0),
        (32, 0.1, True, "--tuning_method bias", 50),  # one batch, 8 epochs
        (129, 0.1, True, "--tuning_method bias", 0),
        (129, 0.1, True, "--tuning_method lora", 100),
        (128, 0.1, True, "--prefix", 50),
        (129, 0.1, True, "--prefix", 0),
        (32, 0.1, True, "--prefix --num_prefixes 2", 0),
        (32, 0.1, True, "--tuning_method probe", 0),
    ],
)
def test_runs_for_new_texts_start_contrastively(rows, seen_share, fresh, flags, steps):
    """Unless flags say otherwise; with a part of the rate, and all else as it is."""
    args = parse_args([*TASK, *flags.split()])
    given = args.pooling
    found = fill_start(vars(args), rows, seen_share, 384, fresh)
    assert found == {"contrastive_steps": steps}
    assert args.contrastive_steps == found["contrastive_steps"]
    default = {50: "mean", 100: "cls"}.get(steps)
    assert args.pooling == (given or default)
    other = parse_args([*TASK, *flags.split()])
    schedule, usual = (fill_schedule(vars(one), seen_share, 384) for one in (args, other))
    if steps and "--learning_rate" not in flags:
        for name in ("learning_rate", "head_learning_rate"):
            share = {50: 10, 100: 2}[steps]
            assert schedule.pop(name) == pytest.approx(usual.pop(name) / share)
    assert schedule == usual


def test_a_pooling_that_a_flag_sets_is_kept():
    args = parse_args([*TASK, "--contrastive_steps", "7", "--pooling", "cls"])
    assert fill_start(vars(args), 32, 0.0, 384, True) == {"contrastive_steps": 7}
    assert args.pooling == "cls"


def test_the_loss_counts_equal_and_other_pairs_the_same():
    states = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    half = 0.5**0.5
    for labels in ([0, 0, 1, 0], [[1, 0], [1, 0], [1, 1], [1, 0]]):  # two equal, one right angle
        equal = [0, (half - 1) ** 2, (half - 1) ** 2]
        expected = (np.mean(equal) + np.mean([0, 0, half**2])) / 2
        assert contrastive.pair_loss(states, torch.tensor(labels)).item() == pytest.approx(expected)
    assert contrastive.pair_loss(states[:1], torch.tensor([0])) == 0  # there is no pair
    assert contrastive.pair_loss(states[:2], torch.tensor([0, 1])).item() == 0.5


def test_batches_have_every_row_once_in_an_epoch():
    batches = contrastive.row_batches(contrastive.ROWS * 2, seed=1)
    for _ in range(2):
        rows = np.concatenate([next(batches), next(batches)])
        assert sorted(rows) == list(range(len(rows))) != list(rows)
    assert len(next(contrastive.row_batches(3, seed=1))) == 3


def test_the_start_moves_texts_of_a_label_together_and_fits_the_head(data, make_model):  # noqa: F811
    model = make_model("--pooling", "mean")
    labels = torch.from_numpy(data.labels)
    contrastive.start(model, data, FP32, 0, 1.0, seed=1)
    before = states_of(model, data)
    contrastive.start(model, data, FP32, 60, 5e-3, seed=1)  # so small a model learns slowly
    after = states_of(model, data)
    assert contrastive.pair_loss(after, labels) < contrastive.pair_loss(before, labels) * 0.9
    logits = FP32.logits(model, data, data.text_index).detach()
    torch.testing.assert_close(logits, model.classifier(after).detach())
    # the head is where penalty and loss balance: in units of the mean norm, gradient = -weight
    scale = after.norm(dim=1).mean()
    errors = logits.softmax(1) - torch.eye(logits.shape[1])[labels]
    expected = -(errors.T @ (after / scale)) / scale
    torch.testing.assert_close(model.classifier.weight.detach(), expected, atol=1e-3, rtol=1e-2)


def states_of(model, rows) -> torch.Tensor:
    head, model.classifier = model.classifier, torch.nn.Identity()
    model.eval()
    with torch.no_grad():
        states = FP32.logits(model, rows, rows.text_index)
    model.classifier = head
    return states


def test_a_run_on_few_new_texts_starts_so_and_says_so(backbone, files, tmp_path, caplog):
    caplog.set_level("INFO")
    argv = ["--do_train", *files[:2], "--model_name_or_path", backbone, "--max_seq_length", "16"]
    for name, flags, steps in (("few", (), 50), ("own", ("--num_train_epochs", "1"), 0)):
        caplog.clear()
        assert main.main([*argv, *flags, "--output_dir", str(tmp_path / name)]) == 0
        settings = load(tmp_path / name, "run.json")["settings"]
        assert settings["contrastive_steps"] == steps
        assert settings["pooling"] == ("mean" if steps else "cls")
        assert load(tmp_path / name, "config.json")["pooling"] == settings["pooling"]
        assert ("50 contrastive steps" in caplog.text) == bool(steps)
        assert f"contrastive_steps {steps}" in caplog.text
    assert len(ROWS) == load(tmp_path / "few", "all_results.json")["train_rows"]

"""The schedule for repeated and for new texts, and R-Drop."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import main
from arguments import SCHEDULE, TUNING
from conftest import ROWS, make_backbone, one_line, write_csv
from model.sequence_classification import divergence
from runtime.files import read_json
from test_main import load


@pytest.mark.parametrize("flags", [(), ("--prefix", "--pre_seq_len", "3")])
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_schedule_depends_on_the_repeated_texts(
    backbone, files, tmp_path, capsys, flags, repeats
):
    write_csv(Path(files[1]), ROWS[:8] * repeats)
    argv = ["--do_train", *files[:2], "--model_name_or_path", backbone, "--max_seq_length", "16"]
    assert main.main([*argv, *flags, "--output_dir", str(tmp_path / "out")]) == 0
    settings = load(tmp_path / "out", "run.json")["settings"]
    row = TUNING["prefix" if flags else "full"]
    *expected, _ = row.new if repeats == 1 else row.seen
    found = [settings[name] for name in SCHEDULE]
    assert found == [*expected, False]  # without a validation file, no epoch is the best
    steps = load(tmp_path / "out", "all_results.json")["train_steps"]
    assert steps == settings["num_train_epochs"]
    # with a validation file, its texts decide
    write_csv(Path(files[3]), [("new", "0"), *ROWS[:1] * (repeats == 1)])
    argv += ["--do_eval", *files[2:4]]
    assert main.main([*argv, *flags, "--output_dir", str(tmp_path / "other")]) == 0
    settings = load(tmp_path / "other", "run.json")["settings"]
    expected = row.new if repeats == 3 else row.seen
    assert [settings[name] for name in SCHEDULE] == [*expected]
    *_, line = (one for one in capsys.readouterr().out.split("\n") if one.startswith("schedule"))
    warning = "; near 50 %, where it switches, try the other one too: see --help"
    said = {1: f"for repeated texts (50 % seen){warning}", 3: "for new texts (0 % seen)"}
    assert line == f"schedule {said[repeats]}"


@pytest.mark.parametrize(
    ("width", "flags", "rate"),
    [(384, (), 2e-4), (768, (), 5e-5), (1024, ("--prefix", "--pre_seq_len", "3"), 5e-3)],
)
def test_the_learning_rate_depends_on_the_width(files, tmp_path, caplog, width, flags, rate):
    """It is logged and recorded, and a step in bfloat16 leaves loss and weights finite."""
    caplog.set_level("INFO")
    size = {"hidden_size": width, "num_hidden_layers": 1, "initializer_range": 0.02}
    model = make_backbone(tmp_path / "wide", **size)
    argv = ["--do_train", *files[:2], "--max_seq_length", "16", "--num_train_epochs", "1"]
    for name, more in (("tuned", flags), ("tuned further", ())):
        caplog.clear()
        task = [*argv, "--precision", "bf16", "--model_name_or_path", model, *more]
        folder = tmp_path / name
        assert main.main([*task, "--output_dir", str(folder)]) == 0
        assert f"hidden size {width}: learning_rate {rate}" in caplog.text
        assert "; not measured on this backbone" in caplog.text
        settings = load(folder, "run.json")["settings"]
        assert settings["learning_rate"] == settings["head_learning_rate"] == rate
        assert math.isfinite(load(folder, "all_results.json")["train_loss"])
        tensors = load_file(next(folder.glob("*model.safetensors")))
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        model = str(folder)


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


def test_r_drop_needs_dropout_to_change_anything(run, capsys):
    flags = ("--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0")
    nothing = ("--hidden_dropout_prob", "1e-9", *flags[2:], "--rdrop_alpha", "5")
    plain, same = run(*flags, name="plain"), run(*nothing, name="same")
    run(*flags, "--rdrop_alpha", "5", name="no", status=2)
    assert "--rdrop_alpha needs dropout" in one_line((2, capsys.readouterr().err))
    other = run("--rdrop_alpha", "5", "--hidden_dropout_prob", "0.1", name="other")
    tables = [
        pd.read_csv(folder / "predictions.csv").filter(like="probability_")
        for folder in (plain, same, other)
    ]
    assert (tables[0] - tables[1]).abs().max(axis=None) < 1e-5
    assert (tables[0] - tables[2]).abs().max(axis=None) > 1e-4


def test_balanced_weights_make_all_labels_count_the_same(run, tmp_path, files):
    """In the loss, a label with a third of the rows of another one has three times its weight."""
    write_csv(Path(files[1]), [*ROWS[:2], *ROWS[4:10]])  # 2, 4 and 2 rows
    folder = run("--class_weights", "balanced")
    weights = load(folder, "run.json")["settings"]["class_weights"]
    assert weights == pytest.approx({"0": 4 / 3, "1": 2 / 3, "2": 4 / 3})
    path = tmp_path / "weights.json"
    path.write_text('{"0": 2, "2": 2}')
    same = run("--class_weights", str(path), name="same")
    expected, found = (pd.read_csv(one / "predictions.csv") for one in (folder, same))
    pd.testing.assert_frame_equal(found, expected, atol=1e-5)
    plain = pd.read_csv(run(name="plain") / "predictions.csv")
    assert (plain["confidence"] - found["confidence"]).abs().max() > 1e-4


def test_a_weight_counts_as_so_many_rows(run, files, tmp_path):
    """One step on the whole file: the gradient is that of a file with the label's rows doubled."""
    flags = ("--per_device_train_batch_size", "32", "--num_train_epochs", "1", "--ema_decay", "0")
    flags += ("--attention_probs_dropout_prob", "0", "--load_best_model_at_end", "False")
    path = tmp_path / "weights.json"
    path.write_text('{"1": 2}')
    weighted = run("--class_weights", str(path), *flags, name="weighted")
    write_csv(Path(files[1]), [*ROWS, *ROWS[4:8]])
    doubled = run(*flags, name="doubled")
    line, other = (
        read_json(folder / "metrics.jsonl", lines=True)[0] for folder in (weighted, doubled)
    )
    assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("several", [False, True])
def test_weights_of_unknown_labels_are_refused(run, files, tmp_path, capsys, several):
    flags = ["--class_weights", str(tmp_path / "weights.json")]
    if several:
        for path in files[1::2]:
            write_csv(Path(path), [(text, f"{label}|9") for text, label in ROWS])
        flags += ["--problem_type", "multi_label_classification"]
    for content, expected in (
        ('{"x": 2}', "has 'x'; labels are 0, 1, 2"),
        ('{"0": -1}', "0"),
    ):
        (tmp_path / "weights.json").write_text(content)
        capsys.readouterr()
        run(*flags, status=2)
        assert expected in one_line((2, capsys.readouterr().err))
    if several:
        folder = run("--class_weights", "balanced", *flags[2:], name="several")
        weights = load(folder, "run.json")["settings"]["class_weights"]
        assert weights == pytest.approx({"0": 7 / 4, "1": 7 / 4, "2": 8 / 3, "9": 1 / 11})

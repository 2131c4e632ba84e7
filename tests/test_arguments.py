"""The command line: accepted flags, and one-line errors for invalid ones."""

import re
import subprocess
import sys

import pytest

from arguments import (
    GROUPS,
    SCHEDULE,
    TUNING,
    build_parser,
    parse_args,
)
from conftest import ROOT
from model.schedule import advice_after_collapse, fill_schedule, learning_rate_warning
from script import serve, split

TASK = ["--do_train", "--do_eval", "--output_dir", "out"]
ORIGINAL = (
    "--model_name_or_path bert-base-cased --do_train --do_eval --do_predict --max_seq_length 256 "
    "--per_device_train_batch_size 16 --learning_rate 5e-5 --num_train_epochs 10 --pre_seq_len 4 "
    "--output_dir checkpoints/prefix/ --overwrite_output_dir --hidden_dropout_prob 0.1 --seed 11 "
    "--load_best_model_at_end True --save_strategy epoch --evaluation_strategy epoch --prefix"
)


# Scripts depend on these names: renaming or removing one breaks them.
FLAGS = """
    --attention_probs_dropout_prob
    --class_weights
    --column_names
    --contrastive_steps
    --csv_encoding
    --delimiter
    --do_eval
    --do_predict
    --do_train
    --drop_empty
    --drop_malformed
    --early_stopping_patience
    --ema_decay
    --engine
    --eval_strategy
    --evaluation_strategy
    --gradient_accumulation_steps
    --gradient_checkpointing
    --head_learning_rate
    --hidden_dropout_prob
    --int8
    --label_column_name
    --label_separator
    --learning_rate
    --load_best_model_at_end
    --logging_steps
    --lora_alpha
    --lora_r
    --max_grad_norm
    --max_seq_length
    --max_train_samples
    --metric_for_best_model
    --model_name_or_path
    --num_prefixes
    --num_train_epochs
    --output_dir
    --overwrite_output_dir
    --per_device_eval_batch_size
    --per_device_train_batch_size
    --pooling
    --pre_seq_len
    --precision
    --prefix
    --prefix_column
    --prefix_depth
    --prefix_hidden_size
    --prefix_init
    --prefix_init_text
    --prefix_paths
    --prefix_projection
    --problem_type
    --quoting
    --rdrop_alpha
    --reject_below
    --report_to
    --resume_from_checkpoint
    --safe_csv
    --save_steps
    --save_strategy
    --save_total_limit
    --seed
    --test_file
    --text
    --text_column_delimiter
    --text_column_names
    --train_file
    --tuning_method
    --validation_file
    --warmup_steps
    --weight_decay
"""


def test_the_flags_are_exactly_these():
    actions = (action for action in build_parser()._actions if action.dest != "help")
    assert sorted(name for action in actions for name in action.option_strings) == FLAGS.split()


def test_the_original_command_line_is_accepted_with_a_warning():
    args = parse_args(ORIGINAL.split())
    assert (args.prefix, args.pre_seq_len, args.seed, args.max_seq_length) == (True, 4, 11, 256)
    assert args.load_best_model_at_end is True
    assert (args.eval_strategy, args.save_strategy) == ("epoch", "epoch")
    assert "--learning_rate 5e-05 is low for prefix tuning" in learning_rate_warning(
        vars(args), 768
    )


def test_defaults_depend_on_method_and_width_and_on_repeated_texts():
    cases = {
        "full": [],
        "prefix": ["--prefix"],
        "projected prefix": ["--prefix", "--prefix_projection"],
        "input prefix": ["--prefix", "--prefix_depth", "input"],
        "lora": ["--tuning_method", "lora"],
        "probe": ["--tuning_method", "probe"],
        "bias": ["--tuning_method", "bias"],
    }
    assert cases.keys() == TUNING.keys()
    columns = {128: 0, 256: 0, 312: 0, 384: 0, 385: 1, 512: 1, 768: 1, 769: 2, 1024: 2, 1280: 2}
    for method, flags in cases.items():
        rates = TUNING[method].rates
        assert rates[0] > rates[1] >= rates[2]
        assert parse_args(TASK + flags).learning_rate is None  # until the backbone is known
        for width, column in columns.items():
            args = parse_args(TASK + flags)
            found = fill_schedule(vars(args), 0.0, width)
            assert found["learning_rate"] == found["head_learning_rate"] == rates[column]
            assert learning_rate_warning(vars(args), width) is None
        for seen, column in ((0.0, 1), (0.49, 1), (0.5, 0), (0.9, 0)):
            found = fill_schedule(vars(parse_args(TASK + flags)), seen, 384)
            assert (
                tuple(found[name] for name in SCHEDULE)
                == (TUNING[method].seen, TUNING[method].new)[column]
            )
    args = parse_args([*TASK, "--num_train_epochs", "3", "--hidden_dropout_prob", "0.3"])
    assert fill_schedule(vars(args), 0.0, 384)["num_train_epochs"] == args.num_train_epochs == 3
    assert (args.hidden_dropout_prob, args.rdrop_alpha) == (0.3, 1)
    for flags in (["--early_stopping_patience", "2"], ["--metric_for_best_model", "loss"]):
        assert fill_schedule(vars(parse_args(TASK + flags)), 0.0, 384)["load_best_model_at_end"]
    args = parse_args([*TASK, "--prefix", "--hidden_dropout_prob", "0"])
    assert fill_schedule(vars(args), 0.0, 384)["rdrop_alpha"] == 0  # two equal predictions
    args = parse_args([*TASK, "--learning_rate", "2e-4", "--head_learning_rate", "1e-3"])
    found = fill_schedule(vars(args), 0.0, 768)
    assert (found["learning_rate"], found["head_learning_rate"]) == (2e-4, 1e-3)
    assert learning_rate_warning(vars(args), 384) is None
    assert "is high for full tuning of a backbone with hidden" in learning_rate_warning(
        vars(args), 768
    )


def test_after_a_collapse_lower_rates_are_advised_until_they_are_too_low():
    """Each advice is typed; the first ones for BERT-base stay within what its paper searches."""
    for method, flags in (("full", []), ("prefix", ["--prefix"])):
        lowest, rates = TUNING[method].lowest, TUNING[method].rates
        for width, rate in zip((384, 768, 1024), rates, strict=True):
            args = parse_args(TASK + flags)
            fill_schedule(vars(args), 0.0, width)
            while (advice := advice_after_collapse(vars(args))) != "omit --learning_rate":
                verb, *typed = advice.split()
                args = parse_args([*TASK, *flags, *typed])
                assert (verb, len(typed)) == ("try", 2) and lowest * 0.9 < args.learning_rate < rate
                rate = args.learning_rate
            assert args.learning_rate < 3.5 * lowest
    settings = vars(parse_args([*TASK, "--learning_rate", "5e-5"]))
    assert advice_after_collapse(settings).endswith("2e-05")


def test_prefix_is_short_for_the_tuning_method_prefix():
    assert parse_args([*TASK, "--prefix"]) == parse_args([*TASK, "--tuning_method", "prefix"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learnig_rate", "1"], "unrecognized arguments: --learnig_rate"),
        (["--learning_rate", "-1"], "--learning_rate: -1 is out of range"),
        (["--learning_rate", "nan"], "--learning_rate: 'nan' is not a number"),
        (["--seed", "-1"], "--seed: -1 is out of range"),
        (["--seed", "4294967296"], "--seed: 4294967296 is out of range"),
        (["--num_train_epochs", "0"], "--num_train_epochs: 0 is out of range"),
        (["--num_train_epochs", "2.5"], "--num_train_epochs: '2.5' is not a whole number"),
        (["--contrastive_steps", "3", "--tuning_method", "probe"], "start so; omit it"),
        (["--contrastive_steps", "3", "--prefix", "--num_prefixes", "2"], "start so; omit it"),
        (["--pre_seq_len", "4"], "--pre_seq_len needs --tuning_method prefix"),
        (["--prefix", "--pre_seq_len", "0"], "--pre_seq_len: 0 is out of range"),
        (["--prefix", "--prefix_hidden_size", "9"], "--prefix_hidden_size needs --prefix_projec"),
        (["--prefix_depth", "input"], "--prefix_depth needs --tuning_method prefix"),
        (["--prefix_init_text", "cat"], "--prefix_init_text needs --tuning_method prefix"),
        (
            ["--prefix", "--prefix_init", "random", "--prefix_init_text", "cat"],
            "--prefix_init text",
        ),
        (
            ["--prefix", "--prefix_projection", "--prefix_init", "text"],
            "--prefix_projection requires --prefix_init random",
        ),
        (
            ["--prefix", "--prefix_projection", "--prefix_init_text", "a"],
            "--prefix_projection requires --prefix_init random",
        ),
        (["--prefix", "--tuning_method", "bias"], "--prefix and --tuning_method bias exclude"),
        (
            ["--tuning_method", "probe", "--pre_seq_len", "4"],
            "--pre_seq_len needs --tuning_method prefix",
        ),
        (["--prefix_column", "a"], "--prefix_column needs --prefix_paths"),
        (
            ["--prefix_paths", "a", "--prefix_column", "b"],
            "--prefix_paths works only with --do_predict",
        ),
        (["--eval_strategy", "no", "--load_best_model_at_end"], "--load_best_model_at_end needs"),
        (["--eval_strategy", "no", "--early_stopping_patience", "1"], "--early_stopping_patience"),
        (["--metric_for_best_model", "micro_f1"], "micro_f1 is for multi-label data"),
        (["--text_column_names", "a,,b"], "'a,,b' contains an empty column name"),
        (["--delimiter", ";"], "--delimiter: invalid choice: ';'"),
        (["--quoting", "all"], "--quoting: invalid choice: 'all'"),
        (["--label_separator", ""], "--label_separator: '' separates nothing: pass one such as"),
        (["--label_column_name", "a,b,a"], "--label_column_name: 'a,b,a' names a column twice"),
        (["--column_names", "a,a"], "--column_names: 'a,a' names a column twice"),
        (["--csv_encoding", "utf-9"], "Python cannot read files in 'utf-9'"),
        (["--model_name_or_path", "./out"], "--output_dir contains the model ./out"),
        (["--model_name_or_path", "out/a/b"], "--output_dir contains the model out/a/b"),
        (["--eval_strategy", "no", "--metric_for_best_model", "loss"], "--metric_for_best_model n"),
        (["--warmup_steps", "inf"], "--warmup_steps: 'inf' is not a number"),
        (["--warmup_steps", "2.5"], "--warmup_steps must be a whole number"),
        (["--weight_decay", "2"], "--weight_decay: 2 is out of range"),
        (["--csv_encoding", "undefined"], "Python cannot read files in 'undefined'"),
        (["--output_dir", ""], "--output_dir is missing"),
        (["--output_dir", "caf\udce9"], "'caf\\udce9' is not UTF-8"),
        (
            ["--train_file", "a.csv"],
            "--train_file also needs --validation_file: pass it, or make",
        ),
        (["--text", "a title"], "--text works only with --do_predict"),
        (["--load_best_model_at_end", "maybe"], "'maybe' is neither True nor False"),
    ],
)
def test_user_errors_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_args(TASK + flags)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_nothing_to_do_is_an_error(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--output_dir", "out"])
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--prefix", "--learning_rate=1e-3", "--save_strategy"])
def test_training_flags_need_do_train(flag, capsys):
    """Without training they would be ignored: a folder records how its model was tuned."""
    value = ["epoch"] if flag == "--save_strategy" else []
    with pytest.raises(SystemExit):
        parse_args(["--do_predict", "--output_dir", "out", flag, *value])
    assert f"error: {flag.partition('=')[0]} needs --do_train" in capsys.readouterr().err
    args = parse_args(["--do_predict", "--output_dir", "out"])
    assert args.learning_rate is args.prefix is args.problem_type is None


@pytest.mark.parametrize(
    ("task", "flags", "said"),
    [
        ("--do_predict", ["--train_file", "a.csv"], "--train_file needs --do_train"),
        ("--do_predict", ["--validation_file=a.csv"], "--validation_file needs --do_eval"),
        ("--do_predict", ["--seed", "3"], "--seed needs --do_train"),
        ("--do_eval", ["--test_file", "a.csv"], "--test_file needs --do_predict"),
        ("--do_train", ["--safe_csv"], "--safe_csv needs --do_predict or --do_eval"),
        ("--do_train", ["--per_device_eval_batch_size", "8"], "_batch_size needs --do_predict or"),
        (
            "--do_train",
            ["--do_eval", "--metric_for_best_model", "loss", "--load_best_model_at_end", "False"],
            "--metric_for_best_model needs --load_best_model_at_end",
        ),
        *(
            ("--do_predict", ["--text", "a", *flags], f"{flags[0]} has no effect with --text: omit")
            for flags in (
                ["--test_file", "a.csv"],
                ["--csv_encoding", "cp1252"],
                ["--safe_csv"],
                ["--label_column_name", "x"],
                ["--delimiter", "tab"],
                ["--drop_malformed"],
                ["--learning_rate", "1"],
                ["--overwrite_output_dir"],
            )
        ),
    ],
)
def test_a_flag_without_an_effect_is_an_error(task, flags, said, capsys):
    with pytest.raises(SystemExit):
        parse_args([task, *([] if "--text" in flags else ["--output_dir", "out"]), *flags])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_help_shows_the_defaults():
    text = " ".join(build_parser().format_help().split())
    for method, row in TUNING.items():
        assert f"{method} {'/'.join(f'{rate:g}' for rate in row.rates)}" in text
        for old, new in zip(row.seen[:-1], row.new[:-1], strict=True):
            assert f"{method} {old:g}/{new:g}" in text
    assert len(SCHEDULE) == len(TUNING["full"].seen)
    table = (ROOT / "model" / "README.md").read_text(encoding="utf-8")
    for column, size in enumerate(("up to 384", "up to 768", "above")):
        rates = [TUNING[name].rates[column] for name in ("full", "prefix", "lora", "bias", "probe")]
        cells = " | ".join(f"{rate:.0e}".replace("e-0", "e-") for rate in rates)
        assert f"| {size} | {cells} |" in table


def test_numbers_and_booleans_are_accepted_as_trainer_scripts_write_them():
    args = parse_args([*TASK, "--num_train_epochs", "3.0", "--load_best_model_at_end", "False"])
    assert args.num_train_epochs == 3
    assert args.load_best_model_at_end is False


def test_every_flag_has_a_help_text_and_a_group():
    parser = build_parser()
    for group in parser._action_groups[2:]:
        for action in group._group_actions:
            assert action.help, action.option_strings
    assert not parser._action_groups[0]._group_actions
    assert [a.dest for a in parser._action_groups[1]._group_actions] == ["help"]


def test_home_is_expanded_in_every_flag_that_takes_a_path(monkeypatch, tmp_path):
    """A shell does not do it after `=`, and a folder named ~ was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    kinds = {row[0].split()[0]: row[1] for rows in GROUPS.values() for row in rows}
    paths = [k for k, kind in kinds.items() if re.search("FILE|DIR", kind.get("metavar") or "")]
    assert len(paths) == 7
    for name in ("--model_name_or_path", *paths):
        found = getattr(build_parser().parse_args([f"{name}=~/a"]), name[2:])
        assert found in (f"{tmp_path}/a", [f"{tmp_path}/a"]), name
    assert split.parse_args(["x.csv", "--output_dir=~/a"]).output_dir == f"{tmp_path}/a"
    assert serve.parse(["--allow_updates=~/a"]).allow_updates == f"{tmp_path}/a"


def test_help_imports_no_torch():
    watch = "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules))"
    code = f"{watch}; sys.argv = ['main.py', '--help']; runpy.run_path('main.py', {{}}, '__main__')"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "--pre_seq_len" in shown.stdout
    assert shown.stdout.endswith("False\n")


@pytest.mark.parametrize(("flag", "status"), [("--help", 0), ("--no_such_flag", 2)])
def test_help_and_typos_need_no_packages(flag, status):
    command = [sys.executable, "-S", "main.py", flag]  # without site-packages
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == status, shown.stderr
    assert "not installed" not in shown.stderr


def test_a_tuned_prefix_needs_no_prefix_flags_and_refuses_them(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    task = [*TASK, "--model_name_or_path", str(tmp_path)]
    args = parse_args(task)
    assert args.prefix
    assert args.prefix_init is None
    assert fill_schedule(vars(args), 0.0, 384)["learning_rate"] == TUNING["prefix"].rates[0]
    with pytest.raises(SystemExit):
        parse_args([*task, "--pre_seq_len", "4"])
    assert "--pre_seq_len cannot" in (error := capsys.readouterr().err)
    assert f"cannot change the tuned adapter in {tmp_path}" in error

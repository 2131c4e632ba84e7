"""Command-line arguments: their names, defaults, help, and every check that needs no file.

Names follow Hugging Face's `TrainingArguments` and `run_classification.py`; those of the prefix
follow P-tuning v2. Nothing heavy is imported here, so that `--help` and a typo answer at once.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
from typing import NoReturn

DEFAULT_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"

# What depends on the way of tuning, measured on the bundled backbone (results/README.md).
TUNING_DEFAULTS = {
    "full": {
        "learning_rate": 2e-4,
        "num_train_epochs": 8,
        "attention_probs_dropout_prob": 0.1,
    },
    "prefix": {
        "learning_rate": 3e-2,
        "num_train_epochs": 12,
        "attention_probs_dropout_prob": 0.0,
    },
}
# Not tuned on real data.
TUNING_DEFAULTS["projected prefix"] = TUNING_DEFAULTS["prefix"] | {"learning_rate": 1e-3}
TUNING_DEFAULTS["input prefix"] = TUNING_DEFAULTS["prefix"]
COLUMN_DEFAULTS = {
    "text_column_names": ["text"],
    "text_column_delimiter": " ",
    "label_column_name": "label",
}
# Groups of flags that would do nothing without --do_train.
NEEDS_TRAINING = ("prefix tuning", "training", "evaluation and choice of the best epoch")
PREFIX_DEFAULTS = {
    "pre_seq_len": {"all": 128, "input": 16},
    "prefix_depth": "all",
    "prefix_init": "text",
    "prefix_projection": False,
    "prefix_hidden_size": 512,
}
# Outside these bounds a learning rate most likely was meant for another way of tuning.
SUITABLE_LEARNING_RATES = {
    "full": (0, 1e-3),
    "prefix": (1e-3, 1),
    "projected prefix": (5e-5, 1e-2),
    "input prefix": (1e-3, 1),
}


def by_way(name: str) -> str:
    """The defaults of `TUNING_DEFAULTS` as help shows them."""
    return ", ".join(f"{way} {values[name]:g}" for way, values in TUNING_DEFAULTS.items())


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the way out, and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message.removeprefix('argument ')} (see python main.py --help)\n")


def number(kind: type, low: float, high: float, *, open_low: bool = False):
    """Make an argparse type: a number within [low, high], or (low, high] where `open_low`.

    A whole number may be written as `3.0`, as scripts for the Trainer often do.
    """

    def convert(text: str):
        try:
            value = float(text)
            if not math.isfinite(value) or (kind is int and value != int(value)):
                raise ValueError
        except ValueError:
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"'{text}' is not a {noun}") from None
        if not low <= value <= high or (open_low and value == low):
            bound = f"above {low:g}" if open_low else f"{low:g} or more"
            limit = "" if high == float("inf") else f" and at most {high:.10g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: give {bound}{limit}")
        return int(float(text)) if kind is int else value

    return convert


def boolean(text: str) -> bool:
    """Read `True`/`False` as HF's parser does (also yes/no, 1/0)."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return words[text.lower()]


def names(text: str) -> list[str]:
    """Split `title,tags` at the commas."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"'{text}' holds an empty column name")
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"'{text}' names a column twice")
    return found


POSITIVE_INT = number(int, 1, float("inf"))
COUNT = number(int, 0, float("inf"))
POSITIVE = number(float, 0, float("inf"), open_low=True)
LEARNING_RATE = number(float, 0, 1e30, open_low=True)
NON_NEGATIVE = number(float, 0, float("inf"))


def switch(group, flag: str, help_text: str, **options) -> None:
    """A boolean that takes `--flag` and `--flag True|False` alike."""
    group.add_argument(
        flag, type=boolean, nargs="?", const=True, metavar="BOOL", help=help_text, **options
    )


def add_task_flags(parser: Parser) -> None:
    """What to do."""
    group = parser.add_argument_group("what to do (at least one)")
    switch(group, "--do_train", "tune on the training file", default=False)
    switch(group, "--do_eval", "evaluate on the validation file", default=False)
    switch(group, "--do_predict", "predict the test file; score it if it has labels", default=False)


def add_data_flags(parser: Parser) -> None:
    """Files and columns."""
    group = parser.add_argument_group("data")
    group.add_argument("--train_file", default="csv/train_simple.csv", help="[%(default)s]")
    group.add_argument("--validation_file", default="csv/val_simple.csv", help="[%(default)s]")
    group.add_argument("--test_file", default="csv/test_simple.csv", help="[%(default)s]")
    group.add_argument(
        "--text_column_names",
        type=names,
        metavar="A,B",
        help="column(s) that hold the text, separated by commas "
        "[text, or those of the tuned folder]",
    )
    group.add_argument(
        "--text_column_delimiter",
        metavar="STR",
        help="what joins several text columns [one blank, or that of the tuned folder]",
    )
    group.add_argument(
        "--label_column_name",
        metavar="NAME",
        help="label column [label, or that of the tuned folder]",
    )
    group.add_argument(
        "--problem_type",
        choices=["single_label_classification", "multi_label_classification"],
        help="multi-label: the labels of one row are separated by | "
        "[single, or that of the tuned folder]",
    )
    group.add_argument(
        "--csv_encoding",
        default="utf-8",
        metavar="NAME",
        help="encoding of the CSV files, such as cp1252 or utf-16 [%(default)s]",
    )
    switch(group, "--drop_empty", "drop rows with a blank text instead of refusing", default=False)


def add_model_flags(parser: Parser) -> None:
    """Backbone, precision, seed."""
    group = parser.add_argument_group("model and machine")
    group.add_argument(
        "--model_name_or_path",
        default=DEFAULT_BACKBONE,
        metavar="NAME",
        help="a BERT on the hub, a local folder, or a folder that this program wrote [%(default)s]",
    )
    group.add_argument(
        "--prefix_paths",
        nargs="+",
        metavar="DIR",
        help="instead: tuned prefixes over one backbone, each for its rows of the test file",
    )
    group.add_argument(
        "--prefix_column",
        metavar="NAME",
        help="the test file's column that names each row's folder of --prefix_paths",
    )
    group.add_argument(
        "--max_seq_length",
        type=number(int, 3, 1e6),
        metavar="N",
        help="longest text in tokens, [CLS] and [SEP] included; the rest is cut "
        "[128, or that of the tuned folder]",
    )
    group.add_argument(
        "--per_device_eval_batch_size", type=POSITIVE_INT, default=64, metavar="N", help="[64]"
    )
    group.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="auto: bfloat16 autocast where the processor has it [auto]",
    )

    group.add_argument(
        "--seed", type=number(int, 0, 2**32 - 1), default=42, metavar="N", help="[%(default)s]"
    )


def add_prefix_flags(parser: Parser) -> None:
    """The prefix."""
    group = parser.add_argument_group(NEEDS_TRAINING[0])
    switch(group, "--prefix", "freeze the backbone; tune a prefix of virtual tokens", default=False)
    group.add_argument(
        "--prefix_depth",
        choices=["all", "input"],
        help="virtual tokens are keys and values in every layer, or embeddings at the input [all]",
    )
    group.add_argument(
        "--pre_seq_len",
        type=POSITIVE_INT,
        metavar="N",
        help="number of virtual tokens "
        f"[{', '.join(f'{depth} {n}' for depth, n in PREFIX_DEFAULTS['pre_seq_len'].items())}]",
    )
    group.add_argument(
        "--prefix_init",
        choices=["random", "text"],
        help="start from small random numbers, or from what the backbone makes of real words "
        "[text; with --prefix_projection random]",
    )
    group.add_argument(
        "--prefix_init_text",
        metavar="STR",
        help="those words, repeated to the prefix's length "
        "[the labels; where they are numbers, training texts drawn by --seed]",
    )
    switch(group, "--prefix_projection", "reparametrise the prefix by an MLP [False]")
    group.add_argument(
        "--prefix_hidden_size",
        type=POSITIVE_INT,
        metavar="N",
        help=f"width of that MLP [{PREFIX_DEFAULTS['prefix_hidden_size']}]",
    )


def add_loop_flags(parser: Parser) -> None:
    """The loop."""
    group = parser.add_argument_group(NEEDS_TRAINING[1])
    group.add_argument(
        "--num_train_epochs", type=POSITIVE_INT, metavar="N", help=f"[{by_way('num_train_epochs')}]"
    )
    group.add_argument(
        "--per_device_train_batch_size", type=POSITIVE_INT, default=32, metavar="N", help="[32]"
    )
    group.add_argument(
        "--gradient_accumulation_steps",
        type=POSITIVE_INT,
        default=1,
        metavar="N",
        help="batches whose gradients make one step; their examples all weigh the same [1]",
    )
    group.add_argument(
        "--learning_rate",
        type=LEARNING_RATE,
        metavar="LR",
        help=f"peak; the default suits the bundled backbone [{by_way('learning_rate')}]",
    )
    group.add_argument(
        "--head_learning_rate",
        type=LEARNING_RATE,
        metavar="LR",
        help="peak, of the classification head [that of --learning_rate]",
    )
    group.add_argument(
        "--weight_decay",
        type=number(float, 0, 1),
        default=0.01,
        metavar="W",
        help="AdamW's, not on biases, LayerNorm and the prefix [%(default)s]",
    )
    group.add_argument(
        "--max_grad_norm", type=POSITIVE, default=1.0, metavar="X", help="clip above it [1.0]"
    )
    group.add_argument(
        "--warmup_steps",
        type=NON_NEGATIVE,
        default=0.06,
        metavar="N",
        help="steps of linear warm-up; below 1: a share of all steps [0.06]",
    )
    group.add_argument(
        "--hidden_dropout_prob",
        type=number(float, 0, 0.99),
        default=0.0,
        metavar="P",
        help="dropout of hidden layers and before the head [%(default)s]",
    )
    group.add_argument(
        "--attention_probs_dropout_prob",
        type=number(float, 0, 0.99),
        metavar="P",
        help=f"dropout of attention [{by_way('attention_probs_dropout_prob')}]",
    )
    group.add_argument(
        "--ema_decay",
        type=number(float, 0, 0.999999),
        default=0.99,
        metavar="D",
        help="decay, at each step, of the moving average of the weights, which is what is "
        "evaluated and saved; 0: no average [%(default)s]",
    )
    switch(
        group,
        "--gradient_checkpointing",
        "recompute activations in the backward pass: less memory, more time",
        default=False,
    )
    group.add_argument(
        "--max_train_samples",
        type=POSITIVE_INT,
        metavar="N",
        help="train on N rows drawn at random by --seed [all]",
    )
    group.add_argument(
        "--logging_steps",
        type=POSITIVE_INT,
        default=50,
        metavar="N",
        help="steps between two lines of metrics.jsonl [%(default)s]",
    )
    group.add_argument(
        "--report_to",
        choices=["none", "tensorboard"],
        default="none",
        help="write those lines for TensorBoard too, into the output folder [%(default)s]",
    )


def add_choice_flags(parser: Parser) -> None:
    """Evaluation while training, and what is kept."""
    group = parser.add_argument_group(NEEDS_TRAINING[2])
    group.add_argument(
        "--eval_strategy",
        "--evaluation_strategy",
        choices=["no", "epoch"],
        help="when to evaluate while training [epoch, with --do_eval]",
    )
    switch(group, "--load_best_model_at_end", "keep the best epoch, not the last [where evaluated]")
    group.add_argument(
        "--metric_for_best_model",
        choices=["accuracy", "macro_f1", "micro_f1", "loss"],
        help="on the validation file [accuracy; multi-label: micro_f1]",
    )
    group.add_argument(
        "--early_stopping_patience",
        type=COUNT,
        default=0,
        metavar="N",
        help="stop after N evaluations without a better one; 0: never [0]",
    )
    group.add_argument(
        "--save_strategy",
        choices=["no", "epoch", "steps"],
        help="write checkpoints that a run can go on from: at the end of each epoch; steps: and "
        "every --save_steps [epoch, removed once the run has finished]",
    )
    group.add_argument("--save_steps", type=POSITIVE_INT, metavar="N", help="[500]")
    group.add_argument(
        "--save_total_limit",
        type=POSITIVE_INT,
        metavar="N",
        help="checkpoints that stay, in checkpoint-STEP: the newest N, and the best "
        "[all, where --save_strategy is given]",
    )
    group.add_argument(
        "--resume_from_checkpoint",
        metavar="auto|DIR",
        help="go on from the newest whole checkpoint of the unfinished run in --output_dir, from "
        "the start where there is none; or from a given checkpoint",
    )


def add_output_flags(parser: Parser) -> None:
    """Where results go."""
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", required=True, metavar="DIR", help="folder of the results")
    switch(
        group,
        "--overwrite_output_dir",
        "replace the results that an earlier run left there",
        default=False,
    )


def build_parser() -> Parser:
    """All flags, in groups."""
    parser = Parser(
        prog="main.py",
        description="Tune a BERT classifier on CSV files of texts and labels: "
        "all of its weights, or a prefix of virtual tokens (--prefix).",
        allow_abbrev=False,
    )
    add_task_flags(parser)
    add_data_flags(parser)
    add_model_flags(parser)
    add_prefix_flags(parser)
    add_loop_flags(parser)
    add_choice_flags(parser)
    add_output_flags(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check; fill in the defaults that depend on the way of tuning.

    Returns the settings, complete but for what only the model knows (`max_seq_length`, and
    without --do_train `problem_type`, may be None). Without --do_train those of training are None.
    A bad flag, value or combination ends the program: one line, exit status 2.
    """
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:  # what a run is told is written down, as UTF-8
            parser.error(f"{word!a} is not UTF-8")
    args = parser.parse_args(argv)
    check_tasks(parser, args)
    fill_columns(args)
    check_columns_and_paths(parser, args)
    if args.do_train:
        check_prefix(parser, args)
        check_training(parser, args)
        fill_learning(args)
    else:
        refuse_training_flags(parser, args, argv)
    return args


def check_tasks(parser: Parser, args: argparse.Namespace) -> None:
    """At least one task; evaluation asked for by its strategy counts, as in HF's Trainer."""
    if args.do_train and args.eval_strategy == "epoch":
        args.do_eval = True
    if not (args.do_train or args.do_eval or args.do_predict):
        parser.error("nothing to do: give --do_train, --do_eval or --do_predict")
    if (args.prefix_paths is None) != (args.prefix_column is None):
        parser.error("--prefix_paths and --prefix_column need each other")
    if args.prefix_paths and args.model_name_or_path != DEFAULT_BACKBONE:
        parser.error("--prefix_paths: the folders name their backbone; leave --model_name_or_path")
    if args.prefix_paths and (args.do_train or args.do_eval):
        parser.error("--prefix_paths is for --do_predict alone")


def fill_columns(args: argparse.Namespace) -> None:
    """Columns that are not given are those that a tuned folder was tuned on."""
    try:
        with open(os.path.join(args.model_name_or_path, "run.json"), encoding="utf-8") as file:
            tuned_on = json.load(file)["settings"]
        tuned_on = {name: tuned_on[name] for name in COLUMN_DEFAULTS}
    except (OSError, ValueError, KeyError, TypeError):  # a backbone, or written by others
        tuned_on = COLUMN_DEFAULTS
    for name, value in tuned_on.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def refuse_training_flags(parser: Parser, args: argparse.Namespace, argv: list[str]) -> None:
    """Without --do_train a tuned folder knows how it was tuned; flags about it do nothing."""
    given = {word.partition("=")[0] for word in argv}
    for group in parser._action_groups:
        if group.title in NEEDS_TRAINING:
            for action in group._group_actions:
                if found := given.intersection(action.option_strings):
                    parser.error(f"{found.pop()} needs --do_train")
                setattr(args, action.dest, None)


def check_prefix(parser: Parser, args: argparse.Namespace) -> None:
    """A flag of the prefix without the prefix would do nothing, so it is refused.

    A tuned prefix is what it is: tuned further, it takes none of these flags.
    """
    given = [name for name in (*PREFIX_DEFAULTS, "prefix_init_text") if getattr(args, name)]
    tuned = os.path.isfile(os.path.join(args.model_name_or_path, "adapter_config.json"))
    if tuned and given:
        parser.error(f"--{given[0]}: {args.model_name_or_path} is a tuned prefix and has its own")
    if tuned:
        args.prefix = True
    if tuned or not args.prefix:
        if given:
            parser.error(f"--{given[0]} needs --prefix")
        return
    if args.prefix_hidden_size and not args.prefix_projection:
        parser.error("--prefix_hidden_size needs --prefix_projection")
    if args.prefix_init_text and args.prefix_init == "random":
        parser.error("--prefix_init_text needs --prefix_init text")
    if args.prefix_projection and (args.prefix_init == "text" or args.prefix_init_text):
        parser.error("--prefix_init text: the MLP of --prefix_projection can only start at random")
    depth = args.prefix_depth or PREFIX_DEFAULTS["prefix_depth"]
    defaults = PREFIX_DEFAULTS | {"pre_seq_len": PREFIX_DEFAULTS["pre_seq_len"][depth]}
    if args.prefix_projection:
        defaults["prefix_init"] = "random"
    else:
        defaults["prefix_hidden_size"] = None
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def check_training(parser: Parser, args: argparse.Namespace) -> None:
    """Choosing an epoch needs an evaluation after each; steps are whole."""
    args.problem_type = args.problem_type or "single_label_classification"
    multi_label = args.problem_type == "multi_label_classification"
    if args.eval_strategy is None:
        args.eval_strategy = "epoch" if args.do_eval else "no"
    if args.eval_strategy == "no":
        for name in ("load_best_model_at_end", "early_stopping_patience", "metric_for_best_model"):
            if getattr(args, name):
                parser.error(f"--{name} needs --do_eval and --eval_strategy epoch")
    if args.load_best_model_at_end is None:
        args.load_best_model_at_end = args.eval_strategy == "epoch"
    if args.metric_for_best_model is None:
        args.metric_for_best_model = "micro_f1" if multi_label else "accuracy"
    elif args.metric_for_best_model == "micro_f1" and not multi_label:
        parser.error(
            "--metric_for_best_model: micro_f1 is for multi-label data; with one label a row it "
            "equals accuracy"
        )
    check_saving(parser, args)
    if args.report_to == "tensorboard" and not importlib.util.find_spec("tensorboard"):
        parser.error("--report_to tensorboard: .venv/bin/pip install tensorboard first")
    if args.warmup_steps > 1 and args.warmup_steps % 1:
        parser.error("--warmup_steps: give a whole number of steps, or a share below 1")


def check_saving(parser: Parser, args: argparse.Namespace) -> None:
    """Checkpoints that nobody asked for are there to go on from, and go once the run is done."""
    asked = args.save_strategy is not None or args.save_steps is not None
    if args.save_strategy is None:
        args.save_strategy = "steps" if args.save_steps else "epoch"
    if args.save_steps and args.save_strategy != "steps":
        parser.error("--save_steps needs --save_strategy steps")
    if args.save_strategy == "steps" and not args.save_steps:
        args.save_steps = 500
    if args.save_total_limit and args.save_strategy == "no":
        parser.error("--save_total_limit needs --save_strategy epoch or steps")
    if args.save_total_limit is None and not asked:
        args.save_total_limit = 0


def check_columns_and_paths(parser: Parser, args: argparse.Namespace) -> None:
    """Columns and folders that contradict each other."""
    if args.label_column_name in args.text_column_names:
        parser.error(f"--text_column_names: '{args.label_column_name}' is the label column")
    try:
        "".encode(args.csv_encoding)
    except (LookupError, UnicodeError):
        parser.error(f"--csv_encoding: Python knows no encoding '{args.csv_encoding}'")
    if not args.output_dir:
        parser.error("--output_dir is empty: name a folder")
    for model in (args.model_name_or_path, *(args.prefix_paths or ())):
        if os.path.realpath(args.output_dir) == os.path.realpath(model):
            parser.error(f"--output_dir is the folder of the model {model}: give another one")


def way_of_tuning(args: argparse.Namespace) -> str:
    """A key of `TUNING_DEFAULTS`."""
    if not args.prefix:
        return "full"
    if args.prefix_projection:
        return "projected prefix"
    return "input prefix" if args.prefix_depth == "input" else "prefix"


def fill_learning(args: argparse.Namespace) -> None:
    """Learning rates and epochs by the way of tuning."""
    for name, default in TUNING_DEFAULTS[way_of_tuning(args)].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.head_learning_rate is None:
        args.head_learning_rate = args.learning_rate


def learning_rate_warning(args: argparse.Namespace) -> str | None:
    """A sentence where the learning rate looks meant for another way of tuning, else None."""
    way = way_of_tuning(args)
    low, high = SUITABLE_LEARNING_RATES[way]
    if low <= args.learning_rate <= high:
        return None
    side, effect = (
        ("low", "slowly") if args.learning_rate < low else ("high", "badly or not at all")
    )
    return (
        f"--learning_rate {args.learning_rate:g} is {side} for {way} tuning: expect it to learn "
        f"{effect} (the default is {TUNING_DEFAULTS[way]['learning_rate']:g})"
    )

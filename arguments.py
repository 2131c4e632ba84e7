"""Command-line arguments: one row per flag, then every check that needs no data and no model.

Names follow Hugging Face's `TrainingArguments` and `run_classification.py`; prefix flags follow
P-tuning v2. Nothing heavy is imported here, so `--help` and typos are answered at once.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from runtime import flags

from runtime.flags import (  # isort: skip
    COUNT, DIR, DROPOUT, FILE, INT, NAME, POSITIVE, PROBABILITY, RATE, SEED, STEPS, STR, SWITCH,
    TOKENS, Parser, choice, column_names, encoding, fill, number, value,
)  # fmt: skip

DEFAULT_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"

# If at least half of the validation texts are training texts, so are those of the test file, and
# what counts is to memorise them. If not, long training makes the model overconfident, dropout and
# R-Drop help, and the last epoch beats the best on a small validation file (results/LOG.md).
SCHEDULE = (
    "num_train_epochs hidden_dropout_prob attention_probs_dropout_prob rdrop_alpha "
    "load_best_model_at_end"
).split()
WIDTHS = (384, 768)  # a width in between has the rates of the wider backbone, which are safer


class Tuning(NamedTuple):
    """The defaults of a tuning method: peak learning rates by hidden size, see WIDTHS; schedules.

    - up to 384: measured on the bundled backbone (results/README.md), projected and input not
    - full: 2e-5 to 5e-5 for base and large (Devlin et al. 2019, https://arxiv.org/abs/1810.04805)
    - prefix: 5e-3 to 2e-2 for BERT-large, projected 1e-4 (run_script, github.com/THUDM/P-tuning-v2)
    - lora: 2e-4 to 5e-4 for RoBERTa (Hu et al. 2022, https://arxiv.org/abs/2106.09685)
    - bias and probe: 1e-3 for BERT-base (README, github.com/benzakenelad/BitFit); above: a guess
    """

    lowest: float  # that is plausible
    rates: tuple[float, float, float]
    highest: tuple[float, float, float]
    seen: tuple  # SCHEDULE, if most texts are seen
    new: tuple  # and if not
    flags: Mapping[str, Any] = MappingProxyType({})  # its own ones: their defaults
    starts: bool = False  # contrastively, if texts are new; all that can do if they are few
    peft_type: str = ""  # of an adapter that PEFT wrote, if it is no prefix


KEEP_BEST = (12, 0, 0, 0, True)
# fmt: off
TUNING = {
    "full":   Tuning(1e-6, (2e-4, 5e-5, 2e-5), (1e-3, 1e-4, 5e-5),
                     (8, 0, 0.1, 0, True), (4, 0.1, 0.1, 1, False), starts=True),
    "prefix": Tuning(1e-3, (3e-2, 1e-2, 5e-3), (1, 0.1, 0.1), KEEP_BEST, (8, 0.1, 0, 1, False),
                     {"prefix_depth": "all", "prefix_init": "text", "prefix_projection": False}),
    "projected prefix": Tuning(2e-5, (1e-3, 3e-4, 1e-4), (1e-2, 3e-3, 1e-3), KEEP_BEST, KEEP_BEST),
    "input prefix": Tuning(1e-3, (3e-2, 1e-2, 5e-3), (1, 0.1, 0.1), KEEP_BEST, KEEP_BEST),
    "lora":   Tuning(1e-5, (2e-3, 5e-4, 2e-4), (2e-2, 5e-3, 2e-3),
                     KEEP_BEST, (8, 0.1, 0, 1, False),
                     {"lora_r": 8, "lora_alpha": 16.0}, starts=True, peft_type="LORA"),
    "probe":  Tuning(1e-4, (3e-3, 1e-3, 1e-3), (0.1, 0.1, 0.1), KEEP_BEST, KEEP_BEST),
    "bias":   Tuning(1e-4, (3e-3, 1e-3, 5e-4), (3e-2, 1e-2, 1e-2),
                     (8, 0, 0, 0, True), (8, 0, 0, 0, True)),
}
# fmt: on
MOSTLY_SEEN = 0.5  # share of the validation rows
FEW_STEPS, STARTS = 32, {True: (50, "mean", 0.1), False: (100, "cls", 0.5)}  # see fill_start
METHODS = tuple(name for name in TUNING if " " not in name)  # others: kinds of prefix
USES = {"train": "train", "validation": "val", "test": "test"}
FILES = {f"{use}_file": f"csv/{name}_simple.csv" for use, name in USES.items()}
SCORING = ("do_predict", "do_eval")
PRE_SEQ_LEN = {"all": 128, "input": 16}


def by_method(name: str) -> str:
    """List the default of a schedule flag for every tuning method, for the help text."""
    place = SCHEDULE.index(name)
    rows = ((method, row.seen[place], row.new[place]) for method, row in TUNING.items())
    return ", ".join(f"{method} {seen:g}/{new:g}" for method, seen, new in rows)


RATES = ", ".join(f"{name} {'/'.join(f'{r:g}' for r in row.rates)}" for name, row in TUNING.items())
TUNED_FOLDER = "or the tuned model's"
# fmt: off
READING = (  # how a file is read: flags of main.py and split.sh
    ("--text_column_names", value(column_names, "A,B"), None, f"columns [text, {TUNED_FOLDER}]"),
    ("--label_column_name", value(flags.label_columns, "NAME"), None,
     f"a column; A,B,C: a column of 0 and 1 for each label [label, {TUNED_FOLDER}]"),
    ("--problem_type", choice(flags.SINGLE_LABEL, flags.MULTI_LABEL), None,
     "multi-label: a row has several labels, or none, such as a|b or ['a', 'b'] "
     f"[single, {TUNED_FOLDER}]"),
    ("--label_separator", value(flags.separator, "S"), None, "between labels in one cell [|]"),
    ("--column_names", value(column_names, "A,B"), None,
     "names of all columns, of a file without a header"),
    ("--delimiter", choice(*flags.DELIMITERS), None, "between columns [found by the header]"),
    ("--quoting", choice(*flags.QUOTINGS), None,
     "none: quotes are characters like any other, as in many files with tabs [minimal]"),
    ("--csv_encoding", value(encoding, "NAME"), None,
     f"encoding of the files, e.g. cp1252 [utf-8, {TUNED_FOLDER} if a file is not UTF-8]"),
    ("--drop_malformed", SWITCH, False, "drop rows that cannot be read instead of stopping"),
)
GROUPS = {  # each flag: name, kind, default and help
"what to do (at least one)": (
    ("--do_train", SWITCH, False, "tune on the training file"),
    ("--do_eval", SWITCH, False, "evaluate on the validation file"),
    ("--do_predict", SWITCH, False, "predict the test file; score it if it has labels"),
    ("--text", STR | {"nargs": "+"}, None,
     "with --do_predict: label these texts, say why, and write no files; -: label the lines of "
     "standard input"),
),
"data": (
    *((f"--{name}", FILE, None, f"[{path}]") for name, path in FILES.items()),
    *READING,
    ("--text_column_delimiter", STR, None, f"joins text columns [the separator, {TUNED_FOLDER}]"),
    ("--drop_empty", SWITCH, False, "drop rows with a blank text instead of stopping"),
    ("--safe_csv", SWITCH, False, "put an ' before formulas in predictions.csv, for spreadsheets"),
    ("--reject_below", PROBABILITY, 0.0,
     "mark predictions of a confidence below P as rejected, in a column [0: no column]"),
),
"model and machine": (
    ("--model_name_or_path", value(flags.path, "NAME"), DEFAULT_BACKBONE,
     "a BERT on the hub or in a local folder, or a model or adapter folder [%(default)s]"),
    ("--prefix_paths", DIR | {"nargs": "+"}, None,
     "instead of one model: adapter folders of several prefixes on one backbone"),
    ("--prefix_column", NAME, None, "column that names each row's folder [average all of them]"),
    ("--max_seq_length", TOKENS, None, f"longer texts are cut to N tokens [128, {TUNED_FOLDER}]"),
    ("--per_device_eval_batch_size", INT, 64, "[%(default)s]"),
    ("--precision", choice("auto", "fp32", "bf16"), "auto", "auto: bf16 if fast here [auto]"),
    ("--engine", choice("auto", "torch", "openvino"), None,
     "to predict with; auto: OpenVINO for files above half a megabyte on a CPU [auto]"),
    ("--int8", SWITCH, False, "predict in 8 bits, unless that harms the validation predictions"),
    ("--seed", SEED, 42, "seed of weights, row order and dropout [%(default)s]"),
),
"prefix tuning": (
    ("--prefix", SWITCH, False, "same as --tuning_method prefix"),
    ("--prefix_depth", choice("all", "input"), None, "in every layer, or only at the input [all]"),
    ("--pre_seq_len", INT, None, "number of virtual tokens [all 128, input 16]"),
    ("--num_prefixes", INT, None, "train N prefixes at once; they predict together [1]"),
    ("--prefix_init", choice("random", "text"), None,
     "initialise at random, or from the backbone's encoding of words [text; random if projected]"),
    ("--prefix_init_text", STR, None,
     "words to start from, repeated to the prefix's length [those of training texts]"),
    ("--prefix_projection", SWITCH, None, "reparametrise the prefix with an MLP [False]"),
    ("--prefix_hidden_size", INT, None, "hidden size of the --prefix_projection MLP [512]"),
),
"lora tuning": (
    ("--lora_r", INT, None, "rank of the matrices beside each query and value matrix [8]"),
    ("--lora_alpha", POSITIVE, None, "their product is scaled by X over the rank [16]"),
),
"training": (
    ("--tuning_method", choice(*METHODS), None, "train all weights, a prefix, LoRA, the head alone "
     f"(over mean-pooled tokens), or biases and LayerNorm's gains [full, {TUNED_FOLDER}]"),
    ("--pooling", choice("cls", "mean"), None,
     "what the head reads: BERT's pooler over [CLS], or the mean of the tokens, which transformers "
     f"and PEFT cannot load [cls; probe mean, {TUNED_FOLDER}]"),
    ("--num_train_epochs", INT, None, "if at least half of the validation texts are seen/if not "
     f"[{by_method('num_train_epochs')}]"),
    ("--per_device_train_batch_size", INT, 32, "rows, shared among processes [%(default)s]"),
    ("--gradient_accumulation_steps", INT, 1, "batches accumulated per optimizer step [1]"),
    ("--learning_rate", RATE, None, "peak rate, by the backbone's hidden size: up to 384/up to 768/"
     f"above; measured on the bundled backbone alone [{RATES}]"),
    ("--head_learning_rate", RATE, None, "peak rate of the head [same as --learning_rate]"),
    ("--weight_decay", value(number(float, 0, 1), "W"), 0.01,
     "AdamW's weight decay; none for biases, LayerNorm and the prefix [%(default)s]"),
    ("--max_grad_norm", POSITIVE, 1.0, "clip the gradient to this norm [%(default)s]"),
    ("--warmup_steps", STEPS, 0.06, "linear warm-up steps; below 1: a share of all steps [0.06]"),
    ("--hidden_dropout_prob", DROPOUT, None,
     f"dropout of hidden layers and head input [{by_method('hidden_dropout_prob')}]"),
    ("--attention_probs_dropout_prob", DROPOUT, None,
     f"dropout of attention weights [{by_method('attention_probs_dropout_prob')}]"),
    ("--rdrop_alpha", STEPS | {"metavar": "A"}, None,
     "R-Drop: train each row with two dropout masks, and weigh the divergence of the predictions "
     f"with A (the paper's alpha is 2 A); takes twice the time [{by_method('rdrop_alpha')}]"),
    ("--ema_decay", value(number(float, 0, 0.999999), "D"), 0.99,
     "decay of the moving average of the weights, which is evaluated and saved; 0: off [0.99]"),
    ("--gradient_checkpointing", SWITCH, False, "recompute activations: less memory, more time"),
    ("--contrastive_steps", COUNT, None, "first move texts of a label together, as SetFit does, "
     "and fit the head; the default rate is then half the usual one, or a tenth with mean pooling "
     f"if at most {FEW_STEPS} steps follow [new texts: {STARTS[True][0]} if so few follow, unless "
     f"epochs or pooling are given, else {STARTS[False][0]} for full and lora; 0 otherwise]"),
    ("--class_weights", value(flags.path, "balanced|FILE"), None,
     "of the labels in the loss: by inverse frequency, or a JSON file like {\"a\": 5} [all 1]"),
    ("--max_train_samples", INT, None, "train on N rows drawn at random with --seed [all]"),
    ("--logging_steps", INT, 50, "steps between lines of metrics.jsonl [%(default)s]"),
    ("--report_to", choice("none", "tensorboard"), "none", "also log to TensorBoard [none]"),
),
"evaluation and choice of the best epoch": (
    ("--eval_strategy --evaluation_strategy", choice("no", "epoch"), None, "[epoch if --do_eval]"),
    ("--load_best_model_at_end", SWITCH, None, "keep the best epoch's weights, else the last's "
     "[full and prefix: True if most texts are seen, False if not; other methods: True]"),
    ("--metric_for_best_model", choice("accuracy", "macro_f1", "micro_f1", "loss"), None,
     "on the validation file [accuracy; multi-label: micro_f1]"),
    ("--early_stopping_patience", COUNT, 0, "stop after N evaluations without improvement; 0: off"),
    ("--save_strategy", choice("no", "epoch", "steps"), None, "write checkpoint-STEP each epoch; "
     "steps: also every --save_steps [epoch, removed when the run finishes]"),
    ("--save_steps", INT, None, "steps between checkpoints [500]"),
    ("--save_total_limit", INT, None, "keep the newest N and the best [all if --save_strategy]"),
    ("--resume_from_checkpoint", value(flags.path, "auto|DIR"), None,
     "auto: resume the run in --output_dir, or start it; DIR: resume from this checkpoint"),
),
"output": (
    ("--output_dir", DIR, None, "folder of the results; required without --text"),
    ("--overwrite_output_dir", SWITCH, False, "replace an earlier run's results in --output_dir"),
),
}
METHOD_FLAGS = {  # of one method alone: those of a group "METHOD tuning"
    title.removesuffix(" tuning"): [row[0][2:] for row in rows if row[0] != "--prefix"]
    for title, rows in GROUPS.items() if title.endswith(" tuning")
}
# fmt: on
TRAINING = ("training", "evaluation and choice of the best epoch")
TRAINING += tuple(f"{method} tuning" for method in METHOD_FLAGS)
TRAINING_FLAGS = [row[0].split()[0][2:] for title in TRAINING for row in GROUPS[title]]
TASKS = {  # the tasks that use a flag, if not all do: a flag without an effect is an error
    **dict.fromkeys((*TRAINING_FLAGS, "train_file", "seed"), ("do_train",)),
    **{"validation_file": ("do_eval",), "test_file": ("do_predict",), "int8": SCORING},
    **dict.fromkeys("per_device_eval_batch_size safe_csv reject_below engine".split(), SCORING),
}
USED_WITH_TEXT = (
    "text problem_type drop_empty reject_below model_name_or_path prefix_paths max_seq_length "
    "per_device_eval_batch_size precision"
).split()


def build_parser() -> Parser:
    """Build the parser of all flags, in groups."""
    parser = Parser("python main.py", "Tune and evaluate a BERT classifier on CSV files.")
    for title, rows in GROUPS.items():
        group = parser.add_argument_group(title)
        for names, kind, default, help_text in rows:
            group.add_argument(*names.split(), **kind, default=default, help=help_text)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments, and fill in the defaults that depend on the tuning method.

    Without --do_train, training flags are None. What only the model knows is None, too, and so are
    rates and schedule, see `model.schedule`. A bad flag ends the program with exit status 2.
    """
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    if broken := [word for word in argv if word.encode(errors="replace").decode() != word]:
        parser.error(f"{broken[0]!a} is not UTF-8")  # run.json is
    args = parser.parse_args(argv)
    check_tasks(parser, args)
    refuse_unused_flags(parser, args, argv)
    check_files(parser, args)
    if args.do_train:
        check_method(parser, args)
        check_training(parser, args)
    return args


def check_tasks(parser: Parser, args: argparse.Namespace) -> None:
    """Check the task flags; --eval_strategy epoch implies --do_eval, as in HF's Trainer."""
    if args.do_train and args.eval_strategy == "epoch":
        args.do_eval = True
    if not (args.do_train or args.do_eval or args.do_predict):
        tasks = "--do_predict" if args.text else "--do_train, --do_eval or --do_predict"
        parser.error(f"nothing to do: pass {tasks}")
    if args.prefix_column and not args.prefix_paths:
        parser.error("--prefix_column needs --prefix_paths")
    for name in ("prefix_paths", "text"):
        if getattr(args, name) and (args.do_train or args.do_eval):
            parser.error(f"--{name} works only with --do_predict")
    if args.do_train and (args.engine or args.int8):
        parser.error("--engine and --int8 work only in a run without --do_train")
    if args.int8 and (args.prefix_paths or args.engine == "torch"):
        parser.error("--int8 excludes --prefix_paths and --engine torch")
    if args.prefix_paths and args.model_name_or_path != DEFAULT_BACKBONE:
        parser.error("--prefix_paths: the folders name their backbone; omit --model_name_or_path")


def refuse_unused_flags(parser: Parser, args: argparse.Namespace, argv: list[str]) -> None:
    """Reject flags without an effect; without --do_train, set the training flags to None."""
    for name, flag in parser.given(argv).items():
        if args.text and name not in (*USED_WITH_TEXT, "do_train", *SCORING):
            parser.error(f"{flag} has no effect with --text: omit it")
        tasks = TASKS.get(name, ("do_train", *SCORING))
        if not any(getattr(args, task) for task in tasks):
            parser.error(f"{flag} needs --{' or --'.join(tasks)}")
    if not args.do_train:
        vars(args).update(dict.fromkeys(TRAINING_FLAGS))


def check_files(parser: Parser, args: argparse.Namespace) -> None:
    """Fill in the default files; reject missing ones, and a folder of results with the model."""
    needed = {"validation_file": args.do_eval, "test_file": args.do_predict}
    if args.do_train and args.train_file:
        for name in (name for name, used in needed.items() if used and not getattr(args, name)):
            advice = f"pass it, or make all three files by bash script/split.sh {args.train_file}"
            parser.error(f"--train_file also needs --{name}: {advice}")
    fill(vars(args), FILES)
    if not (args.output_dir or args.text):
        parser.error("--output_dir is missing: name a folder for the results")
    for model in (args.model_name_or_path, *(args.prefix_paths or ())):
        if args.output_dir and flags.contains(args.output_dir, model):
            parser.error(f"--output_dir contains the model {model}: choose another one")


def check_method(parser: Parser, args: argparse.Namespace) -> None:
    """Determine the tuning method, which an adapter keeps; reject flags of other methods."""
    folder = args.model_name_or_path
    if args.prefix and args.tuning_method not in (None, "prefix"):
        parser.error(f"--prefix and --tuning_method {args.tuning_method} exclude each other")
    method, tuned_by = "prefix" if args.prefix else args.tuning_method, None
    if os.path.isfile(os.path.join(folder, "adapter_config.json")):
        from runtime.files import UserError, read_json  # --help needs no packages

        entries = {}
        for name in ("adapter_config.json", "config.json"):  # PEFT writes the first alone
            with suppress(UserError):  # model/ reports what is wrong
                entries |= read_json(Path(folder) / name)
        kind = entries.get("peft_type")
        of_peft = next((name for name, row in TUNING.items() if row.peft_type == kind), "prefix")
        tuned_by = entries.get("tuning_method", of_peft)
        if tuned_by not in METHODS or method not in (None, tuned_by):
            parser.error(
                f"--tuning_method: {folder} was tuned with {tuned_by}; its method cannot be changed"
            )
    args.tuning_method = tuned_by or method or "full"
    args.prefix = args.tuning_method == "prefix"
    for method, names in METHOD_FLAGS.items():
        given = [name for name in names if getattr(args, name)]
        if given and tuned_by == method:
            parser.error(f"--{given[0]} cannot change the tuned adapter in {folder}: omit the flag")
        if given and args.tuning_method != method:
            parser.error(f"--{given[0]} needs --tuning_method {method}")
    if args.prefix and not tuned_by:
        fill_prefix(parser, args)
    elif not tuned_by:
        fill(vars(args), TUNING[args.tuning_method].flags)
    fill(vars(args), {"num_prefixes": 1})


def fill_prefix(parser: Parser, args: argparse.Namespace) -> None:
    """Check the flags of a new prefix and fill in their defaults."""
    if args.prefix_hidden_size and not args.prefix_projection:
        parser.error("--prefix_hidden_size needs --prefix_projection")
    if args.prefix_init_text and args.prefix_init == "random":
        parser.error("--prefix_init_text needs --prefix_init text")
    if args.prefix_projection:
        if args.prefix_init == "text" or args.prefix_init_text:
            parser.error("--prefix_init text: --prefix_projection requires --prefix_init random")
        fill(vars(args), {"prefix_init": "random", "prefix_hidden_size": 512})
    fill(vars(args), TUNING["prefix"].flags)
    if (args.num_prefixes or 1) > 1 and (args.prefix_projection or args.prefix_depth == "input"):
        parser.error("--num_prefixes: several prefixes need --prefix_depth all, unprojected")
    fill(vars(args), {"pre_seq_len": PRE_SEQ_LEN[args.prefix_depth]})


def can_start(settings: dict[str, Any]) -> bool:
    """Return whether a run can start contrastively: one model with more to tune than a head."""
    return settings["tuning_method"] != "probe" and settings["num_prefixes"] == 1


def check_training(parser: Parser, args: argparse.Namespace) -> None:
    """Check the flags of training, evaluation and checkpoints, and fill in their defaults."""
    kind = (flags.SINGLE_LABEL, flags.MULTI_LABEL)[flags.several_columns(args.label_column_name)]
    fill(vars(args), {"problem_type": kind, "eval_strategy": "epoch" if args.do_eval else "no"})
    multi_label = args.problem_type == flags.MULTI_LABEL
    if args.label_separator and not multi_label:
        parser.error(f"--label_separator needs --problem_type {flags.MULTI_LABEL}")
    if args.eval_strategy == "no":
        needs = ("load_best_model_at_end", "early_stopping_patience", "metric_for_best_model")
        if given := [name for name in needs if getattr(args, name)]:
            parser.error(f"--{given[0]} needs --do_eval and --eval_strategy epoch")
        args.load_best_model_at_end = False
    elif args.metric_for_best_model or args.early_stopping_patience:  # a choice was asked for
        fill(vars(args), {"load_best_model_at_end": True})
        if not args.load_best_model_at_end and not args.early_stopping_patience:
            parser.error("--metric_for_best_model needs --load_best_model_at_end")
    fill(vars(args), {"metric_for_best_model": "micro_f1" if multi_label else "accuracy"})
    if args.metric_for_best_model == "micro_f1" and not multi_label:
        parser.error("--metric_for_best_model: micro_f1 is for multi-label data, else use accuracy")
    if args.report_to == "tensorboard" and not importlib.util.find_spec("tensorboard"):
        parser.error("--report_to tensorboard: first run .venv/bin/pip install tensorboard")
    if args.contrastive_steps and not can_start(vars(args)):
        parser.error("--contrastive_steps: a probe and several prefixes cannot start so; omit it")
    if args.warmup_steps > 1 and args.warmup_steps % 1:
        parser.error("--warmup_steps must be a whole number of steps, or a share below 1")
    # checkpoints that were not asked for are removed when the run finishes
    asked = args.save_strategy is not None or args.save_steps is not None
    fill(vars(args), {"save_strategy": "steps" if args.save_steps else "epoch"})
    if args.save_strategy == "steps":
        fill(vars(args), {"save_steps": 500})
    elif args.save_steps:
        parser.error("--save_steps needs --save_strategy steps")
    if args.save_total_limit and args.save_strategy == "no":
        parser.error("--save_total_limit needs --save_strategy epoch or steps")
    if not asked:
        fill(vars(args), {"save_total_limit": 0})

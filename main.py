"""Tune and evaluate a BERT classifier on CSV files; read `run` from top to bottom.

`python main.py --help` lists the flags; `bash script/run_og.sh` and `bash script/run_prefix.sh` are
the usual ways to start it.
"""

import os
import sys

from runtime.interrupt import one_line_on_interrupt

if __name__ == "__main__":
    one_line_on_interrupt()

from importlib.util import find_spec
from itertools import zip_longest

from arguments import DEFAULT_BACKBONE, parse_args

if __name__ == "__main__":
    for number in range(3):  # else a file could get the number of a stream that is closed
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115

if __name__ == "__main__":  # answer --help and typos before torch loads, which takes seconds
    parse_args()
    for package in ("torch", "transformers", "pandas", "sklearn", "matplotlib", "jinja2"):
        if not find_spec(package):
            advice = "run bash script/run_og.sh once, then use .venv/bin/python"
            print(f"error: {package} is not installed here; {advice}", file=sys.stderr)
            sys.exit(2)
    print("loading libraries ...", file=sys.stderr)
# Limit how long OpenMP threads spin at a barrier before they sleep; libgomp reads it when torch
# loads it. By default they spin so long that training beside other processes is ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import logging
import signal
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

import dataset
import trainer
from dataset import Data, Split
from evaluation.calibration import calibrate
from evaluation.importance import word_importance
from evaluation.predictions import check_columns
from evaluation.scoring import publish, score, show
from evaluation.tables import schedule_name, summary
from model.bank_start import find_start
from model.classifier import Classifier, as_texts
from model.schedule import fill_schedule, learning_rate_warning
from model.sequence_classification import train_words_in_use
from model.start import Start, read_tensors
from runtime import checkpoint as checkpoints
from runtime import processes
from runtime.batches import encode, prefix_index
from runtime.checkpoint import Checkpoint, Tensors
from runtime.columns import fill_format, model_folders, precision_for
from runtime.files import UserError, read_json, writing
from runtime.machine import Machine, pick_machine, set_up_process
from runtime.output_folder import OutputFolder, opened, recorder
from runtime.processes import Group, stop_signals
from runtime.record import check_same_run, describe_run, identity

logger = logging.getLogger("main")

CONTINUE = "add --resume_from_checkpoint auto to the same command to continue"
OUT_OF_MEMORY = {  # by --do_train
    True: "pass --gradient_checkpointing, lower --per_device_eval_batch_size, or halve "
    "--per_device_train_batch_size and double --gradient_accumulation_steps, and add "
    "--resume_from_checkpoint auto to continue; a lower --max_seq_length needs a new run",
    False: "lower --per_device_eval_batch_size or --max_seq_length",
}


def main(argv: list[str] | None = None) -> int:
    """Run from the command line and return the exit status.

    0 on success, 2 after a one-line error that the user can fix, 128 and its number after a
    signal, 1 if another process died.
    """
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        set_up_process()
        if args.text:
            label_texts(args)
        else:
            run(args)
        return 0
    except UserError as error:
        status, message = 2, f"error: {error}"
    except trainer.Stopped as stopped:
        step, number = stopped.args
        status, message = 128 + number, f"stopped after step {step} (saved); {CONTINUE}"
    except KeyboardInterrupt:
        status, message = 130, "interrupted; previous results are unchanged"
    except (MemoryError, RuntimeError) as error:
        if processes.is_lost(error):
            status, message = 1, f"error: lost another process: {error}".split("\n")[0]
            message += f"; checkpoints are intact: {CONTINUE}"
        elif is_out_of_memory(error):
            status, message = 2, f"error: out of memory: {OUT_OF_MEMORY[bool(args.do_train)]}"
        else:
            raise
    with suppress(OSError):  # the terminal is gone after SIGHUP
        print(message, file=sys.stderr)
    return status


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error says that memory ran out; on the CPU PyTorch has no class for it."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate" in said


def run(args: Namespace) -> None:
    """Execute one run, from checked arguments to published results."""
    with (
        processes.joined() as group,
        opened(
            args.output_dir, args.overwrite_output_dir, args.resume_from_checkpoint, group.is_main
        ) as output,
    ):
        # prepare: machine, model, data and record, the same in all processes
        calibrated = [] if args.do_train else model_folders(args)
        choice = precision_for(output.precision(args.precision), calibrated)
        machine = pick_machine(group.from_main(choice), group)
        start, data, tokenizer, record = group.agree(
            lambda: prepare(args, machine), compared=lambda prepared: identity(prepared[-1])
        )

        # resume: has this run already finished? is there a checkpoint? the main process decides
        if group.from_main(group.is_main and output.is_finished(record)):
            if group.is_main:
                logger.info("this run has already finished")
                show(summary(record, read_json(output.path / "all_results.json"), output.path))
            return
        checkpoint = find_checkpoint(output, args, record, group)
        output.start(record, checkpoint)

        # model
        model = start.build(args)
        if args.do_train:
            start.method.initialise(model, tokenizer, args, data.train.texts)
        machine.place(model)
        results = data.count_rows() | start.count(model)

        # train; the model ends with its best epoch on the validation file, else with the last
        if args.do_train:
            results |= tune(
                model, tokenizer, data, args, machine, start, output, record, checkpoint
            )

        # calibrate on the validation file, and write the tuned model
        batch_size = args.per_device_eval_batch_size
        classifier = Classifier(start, model, tokenizer, machine, batch_size)
        if args.do_train and data.eval is not None:
            logits = classifier.member_logits(data.eval)  # one fit: others may round differently
            calibration, found = group.from_main(calibrate(logits, data) if group.is_main else None)
            start.method.change_logits(model, calibration.temperature, calibration.biases)
            results |= found
        if args.do_train and group.is_main:
            with writing(output.staging):
                start.save(model, tokenizer, output.staging)

        # score; the model sees the test file only now that every choice has been made
        def classify(split: Split) -> torch.Tensor:
            index = prefix_index(split, args.prefix_column, args.prefix_paths)
            return classifier.logits(split, index)

        if not group.is_main:  # the other processes only help to predict
            for split in data.to_predict():
                classify(split)
            return
        explain = group.size == 1 and not args.prefix_column  # else texts alone cannot be scored
        results |= score(classify, data, start.multi_label, output, args, explain)

        # publish; a limit of 0 means that checkpoints were only for resuming
        publish(output, record, results, keep_checkpoints=args.save_total_limit != 0)


def prepare(args: Namespace, machine: Machine) -> tuple[Start, Data, PreTrainedTokenizerBase, dict]:
    """Find the model, read and check the data, and describe the run."""
    # start: the model to start from
    form = fill_format(args)
    start = find_start(args)
    tokenizer = start.tokenizer()
    form = start.complete(form, args, tokenizer)
    logger.info("%s, model %s", machine, start.source.name)
    settings = start.settings(args) | machine.describe()

    # data: read, check, audit for leaks
    splits = dataset.read_splits(args, form)
    if args.do_train:
        start.set_labels(dataset.label_names(splits["train"], args.label_names))
    data = dataset.prepare(args, form, splits, start.labels, start.labels_by_prefix)
    check_columns(data, args.reject_below)

    # schedule: for the backbone's width, and texts that repeat or new ones, unless flags set it
    if args.do_train:
        width, measured = start.config.hidden_size, start.source.name == DEFAULT_BACKBONE
        schedule = fill_schedule(args, data.seen_share, width)
        shown = ", ".join(f"{name} {value}" for name, value in schedule.items())
        shown += "" if measured else "; not measured on this backbone"
        logger.info("%s, hidden size %d: %s", schedule_name(data.seen_share), width, shown)
        if args.rdrop_alpha and not (args.hidden_dropout_prob or args.attention_probs_dropout_prob):
            raise UserError("--rdrop_alpha needs dropout: pass --hidden_dropout_prob 0.1")
        settings |= schedule
        args.class_weights = trainer.class_weights(data.train, args.class_weights, data.names)
        settings |= {"class_weights": args.class_weights}
        start.set_dropout(args)

    # record: describe everything the results depend on
    record = describe_run(settings, start.describe(), data.names, data.describe())
    return start, data, tokenizer, record


def label_texts(args: Namespace) -> None:
    """Print each text's labels, the most probable first, and why; write no files."""
    many = args.text == ["-"]
    try:
        texts = [line.rstrip("\r\n") for line in sys.stdin] if many else args.text
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding}: convert it") from None
    texts = as_texts(texts, args.drop_empty, "fill it in, or drop blank texts with --drop_empty")
    if not texts:
        raise UserError("there is no text to label: pass one after --text, or lines with --text -")
    classify = Classifier.of(find_start(args), args)
    why = word_importance(classify.logits, [] if many else texts, classify.multi_label)
    for text, found, words in zip_longest(texts, classify(texts), why, fillvalue=()):
        order = sorted(found["probabilities"].items(), key=lambda one: -one[1])
        lines = [text, *(f"{share:8.4f}  {label}" for label, share in order)]
        if found["confidence"] < args.reject_below:
            lines.append(f"          rejected: its confidence is below {args.reject_below:g}")
        if most := sorted(words, key=lambda one: -one[1])[:3]:
            falls = (f"{word} {-fall:+.4f}" for word, fall in most)
            lines.append(f"          without the word: {', '.join(falls)}")
        show("\n".join(lines))


def find_checkpoint(
    output: OutputFolder, args: Namespace, record: dict, group: Group
) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    The main process finds it and sends it to the others, which may be on another machine.
    Raises: UserError if the checkpoint is damaged or belongs to another run.
    """
    found = None
    if args.resume_from_checkpoint and group.is_main:
        found = checkpoints.find(args.resume_from_checkpoint, output.staging, read_tensors)
        if found is None:
            logger.info("no checkpoint yet: starting from the beginning")
        else:
            check_same_run(found.path, found.state["run"], record)
            logger.info("resuming from %s", found.path)
    tensors = group.tensors_from_main(found.tensors if found else {})
    found = group.from_main(found and replace(found, tensors={}))
    return found and replace(found, tensors=tensors)


def tune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    args: Namespace,
    machine: Machine,
    start: Start,
    output: OutputFolder,
    record: dict,
    checkpoint: Checkpoint | None,
) -> dict:
    """Train with checkpoints, and return the training figures."""
    if warning := learning_rate_warning(args, start.config.hidden_size):
        logger.warning("warning: %s", warning)
    is_main, length = machine.group.is_main, start.config.max_seq_length
    train_set = encode(tokenizer, data.train, length).for_each_prefix(args.num_prefixes)
    if args.class_weights:
        train_set = replace(train_set, label_weights=[*args.class_weights.values()])
    eval_set = encode(tokenizer, data.eval, length) if args.eval_strategy == "epoch" else None
    train_words_in_use(model, train_set.token_ids)

    if checkpoint:  # the run may have been killed before it removed older checkpoints
        checkpoints.prune(output.staging, args.save_total_limit, checkpoint.state["best_step"])

    def write_model(folder: Path) -> None:
        start.save(model, tokenizer, folder)
        output.copy_metrics(folder)

    def save(state: dict, tensors: Tensors) -> None:
        if is_main:
            state |= {"run": record}
            checkpoints.write(output.staging, state, tensors, write_model, read_tensors)
            checkpoints.prune(output.staging, args.save_total_limit, state["best_step"])

    write_metrics = recorder(output, args.report_to if is_main else "none")
    with stop_signals() as received_signal:
        figures = trainer.train(
            model,
            train_set,
            eval_set,
            args,
            machine,
            write_metrics,
            save,
            checkpoint,
            received_signal,
        )
    if number := received_signal():  # a signal that came after the last step
        signal.raise_signal(number)
    return figures | {"schedule_seen_share": data.seen_share}


if __name__ == "__main__":
    sys.exit(main())

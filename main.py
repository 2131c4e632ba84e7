"""Tune and evaluate a BERT classifier on CSV files; read `run` from top to bottom.

`python main.py --help` lists the flags; `bash script/run_og.sh` and `bash script/run_prefix.sh` are
the usual ways to start it.
"""

import sys

from runtime.startup import check_packages, one_line_on_interrupt, open_closed_streams

if __name__ == "__main__":  # answer --help and typos before torch loads, which takes seconds
    one_line_on_interrupt()
    open_closed_streams()

from arguments import DEFAULT_BACKBONE, parse_args

if __name__ == "__main__":
    parse_args()
    check_packages("torch", "transformers", "pandas", "sklearn", "matplotlib", "jinja2", "msgspec")
    print("loading libraries ...", file=sys.stderr)

import logging
import os
import signal
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import dataset
import trainer
from dataset import Data, RowPrefixes, Split
from evaluation.calibration import calibrate
from evaluation.predictions import Options, check_columns
from evaluation.quantization import check_int8
from evaluation.scoring import publish, score, show
from evaluation.tables import schedule_name, summary
from evaluation.texts import label_texts
from model import contrastive
from model.bert import train_words_in_use
from model.classifier import Classifier
from model.schedule import fill_schedule, fill_start, learning_rate_warning, start_rate
from model.source import ModelSource, new_model, open_model, read_tensors
from runtime import checkpoint as checkpoints
from runtime import processes
from runtime.batches import encode
from runtime.checkpoint import Checkpoint, Tensors
from runtime.columns import fill_format, model_folders, precision_for
from runtime.files import UserError, read_json, writing
from runtime.machine import Machine, engine_for, fastest_threads, pick_machine, set_up_process
from runtime.output_folder import OutputFolder, opened, recorder
from runtime.processes import Group, stop_signals
from runtime.record import check_same_run, describe_run, identity
from runtime.training_state import trainable

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
            label_texts(classifier_of(args), args.text, args.drop_empty, args.reject_below)
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
    where = args.output_dir, args.overwrite_output_dir, args.resume_from_checkpoint
    with processes.joined() as group, opened(*where, group.is_main) as output:
        # prepare: machine, model, data and record, the same in all processes
        machine = choose_machine(args, output, group)
        source, data, record = group.agree(
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
        model, results = build(args, source, data, machine)

        # train; the model ends with its best epoch on the validation file, else with the last
        if args.do_train:
            results |= tune(model, source, data, args, machine, output, record, checkpoint)

        # calibrate on the validation file, and write the tuned model
        classifier = Classifier(source, machine, args.per_device_eval_batch_size, model)
        if args.do_train and data.eval is not None:
            logits = classifier.member_logits(data.eval)
            # all processes must change their heads by the same numbers, so the main one fits them
            calibration, facts = group.from_main(calibrate(logits, data) if group.is_main else None)
            source.method.change_logits(model, calibration.temperature, calibration.biases)
            results |= facts
        if args.do_train and group.is_main:
            with writing(output.staging):
                source.save(model, output.staging)

        if args.int8:
            folder = Path(args.model_name_or_path)
            check_int8(classifier.logits, folder, source.labels, source.multi_label)

        # score; the model sees the test file only now that every choice has been made
        def classify(split: Split) -> torch.Tensor:
            return classifier.logits(split, data.prefixes and data.prefixes.index(split))

        if not group.is_main:  # the other processes only help to predict
            for split in data.to_predict():
                classify(split)
            return
        explain = group.size == 1 and not args.prefix_column  # it scores texts that have no row
        options = Options(args.safe_csv, args.reject_below)
        results |= score(classify, data, source.multi_label, output, options, explain)

        # publish; a limit of 0 means that checkpoints were only for resuming
        publish(output, record, results, keep_checkpoints=args.save_total_limit != 0)


def choose_machine(args: Namespace, output: OutputFolder, group: Group) -> Machine:
    """Choose device, precision, engine and, for training, threads; a resumed run keeps its own."""
    calibrated = [] if args.do_train else model_folders(vars(args))
    precision = args.precision
    if precision == "auto":
        precision = precision_for(output.measured("precision") or "auto", calibrated)
    engine = group.from_main(engine_of(args))
    machine = pick_machine(group.from_main(precision), group, engine, args.int8)
    if args.do_train and machine.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        earlier, most = output.measured("threads"), torch.get_num_threads()
        torch.set_num_threads(min(earlier, most) if earlier else fastest_threads())
    return machine


def build(
    args: Namespace, source: ModelSource, data: Data, machine: Machine
) -> tuple[nn.Module, dict]:
    """Load the model to train or to predict with, on the machine; count rows and parameters."""
    if args.do_train:
        model = source.build_trainable(args.seed, args.gradient_checkpointing)
        source.method.initialise(model, source.tokenizer, vars(args), data.train.texts)
    else:
        model = source.build()
    counts = data.count_rows() | source.count(model)  # a compiled model has no parameters
    if args.do_train:
        machine.place(model)
    else:
        model = source.place(model, machine)
    return model, counts


def engine_of(args: Namespace) -> str:
    """Return the engine to predict with."""
    if args.do_train:
        return "torch"
    tasks = (args.do_eval, args.validation_file), (args.do_predict, args.test_file)
    paths = [path for wanted, path in tasks if wanted and os.path.isfile(path)]
    return engine_for(args.engine, args.int8, sum(map(os.path.getsize, paths)))


def classifier_of(args: Namespace) -> Classifier:
    """Load a tuned model."""
    machine = pick_machine(precision_for(args.precision, model_folders(vars(args))))
    return Classifier(find_model(args), machine, args.per_device_eval_batch_size)


def find_model(args: Namespace) -> ModelSource:
    """Return the model to train, or to predict with."""
    settings = vars(args)
    if args.do_train:
        return new_model(settings)
    paths = args.prefix_paths or args.model_name_or_path
    return open_model(paths, args.max_seq_length, args.problem_type, bool(args.prefix_column))


def prepare(args: Namespace, machine: Machine) -> tuple[ModelSource, Data, dict]:
    """Find the model, read and check the data, and describe the run."""
    # model: what to start from, without its weights
    settings = vars(args)
    form = fill_format(settings)
    source = find_model(args)
    form = source.complete(form, settings)
    logger.info("%s, model %s", machine, source.name)
    described = source.settings(settings) | machine.describe()
    if args.do_train:
        described |= {"threads": torch.get_num_threads()}

    # data: read, check, audit for leaks
    tasks = ("train", args.do_train, args.train_file), ("eval", args.do_eval, args.validation_file)
    splits = dataset.read_splits({name: path for name, wanted, path in tasks if wanted}, form)
    if args.do_train:
        source.set_labels(dataset.label_names(splits["train"], args.label_names))
    prefixes, test_file = None, args.test_file if args.do_predict else None
    if args.prefix_column:
        prefixes = RowPrefixes(args.prefix_column, args.prefix_paths, source.labels_by_prefix)
    sample = args.max_train_samples, args.seed
    data = dataset.prepare(form, splits, source.labels, test_file, prefixes, *sample)
    check_columns(data, args.reject_below)

    # schedule: for the backbone's width, and texts that repeat or new ones, unless flags set it
    if args.do_train:
        width, measured = source.config.hidden_size, source.name == DEFAULT_BACKBONE
        fresh = not (source.started_from or source.multi_label)
        start = fill_start(settings, len(data.train), data.seen_share, width, fresh)
        if args.pooling:
            source.config.pooling = described["pooling"] = args.pooling
        schedule = fill_schedule(settings, data.seen_share, width) | start
        shown = ", ".join(f"{name} {value}" for name, value in schedule.items())
        shown += "" if measured else "; not measured on this backbone"
        logger.info("%s, hidden size %d: %s", schedule_name(data.seen_share), width, shown)
        if args.rdrop_alpha and not (args.hidden_dropout_prob or args.attention_probs_dropout_prob):
            raise UserError("--rdrop_alpha needs dropout: pass --hidden_dropout_prob 0.1")
        described |= schedule
        args.class_weights = trainer.class_weights(data.train, args.class_weights, data.names)
        described |= {"class_weights": args.class_weights}
        source.set_dropout(args.hidden_dropout_prob, args.attention_probs_dropout_prob)

    # record: describe everything the results depend on
    return source, data, describe_run(described, source.describe(), data.names, data.describe())


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
    source: ModelSource,
    data: Data,
    args: Namespace,
    machine: Machine,
    output: OutputFolder,
    record: dict,
    checkpoint: Checkpoint | None,
) -> dict:
    """Train with checkpoints, and return the training figures."""
    if warning := learning_rate_warning(vars(args), source.config.hidden_size):
        logger.warning("warning: %s", warning)
    is_main, length = machine.group.is_main, source.config.max_seq_length
    train_set = encode(source.tokenizer, data.train, length).for_each_prefix(args.num_prefixes)
    if args.class_weights:
        train_set = replace(train_set, label_weights=[*args.class_weights.values()])
    evaluates = args.eval_strategy == "epoch"
    eval_set = encode(source.tokenizer, data.eval, length) if evaluates else None
    train_words_in_use(model, train_set.token_ids)
    if args.contrastive_steps and not checkpoint:
        if is_main:
            logger.info("%d contrastive steps, then the head", args.contrastive_steps)
            rate = start_rate(vars(args), source.config.hidden_size)
            contrastive.start(model, train_set, machine, args.contrastive_steps, rate, args.seed)
        model.load_state_dict(machine.group.tensors_from_main(trainable(model)), strict=False)

    if checkpoint:  # the run may have been killed before it removed older checkpoints
        checkpoints.prune(output.staging, args.save_total_limit, checkpoint.state["best_step"])

    def write_model(folder: Path) -> None:
        source.save(model, folder)
        output.copy_metrics(folder)

    def save(state: dict, tensors: Tensors) -> None:
        if is_main:
            state |= {"run": record}
            checkpoints.write(output.staging, state, tensors, write_model, read_tensors)
            checkpoints.prune(output.staging, args.save_total_limit, state["best_step"])

    write = recorder(output, args.report_to if is_main else "none")
    with stop_signals() as received_signal:
        figures = trainer.train(
            model, train_set, eval_set, args, machine, write, save, checkpoint, received_signal
        )
    if number := received_signal():  # a signal that came after the last step
        signal.raise_signal(number)
    return figures | {"schedule_seen_share": data.seen_share}


if __name__ == "__main__":
    sys.exit(main())

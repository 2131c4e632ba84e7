"""Tune a BERT classifier on CSV files, by full fine-tuning or by a prefix, and score it.

The story of a run: arguments, data, model, train, evaluate, predict. `python main.py --help`
lists the flags; `bash script/run_og.sh` and `bash script/run_prefix.sh` are the usual ways in.
"""

import logging
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from arguments import learning_rate_warning, parse_args

# How long OpenMP threads spin at a barrier before they sleep; read when torch is loaded. By default
# they spin so long that training beside other processes falls to a tenth of its speed.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

logger = logging.getLogger("main")


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status.

    0; 2 after one line about what the user can mend; 130 or 143 when stopped by a signal; 1 where
    another process of the group is lost.
    """
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.info("loading libraries ...")  # seconds of silence otherwise

    # After the arguments, so that --help and a typo are answered without importing torch.
    try:
        from model.source import ModelError
        from runtime import processes
        from runtime.checkpoint import CheckpointError
        from runtime.csv_reader import DataError
        from runtime.record import OutputError
        from trainer import Stopped, TrainingError
    except ModuleNotFoundError as error:
        print(
            f"error: {error} for {sys.executable}: .venv/bin/python has it, once bash "
            "script/run_og.sh has made that",
            file=sys.stderr,
        )
        return 2

    try:
        run(args)
    except (DataError, ModelError, OutputError, CheckpointError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if processes.is_lost(error):
            first = str(error).split("\n")[0]
            print(
                f"error: another process ended, or does not answer: {first}; what was saved is "
                "intact: --resume_from_checkpoint auto goes on",
                file=sys.stderr,
            )
            return 1
        if not out_of_memory(error):
            raise
        print(
            "error: out of memory: lower --per_device_train_batch_size (and raise "
            "--gradient_accumulation_steps), --per_device_eval_batch_size or --max_seq_length, or "
            "give --gradient_checkpointing; what was saved is intact",
            file=sys.stderr,
        )
        return 2
    except Stopped as stopped:
        step, number = stopped.args
        print(
            f"stopped at step {step}, which is saved: the same command with "
            "--resume_from_checkpoint auto goes on",
            file=sys.stderr,
        )
        return 128 + number
    except KeyboardInterrupt:
        print("interrupted: earlier results are as they were", file=sys.stderr)
        return 130
    return 0


def out_of_memory(error: Exception) -> bool:
    """Whether it is that; on the CPU torch has no class of its own for it."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate" in said


def run(args: Namespace) -> None:
    """One run, from checked arguments to published results."""
    from runtime import processes
    from runtime.output_folder import OutputFolder

    # where to write: a mistake here costs a second; what others than the first write is thrown away
    with processes.joined() as group, ExitStack() as stack:
        if not group.first:
            logging.disable(logging.WARNING)
            args.output_dir = stack.enter_context(TemporaryDirectory())
        output = stack.enter_context(
            OutputFolder(args.output_dir, args.overwrite_output_dir, args.resume_from_checkpoint)
        )
        run_into(output, args, group)


def run_into(output, args: Namespace, group) -> None:
    """The story of a run."""
    import dataset
    import trainer
    from evaluation import tables
    from model import loading
    from model.prefix_bank import PrefixBank
    from model.source import locate, sha256_of
    from runtime.machine import pick_machine
    from runtime.output_folder import writing
    from runtime.record import about as about_run

    # what to compute with, what to start from
    machine = pick_machine(args.precision, group)
    bank = args.prefix_paths and PrefixBank.open(args.prefix_paths, args.max_seq_length)
    source = bank.sources[0] if bank else locate(args.model_name_or_path)
    config = bank.config if bank else loading.load_config(source, tuned=not args.do_train)
    args.device, args.precision = str(machine.device), machine.precision
    args.processes = group.size
    logger.info("device %s, precision %s, model %s", args.device, args.precision, source.name)

    # data: read, checked, audited for leaks
    if not args.do_train:
        args.problem_type = loading.task_of(config, args.problem_type)
    splits = dataset.read_splits(args)
    fresh_head = args.do_train and loading.describe_task(
        source, config, dataset.label_names(splits["train"]), args
    )
    if args.do_train and args.max_train_samples:
        splits["train"] = splits["train"].sample(args.max_train_samples, args.seed)
    names = loading.list_labels(config)
    multi_label = args.problem_type == "multi_label_classification"
    labels = {name: dataset.label_ids(split, names, multi_label) for name, split in splits.items()}
    known = dataset.audit(splits["train"]) if args.do_train else None
    before = args.model_name_or_path if args.do_train and loading.is_tuned(source, config) else None
    if before:
        logger.warning(
            "warning: %s was tuned before: the texts it saw then count as unseen", before
        )
    if args.do_train and args.do_eval:
        seen = dataset.seen_texts(known, dataset.text_keys(splits["eval"]))
        dataset.log_seen(splits["eval"].path, len(seen), seen.sum())
    files = dict(splits)
    if args.do_predict:
        files["test"] = dataset.open_stream(args, names, known, bank.labels if bank else ())
        output.check_columns(args.test_file, files["test"].columns, names)

    # tokens
    args.max_seq_length = loading.set_max_seq_length(config, args.max_seq_length)
    tokenizer = loading.load_tokenizer(source, config)
    encoded = {
        name: dataset.encode(tokenizer, split, labels[name], args.max_seq_length)
        for name, split in splits.items()
        if args.do_train
    }

    # is there anything left to do?
    described = {name: file.describe() for name, file in files.items()}
    about = about_run(
        args, source.name, sha256_of(bank.sources if bank else [source]), names, described
    ) | {"started_from": before}
    auto = args.resume_from_checkpoint == "auto"
    if group.from_first(auto and group.first and output.is_finished(about)):
        logger.info("this run has finished already")
        if group.first:
            show(tables.summary(args, output.read_results(), output.path))
        return
    begun = group.from_first(group.first and find_checkpoint(output, args, about))
    output.start(about, begun and (begun[0], begun[1]["step"]))

    # model
    model = bank or loading.make_model(source, config, args, fresh_head)
    if args.prefix_init == "text":
        words = args.prefix_init_text or dataset.words_to_start_from(
            names, splits["train"], args.seed
        )
        loading.start_from_text(model, tokenizer, words)
    machine.place(model)
    results = {f"{name}_rows": len(file) for name, file in files.items()}
    if bank:
        logger.info("%d tuned prefixes over one backbone", len(args.prefix_paths))
    else:
        results |= loading.count_parameters(model)
        logger.info(tables.parameters(results))

    # train; the model ends as its best epoch by the validation file
    if args.do_train:
        save = partial(loading.save_model, model, tokenizer, source)
        results |= tune(model, encoded, args, machine, output, about, save, begun and begun[1:])
        if group.first:
            with writing(output.staging):
                save(output.staging)

    # evaluate and predict; the test file only now, when every choice is made
    def classify(split):
        served_by = bank and dataset.numbers_of(split, args.prefix_column, args.prefix_paths)
        data = dataset.encode(tokenizer, split, None, args.max_seq_length, served_by)
        return trainer.predict(model, data, args, machine)

    if not group.first:  # only lends a hand
        for part in chain([splits["eval"]] if args.do_eval else (), files.get("test", ())):
            classify(part)
        return
    results |= score(classify, splits.get("eval"), files.get("test"), known, names, args, output)
    if args.do_train:
        output.write_text("README.md", tables.model_card(about, results))
    publish(output, args, about, results)


def find_checkpoint(output, args: Namespace, about: dict) -> tuple[Path, dict, dict] | None:
    """What this run is to go on from: folder, state and tensors; None for the beginning."""
    from runtime import checkpoint
    from runtime.record import check_same

    if not args.resume_from_checkpoint:
        return None
    found = checkpoint.find(args.resume_from_checkpoint, output.staging)
    if found:
        check_same(found[0], found[1]["run"], about)
        logger.info("going on from %s", found[0])
    else:
        logger.info("there is no checkpoint yet: starting from the beginning")
    return found


def tune(
    model, encoded: dict, args: Namespace, machine, output, about: dict, save_model, start
) -> dict:
    """Train, with checkpoints, from the state and tensors of one if given; returns its figures."""
    import trainer
    from model import loading
    from runtime import checkpoint

    loading.tune_words_in_use(model, encoded["train"].token_ids)
    if warning := learning_rate_warning(args):
        logger.warning("warning: %s", warning)
    if args.prefix_depth == "input":
        from model.adapter import NOT_FOR_PEFT

        logger.warning("warning: %s", NOT_FOR_PEFT)

    def save(state: dict, tensors: dict) -> None:
        if not machine.group.first:
            return

        def fill(folder: Path) -> None:
            save_model(folder)
            output.copy_records(folder)

        path = checkpoint.write(output.staging, {**state, "run": about}, tensors, fill)
        checkpoint.prune(output.staging, args.save_total_limit, state["best_step"])
        logger.info("saved %s", path)

    with stop_signals() as received:
        figures = trainer.train(
            model,
            encoded["train"],
            encoded["eval"] if args.eval_strategy == "epoch" else None,
            args,
            machine,
            record=recorder(output, args.report_to if machine.group.first else "none"),
            save=save,
            start=start,
            stopped=lambda: received[0] if received else 0,
        )
    if received:  # after the last step was asked for it
        signal.raise_signal(received[0])
    return figures


def recorder(output, report_to: str):
    """What writes a line of the training's records: to metrics.jsonl, and where wanted beyond."""
    if report_to == "none":
        return partial(output.append_json, "metrics.jsonl")
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(output.staging / "tensorboard")

    def show(line: dict) -> None:
        for name, value in line.items():
            if name != "step":
                board.add_scalar(name, value, line["step"])
        board.flush()

    for line in output.staged("metrics.jsonl"):  # of a run that goes on
        show(line)

    def record(line: dict) -> None:
        output.append_json("metrics.jsonl", line)
        show(line)

    return record


def score(classify, eval_split, stream, known: set | None, names, args: Namespace, output) -> dict:
    """Score the validation file; predict the test file, and score it where it has labels.

    classify: from a `Split` to its logits [N, C]. Writes predictions.csv and evaluation.json;
    returns the figures for all_results.json.
    """
    import dataset
    from evaluation.metrics import Score

    multi_label = args.problem_type == "multi_label_classification"
    scores: dict[str, Score] = {}

    def add(name: str, split, logits) -> None:
        labels, keys = dataset.label_ids(split, names, multi_label), dataset.text_keys(split)
        seen = known and dataset.seen_texts(known, keys)
        scores.setdefault(name, Score()).add(logits, labels, split.texts, keys, seen)

    if eval_split:
        add("eval", eval_split, classify(eval_split))
    figures = {}
    if stream:
        done, start = 0, time.perf_counter()
        with output.predictions(stream.columns, names, multi_label) as write:
            for chunk in stream:
                logits = classify(chunk)
                write(chunk.table, logits)
                if stream.labelled:
                    add("test", chunk, logits)
                done += len(chunk)
                speed = done / (time.perf_counter() - start)
                if done < len(stream) or done > len(chunk):
                    logger.info("%d of %d rows: %.0f rows/s, %.0f s left", done, len(stream), speed,
                                (len(stream) - done) / speed)  # fmt: skip
        figures["predict_samples_per_second"] = speed
    if scores:
        details = {name: score.details() for name, score in scores.items()}
        output.write_json("evaluation.json", {"labels": names, **details})
    for name, one in scores.items():
        figures |= one.results(name)
    return figures


def publish(output, args: Namespace, about: dict, results: dict) -> None:
    """Write the figures and the report; then all files of the run appear at once."""
    from evaluation import pages, tables
    from runtime.record import peak_memory_bytes

    results["peak_memory_bytes"] = peak_memory_bytes()
    output.write_json("all_results.json", results)
    if evaluation := output.staged("evaluation.json"):
        records = output.staged("metrics.jsonl")
        output.write_text("report.html", pages.render(about, results, evaluation[0], records))
    output.publish(about, keep_checkpoints=args.save_total_limit != 0)
    show(tables.summary(args, results, output.path))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM, so that a step can end; a second one ends at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each in usual:
            signal.signal(each, signal.SIG_DFL)

    usual = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for each, handler in usual.items():
            signal.signal(each, handler)


def show(text: str) -> None:
    """Print, whatever the locale; where nobody reads any more, the results still stand."""
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or the interpreter's exit fails on it


if __name__ == "__main__":
    sys.exit(main())

"""Tune a BERT classifier on CSV files, by full fine-tuning or by a prefix, and score it.

The story of a run: arguments, data, model, train, evaluate, predict. `python main.py --help`
lists the flags; `bash script/run_og.sh` and `bash script/run_prefix.sh` are the usual ways in.
"""

import logging
import os
import sys
from argparse import Namespace

from arguments import learning_rate_warning, parse_args

logger = logging.getLogger("main")


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status.

    0; 2 after one line about what the user can mend; 130 when interrupted.
    """
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.info("loading libraries ...")  # seconds of silence otherwise

    # After the arguments, so that --help and a typo are answered without importing torch.
    from dataset import DataError
    from model.output_folder import OutputError
    from model.source import ModelError
    from trainer import TrainingError

    try:
        run(args)
    except (DataError, ModelError, OutputError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: earlier results are as they were", file=sys.stderr)
        return 130
    return 0


def run(args: Namespace) -> None:
    """One run, from checked arguments to published results."""
    import torch

    import dataset
    import trainer
    from model import adapter, report, utils
    from model.metrics import score
    from model.output_folder import OutputFolder
    from model.prefix_bank import PrefixBank
    from model.source import locate

    # where to write, what to compute with, what to start from: a mistake here costs a second
    output = OutputFolder(args.output_dir, args.overwrite_output_dir)
    machine = trainer.pick_machine(args.precision)
    bank = args.prefix_paths and PrefixBank.open(args.prefix_paths, args.max_seq_length)
    source = bank.source if bank else locate(args.model_name_or_path)
    config = bank.config if bank else utils.load_config(source, tuned=not args.do_train)
    args.device, args.precision = str(machine.device), machine.precision
    logger.info("device %s, precision %s, model %s", args.device, args.precision, source.name)

    # data: read, checked, audited for leaks
    if not args.do_train:
        args.problem_type = utils.task_of(config, args.problem_type)
    splits = dataset.read_splits(args)
    if args.do_train:
        fresh_head = utils.describe_task(source, config, dataset.label_names(splits["train"]), args)
        if args.max_train_samples:
            splits["train"] = splits["train"].sample(args.max_train_samples, args.seed)
    names = utils.list_labels(config)
    labels = dataset.number_labels(splits, names, args)
    seen = dataset.audit(splits)
    if args.do_predict:
        output.check_columns(args.test_file, list(splits["test"].table), names)

    served_by = bank and dataset.numbers_of(splits["test"], args.prefix_column, args.prefix_paths)

    # tokens
    args.max_seq_length = utils.set_max_seq_length(config, args.max_seq_length)
    tokenizer = utils.load_tokenizer(source, config)
    encoded = {
        name: dataset.encode(tokenizer, split, labels[name], args.max_seq_length, served_by)
        for name, split in splits.items()
    }

    # model
    torch.manual_seed(args.seed)
    if bank:
        model = bank
    elif args.do_train:
        model = utils.build_model(source, config, fresh_head)
    else:
        model = utils.load_model(source, config)
    if args.prefix_init == "text":
        words = args.prefix_init_text or dataset.words_to_start_from(
            names, splits["train"], args.seed
        )
        utils.start_from_text(model, tokenizer, words)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    machine.place(model)
    results = {f"{name}_rows": len(split) for name, split in splits.items()}
    if bank:
        logger.info("%d tuned prefixes over one backbone", len(args.prefix_paths))
    else:
        results |= utils.count_parameters(model)
        logger.info(report.parameters(results))
    about = report.about(args, source.name, names, {n: s.describe() for n, s in splits.items()})
    output.write_json("run.json", about)

    # train; the model ends as its best epoch by the validation file
    if args.do_train:
        if warning := learning_rate_warning(args):
            logger.warning("warning: %s", warning)
        results |= trainer.train(
            model,
            encoded["train"],
            encoded["eval"] if args.eval_strategy == "epoch" else None,
            args,
            machine,
            record=lambda line: output.append_json("metrics.jsonl", line),
            save=lambda step: utils.save_model(
                model, tokenizer, source, output.staging / f"checkpoint-{step}"
            ),
        )
        utils.save_model(model, tokenizer, source, output.staging)
        if args.prefix_depth == "input":
            logger.warning("warning: %s", adapter.NOT_FOR_PEFT)

    # evaluate and predict; the test file only now, when every choice is made
    for name in ("eval", "test"):
        if name in splits:
            logits = trainer.predict(model, encoded[name], args, machine)
            results |= score(name, logits, labels[name], seen.get(name))
            if name == "test":
                output.write_predictions(splits[name].table, names, logits, args.problem_type)

    # publish: all files appear at once
    results["peak_memory_bytes"] = report.peak_memory_bytes()
    output.write_json("all_results.json", results)
    if args.do_train:
        output.write_text("README.md", report.model_card(about, results))
    output.publish(about)
    show(report.summary(args, results, output.path))


def show(text: str) -> None:
    """Print, whatever the locale; where nobody reads any more, the results still stand."""
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or the interpreter's exit fails on it


if __name__ == "__main__":
    sys.exit(main())

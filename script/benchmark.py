"""Measures, in turn in one call: scoring by one prefix, and by many mixed in each batch.

Usage: bash script/benchmark.sh [--texts N] [--prefixes K] [--pre_seq_len P] [--rounds R]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import dataset
import trainer
from model import utils
from model.prefix_bank import PrefixBank
from model.source import BUNDLED_NAME, locate


def tuned_folders(parent: Path, count: int, length: int) -> list[str]:
    """Folders of `count` prefixes of the bundled backbone, as they are before training."""
    source = locate(BUNDLED_NAME)
    config = utils.load_config(source, tuned=False)
    config.pre_seq_len, config.prefix_depth, config.prefix_projection = length, "all", False
    utils.set_labels(config, [str(number) for number in range(6)])
    utils.set_max_seq_length(config, None)
    tokenizer = utils.load_tokenizer(source, config)
    for number in range(count):
        torch.manual_seed(number)
        model = utils.build_model(source, config)
        utils.save_model(model, tokenizer, source, parent / str(number))
    return [str(parent / str(number)) for number in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="csv/test_simple.csv", help="its `text` column is scored")
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--prefixes", type=int, default=16)
    parser.add_argument("--pre_seq_len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    args.per_device_eval_batch_size = 64
    split = dataset.read_split(args.data, text_columns=["text"], labels_required=False)
    texts = (list(dict.fromkeys(split.texts)) * args.texts)[: args.texts]
    machine = trainer.pick_machine("auto")
    with tempfile.TemporaryDirectory() as parent:
        folders = tuned_folders(Path(parent), args.prefixes, args.pre_seq_len)
        bank = PrefixBank.open(folders)
        tokenizer = utils.load_tokenizer(bank.source, bank.config)
        alone = utils.load_model(locate(folders[0]), utils.load_config(locate(folders[0]), True))
    tokens = tokenizer(texts, truncation=True, max_length=128)["input_ids"]
    rows = np.arange(len(texts))
    data = dataset.Encoded(tokens, rows, None, rows.tolist(), tokenizer.pad_token_id)
    ways = {
        "one model": (alone, None),
        "bank, one prefix": (bank, np.zeros(len(texts), dtype=np.int64)),
        f"bank, {args.prefixes} prefixes": (bank, rows % args.prefixes),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for model, _ in ways.values():
        machine.place(model.requires_grad_(False))
    for _ in range(args.rounds + 1):  # the first warms up
        for name, (model, served_by) in ways.items():
            start = time.perf_counter()
            trainer.predict(model, dataset.replace(data, served_by=served_by), args, machine)
            seconds[name].append(time.perf_counter() - start)
    print(f"{args.texts} texts, {args.pre_seq_len} virtual tokens, {machine.precision}, "
          f"medians of {args.rounds}")  # fmt: skip
    base = statistics.median(seconds["one model"][1:])
    for name, times in seconds.items():
        median = statistics.median(times[1:])
        print(f"{name:24}{args.texts / median:8.0f} texts/s  {base / median:5.2f}x")


if __name__ == "__main__":
    main()

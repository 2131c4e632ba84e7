"""The start of a run that uses several tuned prefixes at once: check, load and merge them."""

import logging
from argparse import Namespace
from pathlib import Path

import torch
from transformers import BertConfig

from model import adapter
from model.loading import list_labels, problem_type, set_labels, set_max_seq_length
from model.prefix_bank import UNKNOWN, PrefixBank
from model.source import Source, backbone_sha256, ensemble_folders, locate
from model.start import Start, check_backbone, read_model_config
from model.tuning import TUNING
from runtime.files import UserError

logger = logging.getLogger(__name__)


def find_start(args: Namespace) -> Start:
    """Return what a run starts from: one model, or several prefixes.

    Raises: UserError if a model does not exist or does not fit the arguments.
    """
    paths = args.prefix_paths or ensemble_folders(Path(args.model_name_or_path))
    if not paths:
        return Start(args)
    if args.prefix_paths and not args.prefix_column:  # a folder may have several prefixes
        paths = [one for path in paths for one in ensemble_folders(Path(path)) or [path]]
    if args.do_train:
        raise UserError(
            f"{args.model_name_or_path} contains {len(paths)} prefixes, which cannot be tuned "
            f"further together: pass one of them, such as {paths[0]}"
        )
    return BankStart(args, paths)


def open_bank(
    paths: list[str], max_seq_length: int | None = None
) -> tuple[PrefixBank, list[Source], list[list[str]]]:
    """Load the adapter folders at `paths`, numbered in this order: the bank, sources and labels.

    Raises: UserError if they do not all have depth `all` and the same backbone, problem type and
        `max_seq_length`.
    """
    sources, method = [locate(path) for path in paths], TUNING["prefix"]
    configs: list[BertConfig] = []
    checksums = {one: backbone_sha256(one) for one in {source.backbone for source in sources}}
    for path, source in zip(paths, sources, strict=True):
        if ensemble_folders(Path(path)):
            raise UserError(
                f"--prefix_paths: {path} has several prefixes: --prefix_column needs one of them"
            )
        config, tuned_by = read_model_config(source)
        if tuned_by is not method:
            raise UserError(f"--prefix_paths: {path} is not the adapter folder of a prefix")
        check_backbone(source, config, checksums[source.backbone])
        set_max_seq_length(config, method.virtual_tokens(config), max_seq_length)
        configs.append(config)
    check_alike(sources, configs)
    merged, labels = merge(configs), [list_labels(config) for config in configs]
    tuned = [
        adapter.read(source.adapter, method.shapes(config))
        for source, config in zip(sources, configs, strict=True)
    ]
    names = list_labels(merged)
    weight = torch.zeros(len(tuned), len(names), merged.hidden_size)
    bias = torch.full(weight.shape[:2], UNKNOWN)
    for number, tensors in enumerate(tuned):
        columns = [names.index(name) for name in labels[number]]
        weight[number, columns] = tensors["classifier.weight"]
        bias[number, columns] = tensors["classifier.bias"]
    bert = method.build(sources[0], configs[0]).bert
    bank = PrefixBank(bert, merged, [one[adapter.PREFIX] for one in tuned], weight, bias)
    return bank.requires_grad_(False).eval(), sources, labels


def check_alike(sources: list[Source], configs: list[BertConfig]) -> None:
    """Check that all folders fit the first. Raises: UserError naming a folder that does not."""

    def traits(source: Source, config: BertConfig) -> dict:
        return {
            "backbone": source.backbone,
            "problem_type": problem_type(config, None, source.adapter),
            "max_seq_length": config.max_seq_length,
            "pooling": config.pooling,
        }

    first = traits(sources[0], configs[0])
    for source, config in zip(sources, configs, strict=True):
        if config.prefix_depth != "all":
            raise UserError(f"--prefix_paths: {source.adapter} is not a prefix of depth all")
        for name, value in traits(source, config).items():
            if value != first[name]:
                raise UserError(
                    f"--prefix_paths: {name} of {source.adapter} is {value}, "
                    f"but in {sources[0].adapter} it is {first[name]}"
                )


def merge(configs: list[BertConfig]) -> BertConfig:
    """Return the first config with the labels of all configs, in order of first occurrence."""
    merged = BertConfig.from_dict(configs[0].to_dict())
    names = (name for config in configs for name in list_labels(config))
    set_labels(merged, list(dict.fromkeys(names)))
    merged.pre_seq_len = max(config.pre_seq_len for config in configs)
    return merged


class BankStart(Start):
    """The start of a run with --prefix_paths: a bank that only predicts."""

    def __init__(self, args: Namespace, paths: list[str]) -> None:
        self.bank, self.sources, labels = open_bank(paths, args.max_seq_length)
        self.config, self.labels_by_prefix = self.bank.config, labels
        self.source, self.method = self.sources[0], TUNING["prefix"]
        self.config.problem_type = problem_type(self.config, args.problem_type, self.source.adapter)
        self.title, self.started_from = f"predictions of {', '.join(paths)}", None
        if args.prefix_column is None:  # all prefixes classify each row
            for path, names in zip(paths, labels, strict=True):
                if {*names} != {*self.labels}:
                    raise UserError(
                        f"--prefix_paths: {path} has other labels than {paths[0]}, so "
                        "they cannot be averaged: pass --prefix_column, or prefixes for one task"
                    )
            self.labels_by_prefix = None

    def build(self, args: Namespace) -> PrefixBank:
        return self.bank

    def count(self, model: PrefixBank) -> dict[str, int]:
        logger.info("%d tuned prefixes on one backbone", len(self.sources))
        return {}

"""Serve tuned models over HTTP, with a page to try them at the address that is printed.

    bash script/serve.sh [MODEL...] [flags]

MODEL is a model or adapter folder, or a folder of such folders [checkpoints]. Prefixes of depth
`all` on the same backbone share it and their requests share batches; other models have a backbone
each. serving/README.md describes the interface.
"""

import argparse
import gc
import logging
import os
import re
import resource
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from runtime.columns import precision_for
from runtime.files import UserError, name_list, run_and_report
from runtime.flags import DIR, FILE, INF, INT, NAME, SWITCH, Parser, choice, number, value
from runtime.machine import ENGINES, pick_machine, set_up_process
from runtime.processes import ALONE
from serving.app import create_app
from serving.engine import Settings
from serving.models import Registry, find_models

logger = logging.getLogger("serve")

BACKLOG = 4096  # connections that wait to be accepted
MOST_CONNECTIONS = 20_000  # more are answered with 503
SWITCH_SECONDS = 0.0005  # until a thread that waits gets Python's lock; 5 ms delayed every answer
MACOS_OPEN_FILES = 10_240  # the most it grants, though its limit may be infinite
SHUTDOWN_SECONDS = 60  # for requests in flight


def origin(text: str) -> str:
    """Check the origin of pages, as browsers send it. Raises: ArgumentTypeError."""
    if text != "*" and not re.fullmatch(r"https?://[^/\s]+", text):
        raise argparse.ArgumentTypeError(
            f"'{text}' is no origin: write it such as https://example.org, without a path"
        )
    return text.lower()


LIMITS = Settings()
SIZE = value(number(float, 0, INF, open_low=True), "GIB|MIB")
# fmt: off
FLAGS = (
    ("--host", {}, "127.0.0.1", "address to listen on [%(default)s]"),
    ("--port", value(number(int, 0, 65535)), 8000, "0: any free one [%(default)s]"),
    ("--allowed_hosts", NAME | {"nargs": "+"}, (),
     "further names by which clients call this server, such as example.org; '*': any"),
    ("--allow_origins", value(origin, "URL", nargs="+"), (),
     "pages that may call this server, such as https://example.org; '*': any [none]"),
    ("--api_key_file", FILE, None, "its content is the key that clients must send"),
    ("--allow_updates", DIR | {"metavar": "FOLDER"}, None,
     "let /v1/load_adapter and /v1/unload_adapter change what is served, from below FOLDER"),
    ("--precision", choice("auto", "fp32", "bf16"), "auto", ""),
    ("--engine", choice(*ENGINES), "auto", "that predicts; auto: OpenVINO on a CPU [auto]"),
    ("--int8", SWITCH, False, "predict in 8 bits; a model is refused if that harms its "
     "validation predictions, or if it has too few"),
    ("--cache_gib", SIZE, 1.0, "memory for prefixes; those used last stay [%(default)s]"),
    ("--max_batch_tokens", INT, LIMITS.max_batch_tokens, "[%(default)s]"),
    ("--max_queue", INT, LIMITS.max_queue, "texts that may wait; more get 429 [%(default)s]"),
    ("--max_texts", INT, LIMITS.max_texts, "texts of one request [%(default)s]"),
    ("--max_body_mib", SIZE, LIMITS.max_body / 2**20, "size of one request [%(default)s]"),
)
# fmt: on


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser("bash script/serve.sh", __doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    for name, kind, default, text in FLAGS:
        parser.add_argument(name, **kind, default=default, help=text)
    return parser.parse_args(argv)


def read_key(path: str | None) -> str | None:
    """Read the API key. Raises: UserError if the file is unreadable, or the key is not plain."""
    if path is None:
        return None
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"--api_key_file {path} cannot be read: {error}") from None
    if not key.isascii() or not key.isprintable() or len(key) < 8 or " " in key:
        raise UserError(f"--api_key_file {path} must contain a word of 8 or more ASCII characters")
    return key


def run(args: argparse.Namespace) -> None:
    """Load all models, then serve them until a signal. Raises: UserError."""
    began = time.perf_counter()
    raise_open_files()
    paths = args.models or ["checkpoints"]
    updates = Path(args.allow_updates) if args.allow_updates else None
    if updates and not updates.is_dir():
        raise UserError(f"--allow_updates: folder {updates} does not exist")
    same = ("max_batch_tokens", "max_queue", "max_texts", "allow_origins")
    settings = Settings(
        **{name: getattr(args, name) for name in same},
        max_body=int(args.max_body_mib * 2**20),
        allowed_hosts=("127.0.0.1", "localhost", args.host, *args.allowed_hosts),
        api_key=read_key(args.api_key_file),
        updates_from=updates,
    )
    try:  # before models load: a port in use is reported at once, and connections wait
        listener = socket.create_server((args.host, args.port), backlog=BACKLOG)
    except OSError as error:
        where = f"--host {args.host} --port {args.port}"
        raise UserError(f"{where}: {error.strerror or error}") from None
    set_up_process()
    # else oneDNN keeps a kernel for each shape of a batch, gigabytes in all; the libraries read it
    # when they compute for the first time
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100")
    folders = find_models(paths)
    precision = precision_for(args.precision, folders.values())
    machine = pick_machine(precision, ALONE, args.engine, args.int8)
    if machine.engine == "openvino":  # its threads hardly wait for each other, as torch's do
        machine = replace(machine, workers=max(1, machine.workers // 2))
    registry = Registry(machine, int(args.cache_gib * 2**30))
    registry.add_all(folders, named=paths)
    shared, models = len(registry.backbones), len(registry.models)
    logger.info("%s; %d models, %d shared backbones", machine, models, shared)
    logger.info("serving %s", name_list(registry.models))
    address = "http://{}:{}".format(*listener.getsockname())
    logger.info("ready after %.1f s: %s", time.perf_counter() - began, address)
    serve(create_app(registry, settings), listener)
    logger.info("stopped")


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until a signal."""
    # Python looks for garbage in all objects, and the libraries have a million of them. That took
    # four fifths of the main thread's time, while no other thread could run. So leave these out.
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_SECONDS)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, backlog=BACKLOG,
        limit_concurrency=MOST_CONNECTIONS, timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )  # fmt: skip
    for sent in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises it again at its end
        signal.signal(sent, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listener])


def raise_open_files() -> None:
    """Allow as many open files as the system lets us: each connection is one."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (most, MACOS_OPEN_FILES):
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), most))
            return


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    return run_and_report(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

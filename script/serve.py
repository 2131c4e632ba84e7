"""Serve tuned models over HTTP, with a page to try them at the address that is printed.

    bash script/serve.sh [MODEL...] [flags]

MODEL is a model or adapter folder, or a folder of such folders [checkpoints]. Prefixes of depth
`all` on the same backbone share it and their requests share batches; other models have a backbone
each. serving/README.md describes the interface.
"""

import argparse
import gc
import logging
import re
import resource
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import uvicorn

from arguments import DIR, FILE
from runtime.columns import precision_for
from runtime.files import UserError, run_and_report
from runtime.flags import Parser, number, value
from runtime.machine import pick_machine, set_up_process
from serving.app import create_app
from serving.engine import Settings
from serving.models import Registry, find_models

logger = logging.getLogger("serve")

BACKLOG = 4096  # connections that wait to be accepted
MOST_CONNECTIONS = 20_000  # more are answered with 503
MACOS_OPEN_FILES = 10_240  # the most it grants, though its limit may be infinite
SHUTDOWN_SECONDS = 60  # for requests in flight


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser("bash script/serve.sh", __doc__)
    count, defaults = number(int, 1, float("inf")), Settings()
    size = number(float, 0, float("inf"), open_low=True)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL")
    add("--host", default="127.0.0.1", help="address to listen on [%(default)s]")
    add("--port", default=8000, **value(number(int, 0, 65535)), help="0: any free one [8000]")
    add(
        "--allowed_hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further names by which clients call this server, such as example.org; '*': any",
    )
    add(
        "--allow_origins",
        nargs="+",
        default=[],
        **value(origin, "URL"),
        help="pages that may call this server, such as https://example.org; '*': any [none]",
    )
    add("--api_key_file", **FILE, help="its content is the key that clients must send")
    add(
        "--allow_updates",
        **DIR | {"metavar": "FOLDER"},
        help="let /v1/load_adapter and /v1/unload_adapter change what is served, from below FOLDER",
    )
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    for name, default, kind, what in (
        ("--cache_gib", 1.0, value(size, "GIB"), "memory for prefixes; those used last stay "),
        ("--max_batch_tokens", defaults.max_batch_tokens, value(count), ""),
        ("--max_queue", defaults.max_queue, value(count), "texts that may wait; more get 429 "),
        ("--max_texts", defaults.max_texts, value(count), "texts of one request "),
        ("--max_body_mib", defaults.max_body / 2**20, value(size, "MIB"), "size of one request "),
    ):
        add(name, default=default, **kind, help=f"{what}[%(default)s]")
    return parser.parse_args(argv)


def origin(text: str) -> str:
    """Check the origin of pages, as browsers send it. Raises: ArgumentTypeError."""
    if text != "*" and not re.fullmatch(r"https?://[^/\s]+", text):
        raise argparse.ArgumentTypeError(
            f"'{text}' is no origin: write it such as https://example.org, without a path"
        )
    return text.lower()


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
    if not args.models and not Path("checkpoints").is_dir():
        raise UserError("there is no folder checkpoints: name a model, or train one first")
    updates = Path(args.allow_updates) if args.allow_updates else None
    if updates and not updates.is_dir():
        raise UserError(f"--allow_updates: folder {updates} does not exist")
    settings = Settings(
        max_batch_tokens=args.max_batch_tokens,
        max_queue=args.max_queue,
        max_texts=args.max_texts,
        max_body=int(args.max_body_mib * 2**20),
        allowed_hosts=("127.0.0.1", "localhost", args.host, *args.allowed_hosts),
        api_key=read_key(args.api_key_file),
        updates_from=updates,
        allow_origins=tuple(args.allow_origins),
    )
    listener = listen(args.host, args.port)
    set_up_process()
    found = find_models(paths)
    machine = pick_machine(precision_for(args.precision, found.values()))
    registry = Registry(machine, int(args.cache_gib * 2**30))
    registry.add_all(found, named=paths)
    app = create_app(registry, settings)
    # Python looks for garbage in all objects, and the libraries have a million of them. That took
    # four fifths of the main thread's time, while no other thread could run. So leave these out.
    gc.collect()
    gc.freeze()
    own = sum(not model.adapters for model in registry.models.values())
    names = [*registry.models]
    logger.info(
        "%s; %d models: %d on %d shared backbones, %d on their own",
        registry.machine, len(names), len(names) - own, len(registry.backbones), own,
    )  # fmt: skip
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    logger.info("serving %s", shown)
    host, port = listener.getsockname()[:2]
    logger.info("ready after %.1f s: http://%s:%d", time.perf_counter() - began, host, port)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        backlog=BACKLOG,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        server_header=False,
    )
    for one in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises it again at its end
        signal.signal(one, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listener])
    logger.info("stopped")


def listen(host: str, port: int) -> socket.socket:
    """Open the socket before models load, so that a port in use is reported at once."""
    try:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)  # from now on connections wait instead of being refused
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return listener


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

"""Measure the server with 1, 16, 100 and 1,000 tuned prefixes, and its rivals with 16 models.

    bash script/serving_benchmark.sh PREFIX FULL [flags]

PREFIX: the adapter folder of a prefix, which is copied, with other weights, as often as needed.
FULL: a model folder, for the rivals. The load comes from locust, in another process: first 64 users
who wait for nothing but the answer find the most texts per second; then one such user, and requests
at random times, a tenth, half and nine tenths as many per second, measure the latencies. Each
request has one text for one model, both drawn at random.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from multiprocessing import Process
from pathlib import Path
from urllib.request import urlopen

import pandas as pd
from safetensors.torch import load_file, save_file

from runtime.files import UserError, run_and_report
from runtime.flags import DIR, FILE, Parser
from runtime.processes import end_with_parent
from script import serve
from script.benchmark import rival_servers
from script.benchmark.processes import format_table, started, write_figures

PORT = 8765
URL = f"http://127.0.0.1:{PORT}"
BUSY_USERS, RANDOM_USERS = 64, 100
SHARES = (0.1, 0.5, 0.9)  # of the most requests per second: loads to measure latencies under
PERCENTILES = (50, 95, 99)  # of the latencies, in ms
KINDS = ("pipelines", "lora", "prefixes")
COLUMNS = {
    "texts/s": lambda row: f"{row['texts_per_second']:.0f}",
    **{
        f"p50, p95, p99 at {share:.0%}": lambda row, share=share: ", ".join(
            f"{row['loads'][f'{share:.0%}'][f'p{p}_ms']:.0f}" for p in PERCENTILES
        )
        for share in SHARES
    },
    "lone": lambda row: f"{row['loads']['lone']['p50_ms']:.0f}",
    "memory": lambda row: f"{row['memory_bytes'] / 2**30:.2f} GiB",
    "start-up": lambda row: f"{row['start_up_seconds']:.1f} s",
    "errors": lambda row: str(sum(load["errors"] for load in row["loads"].values())),
}


def copy_prefix(source: Path, target: Path, number: int) -> None:
    """Copy an adapter folder with slightly other weights."""
    target.mkdir(parents=True)
    for name in ("adapter_config.json", "config.json"):
        shutil.copy(source / name, target)
    tensors = load_file(source / "adapter_model.safetensors")
    tensors = {name: tensor * (1 + 1e-3 * number) for name, tensor in tensors.items()}
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})


def wait_for(server: Process) -> None:
    """Wait until the server answers. Raises: UserError if it has ended instead."""
    while True:
        try:
            return urlopen(f"{URL}/openapi.json").close()
        except OSError:
            if not server.is_alive():
                raise UserError(
                    f"the server has ended: check that port {PORT} is free, and that bash "
                    "script/serve.sh serves the two folders"
                ) from None
            time.sleep(0.1)


def load(data: str, models: int, users: int, interval: float, seconds: int) -> pd.Series:
    """Let users send requests; return locust's figures. Raises: UserError if there are none.

    interval: mean time between two requests of a user in seconds; 0: as soon as it is answered.
    """
    env = os.environ | {"DATA": data, "MODELS": str(models), "INTERVAL": str(interval)}
    command = [sys.executable, "-m", "locust", "-f", "script/benchmark/load_user.py", "--headless"]
    command += ["--host", URL, "-u", str(users), "-r", str(users), "-t", f"{seconds}s"]
    end_with_us = partial(end_with_parent, os.getpid())
    with tempfile.TemporaryDirectory() as folder:
        command += ["--reset-stats", "--only-summary", "--csv", f"{folder}/locust"]
        subprocess.run(command, env=env, capture_output=True, preexec_fn=end_with_us)
        table = pd.read_csv(f"{folder}/locust_stats.csv").set_index("Name")
    if "classify" not in table.index:
        raise UserError(f"no request was answered in {seconds} s: pass more --seconds")
    return table.loc["classify"]


def memory(server: Process) -> int:
    """Return the bytes that a server has in memory."""
    pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(server: tuple, data: str, models: int, seconds: int, rates: dict[str, float]) -> dict:
    """Measure a server, a function and its arguments.

    Besides the usual loads, latencies are measured at `rates`, requests per second by their names.
    """

    def send(users: int, interval: float) -> dict[str, float]:
        row = load(data, models, users, interval, seconds)
        times = {f"p{p}_ms": float(row[f"{p}%"]) for p in PERCENTILES}
        return {"rate": float(row["Requests/s"]), "errors": int(row["Failure Count"]), **times}

    start = time.perf_counter()
    with started(*server) as process:
        wait_for(process)
        start_up, idle = time.perf_counter() - start, memory(process)
        send(BUSY_USERS, 0)  # warms up
        loads = {"most": send(BUSY_USERS, 0), "lone": send(1, 0)}
        most = loads["most"]["rate"]
        rates = {f"{share:.0%}": share * most for share in SHARES} | rates
        for name, rate in rates.items():
            loads[name] = send(RANDOM_USERS, RANDOM_USERS / rate)
        return {
            "texts_per_second": most,
            "loads": loads,
            "start_up_seconds": start_up,
            "memory_at_start_bytes": idle,
            "memory_bytes": memory(process),
        }


def compare(args: Namespace, flags: list[str]) -> None:
    """Measure the server and its rivals, print a table, and write all figures."""
    contenders = [(args.rivals, kind) for kind in KINDS] if args.rivals else []
    contenders += [(count, "prefixes") for count in args.counts]
    results: dict[str, dict] = {}
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as parent:
        models = Path(parent) / "models"
        for count, kind in contenders:
            print(f"{count} {kind} ...", flush=True)
            shutil.rmtree(models, ignore_errors=True)
            server = (rival_servers.serve, kind, str(args.full), count, PORT)
            if kind == "prefixes":
                for number in range(count):
                    copy_prefix(args.prefix, models / str(number), number)
                server = (serve.main, [str(models), "--port", str(PORT), *flags])
            results[f"{count} {kind}"] = measure(server, args.data, count, args.seconds, rates)
            if kind == KINDS[0]:  # ours are measured at their half load, too
                rates["50% of the pipelines"] = results[f"{count} {kind}"]["loads"]["50%"]["rate"]
    print(format_table(results, COLUMNS))
    write_figures(args.output_dir, "serving.json", results)


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    parser = Parser("bash script/serving_benchmark.sh", __doc__)
    add = parser.add_argument
    add("prefix", type=Path, metavar="PREFIX")
    add("full", type=Path, metavar="FULL")
    add("--data", **FILE, default="csv/test_simple.csv", help="CSV file with the column text")
    add("--counts", type=int, nargs="*", default=[1, 100, 1000], help="[%(default)s]")
    add("--rivals", type=int, default=16, help="models of each rival; 0: no rivals [%(default)s]")
    add("--seconds", type=int, default=15, help="of each load [%(default)s]")
    add("--output_dir", **DIR, default="checkpoints/serving")
    args, flags = parser.parse_known_args(argv)  # others are passed to the server
    serve.parse(flags)  # a bad flag ends the program
    return run_and_report(compare, args, flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Measure the server with 1, 10, 100 and 1,000 tuned prefixes, and its rivals with 16 models.

    bash script/serving_benchmark.sh PREFIX FULL [flags]

PREFIX: the adapter folder of a prefix, which is copied, with other weights, as often as needed.
FULL: a model folder, for the rivals. The load comes from other processes: wrk keeps 64 requests in
flight to find the most texts per second; then locust sends half of that at a fixed rate, and
measures the latencies. Each request has one text for one model, both drawn at random.
"""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file, save_file

from arguments import DIR, FILE
from runtime.files import UserError, run_and_report
from runtime.flags import Parser
from runtime.processes import end_with_parent
from script import serve

PORT = 8765
CONNECTIONS = 64  # of wrk
USERS = 100  # of locust
BODIES = 5_000
END_WITH_US = partial(end_with_parent, os.getpid())
LUA = """
local bodies = {}
for line in io.lines(os.getenv("BODIES")) do bodies[#bodies + 1] = line end
local headers = {["content-type"] = "application/json"}
math.randomseed(1)
request = function()
  return wrk.format("POST", "/v1/classify", headers, bodies[math.random(#bodies)])
end
done = function(summary, latency, requests)
  local e = summary.errors
  print(string.format("FOUND %f %d", summary.requests / summary.duration * 1e6,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def copy_prefix(source: Path, target: Path, number: int) -> None:
    """Copy an adapter folder with slightly other weights."""
    target.mkdir(parents=True)
    for name in ("adapter_config.json", "config.json"):
        shutil.copy(source / name, target)
    tensors = load_file(source / "adapter_model.safetensors")
    tensors = {name: tensor * (1 + 1e-3 * number) for name, tensor in tensors.items()}
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})


def write_bodies(path: Path, names: list[str], texts: list[str]) -> None:
    """Write the bodies of the requests, one per line."""
    draw = random.Random(1)
    rows = ({"model": draw.choice(names), "input": draw.choice(texts)} for _ in range(BODIES))
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


@contextmanager
def started(*command: str) -> Iterator[tuple[subprocess.Popen, float]]:
    """Start a server; yields its process and the seconds until it answered.

    Raises: UserError if it has ended instead.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], stderr=subprocess.DEVNULL, preexec_fn=END_WITH_US
    )
    try:
        probe = ["curl", "-s", "-o", "/dev/null", f"http://127.0.0.1:{PORT}/openapi.json"]
        while subprocess.run(probe, check=False).returncode:
            if process.poll() is not None:
                raise UserError(
                    f"{command[1]} has ended: check that port {PORT} is free, and that bash "
                    "script/serve.sh serves the two folders"
                )
            time.sleep(0.1)
        yield process, time.perf_counter() - began
    finally:
        process.kill()
        process.wait()


def memory(process: subprocess.Popen) -> int:
    """Return the bytes that a process has in memory."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def most(bodies: Path, seconds: int) -> tuple[float, int]:
    """Return the most requests per second, and the number of errors."""
    lua = bodies.with_name("wrk.lua")
    lua.write_text(LUA)
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "30s"]
    command += ["-s", str(lua)]
    found = subprocess.run(
        [*command, f"http://127.0.0.1:{PORT}"],
        env=os.environ | {"BODIES": str(bodies)}, capture_output=True, text=True, check=True,
        preexec_fn=END_WITH_US,
    )  # fmt: skip
    rate, errors = next(
        line.split()[1:] for line in found.stdout.splitlines() if line.startswith("FOUND")
    )
    return float(rate), int(errors)


def latencies(bodies: Path, rate: float, seconds: int) -> dict[str, float]:
    """Send requests at a fixed rate; returns percentiles in ms, the rate and the errors."""
    prefix = bodies.with_name("locust")
    env = os.environ | {"BODIES": str(bodies), "INTERVAL": str(USERS / rate)}
    command = [sys.executable, "-m", "locust", "-f", "script/benchmark/load_user.py", "--headless"]
    command += ["--host", f"http://127.0.0.1:{PORT}", "-u", str(USERS), "-r", str(USERS)]
    command += ["-t", f"{seconds}s", "--reset-stats", "--csv", str(prefix), "--only-summary"]
    subprocess.run(command, env=env, capture_output=True, check=False, preexec_fn=END_WITH_US)
    with open(f"{prefix}_stats.csv", encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if row["Name"] == "classify")
    found = {f"p{p}_ms": float(row[f"{p}%"]) for p in (50, 95, 99)}
    return found | {"rate": float(row["Requests/s"]), "errors": int(row["Failure Count"])}


def measure(command: list[str], bodies: Path, seconds: int) -> dict:
    """Measure one server under both loads."""
    with started(*command) as (process, start_up):
        idle = memory(process)
        most(bodies, 3)  # warms up
        rate, errors = most(bodies, seconds)
        at_half = latencies(bodies, rate / 2, seconds)
        found = {"texts_per_second": rate, "errors": errors, "at_half_load": at_half}
        return found | {
            "start_up_seconds": start_up,
            "memory_at_start_bytes": idle,
            "memory_bytes": memory(process),
        }


def show(name: str, found: dict) -> None:
    """Print a row of the table."""
    half, errors = found["at_half_load"], found["errors"] + found["at_half_load"]["errors"]
    print(
        f"{name:28} {found['texts_per_second']:6.0f} {half['p50_ms']:5.0f} {half['p95_ms']:5.0f}"
        f" {half['p99_ms']:5.0f} {found['memory_bytes'] / 2**30:7.2f}"
        f" {found['start_up_seconds']:7.1f} {errors:6}",
        flush=True,
    )


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    parser = Parser("bash script/serving_benchmark.sh", __doc__)
    add = parser.add_argument
    add("prefix", type=Path, metavar="PREFIX")
    add("full", type=Path, metavar="FULL")
    add("--data", **FILE, default="csv/test_simple.csv", help="CSV file with the column text")
    add("--counts", type=int, nargs="*", default=[1, 10, 100, 1000], help="[%(default)s]")
    add("--rivals", type=int, default=16, help="models of each rival; 0: no rivals [%(default)s]")
    add("--seconds", type=int, default=15, help="of each load [%(default)s]")
    add("--output_dir", **DIR, default="checkpoints/serving")
    args, flags = parser.parse_known_args(argv)  # others are passed to the server
    serve.parse(flags)  # a bad flag ends the program
    return run_and_report(compare, args, flags)


def compare(args: Namespace, flags: list[str]) -> None:
    """Measure the server and its rivals, print a row for each, and write all figures."""
    texts = pd.read_csv(args.data, keep_default_na=False)["text"].tolist()
    results: dict[str, dict] = {}
    print(f"{'':28} texts/s   p50   p95   p99 ms  GiB  start s errors")
    with tempfile.TemporaryDirectory() as parent:
        bodies, models = Path(parent) / "bodies", Path(parent) / "models"
        contenders = [(f"{count} prefixes", count, None) for count in args.counts]
        if args.rivals:
            contenders += [(f"{args.rivals} prefixes", args.rivals, None)]
            contenders += [
                (f"{args.rivals} {kind}", args.rivals, kind) for kind in ("pipelines", "lora")
            ]
        for name, count, kind in contenders:
            shutil.rmtree(models, ignore_errors=True)
            names = [str(number) for number in range(count)]
            write_bodies(bodies, names, texts)
            command = ["-m", "script.benchmark.rival_servers", str(kind), str(args.full)]
            command += [str(count), str(PORT)]
            if kind is None:
                for number in range(count):
                    copy_prefix(args.prefix, models / names[number], number)
                command = ["-m", "script.serve", str(models), "--port", str(PORT), *flags]
            results[name] = measure(command, bodies, args.seconds)
            show(name, results[name])
    path = Path(args.output_dir) / "serving.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"all figures: {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

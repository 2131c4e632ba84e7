"""Feed the program with damaged files and odd command lines, for as long as you like.

    .venv/bin/python -m tests.fuzzing --minutes 10

Each call of `main.main` must end with status 0 and right results, or with status 2, one line and
the earlier results unchanged; within 30 s, whatever it is given. Hypothesis shrinks what fails.
"""

# ruff: noqa: E402 - the path is set before the project is imported

import csv
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import conftest
import killing
from arguments import GROUPS
from dialects import check_predictions, in_dialect, read_plain
from killing import end_with_parent, main
from runtime.flags import DELIMITERS, Parser

SECONDS = 30
MEMORY = 8 * 2**30  # bytes of address space beyond what the process has

# What tends to break readers, put anywhere into a file.
TOKENS = [
    *(token.encode() for token in '" "" , ; | || =1+1 NA null 1.0 -1 { [ cat text label'.split()),
    *(
        b"\n",
        b"\r",
        b"\r\n",
        b"\0",
        b" ",
        b"\t",
        b"predicted",
        b"\xe2\x80\xa8",
        b"\xf0\x9f\x98\x80",
    ),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9", b"\x1f\x8b", b"x" * 5000, b"a " * 5000),
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 10**6, 10**12, 10**30, 0.5, -0.5, 1e300, 1e-300]),
    st.sampled_from(["", "x", "0", "bert", "../..", "/dev/zero", "é", "[CLS]", "y" * 3000]),
)
VALUES = st.recursive(
    SCALARS,
    lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=3), one, max_size=3),
    max_leaves=5,
)
BYTES = st.tuples(
    st.sampled_from(["insert", "delete", "repeat", "flip", "cut"]),
    st.floats(0, 1),
    st.integers(1, 40),
    st.sampled_from(TOKENS),
)
WORDS = (
    " 0 1 2 3 -1 0.5 1e-3 x True no nan inf 1e400 text label epoch steps auto random all a,b é "
    "bf16 text,label"
).split(" ")


def change_bytes(data: bytes, changes: list[tuple]) -> bytes:
    """Apply changes, each at a share of the file's length."""
    for kind, where, size, token in changes:
        at = int(where * len(data))
        if kind == "insert":
            data = data[:at] + token + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + size :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + size] * 3 + data[at + size :]
        elif kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << size % 8]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
    return data


def change_json(data: bytes, places: list[float], value: object) -> bytes:
    """Replace one node of a JSON file, found at `places` from the top; "": remove it."""
    content = json.loads(data)
    node = content
    for depth, place in enumerate(places):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = keys[int(place * (len(keys) - 1))]
        if depth == len(places) - 1 or not isinstance(node[key], dict | list):
            if value == "":
                del node[key]
            else:
                node[key] = value
            break
        node = node[key]
    return json.dumps(content).encode()


class Bench:
    """Good models, checkpoints and files to damage, and what they give undamaged."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.counts = folder, Counter()
        self.backbone = conftest.make_backbone(folder / "backbone")
        self.files = conftest.make_files(folder)
        self.flags = ["--precision", "fp32", "--max_seq_length", "16"]
        train = ["--do_train", "--do_eval", "--do_predict", *self.files, *self.flags]
        train += ["--model_name_or_path", self.backbone]
        self.train = [*train, "--num_train_epochs", "1", "--save_steps", "2"]
        self.train += ["--per_device_train_batch_size", "4"]
        self.models = {}
        for name, more in {"full": [], "prefix": killing.SMALL_PREFIX.split()}.items():
            self.models[name] = folder / name
            status, said = self.call([*self.train, *more, "--output_dir", str(folder / name)])
            assert status == 0, said
        # a run that was killed, with two checkpoints, and what it gives when it is resumed
        self.killed = folder / "killed"
        point = ("point", "checkpoint.write: os.rename", 3)
        resumed = [*self.train, "--num_train_epochs", "2", "--resume_from_checkpoint", "auto"]
        self.resumed = resumed
        killing.attempt(
            [*resumed, "--output_dir", str(self.killed)], self.killed, point, folder / "p"
        )
        assert len(list((self.killed / "unfinished").glob("checkpoint-*"))) == 2
        status, said = self.call([*resumed, "--output_dir", str(folder / "whole")])
        assert status == 0, said
        whole = killing.comparable(folder / "whole")
        self.whole = {k: v for k, v in whole.items() if not k.startswith("checkpoint-")}

    def call(self, argv: list[str]) -> tuple[int, str]:
        """Run main in a child with limits of time and memory; returns its status and stderr."""
        said = self.folder / "stderr"
        parent, child = os.getpid(), os.fork()
        if child == 0:
            status = 1
            try:
                end_with_parent(parent)
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                status = main.main(argv)
            except SystemExit as error:
                status = error.code
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        deadline = time.monotonic() + SECONDS
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return -1, f"not done within {SECONDS} s"
            time.sleep(0.003)
        return os.waitstatus_to_exitcode(ended[1]), said.read_text(errors="replace")

    def judge(self, kind: str, argv: list[str], folder: Path) -> bool:
        """Run main, and check the outcome; returns whether it succeeded."""
        before = killing.visible(folder)
        status, said = self.call([*argv, "--output_dir", str(folder)])
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert status in (0, 2), f"{argv}: status {status}: {said[-3000:]}"
        assert "Traceback" not in said, said[-3000:]
        self.counts[f"{kind}: {'right' if status == 0 else 'refused'}"] += 1
        if status == 2:
            assert len(lines) == 1, f"{argv}: {said[-3000:]}"
            assert killing.visible(folder) == before, f"{argv}: earlier results changed"
        return status == 0

    def fresh(self, source: Path | None = None) -> Path:
        """Return a new folder, or a copy of one."""
        folder = self.folder / "work"
        shutil.rmtree(folder, ignore_errors=True)
        if source:
            shutil.copytree(source, folder)
        return folder

    def predict(self, model: Path, test: Path) -> list[str]:
        """Return a command line that predicts a file."""
        flags = ["--do_predict", "--model_name_or_path", str(model), "--test_file", str(test)]
        return [*flags, *self.flags, "--overwrite_output_dir"]

    # ------------------------------------------------------------------------- what is damaged

    def csv_file(self, name: str, changes: list, written: dict, encoding: str, switches: set):
        """Write a CSV file in some dialect, damage it, then train on it or predict it."""
        flags = [f"--{switch}" for switch in switches & {"drop_empty", "drop_malformed"}]
        flags += ["--csv_encoding", encoding] if encoding else []
        flags += ["--delimiter", written["delimiter"]] if "delimiter" in switches else []
        flags += ["--quoting", "none"] if written["quoting"] == csv.QUOTE_NONE else []
        files = list(self.files)
        if "column_names" in switches:  # no file has a header
            flags += ["--column_names", "text,label"]
            for place in 1, 3, 5:
                rows = read_plain(self.files[place])[1:]
                files[place] = str(self.folder / f"bare_{place}.csv")
                Path(files[place]).write_bytes(in_dialect(rows, "comma", csv.QUOTE_ALL, "utf-8"))
        place, damaged = files.index(f"--{name}_file") + 1, self.folder / "damaged.csv"
        content = in_dialect(read_plain(files[place]), **written)
        damaged.write_bytes(change_bytes(content, changes))
        files[place] = str(damaged)
        work = self.fresh(self.models["full"])
        if name != "test":
            if "several" in switches:
                flags += ["--problem_type", "multi_label_classification"]
            self.judge("CSV", [*self.train, *files, *flags, "--overwrite_output_dir"], work)
        elif self.judge("CSV", [*self.predict(self.models["full"], damaged), *flags], work):
            names = ["text", "label"] if "column_names" in switches else None
            delimiter = written["delimiter"] if "delimiter" in switches else None
            dialect = {"names": names, "delimiter": delimiter, "quoting": written["quoting"]}
            dialect["drop_malformed"] = "drop_malformed" in switches
            check_predictions(damaged, work, encoding, **dialect)

    def model_folder(self, kind: str, number: int, harm: tuple) -> None:
        """Damage a file of a model folder, then predict with it."""
        model = self.folder / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(self.models[kind], model)
        wanted = ("config.json", "run.json", "tokenizer", ".safetensors")
        paths = sorted(
            p for p in model.iterdir() if p.is_file() and any(w in p.name for w in wanted)
        )
        damage(paths[number % len(paths)], *harm)
        test, work = Path(self.files[5]), self.fresh(self.models["prefix"])
        if self.judge("model", self.predict(model, test), work):
            check_predictions(test, work)

    def checkpoint_folder(self, number: int, harm: tuple) -> None:
        """Damage a file of an unfinished run, then resume it."""
        work = self.fresh(self.killed)
        paths = sorted(path for path in (work / "unfinished").rglob("*") if path.is_file())
        damage(paths[number % len(paths)], *harm)
        if self.judge("checkpoint", self.resumed, work):
            killing.check_end(work, self.whole, checkpoints=False)

    def command_line(self, words: list[str], base: str) -> None:
        """Add odd flags to a command line."""
        work = self.fresh(self.models["full"])
        argv = {
            "train": self.train,
            "predict": self.predict(self.models["prefix"], Path(self.files[5])),
        }
        self.judge("command", [*argv[base], *words, "--overwrite_output_dir"], work)


def damage(path: Path, instead: str, changes: list, places: list, value: object) -> None:
    """Change a JSON file by its structure, any file by its bytes, or put something in its place."""
    data = path.read_bytes()
    if instead:
        path.unlink()
        make = {
            "folder": Path.mkdir,
            "pipe": os.mkfifo,
            "nothing": Path.exists,
            "empty": Path.touch,
        }
        make.get(instead, lambda place: place.symlink_to("nowhere"))(path)
    elif path.suffix == ".json" and places:
        path.write_bytes(change_json(data, places, value))
    else:
        path.write_bytes(change_bytes(data, changes))


def flags_of_the_parser() -> list[tuple[str, str]]:
    """List flags with values, likely and odd, but none that make a run long or write elsewhere."""
    left_out = {"--output_dir", "--num_train_epochs", "--text", "--overwrite_output_dir"}
    pairs = []
    for names, kind, *_ in (row for group in GROUPS.values() for row in group):
        for name in {*names.split()} - left_out:
            likely = kind.get("choices", ("1", "2", "0.01") if kind.get("metavar") != "DIR" else ())
            pairs += [(name, word) for word in (*likely, *likely, *WORDS[:6])]
            pairs += [(name, word) for word in WORDS]
    return sorted(pairs)


def minutes() -> None:
    """Run from the command line."""
    parser = Parser("python -m tests.fuzzing", __doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shrink", action="store_true", help="look for a shorter example")
    args = parser.parse_args()
    places = st.lists(st.floats(0, 1), max_size=4)
    changes = st.lists(BYTES, max_size=4)
    index = st.integers(0, 30)
    words = st.lists(st.sampled_from(flags_of_the_parser()), max_size=3)
    encodings = st.sampled_from(
        [None] * 3 + ["utf-8"] * 3 + ["cp1252", "utf-16", "latin-1", "utf-7", "ascii"]
    )
    written = st.fixed_dictionaries(
        {
            "delimiter": st.sampled_from([*DELIMITERS]),
            "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONE]),
            "encoding": st.sampled_from(["utf-8"] * 4 + ["utf-8-sig", "utf-16"]),
        }
    )
    switches = st.sets(
        st.sampled_from("drop_empty drop_malformed delimiter column_names several".split()),
        max_size=3,
    )
    with tempfile.TemporaryDirectory() as parent:
        bench = Bench(Path(parent))
        several = words.map(lambda pairs: [word for pair in pairs for word in pair if word])
        instead = st.sampled_from([""] * 9 + ["folder", "pipe", "nothing", "empty", "link"])
        harm = st.tuples(instead, changes, places, VALUES)
        files = st.sampled_from(["train", "validation", "test", "test"])
        tests = [
            (bench.csv_file, files, changes, written, encodings, switches),
            (bench.model_folder, st.sampled_from(["full", "prefix"]), index, harm),
            (bench.checkpoint_folder, index, harm),
            (bench.command_line, several, st.sampled_from(["train", "predict"])),
        ]
        options = settings(
            max_examples=25,
            phases=[Phase.generate] + [Phase.shrink] * args.shrink,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        end, chance = time.monotonic() + 60 * args.minutes, random.Random(args.seed)
        found = 0
        while time.monotonic() < end:
            for test, *strategies in tests:
                try:
                    options(seed(chance.randrange(2**32))(given(*strategies)(test)))()
                except Exception as error:
                    found += 1
                    print(f"{test.__name__}: {error}", *getattr(error, "__notes__", ()), sep="\n")
        calls = sum(bench.counts.values())
        print(f"seed {args.seed}, {args.minutes:g} minutes: {calls} calls, {found} found wrong")
        for name, count in sorted(bench.counts.items()):
            print(f"{name} {count}")
    sys.exit(found > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    minutes()

"""The layers of the source, and the tables that must agree."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import arguments
from conftest import ROOT
from model import methods, sequence_classification

CONFIG = ROOT / "pyproject.toml"


def copy_source(folder: Path) -> set[str]:
    """Copy the source as packages, as import-linter requires; returns the module names."""
    modules = {path.stem: path for path in ROOT.glob("*.py")}
    for name, path in modules.items():
        (folder / name).mkdir()
        shutil.copy(path, folder / name / "__init__.py")
    for name in ("evaluation", "model", "runtime", "script", "serving"):
        shutil.copytree(ROOT / name, folder / name)
        (folder / name / "__init__.py").touch()
    return set(modules)


def lint(folder: Path) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).with_name("lint-imports"), "--config", CONFIG, "--no-cache"]
    env = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_imports_respect_the_layers(tmp_path):
    modules = copy_source(tmp_path)
    roots = tomllib.loads(CONFIG.read_text())["tool"]["importlinter"]["root_packages"]
    assert modules <= set(roots)  # a new module needs a layer
    found = lint(tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    with open(tmp_path / "dataset" / "__init__.py", "a") as file:
        file.write("import model\n")
    found = lint(tmp_path)
    assert found.returncode == 1 and "dataset is not allowed to import model" in found.stdout


def test_the_tables_of_tuning_methods_agree():
    assert list(arguments.METHODS) == list(methods.TUNING), "a row in one of the two is missing"


def test_the_poolings_of_the_flag_are_those_of_the_model():
    flag = next(row for row in arguments.GROUPS["training"] if row[0] == "--pooling")
    known = list(sequence_classification.POOLINGS)
    assert list(flag[1]["choices"]) == known, "add it to --pooling in arguments.GROUPS"

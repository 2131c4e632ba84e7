"""SetFit on the same backbone and the same files: the rival for few texts a label.

    python3 -m venv checkpoints/setfit
    checkpoints/setfit/bin/pip install -r script/requirements-setfit.txt
    checkpoints/setfit/bin/python script/study/setfit_rival.py BACKBONE FOLDER...

BACKBONE: a local folder. Each FOLDER contains {train,test}_simple.csv; its name is the seed, if it
is a number. Adds a line of test figures for each to results/setfit.json; a folder that is in it is
skipped. It tunes as SetFit does by default, but for at most `MOST_STEPS` steps: all pairs of more
texts would take days on a CPU.
"""

import json
import sys
import time
from pathlib import Path

import pandas as pd
from datasets import Dataset
from setfit import SetFitModel, Trainer, TrainingArguments
from sklearn.metrics import accuracy_score, f1_score

RESULTS = Path(__file__).parents[2] / "results" / "setfit.json"
MOST_STEPS = 1000


def main(backbone: str, *folders: str) -> None:
    """Tune on each folder's training file, and score its test file."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for folder in map(Path, folders):
        draw = folder.name if folder.name.isdigit() else ""
        name = f"{folder.parent.name}/{draw}" if draw else folder.name
        if name in found:
            continue
        start, read = time.perf_counter(), {"dtype": str, "keep_default_na": False}
        train, test = (pd.read_csv(folder / f"{n}_simple.csv", **read) for n in ("train", "test"))
        steps = {"max_steps": MOST_STEPS} if len(train) > 100 else {}
        place, quiet = f"{folder.parent}/setfit", {"save_strategy": "no", "report_to": "none"}
        settings = TrainingArguments(place, seed=int(draw or 0), **quiet, **steps)
        model = SetFitModel.from_pretrained(backbone)
        trainer = Trainer(model=model, args=settings, train_dataset=Dataset.from_pandas(train))
        trainer.train()
        seconds, predicted = time.perf_counter() - start, model.predict(test["text"].tolist())
        found[name] = {
            "train_rows": len(train),
            "test_accuracy": accuracy_score(test["label"], predicted),
            "test_macro_f1": f1_score(test["label"], predicted, average="macro"),
            "steps": trainer.st_trainer.state.global_step,
            "seconds": seconds,
        }
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(name, found[name], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

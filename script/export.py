"""Write a tuned model as ONNX, for onnxruntime, OpenVINO, ONNX.js and others.

    bash script/export.sh FOLDER [--output_dir DIR]

FOLDER is a model folder, or an adapter folder, whose backbone then becomes part of the file. DIR
[FOLDER/onnx] gets model.onnx and tokenizer.json. The inputs are `input_ids` and `attention_mask`,
int64 [batch, tokens] of any size; the output is `logits`, float32 [batch, labels], calibrated as
the folder is. The file's metadata has `labels` (a JSON list, in the order of the logits),
`problem_type` and `max_seq_length`, the number of tokens to cut texts to.

Before it appears, the file is run by onnxruntime: its logits must be those of the model.
"""

import io
import json
import logging
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch

from model import load
from model.classifier import Classifier
from model.prefix_bank import PrefixBank
from runtime.files import UserError, run_and_report
from runtime.flags import DIR, Parser

INPUTS = ("input_ids", "attention_mask")
SHAPES = ((1, 3), (2, 16), (5, 9))  # batch and tokens, to compare
LARGEST_DIFFERENCE = 1e-3  # of a logit


class Logits(torch.nn.Module):
    """A classifier that returns its logits alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Map int64 [B, T] tokens and mask to logits [B, C], for texts of every length."""
        return self.model(input_ids, attention_mask, traced=True).logits


def example(classifier: Classifier, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Draw inputs of this shape; all rows but the first are padded."""
    random = np.random.default_rng([batch, tokens])
    ids = torch.from_numpy(random.integers(0, len(classifier.tokenizer), (batch, tokens)))
    mask = torch.ones_like(ids)
    mask[1:, -2:] = 0
    return dict(zip(INPUTS, (ids, mask), strict=True))


def write(classifier: Classifier, path: Path) -> None:
    """Write the model to `path` as ONNX."""
    import onnx

    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):  # names of axes
        torch.onnx.export(
            Logits(classifier.model).eval(),
            tuple(example(classifier, *SHAPES[1]).values()),
            path,
            dynamo=True,
            external_data=False,
            input_names=INPUTS,
            output_names=["logits"],
            dynamic_shapes=dict.fromkeys(INPUTS, [torch.export.Dim.DYNAMIC] * 2),
        )
    model = onnx.load(path)
    kind = "multi" if classifier.multi_label else "single"
    facts = {
        "labels": json.dumps(classifier.labels),
        "problem_type": f"{kind}_label_classification",
        "max_seq_length": str(classifier.max_seq_length),
    }
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, path)


@torch.no_grad()
def difference(classifier: Classifier, path: Path) -> float:
    """Return the largest difference of a logit between onnxruntime and the model."""
    import onnxruntime

    session, largest = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), []
    for shape in SHAPES:
        inputs = example(classifier, *shape)
        expected = classifier.model(**inputs).logits.numpy()
        (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        largest.append(np.abs(logits - expected).max())
    return float(np.max(largest))  # unlike max(), NaN if one is


def run(folder: str, output_dir: Path) -> None:
    """Export the model in `folder`. Raises: UserError if that is not possible."""
    classifier = load(folder, "fp32", engine="torch")
    if isinstance(classifier.model, PrefixBank):
        raise UserError(f"{folder} has several prefixes: export each of them, such as prefix-1")
    classifier.model.cpu()
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir) as staging:
        path = Path(staging) / "model.onnx"
        write(classifier, path)
        if not (apart := difference(classifier, path)) <= LARGEST_DIFFERENCE:
            raise UserError(f"the exported model differs by {apart:.2g} in a logit: not written")
        classifier.tokenizer.save_pretrained(staging)
        for name in ("tokenizer.json", path.name):
            Path(staging, name).replace(output_dir / name)
    print(f"{output_dir}/model.onnx has {len(classifier.labels)} labels")
    print(f"onnxruntime gives the same logits within {apart:.0e}")


def main(argv: list[str]) -> int:
    """Run from the command line; return 0, or 2 after a one-line error that the user can fix."""
    parser = Parser("bash script/export.sh", __doc__)
    parser.add_argument("folder")
    parser.add_argument("--output_dir", **DIR, help="[FOLDER/onnx]")
    args = parser.parse_args(argv)
    return run_and_report(run, args.folder, Path(args.output_dir or f"{args.folder}/onnx"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

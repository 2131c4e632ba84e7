"""Models. `load` is for use from Python:

from model import load

classifier = load("checkpoints/og")
classifier(["a title", "another"])  # a dict of label, confidence and probabilities for each
"""


def load(folder, precision: str = "auto", batch_size: int = 64, engine: str = "auto"):
    """Load a model folder or an adapter folder; returns a `model.classifier.Classifier`.

    precision: "fp32", "bf16", or "auto" (as in training; bfloat16 only if fast here). batch_size:
    texts per batch. engine: "torch", "openvino", or "auto" (OpenVINO on a CPU). Raises:
    runtime.files.UserError if the folder is not usable.
    """
    from model.classifier import Classifier  # takes seconds, which other imports of model/ can skip
    from model.source import open_model
    from runtime.columns import precision_for
    from runtime.machine import pick_machine

    machine = pick_machine(precision_for(precision, [folder]), engine=engine)
    return Classifier(open_model(str(folder)), machine, batch_size)

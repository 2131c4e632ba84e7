"""Models. `load` is for use from Python:

from model import load

classifier = load("checkpoints/og")
classifier(["a title", "another"])  # a dict of label, confidence and probabilities for each
"""


def load(folder, precision: str = "auto", batch_size: int = 64):
    """Load a model folder or an adapter folder; returns a `model.classifier.Classifier`.

    precision: "fp32", "bf16", or "auto" (as in training; bfloat16 only if fast here). batch_size:
    texts per batch. Raises: runtime.files.UserError if the folder is not usable.
    """
    from model.classifier import Classifier  # takes seconds, which other imports of model/ can skip

    return Classifier.load(folder, precision, batch_size)

"""The table of tuning methods, and the two that need no file of their own."""

from transformers import BertConfig

from model.lora import Lora
from model.prefix_tuning import Prefix
from model.tuning import AdapterMethod, TuningMethod


class Probe(AdapterMethod):
    """A linear probe: only the head is trained, over the frozen backbone's mean-pooled tokens."""

    name, title_format = "probe", "linear probing"
    pooling = "mean"
    peft_types = ("PROBE",)


class Bias(AdapterMethod):
    """Biases, the gains of LayerNorm and the head are trained.

    BitFit (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199) trains no gains.
    """

    name, title_format = "bias", "bias tuning"
    peft_types = ("BIAS",)
    trains = (".bias", "LayerNorm")


TUNING = {method.name: method for method in (TuningMethod(), Prefix(), Lora(), Probe(), Bias())}


def method_of(config: BertConfig) -> TuningMethod:
    """Return the tuning method of a config; one that names none counts as full."""
    return TUNING[getattr(config, "tuning_method", "full")]

"""Learning rate and schedule: what depends on the backbone's width and on the validation file.

`settings` are those of a run, by the names of the flags.
"""

from bisect import bisect_left
from typing import Any

from arguments import (
    FEW_STEPS,
    MOSTLY_SEEN,
    SCHEDULE,
    STARTS,
    TUNING,
    WIDTHS,
    Tuning,
    can_start,
    fill,
)


def tuning_of(settings: dict[str, Any]) -> tuple[str, Tuning]:
    """Return the name and the row of `TUNING` that applies to the settings of a run."""
    name = settings["tuning_method"]
    if settings.get("prefix_projection"):
        name = f"projected {name}"
    elif settings.get("prefix_depth") == "input":
        name = f"input {name}"
    return name, TUNING[name]


def coming_texts(seen_share: float) -> str:
    """Return which texts are to come: "repeated" if at least half of them are seen, else "new".

    seen_share: see `dataset.Data.seen_share`. Schedule and calibration follow this rule.
    """
    return "repeated" if seen_share >= MOSTLY_SEEN else "new"


def default_rate(settings: dict[str, Any], width: int) -> tuple[float, float, float]:
    """Return the lowest, the default and the highest learning rate for a backbone's hidden size."""
    tuning, place = tuning_of(settings)[1], bisect_left(WIDTHS, width)
    return tuning.lowest, tuning.rates[place], tuning.highest[place]


def start_rate(settings: dict[str, Any], width: int) -> float:
    """Return the highest learning rate of a contrastive start: a quarter of the default one."""
    return default_rate(settings, width)[1] / 4


def fill_schedule(settings: dict[str, Any], seen_share: float, width: int) -> dict:
    """Fill in and return the learning rates and the `SCHEDULE`.

    seen_share: see `dataset.Data.seen_share`. width: the backbone's hidden size.
    """
    fill(settings, {"learning_rate": default_rate(settings, width)[1]})
    fill(settings, {"head_learning_rate": settings["learning_rate"]})
    tuning = tuning_of(settings)[1]
    defaults = tuning.new if coming_texts(seen_share) == "new" else tuning.seen
    chosen = dict(zip(SCHEDULE, defaults, strict=True))
    dropout = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    fill(settings, {name: chosen[name] for name in dropout})
    if not any(settings[name] for name in dropout):
        chosen["rdrop_alpha"] = 0  # two equal predictions
    fill(settings, chosen)
    return {name: settings[name] for name in ("learning_rate", "head_learning_rate", *SCHEDULE)}


def fill_start(
    settings: dict[str, Any], rows: int, seen_share: float, width: int, fresh: bool
) -> dict[str, int]:
    """Fill in and return for how many steps a run for new texts starts contrastively.

    Call it before `fill_schedule`: a head that starts from a fit needs a lower rate, else it soon
    forgets the fit. `STARTS`, by whether few optimizer steps follow: the start's own steps, the
    pooling, the share of the usual rate. Before few, epochs or a pooling of flags are kept instead.
    rows: of the training file. fresh: whether the head is new, and a row has one label.
    """
    size = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    tuning = tuning_of(settings)[1]
    few = -(-rows // size) * tuning.new[0] <= FEW_STEPS
    free = settings["num_train_epochs"] is None and settings["pooling"] in (None, "mean")
    new = fresh and can_start(settings) and coming_texts(seen_share) == "new"
    steps, pooling, share = STARTS[few]
    starts = new and (free if few else tuning.starts)
    fill(settings, {"contrastive_steps": steps if starts else 0})
    if settings["contrastive_steps"]:
        rate = default_rate(settings, width)[1] * share
        fill(settings, {"pooling": pooling, "learning_rate": rate})
    return {"contrastive_steps": settings["contrastive_steps"]}


def learning_rate_warning(settings: dict[str, Any], width: int) -> str | None:
    """Return a warning if the rate was probably meant for another method or width, else None."""
    lowest, default, highest = default_rate(settings, width)
    rate = settings["learning_rate"]
    if lowest <= rate <= highest:
        return None
    side, effect = ("low", "slowly") if rate < lowest else ("high", "badly or not at all")
    return (
        f"--learning_rate {rate:g} is {side} for {tuning_of(settings)[0]} tuning of a backbone "
        f"with hidden size {width}: expect the model to learn {effect} (the default is {default:g})"
    )


def advice_after_collapse(settings: dict[str, Any]) -> str:
    """Return what to try after a model predicted one class only: a third of its learning rate.

    If that is too low to learn, the rate was set by a flag, and the default is better.
    """
    third = settings["learning_rate"] / 3
    if third < tuning_of(settings)[1].lowest:
        return "omit --learning_rate"
    return f"try --learning_rate {third:.0e}"

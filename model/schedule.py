"""Learning rate and schedule: what depends on the backbone's width and on the validation file."""

from argparse import Namespace
from bisect import bisect_left

from arguments import (
    MOSTLY_SEEN,
    SCHEDULE,
    SCHEDULES,
    TUNING_DEFAULTS,
    WIDTHS,
    defaults_name,
    fill,
)


def coming_texts(seen_share: float) -> str:
    """Return which texts are to come: "repeated" if at least half of them are seen, else "new".

    seen_share: see `dataset.Data.seen_share`. Schedule and calibration follow this rule.
    """
    return "repeated" if seen_share >= MOSTLY_SEEN else "new"


def default_rate(args: Namespace, width: int) -> tuple[float, float, float]:
    """Return the lowest, the default and the highest learning rate for a backbone's hidden size."""
    lowest, *by_width = TUNING_DEFAULTS[defaults_name(args)]
    return lowest, *(rates[bisect_left(WIDTHS, width)] for rates in by_width)


def fill_schedule(args: Namespace, seen_share: float, width: int) -> dict:
    """Fill in and return the learning rates and the `SCHEDULE`.

    seen_share: see `dataset.Data.seen_share`. width: the backbone's hidden size.
    """
    fill(args, {"learning_rate": default_rate(args, width)[1]})
    fill(args, {"head_learning_rate": args.learning_rate})
    defaults = SCHEDULES[defaults_name(args)][coming_texts(seen_share) == "new"]
    chosen = dict(zip(SCHEDULE, defaults, strict=True))
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        fill(args, {name: chosen[name]})
    if not (args.hidden_dropout_prob or args.attention_probs_dropout_prob):
        chosen["rdrop_alpha"] = 0  # two equal predictions
    fill(args, chosen)
    names = ("learning_rate", "head_learning_rate", *SCHEDULE)
    return {name: getattr(args, name) for name in names}


def learning_rate_warning(args: Namespace, width: int) -> str | None:
    """Return a warning if the rate was probably meant for another method or width, else None."""
    lowest, default, highest = default_rate(args, width)
    if lowest <= args.learning_rate <= highest:
        return None
    too_low = args.learning_rate < lowest
    side, effect = ("low", "slowly") if too_low else ("high", "badly or not at all")
    return (
        f"--learning_rate {args.learning_rate:g} is {side} for {defaults_name(args)} tuning of a "
        f"backbone with hidden size {width}: expect the model to learn {effect} (the default is "
        f"{default:g})"
    )


def advice_after_collapse(args: Namespace) -> str:
    """Return what to try after a model predicted one class only: a third of its learning rate.

    If that is too low to learn, the rate was set by a flag, and the default is better.
    """
    third = args.learning_rate / 3
    if third < TUNING_DEFAULTS[defaults_name(args)][0]:
        return "omit --learning_rate"
    return f"try --learning_rate {third:.0e}"

"""Write training metrics to metrics.jsonl and TensorBoard."""

from collections.abc import Callable

from runtime.output_folder import OutputFolder


def recorder(output: OutputFolder, report_to: str) -> Callable[[dict], None]:
    """Return a function that appends a line to metrics.jsonl and, if requested, to TensorBoard."""
    if report_to == "none":
        return output.append_metrics
    from torch.utils.tensorboard import SummaryWriter  # an optional package

    board = SummaryWriter(output.staging / "tensorboard")

    def show(line: dict) -> None:
        for name, value in line.items():
            if name != "step":
                board.add_scalar(name, value, line["step"])
        board.flush()

    for line in output.read_metrics():  # earlier lines of a resumed run
        show(line)

    def record(line: dict) -> None:
        output.append_metrics(line)
        show(line)

    return record

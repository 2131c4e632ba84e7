"""What a GPU needs, as far as it can be shown without one.

A tensor on the device "meta" has a shape, but no values. So there a step fails if it reads a value,
for which it would wait for a GPU, or if it mixes devices.
"""

from contextlib import nullcontext

import pytest
import torch

import trainer
from conftest import without_dropout
from model import prefix_bank, prefix_encoder
from runtime.machine import Machine
from runtime.training_state import Progress
from test_trainer import FP32, arguments, data  # noqa: F401 - a fixture

META = Machine(torch.device("meta"), "fp32")
KINDS = {
    "full": [],
    "full, mean pooling, R-Drop": ["--pooling", "mean", "--rdrop_alpha", "1"],
    "bias": ["--tuning_method", "bias"],
    "prefix": ["--prefix"],
    "prefix, projected": ["--prefix", "--prefix_projection"],
    "prefix at the input": ["--prefix", "--prefix_depth", "input"],
    "4 prefixes": ["--prefix", "--num_prefixes", "4"],
}


@pytest.fixture(params=KINDS)
def case(request, make_model, data):  # noqa: F811
    """A model, its data and its arguments."""
    args = arguments(*KINDS[request.param])
    return make_model(*KINDS[request.param]), data.for_each_prefix(args.num_prefixes), args


@pytest.fixture
def no_autocast(monkeypatch) -> None:
    """The device "meta" has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **options: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def test_a_training_step_reads_no_value_and_stays_on_its_device(case, no_autocast, monkeypatch):
    model, data, args = case  # noqa: F811
    trained = [one for one in model.parameters() if one.requires_grad]
    META.place(model)
    optimizer = torch.optim.AdamW(model.parameters())
    monkeypatch.setattr(optimizer, "step", lambda: None)  # the fused one knows no "meta"
    loss, norm = trainer.training_step(model, optimizer, data, range(len(data)), 0, args, META)
    assert {one.device.type for one in (loss, norm, optimizer.found_inf)} == {"meta"}
    assert len(trained) == sum(one.requires_grad for one in model.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


def test_scoring_reads_no_value_and_stays_on_its_device(case, no_autocast):
    model, data, _ = case  # noqa: F811
    META.place(model)
    logits = META.logits(model.eval(), data, range(len(data.token_ids)))
    assert (logits.device.type, *logits.shape) == ("meta", len(data.token_ids), 3)


def test_the_way_of_a_gpu_has_the_same_losses_and_gradients(case, monkeypatch):
    model, data, args = case  # noqa: F811
    without_dropout(model)
    found = []
    for on_gpu in (False, True):
        for module in (prefix_encoder, prefix_bank):
            monkeypatch.setattr(module, "on_gpu", lambda tensor, answer=on_gpu: answer)
        optimizer = torch.optim.SGD(model.parameters())
        gradients = []

        def step(gradients=gradients):
            gradients += [one.grad.clone() for one in model.parameters() if one.grad is not None]

        monkeypatch.setattr(optimizer, "step", step)
        loss, norm = trainer.training_step(model, optimizer, data, range(len(data)), 0, args, FP32)
        found.append([loss, norm, *gradients])
    assert len(found[0]) > 2
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_on_a_gpu_losses_are_read_for_a_report_and_for_a_checkpoint():
    """Tensors on "meta" cannot be read, so the first reading fails."""
    lines = []
    with pytest.raises(RuntimeError, match="meta"), Progress(5, 5, 4, lines.append) as progress:
        progress.state.done = 1  # the first step is reported
        for number in (1, 2, 3):
            progress.step([1, 2], torch.zeros((), device="meta"), torch.zeros(()), 0.1)
            assert len(progress.unread) == number
    assert progress.done == 4 and lines == []
    progress = Progress(4, 4, 3, lines.append)
    progress.unread.append((1, [1], torch.zeros((), device="meta"), torch.zeros(())))
    with pytest.raises(RuntimeError, match="meta"):
        progress.read()

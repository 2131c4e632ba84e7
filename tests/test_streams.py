"""Streams: the same figures as without them."""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from model import classifier
from model.classifier import predict
from runtime.machine import in_workers, pick_machine
from test_trainer import FP32, data  # noqa: F401 - a fixture


def test_two_workers_predict_the_same_bits(make_model, data):  # noqa: F811
    model, two = make_model("--prefix").requires_grad_(False), dataclasses.replace(FP32, workers=2)
    one, other = (predict(model, data, 3, machine) for machine in (FP32, two))
    assert torch.equal(one, other)


def test_results_come_in_order_and_an_error_ends_the_rest():
    started = []

    def work(number: int) -> int:
        started.append(number)
        time.sleep(0.02 * (number % 2))
        if number == 5:
            raise ValueError("five")
        return number

    assert list(in_workers(work, range(5), 2)) == [0, 1, 2, 3, 4]
    started.clear()
    with pytest.raises(ValueError, match="five"):
        list(in_workers(work, range(100), 2))
    time.sleep(0.1)
    assert max(started) < 20


def test_workers_leave_the_threads_of_the_program_as_they_are():
    """The number that a stream sets for itself was that of all threads that started later."""
    torch.set_num_threads(4)
    try:
        list(in_workers(str, range(2), 2))
        assert [*ThreadPoolExecutor(1).map(lambda _: torch.get_num_threads(), range(1))] == [4]
    finally:
        torch.set_num_threads(1)


def test_a_run_with_two_workers_has_the_same_bytes(run, monkeypatch):
    """In batches of the same texts: two workers have smaller ones, which round otherwise."""
    few = ("--per_device_eval_batch_size", "2")  # a stream's share of the four texts
    expected = run(*few, name="one")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert "2 threads, scoring with 2 workers" in str(pick_machine("fp32"))
    found = run(*few, name="two")
    for name in ("predictions.csv", "validation_predictions.csv", "model.safetensors"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()


def test_few_texts_keep_every_stream_busy(make_model, data, monkeypatch):  # noqa: F811
    """One batch of all texts would leave all workers but one without work."""
    sizes = []
    usual = classifier.length_batches

    def length_batches(*arguments):
        found = usual(*arguments)
        sizes.extend(map(len, found))
        return found

    monkeypatch.setattr(classifier, "length_batches", length_batches)
    predict(make_model(), data, 64, dataclasses.replace(FP32, workers=4))
    assert sizes == [3, 3, 3, 2]

"""The queue of the server: turns, texts that are equal, clients that left, and lengths."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from starlette.exceptions import HTTPException

from conftest import within
from runtime.machine import pick_machine
from serving.batching import Batcher, Full, by_length
from serving.metrics import Metrics


class Slow:
    """A backend that notes its batches and waits until it may go on."""

    def __init__(self) -> None:
        self.batches, self.go = [], threading.Event()

    def prepare(self, model):
        if model.name == "broken":
            raise OSError("no such file")

    def logits(self, token_ids, prepared):
        self.batches.append(token_ids)
        self.go.wait(20)
        if [6, 6] in token_ids:
            raise RuntimeError("a bug")
        scores = {7: [float("nan"), 0.0]}
        return [torch.tensor([scores.get(ids[0], [float(ids[0]), 0.0])]) for ids in token_ids]


class Named:
    """A model of a queue test."""

    def __init__(self, name, backend):
        self.name, self.backend, self.adapters = name, backend, []
        self.labels, self.multi_label = ["a", "b"], False


def submit(queue, model, token_ids):
    return queue.submit(model, token_ids, time.perf_counter())


@pytest.fixture
def queue():
    """A queue with one worker, which is busy with a first text."""
    machine = pick_machine("fp32")
    assert machine.workers == 1  # tests compute with one thread
    backend, queue = Slow(), Batcher(machine, 8, 100, Metrics())
    queue.start()
    submit(queue, Named("first", backend), [[0, 0]])
    with within(10):
        while not backend.batches:
            time.sleep(0.001)
    yield queue, backend
    backend.go.set()
    queue.close()


def test_a_model_that_floods_the_queue_does_not_starve_others(queue):
    queue, backend = queue
    flood = Named("flood", backend)
    flooding = submit(queue, flood, [[1, number] for number in range(60)])
    other = submit(queue, Named("other", backend), [[2, 0]])
    with pytest.raises(Full) as full:  # 61 wait, and 40 more are too many
        submit(queue, Named("third", backend), [[3, 0]] * 40)
    assert int(full.value.headers["retry-after"]) >= 1
    with pytest.raises(Full):  # a model may have no more texts than are still free
        submit(queue, flood, [[1, 0]])
    backend.go.set()
    assert other.future.result(20).tolist() == [[2, 0]]
    flooding.future.result(20)
    assert [2, 0] in backend.batches[1]  # the very next batch
    assert all(len(batch) <= 4 for batch in backend.batches)  # of 2 tokens each, 8 in all


def test_equal_texts_are_scored_once_and_those_of_clients_that_left_never(queue):
    queue, backend = queue
    model = Named("one", backend)
    twice = [submit(queue, model, [[1, 1]]) for _ in range(2)]
    left = submit(queue, model, [[9, 9]])
    left.future.cancel()
    broken = submit(queue, Named("broken", backend), [[5, 5]])
    backend.go.set()
    assert [job.future.result(20).tolist() for job in twice] == [[[1, 0]]] * 2
    with pytest.raises(HTTPException):
        broken.future.result(20)
    scored = [ids for batch in backend.batches for ids in batch]
    assert scored.count([1, 1]) == 1 and [9, 9] not in scored and [5, 5] not in scored


def test_texts_of_a_batch_have_similar_lengths():
    rows = [("model", (0,) * length) for length in (3, 128, 5, 120, 10, 60, 19, 64)]
    lengths = [[len(ids) for _, ids in part] for part in by_length(rows, 64)]
    assert lengths == [[128, 120], [64, 60, 19], [10, 5, 3]]


def test_a_batch_that_fails_and_unusable_numbers_end_no_worker(queue):
    """Numbers that are not finite are the error of their own request alone."""
    queue, backend = queue
    model = Named("one", backend)
    unusable, beside = submit(queue, model, [[7, 7], [1, 2]]), submit(queue, model, [[1, 3]])
    backend.go.set()
    with pytest.raises(HTTPException, match="diverged"):
        unusable.future.result(20)
    assert beside.future.result(20).tolist() == [[1, 0]]
    with pytest.raises(RuntimeError):
        submit(queue, model, [[6, 6]]).future.result(20)
    assert submit(queue, model, [[1, 1]]).future.result(20).tolist() == [[1, 0]]
    assert all(worker.is_alive() for worker in queue.workers)


def test_a_large_request_has_work_for_all_workers():
    machine = replace(pick_machine("fp32"), workers=2)
    backend, queue = Slow(), Batcher(machine, 8, 1000, Metrics())
    queue.start()
    job = submit(queue, Named("one", backend), [[1, number] for number in range(500)])
    with within(10):
        while len(backend.batches) < 2:  # none of them ends yet
            time.sleep(0.001)
    backend.go.set()
    assert len(job.future.result(20)) == 500
    queue.close()


def test_the_smallest_batch_has_one_text():
    backend, queue = Slow(), Batcher(pick_machine("fp32"), 1, 10, Metrics())
    backend.go.set()
    queue.start()
    job = submit(queue, Named("one", backend), [[1, 1], [2, 2]])
    assert job.future.result(20).tolist() == [[1, 0], [2, 0]]
    queue.close()

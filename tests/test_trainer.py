"""The training loop: losses, steps, choice of epoch and errors; and the metrics."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

import trainer
from arguments import parse_args
from conftest import ROWS, without_dropout
from evaluation.metrics import Score, Tally, compute_metrics
from model.bert import train_words_in_use
from model.classifier import predict
from model.predictions import Predictions
from model.schedule import fill_schedule
from runtime import batches
from runtime.batches import Encoded
from runtime.files import UserError
from runtime.machine import Machine, pick_machine
from runtime.training_state import MOMENTS, step_if_finite

FP32 = Machine(torch.device("cpu"), "fp32")


@pytest.fixture
def data(tmp_path) -> Encoded:
    """The rows of conftest, with words numbered from 5."""
    words = sorted({word for text, _ in ROWS for word in text.split()})
    ids = [[2, *(5 + words.index(word) % 30 for word in text.split()), 3] for text, _ in ROWS]
    labels = np.array([int(label) for _, label in ROWS])
    rows = list(range(1, len(ROWS) + 1))
    return Encoded(ids, np.arange(len(ROWS)), labels, rows, pad_token_id=0)


def arguments(*flags):
    args = parse_args(["--do_train", "--do_eval", "--output_dir", "out", *flags])
    fill_schedule(vars(args), seen_share=1.0, width=16)
    return args


def nowhere(state, tensors):
    """Save nothing."""


def tune(model, data, *flags, eval_set=None, save=nowhere, machine=FP32):
    lines = []
    args = arguments("--logging_steps", "1", *flags)
    results = trainer.train(
        model, data, eval_set, args, machine, write_metrics=lines.append, save=save
    )
    return results, lines


def test_the_learning_rate_rises_and_falls_linearly():
    factors = [trainer.learning_rate_factor(step, 10, 4) for step in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(factors[4:], [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert trainer.warmup_steps(0.06, 100) == 6
    assert trainer.warmup_steps(7, 100) == 7
    assert trainer.warmup_steps(1000, 100) == 99


def test_biases_layer_norms_and_the_prefix_are_not_decayed(make_model):
    bias = ("--tuning_method", "bias")
    for flags in ((), ("--prefix",), ("--prefix", "--prefix_projection"), bias):
        model = make_model(*flags)
        optimizer = trainer.build_optimizer(
            model, arguments("--weight_decay", "0.1", "--head_learning_rate", "0.5")
        )
        decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
        head = {id(p) for g in optimizer.param_groups if g["lr"] == 0.5 for p in g["params"]}
        for name, parameter in model.named_parameters():
            free = name.endswith("bias") or "LayerNorm" in name or "prefix_encoder.emb" in name
            assert (id(parameter) in decayed) == (parameter.requires_grad and not free), name
            assert (id(parameter) in head) == name.startswith("classifier."), name


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_accumulation_equals_one_large_batch(make_model, data, kind):
    """11 rows in batches of 6 and 5, at once or in parts of 2 (the last part has one row)."""
    if kind == "multi":
        data = dataclasses.replace(data, labels=np.eye(3, dtype=np.float32)[data.labels])
    models, losses = [], []
    for flags in (
        ["6", "--gradient_accumulation_steps", "1"],
        ["2", "--gradient_accumulation_steps", "3"],
    ):
        model = without_dropout(make_model())
        _, lines = tune(model, data, "--per_device_train_batch_size", *flags)
        models.append(model)
        losses.append([line["loss"] for line in lines])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    big, small = (dict(model.named_parameters()) for model in models)
    for name in big:
        if not name.endswith("key.bias"):  # its gradient is only rounding, which Adam scales up
            torch.testing.assert_close(big[name], small[name], rtol=1e-4, atol=1e-5, msg=name)


# Losses of the first six steps. If they change, training has changed.
EXPECTED = {
    "full": [1.051999, 1.534771, 1.064451, 1.041521, 1.148758, 1.125775],
    "prefix": [1.073722, 1.208594, 1.075888, 1.065305, 1.106585, 1.127007],
    "projected": [1.068823, 1.211183, 1.080047, 1.060852, 1.111024, 1.120420],
}


METHODS = {"full": (), "prefix": ("--prefix",), "projected": ("--prefix", "--prefix_projection")}


@pytest.mark.parametrize("method", EXPECTED)
def test_the_first_losses_are_as_expected(make_model, data, method):
    model = without_dropout(make_model(*METHODS[method]))
    flags = [*METHODS[method], "--learning_rate", "0.01", "--per_device_train_batch_size", "4"]
    flags += ["--num_train_epochs", "2", "--warmup_steps", "0"]
    machine = pick_machine("fp32")  # a GPU, if the tests are called with --device cuda
    machine.place(model)
    _, lines = tune(model, data, *flags, machine=machine)
    np.testing.assert_allclose([line["loss"] for line in lines], EXPECTED[method], atol=1e-4)


def test_the_first_loss_is_the_initial_models_loss(make_model, data):
    model = without_dropout(make_model())
    rows = batches.training_batches(data.lengths, 32, 42, 0)[0]
    batch = data.collate(rows)
    logits = model(**batch).logits
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(data.labels[rows])).item()
    _, lines = tune(model, data, "--num_train_epochs", "1")
    assert lines[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_plain_loop_learns_the_same_weights(backbone, make_model, data):
    """transformers' own BERT with all embeddings trained, step by step as in a textbook."""
    model = without_dropout(make_model())
    plain = without_dropout(
        transformers.BertForSequenceClassification.from_pretrained(backbone, num_labels=3)
    )
    plain.load_state_dict(model.state_dict())
    before = model.get_input_embeddings().weight.detach().clone()
    train_words_in_use(model, data.token_ids)
    args = arguments("--weight_decay", "0", "--learning_rate", "1e-3")
    optimizers = [trainer.build_optimizer(one, args) for one in (model, plain)]
    for step in range(6):
        rows = np.arange(step, step + 6)
        loss, norm = trainer.training_step(model, optimizers[0], data, rows, step, args, FP32)
        logits = plain.train()(**data.collate(rows)).logits
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(data.labels[rows]))
        optimizers[1].zero_grad()
        expected.backward()
        assert norm == pytest.approx(
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item(), rel=1e-4
        )
        optimizers[1].step()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
    trained = model.state_dict()
    assert trained.keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        if not name.endswith("key.bias"):  # its gradient is only rounding, which Adam scales up
            torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    words = trained["bert.embeddings.word_embeddings.weight"]
    moved = {word for word in range(len(words)) if not torch.equal(words[word], before[word])}
    assert moved == set(np.concatenate(data.token_ids))


@pytest.mark.upgrade
def test_the_averaged_weights_are_evaluated_and_kept(make_model, data, monkeypatch):
    model, evaluated, steps = make_model(), [], []
    usual = trainer.training_step

    def bias():
        return model.classifier.bias.detach().clone()

    def step(*args):
        done = usual(*args)
        steps.append(bias())
        return done

    def evaluate(*rest):
        evaluated.append(bias())
        return {"loss": 1.0, "accuracy": 0.0, "macro_f1": 0.0}, False

    monkeypatch.setattr(trainer, "training_step", step)
    monkeypatch.setattr(trainer, "evaluate", evaluate)
    start = average = bias()
    flags = ["--ema_decay", "0.25", "--num_train_epochs", "3", "--load_best_model_at_end", "False"]
    tune(model, data, *flags, eval_set=data)
    for number, weight in enumerate(steps, start=1):
        decay = min(0.25, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * weight
        torch.testing.assert_close(evaluated[number - 1], average)
    assert len(steps) == 3 and not torch.equal(start, average)
    assert torch.equal(model.classifier.bias, evaluated[-1])


@pytest.mark.parametrize("method", ["prefix", "probe", "bias"])
def test_frozen_weights_stay_the_same_and_trainable_weights_change(make_model, data, method):
    flags = ["--prefix"] if method == "prefix" else ["--tuning_method", method]
    model = make_model(*flags)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tune(model, data, *flags, "--weight_decay", "0.1")
    for name, tensor in model.state_dict().items():
        frozen = name.startswith("bert.")
        if method == "bias":
            frozen = not (name.endswith("bias") or "LayerNorm" in name or "classifier" in name)
        assert torch.equal(tensor, before[name]) == frozen, name


def test_equal_seeds_give_equal_bits_and_another_seed_does_not(make_model, data):
    def weights(seed):
        model = make_model()
        torch.manual_seed(np.random.randint(1000))  # the state left behind does not matter
        tune(model, data, "--seed", seed, "--num_train_epochs", "2")
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights("1"), weights("1"))
    assert not torch.equal(weights("1"), weights("2"))


@pytest.mark.parametrize("flag", ["True", "False"])
def test_the_best_epoch_is_chosen_by_validation(make_model, data, monkeypatch, flag):
    values = iter([0.5, 0.9, 0.9, 0.1])
    states = []

    def evaluate(model, *rest):
        states.append(model.classifier.weight.detach().clone())
        return {"loss": 1.0, "accuracy": next(values), "macro_f1": 0.0}, False

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    model = make_model()
    flags = ["--num_train_epochs", "4", "--load_best_model_at_end", flag]
    results, lines = tune(model, data, *flags, eval_set=data)
    assert [line["eval_accuracy"] for line in lines if "eval_loss" in line] == [0.5, 0.9, 0.9, 0.1]
    kept = 1 if flag == "True" else 3
    assert results.get("best_epoch") == (2 if flag == "True" else None)
    assert torch.equal(model.classifier.weight, states[kept])


def test_early_stopping_counts_evaluations_without_improvement(make_model, data, monkeypatch):
    losses = [0.9, 0.5, 0.6, 0.7, 0.1]
    metrics = ({"loss": loss, "accuracy": 0.0} for loss in losses)
    monkeypatch.setattr(trainer, "evaluate", lambda *rest: (next(metrics), False))
    flags = ["--num_train_epochs", "5", "--early_stopping_patience", "2"]
    flags += ["--metric_for_best_model", "loss"]
    results, lines = tune(make_model(), data, *flags, eval_set=data)
    assert results["best_epoch"] == 2
    assert sum("eval_loss" in line for line in lines) == 4


@pytest.mark.upgrade
def test_fused_adamw_has_the_private_state_that_checkpoints_store():
    """And it does nothing, also not to its state, if `found_inf` is 1."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    for finite in (True, False):
        before = weight.detach().clone()
        weight.grad = torch.ones(3)
        step_if_finite(optimizer, torch.tensor(finite))
        assert torch.equal(weight, before) != finite
        assert set(optimizer.state[weight]) == set(MOMENTS)
        assert optimizer.state[weight]["step"] == 1


@pytest.mark.upgrade
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_changes_no_weight(make_model, data, broken):
    model = make_model()
    if broken == "loss":
        with torch.no_grad():
            model.classifier.weight[0, 0] = math.inf
    if broken == "gradient":
        model.classifier.bias.register_hook(lambda gradient: gradient * math.nan)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"at step 1, on the training file's rows 1, 2"):
        tune(model, data)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_predictions_follow_the_row_order_and_score_no_text_twice(make_model, data):
    model, args = make_model(), arguments("--per_device_eval_batch_size", "3")
    twice = dataclasses.replace(data, text_index=np.array([4, 0, 4, 10]), labels=None)
    scored = []
    model.register_forward_hook(lambda *hooked: scored.append(len(hooked[2].logits)))
    logits = predict(model, twice, args.per_device_eval_batch_size, FP32)
    assert sum(scored) == len(data.token_ids)
    for row, text in enumerate(twice.text_index):
        alone = model.eval()(**data.collate(np.array([text]))).logits
        torch.testing.assert_close(logits[row : row + 1], alone)


def test_a_model_that_diverged_in_its_last_step_predicts_nothing(make_model, data):
    model = make_model()
    torch.nn.init.constant_(model.classifier.weight, math.nan)
    with pytest.raises(UserError, match="logits are not finite"):
        trainer.evaluate(model, data, arguments(), FP32)


def test_the_last_losses_are_recorded_when_stopping_early(make_model, data, monkeypatch):
    found = {"loss": 1.0, "accuracy": 0.0}, False
    monkeypatch.setattr(trainer, "evaluate", lambda *rest: found)
    lines = []
    args = arguments("--early_stopping_patience", "1", "--num_train_epochs", "9")
    trainer.train(make_model(), data, data, args, FP32, write_metrics=lines.append, save=nowhere)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]


def test_metrics_cover_the_whole_file():
    logits = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 3, 0], [1, 0, 0]])
    labels = np.array([0, 1, 2, 1])
    found = Predictions.from_logits(logits, multi_label=False)
    metrics = compute_metrics(found, labels)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    assert metrics == pytest.approx({"loss": loss, "accuracy": 0.5, "macro_f1": (2 / 3 + 0.5) / 3})

    def score(seen):
        return Score(False).add(found, labels, list("abcd"), list("abcd"), np.array(seen))

    some = score([True, True, False, False]).results("test")
    assert (some["test_accuracy_seen"], some["test_accuracy_unseen"]) == (1.0, 0.0)
    assert some["test_seen_share"] == 0.5
    none = score([True] * 4).results("test")
    assert none["test_accuracy_unseen"] is None


def test_class_figures_and_confusion_matrix_equal_scikit_learns():
    random = np.random.default_rng(0)
    labels, logits = random.integers(0, 4, 200), torch.tensor(random.normal(size=(200, 4)))
    logits[:, 3] = -9  # never predicted
    right = (logits.argmax(dim=1).numpy() == labels).argsort()  # whole chunks that are all wrong
    labels, logits = labels[right], logits[right].float()
    score, texts = Score(False), [str(number) for number in range(200)]
    for part in (slice(150, 200), slice(0, 40), slice(40, 150)):
        found = Predictions.from_logits(logits[part], multi_label=False)
        score.add(found, labels[part], texts[part], texts[part], None)
    tally = score.whole().tally
    found, predicted = tally.per_class(), logits.argmax(dim=1).numpy()
    expected = precision_recall_fscore_support(labels, predicted, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose(found[name], values)
    assert tally.report_metrics(False)["weighted_f1"] == pytest.approx(
        f1_score(labels, predicted, average="weighted")
    )
    assert (score.details()["confusion"] == confusion_matrix(labels, predicted)).all()
    assert tally.rows == 200 and score.details()["support"] == expected[3].tolist()


def test_calibration_error_matches_a_hand_calculation():
    """Confidence 0.9 is right half of the time, confidence 0.6 always."""
    confidence = np.array([0.9, 0.9, 0.6, 0.6])
    logits = torch.tensor(np.log(np.stack([confidence, 1 - confidence], axis=1))).float()
    tally = Tally()
    tally.add(Predictions.from_logits(logits, multi_label=False), np.array([0, 1, 0, 0]))
    assert tally.report_metrics(False)["ece"] == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)
    assert tally.bins[0].sum() == 4


def test_the_most_confident_mistakes_are_kept_each_text_once():
    logits = torch.tensor([[4.0, 0.0], [2.0, 0.0], [9.0, 0.0], [4.0, 0.0]])
    score = Score(multi_label=False)
    for _ in range(2):
        labels, texts = np.array([1, 1, 0, 1]), ["b", "c", "a", "b"]
        score.add(Predictions.from_logits(logits, multi_label=False), labels, texts, texts, None)
    first, second = score.details()["mistakes"]
    assert [(one["text"], one["label"], one["predicted"]) for one in (first, second)] == [
        ("b", 1, 0),
        ("c", 1, 0),
    ]
    assert first["confidence"] == pytest.approx(0.982, abs=1e-3)
    labels, texts = np.ones(400, dtype=int), ["b"] * 380 + [f"other {i}" for i in range(20)]
    logits = torch.tensor([[4.0, 0.0]] * 380 + [[3.0, 0.0]] * 20)
    score.add(Predictions.from_logits(logits, multi_label=False), labels, texts, texts, None)
    assert len(score.mistakes) == 20
    assert json.loads(json.dumps(score.details())) == score.details()


def test_multi_label_metrics_match_a_hand_calculation():
    logits = torch.tensor([[4.0, 4.0], [-4.0, 4.0], [-1.0, -4.0]])
    labels = np.array([[1, 1], [1, 1], [0, 0]], dtype=np.float32)
    found = Predictions.from_logits(logits, multi_label=True)
    assert found.label.tolist() == [[1, 1], [0, 1], [0, 0]]
    expected = [0.982**2, 0.982**2, 0.731 * 0.982]
    np.testing.assert_allclose(found.confidence, expected, atol=1e-3)
    metrics = compute_metrics(found, labels)
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["micro_f1"] == pytest.approx(f1_score(labels, found.label, average="micro"))
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_labels_drawn_from_their_probabilities_are_calibrated():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 4, generator=generator)
    labels = torch.bernoulli(logits.sigmoid(), generator=generator).numpy()
    tally = Tally()
    tally.add(Predictions.from_logits(logits, multi_label=True), labels)
    assert tally.report_metrics(True)["ece"] < 0.015


def test_records_are_plain_json_and_complete(make_model, data):
    _, lines = tune(make_model(), data, "--num_train_epochs", "1", eval_set=data)
    assert json.loads(json.dumps(lines)) == lines
    names = "step epoch loss learning_rate grad_norm samples_per_second eta_seconds"
    assert set(lines[0]) == set(names.split())
    assert set(lines[-1]) == {"step", "epoch", "eval_loss", "eval_accuracy", "eval_macro_f1"}

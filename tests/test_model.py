"""The classifiers: what they compute, what they learn, what they store."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from model import utils
from model.sequence_classification import classification_loss

LAYERS, HEADS, HIDDEN, CLASSES, PREFIX = 2, 2, 16, 3, 5
IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 3, 0], [2, 10, 3, 0, 0]])
MASKS = {"padded": (IDS != 0).long(), "unpadded": torch.ones_like(IDS)}


def reference_logits(model, ids, mask, prefix=None):
    """BERT written out from its paper, with [prefix; text] as each layer's keys and values.

    prefix: [2L, H, P, D], key and value of layer l at 2l and 2l+1.
    """
    weights = dict(model.named_parameters())

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, keepdim=True, unbiased=False) + 1e-12
        ) ** 0.5
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    batch, length = ids.shape
    start = 0 if prefix is None else prefix.shape[2]
    table = {name: weights[f"bert.embeddings.{name}_embeddings.weight"] for name in
             ("word", "position", "token_type")}  # fmt: skip
    x = table["word"][ids] + table["position"][start : start + length] + table["token_type"][0]
    x = norm(x, "bert.embeddings.LayerNorm")
    for layer in range(LAYERS):
        at = f"bert.encoder.layer.{layer}"
        outputs = []
        for row in range(batch):  # one row and head at a time, over what is no padding
            real = mask[row].bool()
            q, k, v = (
                linear(x[row], f"{at}.attention.self.{n}") for n in ("query", "key", "value")
            )
            for head, part in enumerate(torch.arange(HIDDEN).chunk(HEADS)):
                keys, values = k[real][:, part], v[real][:, part]
                if prefix is not None:
                    keys = torch.cat([prefix[2 * layer, head], keys])
                    values = torch.cat([prefix[2 * layer + 1, head], values])
                scores = q[:, part] @ keys.T / (HIDDEN // HEADS) ** 0.5
                outputs.append(scores.softmax(-1) @ values)
        attended = torch.stack(outputs).view(batch, HEADS, length, -1).transpose(1, 2).flatten(2)
        x = norm(
            x + linear(attended, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm"
        )
        hidden = F.gelu(linear(x, f"{at}.intermediate.dense"))
        x = norm(x + linear(hidden, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return linear(torch.tanh(linear(x[:, 0], "bert.pooler.dense")), "classifier")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["plain", "prefix", "projected"])
def test_logits_equal_attention_written_out(make_model, kind, mask, attention):
    model = make_model(kind != "plain", kind == "projected", attention)
    prefix = None
    if kind != "plain":
        flat = model.prefix_encoder.embedding.weight
        if kind == "projected":
            inner, _, outer = model.prefix_encoder.transform
            flat = torch.tanh(flat @ inner.weight.T + inner.bias) @ outer.weight.T + outer.bias
        prefix = torch.empty(2 * LAYERS, HEADS, PREFIX, HIDDEN // HEADS)
        for slot in range(2 * LAYERS):
            for head in range(HEADS):
                start = (slot * HEADS + head) * 8
                prefix[slot, head] = flat[:, start : start + 8]
    with torch.no_grad():
        logits = model(IDS, attention_mask=MASKS[mask]).logits
        torch.testing.assert_close(logits, reference_logits(model, IDS, MASKS[mask], prefix))


def test_the_prefix_and_each_of_its_slots_change_the_logits(make_model):
    model = make_model(prefix=True)
    model(IDS, attention_mask=MASKS["padded"]).logits.square().sum().backward()
    gradient = model.prefix_encoder.embedding.weight.grad.view(PREFIX, 2 * LAYERS, HIDDEN)
    assert (gradient.abs().amax(dim=(0, 2)) > 0).all()


# Prefix: P * 2L * HD = 5 * 4 * 16 = 320; with the MLP 5 * 16 + (16 * 7 + 7) + (7 * 64 + 64) = 711.
# Head: 16 * 3 + 3 = 51. The tiny BERT: embeddings (35 + 64 + 2 + 2) * 16, two layers of
# 4 * (16 * 16 + 16) + (16 * 32 + 32) + (32 * 16 + 16) + 4 * 16, pooler 16 * 16 + 16: 6,368.
@pytest.mark.parametrize(
    ("flags", "trainable", "total", "stored"),
    [
        ((False,), 6419, 6419, 6419),
        ((True,), 371, 6739, 371),
        ((True, True), 762, 7130, 371),
    ],
)
def test_parameter_counts(make_model, flags, trainable, total, stored):
    counts = utils.count_parameters(make_model(*flags))
    assert counts["trainable_parameters"] == trainable
    assert counts["total_parameters"] == total
    assert counts["stored_parameters"] == stored
    assert counts["trainable_parameters_without_head"] == trainable - 51


def test_only_prefix_and_head_get_gradients(make_model):
    model = make_model(prefix=True)
    model(IDS, attention_mask=MASKS["padded"]).logits.sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {
        "prefix_encoder.embedding.weight", "classifier.weight", "classifier.bias"
    }  # fmt: skip


def test_loss_is_a_sum_and_matches_transformers(make_model):
    model = make_model()
    labels = torch.tensor([0, 2, 1])
    hot = F.one_hot(labels, CLASSES).float()
    for target, kind in ((labels, "single_label"), (hot, "multi_label")):
        model.config.problem_type = f"{kind}_classification"
        out = model(IDS, attention_mask=MASKS["padded"], labels=target)
        torch.testing.assert_close(classification_loss(out.logits, target) / 3, out.loss)


@pytest.mark.parametrize("flags", [(False,), (True,), (True, True)])
def test_a_saved_model_gives_equal_logits(make_model, backbone, tmp_path, flags):
    model = make_model(*flags)
    model.config.max_seq_length = 16
    source = utils.locate(backbone)
    tokenizer = utils.load_tokenizer(source, model.config)
    utils.save_model(model, tokenizer, source, tmp_path / "saved")
    again = utils.locate(str(tmp_path / "saved"))
    loaded = utils.load_model(again, utils.load_config(again, tuned=True)).eval()
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    logits, expected = (m(IDS, attention_mask=MASKS["padded"]).logits for m in (loaded, model))
    assert torch.equal(logits, expected)
    if flags[0]:
        frozen = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=CLASSES)
        peer = PeftModel.from_pretrained(frozen, str(tmp_path / "saved")).eval()
        assert torch.equal(peer(input_ids=IDS, attention_mask=MASKS["padded"]).logits, expected)
    else:
        peer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert torch.equal(peer(IDS, attention_mask=MASKS["padded"]).logits, expected)


def test_a_prefix_beyond_the_positions_is_refused(backbone):
    config = utils.load_config(utils.locate(backbone), tuned=False)
    config.pre_seq_len = 50
    with pytest.raises(utils.ModelError, match="--pre_seq_len 50 \\+ --max_seq_length 15 is above"):
        utils.set_max_seq_length(config, 15)
    assert utils.set_max_seq_length(config, 14) == 14


def test_bad_model_folders_are_refused(backbone, tmp_path):
    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(backbone, folder)
        change(folder)
        source = utils.locate(str(folder))
        with pytest.raises(utils.ModelError) as error:
            config = utils.load_config(source, tuned=False)
            config.max_seq_length = 16
            utils.load_tokenizer(source, config)
            utils.build_model(source, config)
        assert "\n" not in str(error.value)
        return str(error.value)

    def edit_config(**changes):
        def change(folder):
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return change  # fmt: skip

    def pickled(folder):
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model.bin")

    def without_words(folder):
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").unlink()

    def truncated(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])

    assert "type 'roberta'" in broken("roberta", edit_config(model_type="roberta"))
    assert "lacks 16 of the weights" in broken("deeper", edit_config(num_hidden_layers=3))
    assert "other shapes" in broken("wider", edit_config(intermediate_size=64))
    assert "no usable model.safetensors" in broken("pickled", pickled)
    assert "no usable model.safetensors" in broken("truncated", truncated)
    assert "do not belong together" in broken("vocabulary", edit_config(vocab_size=20))
    assert "holds no tokenizer" in broken("words", without_words)
    assert "is not a BERT's" in broken("settings", edit_config(hidden_size="wide"))
    assert "not a multiple" in broken("heads", edit_config(num_attention_heads=3))
    assert "cannot be read" in broken("empty", lambda folder: (folder / "config.json").unlink())


def test_an_unknown_name_is_refused_at_once():
    for name in ("no-such-model", "bad//name", "./nowhere", "x" * 5000):
        with pytest.raises(utils.ModelError, match="--model_name_or_path"):
            utils.locate(name)


def test_the_bundled_backbone_is_verified(monkeypatch):
    source = utils.locate(utils.BUNDLED_NAME)
    assert AutoTokenizer.from_pretrained(source.backbone).vocab_size == 30522
    monkeypatch.setattr(utils, "BUNDLED_SHA256", "0" * 64)
    with pytest.raises(utils.ModelError, match="is not the official"):
        utils.locate(utils.BUNDLED_NAME)

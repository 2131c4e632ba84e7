"""The classifiers: what they compute, what they learn, what they store."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from model import loading
from model import source as model_source
from model.prefix_bank import PrefixBank
from model.sequence_classification import classification_loss
from model.source import BUNDLED_NAME, ModelError, locate, sha256_of

LAYERS, HEADS, HIDDEN, CLASSES, PREFIX = 2, 2, 16, 3, 5
IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 3, 0], [2, 10, 3, 0, 0]])
MASKS = {"padded": (IDS != 0).long(), "unpadded": torch.ones_like(IDS)}


def reference_logits(model, ids, mask, prefix=None, embeddings=None):
    """BERT written out from its paper, with [prefix; text] as each layer's keys and values.

    prefix: [2L, H, P, D], key and value of layer l at 2l and 2l+1. embeddings: [P, HD], of
    virtual tokens in front of the text.
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
    x = table["word"][ids]
    if embeddings is not None:
        x = torch.cat([embeddings.expand(batch, -1, -1), x], dim=1)
        mask = torch.cat([torch.ones(batch, len(embeddings)), mask], dim=1)
        length += len(embeddings)
    x = x + table["position"][start : start + length] + table["token_type"][0]
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
    cls = x[:, 0 if embeddings is None else len(embeddings)]
    return linear(torch.tanh(linear(cls, "bert.pooler.dense")), "classifier")


def written_out(model, kind):
    """The prefix of a model as `reference_logits` takes it."""
    if kind == "plain":
        return {}
    flat = model.prefix_encoder.embedding.weight
    if model.config.prefix_projection:
        inner, _, outer = model.prefix_encoder.transform
        flat = torch.tanh(flat @ inner.weight.T + inner.bias) @ outer.weight.T + outer.bias
    if kind.startswith("input"):
        return {"embeddings": flat}
    prefix = torch.empty(2 * LAYERS, HEADS, PREFIX, HIDDEN // HEADS)
    for slot in range(2 * LAYERS):
        for head in range(HEADS):
            start = (slot * HEADS + head) * 8
            prefix[slot, head] = flat[:, start : start + 8]
    return {"prefix": prefix}


KINDS = {
    "plain": {},
    "prefix": {"prefix": True},
    "projected": {"prefix": True, "projection": True},
    "input": {"prefix": True, "depth": "input"},
    "input projected": {"prefix": True, "depth": "input", "projection": True},
}


@pytest.mark.parametrize("use", ["called", "training", "scoring"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_attention_written_out(make_model, kind, mask, attention, use):
    """Also on the shorter ways of training, here without dropout, and of scoring."""
    model = make_model(**KINDS[kind], attention=attention)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train(use == "training")
    with torch.inference_mode() if use == "scoring" else torch.no_grad():
        logits = model(IDS, attention_mask=MASKS[mask]).logits
        expected = reference_logits(model, IDS, MASKS[mask], **written_out(model, kind))
        torch.testing.assert_close(logits, expected)


def test_training_takes_the_same_gradients_as_attention_over_copies(make_model):
    """The shared prefix against a copy of it for each row, with attention's dropout off."""
    gradients = []
    for training in (True, False):  # without training: copies
        model = make_model(prefix=True).train(training)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(IDS, attention_mask=MASKS["padded"]).logits.square().sum().backward()
        gradients.append(model.prefix_encoder.embedding.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
@pytest.mark.parametrize("mask", MASKS)
def test_gradient_checkpointing_keeps_the_prefix_and_its_gradients(make_model, kind, mask):
    """With dropout on, whose random numbers have to come again."""
    gradients = []
    for checkpointing in (False, True):
        model = make_model(**KINDS[kind]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        assert model.config.hidden_dropout_prob > 0
        torch.manual_seed(3)
        model(IDS, attention_mask=MASKS[mask]).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient)


def test_virtual_tokens_at_the_input_are_not_what_is_pooled(make_model):
    """The pooler reads [CLS]: without layers between, virtual tokens could not change it."""
    model = make_model(prefix=True, depth="input")
    model.bert.encoder.layer = model.bert.encoder.layer[:0]
    before = model(IDS, attention_mask=MASKS["padded"]).logits
    torch.nn.init.normal_(model.prefix_encoder.embedding.weight)
    assert torch.equal(model(IDS, attention_mask=MASKS["padded"]).logits, before)


def test_a_reparametrised_prefix_is_computed_once_a_step(make_model):
    model, rows = make_model(prefix=True, projection=True), []
    model.prefix_encoder.transform[0].register_forward_hook(lambda *a: rows.append(len(a[2])))
    model(IDS, attention_mask=MASKS["padded"])
    assert rows == [PREFIX]


@pytest.mark.parametrize("depth", ["all", "input"])
def test_a_start_from_text_is_what_the_backbone_makes_of_the_words(make_model, backbone, depth):
    """Virtual tokens in front of a text then are that very text in front of it."""
    model = make_model(prefix=True, depth=depth)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    loading.start_from_text(model, tokenizer, "cat dog bird")  # repeated: cat dog bird cat dog
    words = tokenizer("cat dog bird cat dog", add_special_tokens=False)["input_ids"]
    plain = make_model()
    states = plain.bert(torch.tensor([words]), output_hidden_states=True).hidden_states
    flat = model.prefix_encoder.embedding.weight
    if depth == "input":
        assert torch.equal(flat, plain.bert.embeddings.word_embeddings.weight[words])
        return
    for layer in range(LAYERS):
        attention = plain.bert.encoder.layer[layer].attention.self
        key, value = flat.view(PREFIX, LAYERS, 2, HIDDEN)[:, layer].unbind(1)
        torch.testing.assert_close(key, attention.key(states[layer][0]))
        torch.testing.assert_close(value, attention.value(states[layer][0]))


def test_a_start_from_no_words_is_refused(make_model, backbone):
    with pytest.raises(ModelError, match="--prefix_init_text '  ' holds no word"):
        loading.start_from_text(
            make_model(prefix=True), AutoTokenizer.from_pretrained(backbone), "  "
        )


def test_the_prefix_and_each_of_its_slots_change_the_logits(make_model):
    model = make_model(prefix=True)
    model(IDS, attention_mask=MASKS["padded"]).logits.square().sum().backward()
    gradient = model.prefix_encoder.embedding.weight.grad.view(PREFIX, 2 * LAYERS, HIDDEN)
    assert (gradient.abs().amax(dim=(0, 2)) > 0).all()


# Prefix: P * 2L * HD = 5 * 4 * 16 = 320; with the MLP 5 * 16 + (16 * 7 + 7) + (7 * 64 + 64) = 711.
# Head: 16 * 3 + 3 = 51. The tiny BERT: embeddings (35 + 64 + 2 + 2) * 16, two layers of
# 4 * (16 * 16 + 16) + (16 * 32 + 32) + (32 * 16 + 16) + 4 * 16, pooler 16 * 16 + 16: 6,368.
# At the input: P * HD = 80; with the MLP 80 + 119 + (7 * 16 + 16) = 327.
@pytest.mark.parametrize(
    ("kind", "trainable", "total", "stored"),
    [
        ("plain", 6419, 6419, 6419),
        ("prefix", 371, 6739, 371),
        ("projected", 762, 7130, 371),
        ("input", 131, 6499, 131),
        ("input projected", 378, 6746, 131),
    ],
)
def test_parameter_counts(make_model, kind, trainable, total, stored):
    model = make_model(**KINDS[kind])
    counts = loading.count_parameters(model)
    assert counts["trainable_parameters"] == trainable
    assert counts["total_parameters"] == total
    assert counts["stored_parameters"] == stored
    assert counts["trainable_parameters_without_head"] == trainable - 51
    predicting = loading.count_parameters(model.requires_grad_(False))
    nothing = {"trainable_parameters": 0, "trainable_parameters_without_head": 0}
    assert predicting == {**counts, **nothing}


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


def save(model, backbone, folder):
    """Save a model and load it again, in the same attention implementation."""
    model.config.max_seq_length = 16
    found = locate(backbone)
    loading.save_model(model, loading.load_tokenizer(found, model.config), found, folder)
    again = locate(str(folder))
    config = loading.load_config(again, tuned=True)
    config._attn_implementation = model.config._attn_implementation.removeprefix("prefix_")
    return loading.load_model(again, config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_gives_equal_logits(make_model, backbone, tmp_path, kind):
    model = make_model(**KINDS[kind])
    loaded = save(model, backbone, tmp_path / "saved")
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    logits, expected = (m(IDS, attention_mask=MASKS["padded"]).logits for m in (loaded, model))
    assert torch.equal(logits, expected)
    if kind == "plain":
        peer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert torch.equal(peer(IDS, attention_mask=MASKS["padded"]).logits, expected)


def test_a_finished_prefix_folder_holds_nothing_of_the_backbone(make_model, backbone, tmp_path):
    save(make_model(prefix=True, projection=True), backbone, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "prompt_embeddings": (5, 64), "base_model.classifier.weight": (3, 16),
        "base_model.classifier.bias": (3,),
    }  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["prefix", "projected"])
def test_peft_loads_our_prefix_to_the_bit(make_model, backbone, tmp_path, kind, attention):
    model = make_model(**KINDS[kind], attention=attention)
    save(model, backbone, tmp_path / "saved")
    frozen = AutoModelForSequenceClassification.from_pretrained(
        backbone, num_labels=CLASSES, attn_implementation=attention
    )
    peer = PeftModel.from_pretrained(frozen, str(tmp_path / "saved")).eval()
    for mask in MASKS.values():
        expected = model(IDS, attention_mask=mask).logits
        assert torch.equal(peer(input_ids=IDS, attention_mask=mask).logits, expected)
    peer.save_pretrained(tmp_path / "peer")
    ours, theirs = (tmp_path / name / "adapter_model.safetensors" for name in ("saved", "peer"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.fixture(params=[False, True], ids=["flat", "projected"])
def peft_folder(request, backbone, tmp_path):
    """A prefix that PEFT made and wrote, and its model."""
    torch.manual_seed(5)
    frozen = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=CLASSES)
    settings = PrefixTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=4, prefix_projection=request.param,
        encoder_hidden_size=9,
    )  # fmt: skip
    peer = get_peft_model(frozen, settings).eval()
    peer.save_pretrained(tmp_path / "peer")
    return tmp_path / "peer", peer


def test_ours_loads_a_prefix_of_peft_to_the_bit(peft_folder, backbone):
    folder, peer = peft_folder
    if peer.peft_config["default"].prefix_projection:  # as PEFT itself predicts with it later
        frozen = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=CLASSES)
        peer = PeftModel.from_pretrained(frozen, str(folder)).eval()
    found = locate(str(folder))
    model = loading.load_model(found, loading.load_config(found, tuned=True)).eval()
    assert model.config.pre_seq_len == 4
    for mask in MASKS.values():
        expected = peer(input_ids=IDS, attention_mask=mask).logits
        assert torch.equal(model(IDS, attention_mask=mask).logits, expected)


def test_peft_refuses_a_prefix_of_depth_input(make_model, backbone, tmp_path):
    save(make_model(prefix=True, depth="input"), backbone, tmp_path)
    frozen = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=CLASSES)
    with pytest.raises((KeyError, ValueError), match="INPUT_PREFIX"):
        PeftModel.from_pretrained(frozen, str(tmp_path))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "reads the first virtual token" in settings["note"]


def test_other_adapters_and_other_backbones_are_refused(make_model, backbone, tmp_path):
    def broken(**changes):
        save(make_model(prefix=True), backbone, tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return refusal()

    def refusal():
        with pytest.raises(ModelError) as error:
            found = locate(str(tmp_path))
            loading.load_model(found, loading.load_config(found, tuned=True))
        return str(error.value)

    assert "only PREFIX_TUNING with SEQ_CLS" in broken(peft_type="LORA")
    assert "only PREFIX_TUNING with SEQ_CLS" in broken(task_type="CAUSAL_LM")
    assert "num_layers is 12, that of its backbone 2" in broken(num_layers=12)
    assert "token_dim is 8" in broken(token_dim=8)
    assert "names no backbone" in broken(base_model_name_or_path=None)
    assert "[5, 64] should be [6, 64]" in broken(num_virtual_tokens=6)
    assert "num_virtual_tokens is many" in broken(num_virtual_tokens="many")
    save(make_model(prefix=True), backbone, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.bert.pooler.dense.bias": torch.zeros(16)}, path)
    assert "base_model.bert.pooler.dense.bias" in refusal()
    tensors["prompt_embeddings"][0, 0] = torch.nan
    save_file(tensors, path)
    assert "all of it finite" in refusal()
    path.write_bytes(path.read_bytes()[:100])
    assert "cannot be read" in refusal()
    path.unlink()
    assert "cannot be read" in refusal()


# ---------------------------------------------------------------------------------- the bank


@pytest.fixture
def tuned(make_model, backbone, tmp_path):
    """Three tuned folders, with prefixes of 5, 2 and 7 tokens and other labels, and the models."""
    models = []
    for number, (length, names) in enumerate([(5, "abc"), (2, "cd"), (7, "bxay")]):
        model = make_model(prefix=True, length=length)
        loading.set_labels(model.config, list(names))
        model.classifier = torch.nn.Linear(HIDDEN, len(names))
        torch.nn.init.normal_(model.prefix_encoder.embedding.weight)
        models.append(save(model, backbone, tmp_path / f"{number}"))
    return [str(tmp_path / f"{number}") for number in range(3)], models


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "served_by", [(0, 1, 2), (2, 0, 2), (1, 1, 1), (2, 0, 0, 0, 1, 0, 2, 0, 2), (0,) * 8 + (1,)]
)
def test_each_row_of_a_batch_is_served_by_its_own_prefix(tuned, mask, served_by):
    paths, models = tuned
    bank = PrefixBank.open(paths)
    names = loading.list_labels(bank.config)
    assert names == list("abcdxy")
    times = len(served_by) // len(IDS)
    ids, masks = IDS.repeat(times, 1), MASKS[mask].repeat(times, 1)
    with torch.no_grad():
        logits = bank(ids, masks, torch.tensor(served_by)).logits
        with torch.inference_mode():
            torch.testing.assert_close(bank(ids, masks, torch.tensor(served_by)).logits, logits)
        for row, number in enumerate(served_by):
            known = loading.list_labels(models[number].config)
            alone = models[number](ids, attention_mask=masks).logits[row]
            found = logits[row, [names.index(name) for name in known]]
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
            probability = logits[row].softmax(0)
            assert probability[[name not in known for name in names]].sum() == 0


def test_a_bank_holds_one_backbone(tuned):
    paths, models = tuned
    count = sum(weight.numel() for weight in PrefixBank.open(paths * 4).parameters())
    assert count == sum(weight.numel() for weight in models[0].bert.parameters())


def test_prefixes_that_do_not_go_together_are_refused(tuned, make_model, backbone, tmp_path):
    paths, _ = tuned
    save(make_model(prefix=True, depth="input"), backbone, tmp_path / "input")
    with pytest.raises(ModelError, match="input is no prefix of depth all"):
        PrefixBank.open([*paths, str(tmp_path / "input")])
    with pytest.raises(ModelError, match="is not the folder of a tuned prefix"):
        PrefixBank.open([*paths, backbone])
    other = tmp_path / "other"
    shutil.copytree(backbone, other)
    save(make_model(prefix=True), str(other), tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"backbone of .*elsewhere is .*other, that of .*0 "):
        PrefixBank.open([*paths, str(tmp_path / "elsewhere")])
    config = json.loads((tmp_path / "1" / "config.json").read_text())
    (tmp_path / "1" / "config.json").write_text(json.dumps(config | {"max_seq_length": 9}))
    with pytest.raises(ModelError, match=r"max_seq_length of .*1 is 9, that of .*0 16"):
        PrefixBank.open(paths)
    assert PrefixBank.open(paths, max_seq_length=12).config.max_seq_length == 12


def test_a_prefix_beyond_the_positions_is_refused(backbone):
    config = loading.load_config(locate(backbone), tuned=False)
    config.pre_seq_len = 50
    with pytest.raises(ModelError, match="--pre_seq_len 50 \\+ --max_seq_length 15 is above"):
        loading.set_max_seq_length(config, 15)
    assert loading.set_max_seq_length(config, 14) == 14


def test_bad_model_folders_are_refused(backbone, tmp_path):
    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(backbone, folder)
        change(folder)
        source = locate(str(folder))
        with pytest.raises(ModelError) as error:
            config = loading.load_config(source, tuned=False)
            config.max_seq_length = 16
            loading.load_tokenizer(source, config)
            loading.build_model(source, config)
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


def test_a_tuned_model_without_its_head_is_refused(make_model, backbone, tmp_path):
    """Where it goes on with its own labels, whose head would otherwise be drawn at random."""
    folder = tmp_path / "tuned"
    save(make_model(), backbone, folder)
    (folder / "vocab_old").mkdir()  # no file, so nothing to start from
    source = locate(str(folder))
    assert len(sha256_of([source])) == 64
    config = loading.load_config(source, tuned=True)
    loading.build_model(source, config, fresh_head=False)
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    loading.build_model(source, config, fresh_head=True)
    with pytest.raises(ModelError, match=r"lacks 1 of the weights.*: classifier\.weight"):
        loading.build_model(source, config, fresh_head=False)


def test_an_unknown_name_is_refused_at_once():
    for name in ("no-such-model", "bad//name", "./nowhere", "x" * 5000):
        with pytest.raises(ModelError, match="--model_name_or_path"):
            locate(name)


def test_the_bundled_backbone_is_verified(monkeypatch):
    source = locate(BUNDLED_NAME)
    assert AutoTokenizer.from_pretrained(source.backbone).vocab_size == 30522
    monkeypatch.setattr(model_source, "BUNDLED_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="is not the official"):
        locate(BUNDLED_NAME)

"""The classifiers: what they compute, what they learn, what they store."""

import json

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from arguments import parse_args
from conftest import without_dropout
from model import prefix_encoder
from model.folders import locate
from model.loading import load_tokenizer
from model.methods import TUNING, method_of
from model.sequence_classification import POOLINGS, classification_loss
from model.source import ModelSource, read_model_config
from runtime.files import UserError

LAYERS, HEADS, HIDDEN, CLASSES, PREFIX = 2, 2, 16, 3, 5
IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 3, 0], [2, 10, 3, 0, 0]])
MASKS = {"padded": (IDS != 0).long(), "unpadded": torch.ones_like(IDS)}


def reference_logits(model, ids, mask, prefix=None, embeddings=None, mean=False):
    """BERT written out from its paper, with [prefix; text] as each layer's keys and values.

    prefix: [2L, H, P, D], key and value of layer l at 2l and 2l+1. embeddings: [P, HD], of
    virtual tokens in front of the text. mean: classify the mean over the tokens that are not
    padding, not the pooled [CLS].
    """
    weights = dict(model.named_parameters())

    def linear(x, name):
        matrix = weights[f"{name}.weight"]
        if f"{name}.lora_A.weight" in weights:
            small = weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
            matrix = matrix + small * model.config.lora_alpha / model.config.lora_r
        return x @ matrix.T + weights[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, keepdim=True, unbiased=False) + 1e-12
        ) ** 0.5
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    batch, length = ids.shape
    start = 0 if prefix is None else prefix.shape[2]
    names = ("word", "position", "token_type")
    table = {name: weights[f"bert.embeddings.{name}_embeddings.weight"] for name in names}
    x = F.embedding(ids, table["word"], padding_idx=0)  # [PAD] is not trained
    if embeddings is not None:
        x = torch.cat([embeddings.expand(batch, -1, -1), x], dim=1)
        mask = torch.cat([torch.ones(batch, len(embeddings)), mask], dim=1)
        length += len(embeddings)
    x = x + table["position"][start : start + length] + table["token_type"][0]
    x = norm(x, "bert.embeddings.LayerNorm")
    for layer in range(LAYERS):
        at = f"bert.encoder.layer.{layer}"
        outputs = []
        for row in range(batch):  # one row and head at a time, without padding
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
    if mean:
        rows = zip(x, mask, strict=True)
        return linear(torch.stack([row[real.bool()].mean(0) for row, real in rows]), "classifier")
    cls = x[:, 0 if embeddings is None else len(embeddings)]
    return linear(torch.tanh(linear(cls, "bert.pooler.dense")), "classifier")


def written_out(model):
    """Return the arguments that tell `reference_logits` the model's tuning method."""
    if model.config.tuning_method == "probe":
        return {"mean": True}
    if model.config.tuning_method != "prefix":
        return {}
    flat = model.prefix_encoder.embedding.weight
    if model.config.prefix_projection:
        inner, _, outer = model.prefix_encoder.transform
        flat = torch.tanh(flat @ inner.weight.T + inner.bias) @ outer.weight.T + outer.bias
    if model.config.prefix_depth == "input":
        return {"embeddings": flat}
    slots = [flat[:, start : start + 8] for start in range(0, 2 * LAYERS * HIDDEN, 8)]
    return {"prefix": torch.stack(slots).view(2 * LAYERS, HEADS, PREFIX, HIDDEN // HEADS)}


KINDS = {
    "full": (),
    "prefix": ("--prefix",),
    "projected": ("--prefix", "--prefix_projection"),
    "input": ("--prefix", "--prefix_depth", "input"),
    "input projected": ("--prefix", "--prefix_depth", "input", "--prefix_projection"),
    "probe": ("--tuning_method", "probe"),
    "bias": ("--tuning_method", "bias"),
    "lora": ("--tuning_method", "lora", "--lora_r", "3"),
}


@pytest.mark.upgrade
@pytest.mark.parametrize("long", [None, 0.0, 1e-9])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_the_reference_written_out(
    make_model, monkeypatch, kind, mask, long
):
    """long: use torch's fused attention, with this dropout; None: our own."""
    model, gradients = without_dropout(make_model(*KINDS[kind])), []
    monkeypatch.setattr(prefix_encoder, "prefers_fused", lambda *_: long is not None)
    if long is not None:
        for layer in model.train().bert.encoder.layer:
            layer.attention.self.dropout.p = long
    trainable = {name: one for name, one in model.named_parameters() if one.requires_grad}
    logits = model(IDS, attention_mask=MASKS[mask]).logits
    expected = reference_logits(model, IDS, MASKS[mask], **written_out(model))
    torch.testing.assert_close(logits, expected)
    for each in (logits, expected):
        loss = each.square().sum()
        gradients.append(torch.autograd.grad(loss, trainable.values(), allow_unused=True))
    for name, one, other in zip(trainable, *gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_the_same_in_every_mode(make_model, kind):
    """Called, without gradients, in inference mode, and in training without dropout."""
    model = without_dropout(make_model(*KINDS[kind]))
    called = model(IDS, attention_mask=MASKS["padded"]).logits
    assert called.shape == (3, CLASSES)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(model(IDS, attention_mask=MASKS["padded"]).logits, called)
    assert torch.equal(model.train()(IDS, attention_mask=MASKS["padded"]).logits, called)


@pytest.mark.upgrade
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(make_model, kind):
    """With dropout on: its random numbers must be repeated."""
    gradients = []
    for checkpointing in (False, True):
        model = make_model(*KINDS[kind]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        assert model.config.hidden_dropout_prob > 0
        torch.manual_seed(3)
        model(IDS, attention_mask=MASKS["padded"]).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["full", "prefix", "input"])
def test_a_pooling_reads_the_tokens_of_the_text_alone(make_model, pooling, kind):
    """Neither padding nor virtual tokens: a row has the same logits alone as in a padded batch."""
    model = make_model(*KINDS[kind], "--pooling", pooling)
    mask = MASKS["padded"]
    together = model(IDS, attention_mask=mask).logits
    for row, length in enumerate(mask.sum(dim=1)):
        alone = model(IDS[row : row + 1, :length], mask[row : row + 1, :length]).logits
        assert_equal(together[row], alone[0])


def test_virtual_tokens_at_the_input_are_not_pooled(make_model):
    """The pooler reads [CLS]: without layers in between, virtual tokens cannot change it."""
    model = make_model(*KINDS["input"])
    model.bert.encoder.layer = model.bert.encoder.layer[:0]
    before = model(IDS, attention_mask=MASKS["padded"]).logits
    torch.nn.init.normal_(model.prefix_encoder.embedding.weight)
    assert torch.equal(model(IDS, attention_mask=MASKS["padded"]).logits, before)


def test_a_reparametrised_prefix_is_computed_once_per_step(make_model):
    model, rows = make_model(*KINDS["projected"]), []
    model.prefix_encoder.transform[0].register_forward_hook(lambda *a: rows.append(len(a[2])))
    model(IDS, attention_mask=MASKS["padded"])
    assert rows == [PREFIX]


def initialise(model, tokenizer, words):
    flags = ["--do_train", "--output_dir", "out", "--prefix", "--prefix_init_text", words]
    TUNING["prefix"].initialise(model, tokenizer, vars(parse_args(flags)), [])


@pytest.mark.parametrize("depth", ["all", "input"])
def test_a_prefix_from_text_equals_the_backbones_states_of_its_words(make_model, backbone, depth):
    """The prefix then has the same effect as these words in front of the text."""
    model = make_model("--prefix", "--prefix_depth", depth)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    initialise(model, tokenizer, "cat dog bird")  # repeated: cat dog bird cat dog
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


def test_a_prefix_text_without_words_is_refused(make_model, backbone):
    with pytest.raises(UserError, match="no word to start from in '  '"):
        initialise(make_model("--prefix"), AutoTokenizer.from_pretrained(backbone), "  ")


def test_every_slot_of_the_prefix_affects_the_logits(make_model):
    model = make_model("--prefix")
    model(IDS, attention_mask=MASKS["padded"]).logits.square().sum().backward()
    gradient = model.prefix_encoder.embedding.weight.grad.view(PREFIX, 2 * LAYERS, HIDDEN)
    assert (gradient.abs().amax(dim=(0, 2)) > 0).all()


# Prefix: P * 2L * HD = 5 * 4 * 16 = 320; with the MLP 5 * 16 + (16 * 7 + 7) + (7 * 64 + 64) = 711.
# Head: 16 * 3 + 3 = 51. The tiny BERT: embeddings (35 + 64 + 2 + 2) * 16, two layers of
# 4 * (16 * 16 + 16) + (16 * 32 + 32) + (32 * 16 + 16) + 4 * 16, pooler 16 * 16 + 16: 6,368.
# At the input: P * HD = 80; with the MLP 80 + 119 + (7 * 16 + 16) = 327.
# Biases and LayerNorm: embeddings 2 * 16, two layers of 4 * 16 + 32 + 16 + 4 * 16, pooler 16: 400.
@pytest.mark.parametrize(
    ("kind", "trainable", "total", "stored"),
    [
        ("full", 6419, 6419, 6419),
        ("prefix", 371, 6739, 371),
        ("projected", 762, 7130, 371),
        ("input", 131, 6499, 131),
        ("input projected", 378, 6746, 131),
        ("probe", 51, 6419, 51),
        ("bias", 451, 6419, 451),
        ("lora", 435, 6803, 435),
        ("lora", 435, 6803, 435),
    ],
)
def test_parameter_counts_match_a_hand_calculation(make_model, kind, trainable, total, stored):
    model = make_model(*KINDS[kind])
    counts = count_parameters(model)
    assert counts["trainable_parameters"] == trainable
    assert counts["total_parameters"] == total
    assert counts["stored_parameters"] == stored
    assert counts["trainable_parameters_without_head"] == trainable - 51
    predicting = count_parameters(model.requires_grad_(False))
    nothing = {"trainable_parameters": 0, "trainable_parameters_without_head": 0}
    assert predicting == {**counts, **nothing}


def count_parameters(model):
    config = model.config
    return ModelSource([], [config], config, method_of(config), "").count(model)


def peer_of(model, backbone):
    """Build transformers' own BERT with the weights of a fully fine-tuned model."""
    peer = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=CLASSES)
    peer.load_state_dict(model.state_dict())
    return peer.eval()


@pytest.mark.upgrade
def test_loss_is_a_sum_and_matches_transformers(make_model, backbone):
    model = peer_of(make_model(), backbone)
    labels = torch.tensor([0, 2, 1])
    one_hot = F.one_hot(labels, CLASSES).float()
    for target, kind in ((labels, "single_label"), (one_hot, "multi_label")):
        model.config.problem_type = f"{kind}_classification"
        out = model(IDS, attention_mask=MASKS["padded"], labels=target)
        torch.testing.assert_close(classification_loss(out.logits, target) / 3, out.loss)


def open_folder(folder):
    """Load the model of a model or adapter folder, in eval mode."""
    source = locate(str(folder))
    config, method = read_model_config(source)
    return method.build(source, config).eval()


def save(model, backbone, folder):
    """Save a model and load it again."""
    folder.mkdir(exist_ok=True)
    found = locate(backbone)
    method_of(model.config).save(model, load_tokenizer(found.backbone, model.config), found, folder)
    return open_folder(folder)


@pytest.mark.upgrade
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_returns_equal_logits(make_model, backbone, tmp_path, kind):
    model = make_model(*KINDS[kind])
    loaded = save(model, backbone, tmp_path / "saved")
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    logits, expected = (m(IDS, attention_mask=MASKS["padded"]).logits for m in (loaded, model))
    assert torch.equal(logits, expected)
    if kind == "full":
        peer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert_equal(peer(IDS, attention_mask=MASKS["padded"]).logits, expected)


def assert_equal(logits, expected):
    """Assert equality up to float32 summation order."""
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


def test_an_adapter_folder_contains_nothing_of_the_backbone(make_model, backbone, tmp_path):
    save(make_model(*KINDS["projected"]), backbone, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    head = {"base_model.classifier.weight": (3, 16), "base_model.classifier.bias": (3,)}
    assert shapes == {"prompt_embeddings": (5, 64)} | head


@pytest.mark.parametrize("kind", ["prefix", "projected"])
def test_peft_loads_our_prefix_and_writes_the_same_file(make_model, backbone, tmp_path, kind):
    model = make_model(*KINDS[kind])
    save(model, backbone, tmp_path / "saved")
    frozen = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=CLASSES)
    peer = PeftModel.from_pretrained(frozen, str(tmp_path / "saved")).eval()
    for mask in MASKS.values():
        expected = model(IDS, attention_mask=mask).logits
        assert_equal(peer(input_ids=IDS, attention_mask=mask).logits, expected)
    peer.save_pretrained(tmp_path / "peer")
    ours, theirs = (tmp_path / name / "adapter_model.safetensors" for name in ("saved", "peer"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.fixture(params=[False, True], ids=["flat", "projected"])
def peft_folder(request, backbone, tmp_path):
    """Save a prefix made by PEFT; returns its folder and its model."""
    torch.manual_seed(5)
    frozen = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=CLASSES)
    settings = PrefixTuningConfig(
        task_type="SEQ_CLS",
        num_virtual_tokens=4,
        prefix_projection=request.param,
        encoder_hidden_size=9,
    )
    peer = get_peft_model(frozen, settings).eval()
    peer.save_pretrained(tmp_path / "peer")
    return tmp_path / "peer", peer


def test_our_model_loads_a_prefix_saved_by_peft(peft_folder, backbone):
    folder, peer = peft_folder
    if peer.peft_config["default"].prefix_projection:  # reload it, as PEFT does to predict
        frozen = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=CLASSES)
        peer = PeftModel.from_pretrained(frozen, str(folder)).eval()
    model = open_folder(folder)
    assert model.config.pre_seq_len == 4
    for mask in MASKS.values():
        expected = peer(input_ids=IDS, attention_mask=mask).logits
        assert_equal(model(IDS, attention_mask=mask).logits, expected)


def test_peft_refuses_a_prefix_of_depth_input(make_model, backbone, tmp_path):
    save(make_model(*KINDS["input"]), backbone, tmp_path)
    frozen = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=CLASSES)
    with pytest.raises((KeyError, ValueError), match="INPUT_PREFIX"):
        PeftModel.from_pretrained(frozen, str(tmp_path))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "reads the first virtual token" in settings["note"]


def test_unsupported_adapters_and_wrong_backbones_are_refused(make_model, backbone, tmp_path):
    def broken(**changes):
        save(make_model("--prefix"), backbone, tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return refusal()

    def refusal():
        with pytest.raises(UserError) as error:
            open_folder(tmp_path)
        return str(error.value)

    kinds = ", ".join(kind for method in TUNING.values() for kind in method.peft_types)
    assert kinds.startswith("PREFIX_TUNING, INPUT_PREFIX, MEAN_INPUT_PREFIX, MEAN_PREFIX, LORA")
    for change in ({"peft_type": "IA3"}, {"task_type": "CAUSAL_LM"}):
        assert f"only {kinds} with SEQ_CLS" in broken(**change)
    assert "num_layers is 12, but its backbone has 2" in broken(num_layers=12)
    assert "token_dim is 8" in broken(token_dim=8)
    assert "names no backbone" in broken(base_model_name_or_path=None)
    assert "[5, 64] should be [6, 64]" in broken(num_virtual_tokens=6)
    assert "num_virtual_tokens: expected a whole number" in broken(num_virtual_tokens="many")
    save(make_model("--prefix"), backbone, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.bert.pooler.dense.bias": torch.zeros(16)}, path)
    assert "base_model.bert.pooler.dense.bias" in refusal()
    tensors["prompt_embeddings"][0, 0] = torch.nan
    save_file(tensors, path)
    assert "with finite values only" in refusal()
    path.write_bytes(path.read_bytes()[:100])
    assert "cannot be read" in refusal()
    path.unlink()
    assert "has no adapter_model.safetensors: copy the whole folder" in refusal()

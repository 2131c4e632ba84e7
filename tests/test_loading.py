"""Many prefixes in one batch, and model folders that are refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from model import prefix_encoder
from model import source as model_source
from model.bank_start import open_bank
from model.loading import list_labels, load_tokenizer, set_labels, set_max_seq_length
from model.source import BUNDLED_NAME, locate, sha256_of
from model.start import read_model_config
from model.tuning import TUNING
from runtime.files import UserError
from test_model import HIDDEN, IDS, KINDS, MASKS, save


@pytest.fixture
def tuned(make_model, backbone, tmp_path):
    """Save three prefixes of 5, 2 and 7 tokens and other labels; returns folders and models."""
    models = []
    for number, (length, names) in enumerate([(5, "abc"), (2, "cd"), (7, "bxay")]):
        model = make_model("--prefix", "--pre_seq_len", str(length))
        set_labels(model.config, list(names))
        model.classifier = torch.nn.Linear(HIDDEN, len(names))
        torch.nn.init.normal_(model.prefix_encoder.embedding.weight)
        models.append(save(model, backbone, tmp_path / f"{number}"))
    return [str(tmp_path / f"{number}") for number in range(3)], models


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "prefix_index", [(0, 1, 2), (2, 0, 2), (1, 1, 1), (2, 0, 0, 0, 1, 0, 2, 0, 2), (0,) * 8 + (1,)]
)
@pytest.mark.parametrize("long", [False, True])
def test_each_row_of_a_batch_has_its_own_prefix(tuned, monkeypatch, mask, prefix_index, long):
    paths, models = tuned
    bank, *_ = open_bank(paths)
    names = list_labels(bank.config)
    assert names == list("abcdxy")
    monkeypatch.setattr(prefix_encoder, "LONG", 0 if long else prefix_encoder.LONG)
    times = len(prefix_index) // len(IDS)
    ids, masks = IDS.repeat(times, 1), MASKS[mask].repeat(times, 1)
    with torch.no_grad():
        logits = bank(ids, masks, torch.tensor(prefix_index)).logits
        for row, number in enumerate(prefix_index):
            known = list_labels(models[number].config)
            alone = models[number](ids, attention_mask=masks).logits[row]
            found = logits[row, [names.index(name) for name in known]]
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)
            probability = logits[row].softmax(0)
            assert probability[[name not in known for name in names]].sum() == 0


def test_a_bank_loads_its_backbone_once(tuned):
    paths, models = tuned
    count = sum(weight.numel() for weight in open_bank(paths * 4)[0].bert.parameters())
    assert count == sum(weight.numel() for weight in models[0].bert.parameters())


def test_incompatible_prefixes_are_refused(tuned, make_model, backbone, tmp_path):
    paths, _ = tuned
    save(make_model(*KINDS["input"]), backbone, tmp_path / "input")
    with pytest.raises(UserError, match="input is not a prefix of depth all"):
        open_bank([*paths, str(tmp_path / "input")])
    with pytest.raises(UserError, match="is not the adapter folder of a prefix"):
        open_bank([*paths, backbone])
    other = tmp_path / "other"
    shutil.copytree(backbone, other)
    save(make_model("--prefix"), str(other), tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"backbone of .*elsewhere is .*other, but in .*0 it is "):
        open_bank([*paths, str(tmp_path / "elsewhere")])
    config = json.loads((tmp_path / "1" / "config.json").read_text())
    (tmp_path / "1" / "config.json").write_text(json.dumps(config | {"max_seq_length": 9}))
    with pytest.raises(UserError, match=r"max_seq_length of .*1 is 9, but in .*0 it is 16"):
        open_bank(paths)
    assert open_bank(paths, max_seq_length=12)[0].config.max_seq_length == 12


def test_a_prefix_beyond_the_positions_is_refused(backbone):
    config, _ = read_model_config(locate(backbone))
    with pytest.raises(UserError, match="--pre_seq_len 50 \\+ --max_seq_length 15 exceeds"):
        set_max_seq_length(config, 50, 15)
    set_max_seq_length(config, 50, 14)
    assert config.max_seq_length == 14


def test_bad_model_folders_are_refused(backbone, tmp_path):
    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(backbone, folder)
        change(folder)
        source = locate(str(folder))
        with pytest.raises(UserError) as error:
            config, _ = read_model_config(source)
            config.max_seq_length = 16
            load_tokenizer(source, config)
            TUNING["full"].build(source, config, fresh_head=True)
        assert "\n" not in str(error.value)
        return str(error.value)

    def edit_config(**changes):
        def change(folder):
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return change

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
    assert "encoder.layer.2.intermediate.dense.weight is missing" in broken(
        "deeper", edit_config(num_hidden_layers=3)
    )
    assert "has the shape [32, 16] in model.safetensors" in broken(
        "wider", edit_config(intermediate_size=64)
    )
    assert "no usable model.safetensors" in broken("pickled", pickled)
    assert "no usable model.safetensors" in broken("truncated", truncated)
    assert "do not belong together" in broken("vocabulary", edit_config(vocab_size=20))
    assert "has no tokenizer" in broken("words", without_words)
    assert "Expected `int`, got `str` - at `$.hidden_size`" in broken(
        "settings", edit_config(hidden_size="wide")
    )
    assert "not a multiple" in broken("heads", edit_config(num_attention_heads=3))
    assert "cannot be read" in broken("empty", lambda folder: (folder / "config.json").unlink())


def test_a_model_folder_without_its_head_is_refused(make_model, backbone, tmp_path):
    """If it keeps its labels: their head would otherwise be initialised at random."""
    folder = tmp_path / "tuned"
    save(make_model(), backbone, folder)
    (folder / "vocab_old").mkdir()  # a folder, so it is not hashed
    source = locate(str(folder))
    assert len(sha256_of([source.backbone])) == 64
    config, full = read_model_config(source)
    full.build(source, config, fresh_head=False)
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    full.build(source, config, fresh_head=True)
    with pytest.raises(UserError, match=r"lacks 1 of the weights.*: classifier\.weight"):
        full.build(source, config, fresh_head=False)


def test_an_unknown_name_is_refused_at_once():
    for name in ("no-such-model", "bad//name", "./nowhere", "x" * 5000):
        with pytest.raises(UserError, match="--model_name_or_path"):
            locate(name)


def test_the_bundled_backbone_is_verified(monkeypatch):
    source = locate(BUNDLED_NAME)
    assert AutoTokenizer.from_pretrained(source.backbone).vocab_size == 30522
    monkeypatch.setattr(model_source, "BUNDLED_SHA256", "0" * 64)
    with pytest.raises(UserError, match="is not the official"):
        locate(BUNDLED_NAME)

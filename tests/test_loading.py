"""Many prefixes in one batch, and model folders that are refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from conftest import ROWS, one_line, registry_of, write_csv
from model import folders as model_source
from model import load as load_classifier
from model import prefix_encoder
from model.folders import BUNDLED_NAME, locate, sha256_of
from model.loading import list_labels, load_tokenizer, separator, set_labels, set_max_seq_length
from model.methods import TUNING
from model.sequence_classification import POOLINGS, Pooling, pool_mean
from model.source import open_model, read_model_config
from runtime.files import UserError, name_list
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


@pytest.mark.upgrade
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "prefix_index", [(0, 1, 2), (2, 0, 2), (1, 1, 1), (2, 0, 0, 0, 1, 0, 2, 0, 2), (0,) * 8 + (1,)]
)
@pytest.mark.parametrize("long", [False, True])
def test_each_row_of_a_batch_has_its_own_prefix(tuned, monkeypatch, mask, prefix_index, long):
    paths, models = tuned
    bank = open_model(paths, by_row=True).build()
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
    count = sum(
        weight.numel() for weight in open_model(paths * 4, by_row=True).build().bert.parameters()
    )
    assert count == sum(weight.numel() for weight in models[0].bert.parameters())


def test_incompatible_prefixes_are_refused(tuned, make_model, backbone, tmp_path):
    paths, _ = tuned
    save(make_model(*KINDS["input"]), backbone, tmp_path / "input")
    with pytest.raises(UserError, match="input is not the adapter folder of a prefix of depth all"):
        open_model([*paths, str(tmp_path / "input")], by_row=True)
    with pytest.raises(UserError, match="is not tuned yet"):
        open_model([*paths, backbone], by_row=True)
    other = tmp_path / "other"
    shutil.copytree(backbone, other)
    save(make_model("--prefix"), str(other), tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"backbone of .*elsewhere is .*other, but in .*0 it is "):
        open_model([*paths, str(tmp_path / "elsewhere")], by_row=True)
    config = json.loads((tmp_path / "1" / "config.json").read_text())
    (tmp_path / "1" / "config.json").write_text(json.dumps(config | {"max_seq_length": 9}))
    with pytest.raises(UserError, match=r"max_seq_length of .*1 is 9, but in .*0 it is 16"):
        open_model(paths, by_row=True)
    assert open_model(paths, max_seq_length=12, by_row=True).config.max_seq_length == 12


def test_a_prefix_beyond_the_positions_is_refused(backbone):
    config, _ = read_model_config(locate(backbone))
    for virtual, length, said in (
        (50, 15, "50 virtual tokens and --max_seq_length 15: .* pass --max_seq_length 14 or less"),
        (62, 15, "pass --pre_seq_len 49 and --max_seq_length 15 or less"),
        (0, 65, "^--max_seq_length 65: more than the 64 positions"),
    ):
        config.pre_seq_len = virtual
        with pytest.raises(UserError, match=said):
            set_max_seq_length(config, length)
    config.pre_seq_len = 50
    set_max_seq_length(config, 14)
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
            load_tokenizer(source.backbone, config)
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
    assert "has its weights as pytorch_model*.bin" in broken("pickled", pickled)
    assert "model.safetensors cannot be read: " in broken("truncated", truncated)
    assert "do not belong together" in broken("vocabulary", edit_config(vocab_size=20))
    assert "has no tokenizer" in broken("words", without_words)
    assert "config.json: hidden_size: expected a whole number, got a text; correct it" in broken(
        "settings", edit_config(hidden_size="wide")
    )
    assert "not a multiple" in broken("heads", edit_config(num_attention_heads=3))
    assert "cannot be read" in broken("empty", lambda folder: (folder / "config.json").unlink())


@pytest.mark.upgrade
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
        with pytest.raises(UserError, match=r"; name a local folder with|: name one that does"):
            locate(name)


def test_the_bundled_backbone_is_verified(monkeypatch):
    source = locate(BUNDLED_NAME)
    assert AutoTokenizer.from_pretrained(source.backbone).vocab_size == 30522
    monkeypatch.setattr(model_source, "BUNDLED_SHA256", "0" * 64)
    with pytest.raises(UserError, match="is not the official"):
        locate(BUNDLED_NAME)


def test_a_model_of_one_output_is_tuned_further_but_does_not_predict(
    run, backbone, predict, tmp_path
):
    """Its softmax is 1 for every text: confidence 1, accuracy 1, calibration error 0."""
    one = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    shutil.copytree(backbone, tmp_path / "one")
    one.save_pretrained(tmp_path / "one")
    settings = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    get_peft_model(one, settings).save_pretrained(tmp_path / "peft")
    one_output = "has one output"
    for name in ("one", "peft"):
        folder, cut = str(tmp_path / name), ("--max_seq_length", "16")
        assert one_output in one_line(predict(folder, *cut))
    with pytest.raises(UserError, match=one_output):
        load_classifier(tmp_path / "one")
    with pytest.raises(UserError, match=one_output):
        registry_of({"one": tmp_path / "one"})
    with pytest.raises(UserError, match=one_output):
        open_model([folder], 16)
    for name in ("one", "peft"):
        tuned = run("--model_name_or_path", str(tmp_path / name), name=f"{name} tuned")
        assert load_classifier(tuned).labels == ["0", "1", "2"]


def test_only_a_pooling_known_to_peft_is_stored_as_a_prefix_of_peft(make_model, monkeypatch):
    """A third one was, and PEFT would have computed another."""
    monkeypatch.setitem(POOLINGS, "third", Pooling(pool_mean))
    config, method = make_model("--prefix").config, TUNING["prefix"]
    for config.pooling in ("cls", "third"):
        for config.prefix_depth in ("all", "input"):
            known = (config.pooling, config.prefix_depth) == ("cls", "all")
            assert (method.peft_type(config) == "PREFIX_TUNING") == known
            assert (method.library(config) == "peft") == known
    assert TUNING["full"].library(config) is None
    assert TUNING["full"].unread(config) == ("bert.pooler.",)  # transformers would read it


def test_an_adapter_finds_its_backbone_where_both_were_moved(make_model, backbone, tmp_path):
    home, moved = tmp_path / "home", tmp_path / "mounted"
    home.mkdir()
    save(make_model(), backbone, home / "og")
    flags = ("--prefix", "--model_name_or_path", str(home / "og"))
    save(make_model(*flags, "--output_dir", str(home / "one")), str(home / "og"), home / "one")
    shutil.copytree(home / "one", home / "two" / "prefix-1")  # as in an ensemble or a checkpoint
    expected = load_classifier(home / "one", "fp32")("a cat")
    home.rename(moved)
    assert load_classifier(moved / "two", "fp32")("a cat") == expected
    registry = registry_of({name: moved / name for name in ("one", "two")})
    assert len(registry.backbones) == 1
    registry.add("again", moved / "one", known_backbone=True)
    # another model at the old place: the checksum decides
    shutil.copytree(moved / "og", home / "og")
    weights = load_file(moved / "og" / "model.safetensors")
    changed = {name: one + 0.1 for name, one in weights.items()}
    save_file(changed, home / "og" / "model.safetensors", {"format": "pt"})
    assert load_classifier(moved / "one", "fp32")("a cat") == expected
    # lost, and found again in the two ways of the message
    shutil.rmtree(home)
    (moved / "og").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError) as error:
        load_classifier(moved / "one")
    for part in (moved / "one", home / "og", moved / "og", "base_model_name_or_path"):
        assert str(part) in str(error.value)
    path = moved / "one" / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "elsewhere")
    path.write_text(json.dumps(settings))
    assert load_classifier(moved / "one", "fp32")("a cat") == expected
    (tmp_path / "elsewhere").rename(moved / "og")
    assert load_classifier(moved / "one", "fp32")("a cat") == expected


def test_a_bert_without_a_pooler_is_tuned_as_the_message_says(run, backbone, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(backbone, bare)
    weights = load_file(bare / "model.safetensors")
    kept = {name: one for name, one in weights.items() if "pooler" not in name}
    save_file(kept, bare / "model.safetensors", {"format": "pt"})
    for flags in (("--prefix",), ("--tuning_method", "bias")):
        flags = (*flags, "--model_name_or_path", str(bare), "--overwrite_output_dir")
        capsys.readouterr()
        run(*flags, status=2)
        said = one_line((2, capsys.readouterr().err))
        assert f"{bare} has no pooler" in said and said.endswith("such as --pooling mean")
        run(*flags, "--pooling", "mean")


def test_a_model_without_names_of_labels_is_scored_by_their_numbers(
    run, trained, predict, tmp_path
):
    """And tuned further with the same rule; other names are not guessed."""
    folder = trained()
    expected = json.loads((folder / "all_results.json").read_text())["test_accuracy"]
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(number): f"LABEL_{number}" for number in range(3)}
    (folder / "config.json").write_text(json.dumps(config))
    assert predict(folder)[0] == 0
    results = json.loads((tmp_path / "predicted" / "all_results.json").read_text())
    assert results["test_accuracy"] == expected
    write_csv(tmp_path / "words.csv", [(text, "abc"[int(label)]) for text, label in ROWS])
    words = ("--test_file", str(tmp_path / "words.csv"))
    assert "label 'a', 'b', 'c' in" in one_line(predict(folder, *words))
    tuned = run("--model_name_or_path", str(folder), "--learning_rate", "1e-12", name="tuned")
    assert load_classifier(tuned).labels == ["0", "1", "2"]
    head, before = (
        load_file(path / "model.safetensors")["classifier.weight"] for path in (tuned, folder)
    )
    cosine = torch.nn.functional.cosine_similarity(head.flatten(), before.flatten(), dim=0)
    assert cosine > 0.999  # the same head, but for the temperature


@pytest.mark.parametrize("kind", ["shards", "pickle", "adapter"])
def test_weights_in_other_files_are_converted_by_the_command_of_the_message(
    make_model, backbone, tmp_path, kind
):
    folder = tmp_path / "a user's folder"
    save(make_model(*(["--prefix"] if kind == "adapter" else [])), backbone, folder)
    expected = load_classifier(folder, "fp32")("a cat")
    path = folder / ("adapter_model" if kind == "adapter" else "model")
    weights = load_file(path.with_suffix(".safetensors"))
    path.with_suffix(".safetensors").unlink()
    if kind == "shards":
        for number in range(2):
            part = dict(list(weights.items())[number::2])
            save_file(part, f"{path}-0000{number + 1}-of-00002.safetensors", {"format": "pt"})
    else:
        torch.save(weights, folder / ("pytorch_model.bin" if kind == "pickle" else f"{path}.bin"))
    with pytest.raises(UserError) as error:
        load_classifier(folder)
    said = str(error.value)
    assert said.startswith(f"{folder} has its weights as ") and "\n" not in said
    command = said.partition("to convert them: ")[2]
    python = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], env=os.environ | python, check=True)
    assert load_classifier(folder, "fp32")("a cat") == expected


def test_capitals_are_kept_if_the_vocabulary_has_them(run, backbone, tmp_path):
    """BioBERT and SciBERT are a vocab.txt alone, which transformers lower-cases."""
    words = (Path(backbone) / "vocab.txt").read_text()
    cased = tmp_path / "cased"
    shutil.copytree(backbone, cased)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (cased / name).unlink()

    def tokens(text: str) -> list[str]:
        config, _ = read_model_config(locate(str(cased)))
        config.max_seq_length = 16
        return load_tokenizer(locate(str(cased)).backbone, config).tokenize(text)

    assert tokens("Cat DOG") == ["cat", "dog"]
    (cased / "vocab.txt").write_text(words.replace("\none\ntwo\n", "\nCat\nDOG\n"))
    assert tokens("Cat cat DOG") == ["Cat", "cat", "DOG"]
    folder = run("--model_name_or_path", str(cased))
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.tokenize("Cat cat DOG") == ["Cat", "cat", "DOG"]
    found = load_classifier(folder, "fp32")("Cat DOG")[0]
    other = pipeline("text-classification", model=str(folder))("Cat DOG")[0]
    assert (other["label"], other["score"]) == (
        found["label"],
        pytest.approx(found["confidence"], abs=1e-5),
    )
    # an entry decides, and then tokenizer.json, which transformers ignores
    AutoTokenizer.from_pretrained(cased, do_lower_case=False).save_pretrained(cased)
    settings = json.loads((cased / "tokenizer_config.json").read_text())
    for entry, expected in (({"do_lower_case": True}, ["cat"]), ({}, ["Cat"])):
        settings.pop("do_lower_case", None)
        (cased / "tokenizer_config.json").write_text(json.dumps(settings | entry))
        assert tokens("Cat") == expected


def test_columns_are_joined_by_the_tokenizers_own_separator(backbone):
    pieces = [(word, -1.0) for word in ("<s>", "</s>", "<unk>", "▁cat", "▁dog", "▁", *"[]SEP")]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    sentencepiece = PreTrainedTokenizerFast(
        tokenizer_object=unigram, sep_token="</s>", unk_token="<unk>"
    )
    bert = AutoTokenizer.from_pretrained(backbone)
    assert separator(bert) == " [SEP] " and separator(sentencepiece) == " </s> "
    for tokenizer in (bert, sentencepiece):
        ids = tokenizer(f"cat{separator(tokenizer)}dog", add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.sep_token_id) == 1
        assert tokenizer.unk_token_id not in ids
    assert separator(PreTrainedTokenizerFast(tokenizer_object=unigram)) == " "


def test_a_message_lists_a_few_labels_on_one_short_line(run, caplog, tmp_path):
    """The labels of a model with many, or long ones, filled the terminal."""
    rows = [(f"cat {number}", f"label {number} {'x' * 90}\n") for number in range(50)]
    many = write_csv(tmp_path / "many.csv", rows)
    files = ("--train_file", many, "--validation_file", many, "--test_file", many)
    folder = run(*files, name="many")
    caplog.clear()
    run("--model_name_or_path", str(folder), name="tuned")
    said = next(one for one in caplog.messages if "initialising a new head" in one)
    assert "and 47 more" in said and "\n" not in said
    assert len(said.replace(str(folder), "")) < 250
    assert name_list("abc") == "a, b, c" and name_list([]) == ""
    assert name_list(map(str, range(12))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert name_list(["x" * 41, "a\nb\u200b"]) == f"{'x' * 39}…, a\\nb\\u200b"

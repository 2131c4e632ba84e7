"""Hostile and outdated model and checkpoint folders: refused in one line, or used rightly."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROWS, one_line, within, write_csv
from dataset import read_split
from model import folders
from model.folders import locate, sha256_of
from runtime import checkpoint
from runtime.columns import remembered_settings
from runtime.file_format import FileFormat
from runtime.files import UserError

DEEP = '{"a":' * 100_000
EPOCHS = ("--save_strategy", "epoch")
AUTO = ("--resume_from_checkpoint", "auto")


def test_a_prefix_knows_its_backbone(run, predict, tmp_path):
    """Defect 2: the backbone is tuned again, and the prefix would predict differently."""
    og = run(name="og")
    prefix = run("--prefix", "--model_name_or_path", str(og), name="prefix")
    assert predict(prefix)[0] == 0
    expected = (tmp_path / "predicted" / "predictions.csv").read_bytes()
    shutil.copytree(og, tmp_path / "kept")
    run("--seed", "1", "--overwrite_output_dir", name="og")
    assert "was tuned on another" in one_line(predict(prefix))
    write_csv(tmp_path / "several.csv", [("a cat", str(prefix))], header=("text", "which"))
    bank = ["--prefix_column", "which", "--test_file", str(tmp_path / "several.csv")]
    assert "was tuned on another" in one_line(predict("", "--prefix_paths", str(prefix), *bank))
    shutil.rmtree(og)
    shutil.copytree(tmp_path / "kept", og)
    assert predict(prefix)[0] == 0
    assert (tmp_path / "predicted" / "predictions.csv").read_bytes() == expected
    assert predict("", "--prefix_paths", str(prefix), *bank)[0] == 0


def test_prefixes_of_different_columns_do_not_share_a_batch(run, predict, tmp_path):
    """Defect 3."""
    for name in ("train", "val"):
        rows = [(text, "more", label, "one") for text, label in ROWS]
        write_csv(tmp_path / f"{name}.csv", rows, header=("text", "title", "label", "which"))
    write_csv(tmp_path / "test.csv", rows[:3], header=("text", "title", "label", "which"))
    run("--prefix", name="one")
    run("--prefix", "--text_column_names", "title,text", name="two")
    paths = ["--prefix_paths", str(tmp_path / "one"), str(tmp_path / "two")]
    said = one_line(predict("", *paths, "--prefix_column", "which"))
    assert "different --text_column_names" in said
    flags = ["--prefix_column", "which", "--text_column_names", "text"]
    assert predict("", *paths, *flags)[0] == 0


def test_a_kept_checkpoint_knows_its_columns(run, predict, tmp_path):
    """Defect 4."""
    for name in ("train", "val", "test"):
        write_csv(tmp_path / f"{name}.csv", ROWS, header=("title", "topic"))
    columns = ("--text_column_names", "title", "--label_column_name", "topic")
    folder = run(*columns, *EPOCHS)
    assert predict(folder / "checkpoint-6")[0] == 0
    form = FileFormat(text_column_names=("title",), label_column_name=("topic",))
    table = read_split(tmp_path / "predicted" / "predictions.csv", form).table
    assert len(table) == len(ROWS) and "predicted" in table


@pytest.mark.parametrize("content", ["{}", DEEP, "[]", '{"state.json": 5}', "\xff", "null"])
def test_a_checkpoint_with_a_bad_manifest_is_not_used(run, stopped, caplog, capsys, content):
    """Defects 6 and 11: it was loaded unchecked, or ended in a traceback."""
    caplog.set_level("INFO")
    (stopped / "checkpoint-5" / "manifest.json").write_text(content, encoding="latin-1")
    run(*EPOCHS, "--resume_from_checkpoint", str(stopped / "checkpoint-5"), status=2)
    one_line((2, capsys.readouterr().err))
    run(*EPOCHS, *AUTO)
    assert f"resuming from {stopped / 'checkpoint-3'}" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("process", {3, 5, 6}),
        ("checkpoint-3/config.json", {5, 6}),
        ("checkpoint-5/state.json", {3, 6}),
    ],
)
def test_a_pipe_in_an_unfinished_run_is_not_waited_for(run, stopped, name, expected):
    """Found by fuzzing. A damaged checkpoint that is not resumed is not published either."""
    (stopped / name).unlink(missing_ok=True)
    os.mkfifo(stopped / name)
    with within(20):
        folder = run(*EPOCHS, *AUTO)
    assert not (folder / "unfinished").exists()
    assert set(checkpoint.steps(folder)) == expected


@pytest.mark.parametrize("content", [DEEP, "[]", "{}", '{"step": "x"}', "\xff"])
def test_a_checkpoint_with_a_bad_state_is_not_used(run, stopped, caplog, capsys, content):
    """Defect 11; the manifest fits."""
    caplog.set_level("INFO")
    path = stopped / "checkpoint-5" / "state.json"
    path.write_text(content, encoding="latin-1")
    manifest = json.loads(path.with_name("manifest.json").read_text())
    manifest["state.json"] = checkpoint.describe(path)
    path.with_name("manifest.json").write_text(json.dumps(manifest))
    run(*EPOCHS, "--resume_from_checkpoint", str(stopped / "checkpoint-5"), status=2)
    one_line((2, capsys.readouterr().err))
    run(*EPOCHS, *AUTO)
    assert f"resuming from {stopped / 'checkpoint-3'}" in caplog.text


@pytest.mark.parametrize(
    "setting",
    [
        {"label_separator": ""},
        {"delimiter": ";"},
        {"quoting": "all"},
        {"csv_encoding": "a\0b"},
        {"csv_encoding": "y" * 3000},
    ],
)
def test_a_remembered_setting_that_no_flag_takes_is_refused(tmp_path, setting):
    (tmp_path / "run.json").write_text(json.dumps({"settings": setting}))
    with pytest.raises(UserError, match=next(iter(setting))) as error:
        FileFormat.from_settings(remembered_settings(tmp_path))
    assert len(str(error.value).replace(str(tmp_path), "")) < 300


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "run.json"])
def test_json_that_is_nested_too_deeply_is_refused(trained, predict, name):
    """Defect 11."""
    folder = trained("--prefix")
    (folder / name).write_text(DEEP)
    assert name in one_line(predict(folder))


def test_the_checksum_of_a_model_does_not_depend_on_its_place(run, tmp_path):
    """Defect 13: a run that was moved could not be resumed."""
    run("--prefix")
    for name in ("z", "a"):
        shutil.copytree(tmp_path / "out", tmp_path / name / "adapter")
        shutil.copytree(tmp_path / "out", tmp_path / name / "m")
        (tmp_path / name / "m" / "config.json").write_text("{}")
    one, other = (
        sha256_of([tmp_path / first / "m", tmp_path / second / "adapter"])
        for first, second in (("a", "z"), ("z", "a"))
    )
    assert one == other


def test_a_missing_folder_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    """Defect 15: a stranger may own the name there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    asked = []
    monkeypatch.setattr(folders, "hub_folder", lambda name: asked.append(name) or tmp_path)
    for name in ("checkpoints/og", "mine/model"):
        with pytest.raises(UserError, match=f"folder {name} does not exist"):
            locate(name)
    locate("google-bert/bert-base-cased")
    assert asked == ["google-bert/bert-base-cased"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_a_model_folder_is_refused(trained, predict, name):
    """Defect 16: the libraries would wait for it forever."""
    folder = trained()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name} is a pipe or a device" in one_line(predict(folder))


def test_the_head_of_another_task_is_not_taken_over(backbone, make_model, tmp_path):
    """A model for tokens has a head of the same name; it would count as new."""
    shutil.copytree(backbone, tmp_path / "tokens")
    path = tmp_path / "tokens" / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["BertForTokenClassification"]}
    path.write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b", "2": "c"}}))
    weights = load_file(tmp_path / "tokens" / "model.safetensors")
    head = {"classifier.weight": torch.full((3, 16), 9.0), "classifier.bias": torch.full((3,), 9.0)}
    path = tmp_path / "tokens" / "model.safetensors"
    save_file({k: one.clone() for k, one in weights.items()} | head, path, {"format": "pt"})
    model = make_model("--model_name_or_path", str(tmp_path / "tokens"))
    assert model.classifier.weight.abs().max() < 2 and not model.classifier.bias.any()


# What each field of a config can wrongly be; None: the field is absent.
WRONG = ["x", "", -1, 0, 1.5, 10**6, 10**12, True, [], ["x"], {}, {"a": 1}, None]
CONFIG = (
    "architectures attention_probs_dropout_prob classifier_dropout dtype hidden_act "
    "hidden_dropout_prob hidden_size id2label initializer_range intermediate_size label2id "
    "layer_norm_eps max_position_embeddings max_seq_length model_type num_attention_heads "
    "num_hidden_layers pad_token_id pooling problem_type tuning_method type_vocab_size vocab_size "
    "is_decoder add_cross_attention chunk_size_feed_forward num_labels attn_implementation "
    "_attn_implementation quantization_config position_embedding_type tie_word_embeddings "
    "torch_dtype transformers_version auto_map pre_seq_len prefix_depth prefix_projection"
).split()
ADAPTER_CONFIG = (
    "base_model_name_or_path modules_to_save num_attention_heads num_layers "
    "num_transformer_submodules num_virtual_tokens peft_type prefix_projection task_type token_dim "
    "inference_mode"
).split()
SPECIAL = {
    "config.json": [
        {"hidden_act": "nope"},
        {"dtype": "nope"},
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_2"},
        {"quantization_config": {"load_in_8bit": True, "quant_method": "bitsandbytes"}},
        {"id2label": {"0": "0", "2": "1", "3": "2"}},
        {"id2label": {"0": "0", "1": "0", "2": "2"}},
        {"id2label": ["0", "1", "2"]},
        {"problem_type": "regression"},
        {"num_attention_heads": 3},
        {"num_hidden_layers": 1},
        {"auto_map": {"AutoConfig": "evil.Config"}},
    ],
    "adapter_config.json": [{"peft_type": "LORA"}, {"base_model_name_or_path": 5}],
    "tokenizer_config.json": [
        {"tokenizer_class": "Nope"},
        {"tokenizer_class": 5},
        {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}},
        {"model_max_length": "x"},
    ],
    "run.json": [
        {"settings": {"text_column_names": 5}},
        {"settings": {"text_column_names": []}},
        {"settings": {"label_names": {"0": 1}}},
        {"settings": 5},
    ],
}


def hostile(name: str, fields: list[str], first: int) -> list[dict]:
    """List changes to a JSON file; a change to None removes the field.

    Each field gets every sixth of the wrong values, its neighbours others: a prediction with each
    would take a fifth of the time of all tests.
    """
    wrong = [
        {field: value} for n, field in enumerate(fields) for value in WRONG[(n + first) % 6 :: 6]
    ]
    return wrong + SPECIAL.get(name, [])


@pytest.mark.parametrize(
    ("name", "fields", "flags"),
    [
        ("config.json", CONFIG, ()),
        ("config.json", CONFIG, ("--prefix",)),
        ("adapter_config.json", ADAPTER_CONFIG, ("--prefix",)),
        ("tokenizer_config.json", [], ()),
        ("run.json", [], ()),
    ],
)
def test_hostile_model_folders_end_in_one_line_or_predict_the_same(
    run, predict, tmp_path, name, fields, flags
):
    """Defect 12: 30 of 113 ended in a traceback, and one never. At most 10 s each."""
    folder = run(*flags, "--max_seq_length", "16")
    good = json.loads((folder / name).read_text())
    assert predict(folder)[0] == 0
    expected = (tmp_path / "predicted" / "predictions.csv").read_bytes()
    refused = 0
    changes = hostile(name, fields, first=3 * len(flags))
    for change in changes:
        content = {k: v for k, v in (good | change).items() if k not in change or v is not None}
        (folder / name).write_text(json.dumps(content))
        outcome = predict(folder)
        assert "Traceback" not in outcome[1], change
        if outcome[0]:
            one_line(outcome)
            refused += 1
        elif not {*change} & MAY_CHANGE:
            found = (tmp_path / "predicted" / "predictions.csv").read_bytes()
            assert found == expected, change
    assert refused >= len(SPECIAL.get(name, [])) / 4
    print(name, *flags, f"{len(changes)} changes, {refused} refused")


# With other valid values of these, another model is meant.
MAY_CHANGE = {"hidden_act", "layer_norm_eps", "max_seq_length", "id2label", "pad_token_id"}
MAY_CHANGE |= {"problem_type", "num_labels", "tuning_method"}

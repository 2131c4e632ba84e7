"""LoRA: what it computes, and exchange with PEFT."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from arguments import parse_args
from conftest import train
from model import load
from model.source import new_model
from runtime.files import UserError
from test_model import CLASSES, IDS, MASKS, assert_equal, open_folder, save

LORA = ("--tuning_method", "lora", "--lora_r", "3", "--lora_alpha", "7")


@pytest.fixture
def frozen(backbone):
    """Return transformers' own BERT with a new head."""
    torch.manual_seed(5)
    return AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=CLASSES)


def test_a_new_adapter_changes_nothing_and_trains_head_and_small_matrices(
    make_model, backbone, files
):
    args = parse_args(["--do_train", *files[:2], "--output_dir", "out", *LORA])
    args.max_seq_length = 16
    args.model_name_or_path = backbone
    source = new_model(vars(args))
    source.set_labels(["a", "b", "c"])
    model, plain = source.build_trainable(seed=1).eval(), make_model()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".lora_" not in k})
    mask = MASKS["padded"]
    assert torch.equal(model(IDS, attention_mask=mask).logits, plain(IDS, mask).logits)
    assert all(p.any() for name, p in model.named_parameters() if "lora_A" in name)
    counts = source.count(model)
    assert counts["trainable_parameters_without_head"] == 2 * 2 * (3 * 16 + 16 * 3)
    assert counts["stored_parameters"] == counts["trainable_parameters"]
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert all(".lora_" in name or name.startswith("classifier.") for name in trained)


def test_peft_loads_our_adapter_and_writes_the_same_tensors(make_model, frozen, backbone, tmp_path):
    tuned = make_model(*LORA)
    save(tuned, backbone, tmp_path / "saved")
    peer = PeftModel.from_pretrained(frozen, str(tmp_path / "saved")).eval()
    for mask in MASKS.values():
        expected = tuned(IDS, attention_mask=mask).logits
        assert_equal(peer(input_ids=IDS, attention_mask=mask).logits, expected)
    peer.save_pretrained(tmp_path / "peer")
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("saved", "peer")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def peft_folder(frozen, folder, **settings):
    peer = get_peft_model(frozen, LoraConfig(task_type="SEQ_CLS", **settings)).eval()
    for name, parameter in peer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peer.save_pretrained(folder)
    return peer


@pytest.mark.parametrize("targets", [["query", "value"], ["key", "dense"]])
def test_an_adapter_of_peft_loads(frozen, tmp_path, targets):
    peer = peft_folder(frozen, tmp_path, r=4, target_modules=targets)
    model = open_folder(tmp_path)
    for mask in MASKS.values():
        expected = peer(input_ids=IDS, attention_mask=mask).logits
        assert_equal(model(IDS, attention_mask=mask).logits, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_rslora": True}, "use_rslora is True: plain LoRA only"),
        ({"alpha_pattern": {"query": 2}}, "alpha_pattern is"),
        ({"use_dora": True}, "must contain exactly"),
        ({"r": 4, "rank_pattern": {"query": 2}}, "should be"),
    ],
)
def test_other_kinds_of_lora_are_refused(frozen, tmp_path, settings, message):
    peft_folder(frozen, tmp_path, **settings)
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path)


def test_a_run_predicts_again_is_tuned_further_and_names_wrong_flags(
    run, backbone, files, tmp_path, predict, capsys
):
    folder = run(*LORA)
    status, _ = predict(folder)
    again = tmp_path / "predicted" / "predictions.csv"
    assert status == 0 and again.read_bytes() == (folder / "predictions.csv").read_bytes()
    assert load(folder, "fp32")("a cat")[0]["label"] in "012"
    assert json.loads((folder / "run.json").read_text())["library"] == "peft"

    assert train(str(folder), files, tmp_path / "further") == 0
    settings = json.loads((tmp_path / "further" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 7)
    for flags, message in (
        (("--lora_r", "3"), "--lora_r needs --tuning_method lora"),
        ((*LORA, "--pre_seq_len", "3"), "--pre_seq_len needs --tuning_method prefix"),
    ):
        with pytest.raises(SystemExit):
            train(backbone, files, tmp_path / "refused", *flags)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(str(folder), files, tmp_path / "refused", "--lora_r", "4")
    assert "cannot change the tuned adapter" in capsys.readouterr().err

"""A text LM initialized from released weights: trained, exported with the training state, and continued."""

import json
import shutil
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from moss_train.cli.main import main
from moss_train.export.load import open_source
from moss_train.training import CatModule
from moss_train.training.loggers.base import read_table
from moss_train.training.run.fit import fit
from moss_train.training.run.warm_start import RECORD_FILE, initialize, plan_initialization

from .runs import column

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}


def release(folder: Path) -> Qwen2ForCausalLM:
    """Save a small Qwen2 with its own tokenizer: letters, and a pair that would be two tokens byte by byte."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, "th", "<|endoftext|>"])}
    Qwen2Tokenizer(vocab=vocabulary, merges=[("t", "h")]).save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=272, **SIZES, **HEADS))
    model.save_pretrained(folder)
    return model


def test_an_export_of_a_run_with_a_pretrained_lm_goes_on_without_its_folder(
    small_config, finetune_config, packed, tmp_path
):
    folder, out = tmp_path / "qwen", tmp_path / "exported"
    released = release(folder)
    text = ["semantic.text._target_=moss_train.semantic.PretrainedText", f"+semantic.text.path={folder}"]
    config = small_config(f"semantic.pretrained={folder}", "semantic.config=null", *text, "stages.0.updates=3")
    run = fit(config.replace(max_updates=3)).directory
    assert len(column(read_table(run / "metrics.csv"), "loss/semantic")) > 0
    assert main(["export", f"checkpoint={run}", f"out={out}", "with_training_state=true"]) == 0
    trained = open_source(run).load()["semantic"]
    embedding = trained["language_model.model.embed_tokens.weight"]
    assert embedding.shape == (272, 16)
    moved = embedding - released.get_input_embeddings().weight
    assert 0 < moved.abs().max() < 0.01  # initialized from the released weights, then trained
    encoded = CatModule(**plan_initialization(config).arguments).semantic.text("this")
    assert len(encoded) == 4  # th, i, s and the end-of-text token
    shutil.rmtree(folder)
    shutil.rmtree(run)

    config = finetune_config(f"init={out}", f"data.train={packed}", "data.crop_seconds=0.4", "data.num_workers=0")
    init_plan = plan_initialization(config)
    module = CatModule(**init_plan.arguments)
    report = initialize(module, init_plan)["semantic"]
    assert (report.resampled, report.new, report.unused) == ((), (), ())
    restored = module.semantic.state_dict()
    assert restored.keys() == trained.keys()
    assert all(torch.equal(restored[name], trained[name]) for name in trained)
    assert module.semantic.text("this") == encoded
    weight = module.semantic.language_model.lm_head.weight
    assert weight is module.semantic.language_model.get_input_embeddings().weight


def test_fine_tuning_such_an_export_trains_its_lm_and_resumes_without_it(
    small_config, finetune_config, packed, tmp_path
):
    folder, out = tmp_path / "qwen", tmp_path / "exported"
    release(folder)
    text = ["semantic.text._target_=moss_train.semantic.PretrainedText", f"+semantic.text.path={folder}"]
    run = fit(small_config(f"semantic.pretrained={folder}", "semantic.config=null", *text, "max_updates=1")).directory
    assert main(["export", f"checkpoint={run}", f"out={out}", "with_training_state=true"]) == 0
    shutil.rmtree(folder)
    quick = [
        "data.crop_seconds=0.4",
        "data.num_workers=0",
        "stages.0.batch_seconds=4",
        "objective.discriminator_crop_seconds=0.1",
    ]
    config = finetune_config(
        f"init={out}", f"data.train={packed}", *quick, "wandb=null", f"run_dir={tmp_path / 'tuned'}"
    )
    fit(config.replace(max_updates=1))
    record = json.loads((tmp_path / "tuned" / RECORD_FILE).read_text())
    assert record["new_networks"] == []
    assert record["semantic"]["pretrained"] is None
    assert fit(config.replace(max_updates=2)).update == 2
    losses = column(read_table(tmp_path / "tuned" / "metrics.csv"), "loss/semantic")
    assert len(losses) == 2
    assert (
        main(["export", f"checkpoint={tmp_path / 'tuned'}", f"out={tmp_path / 'again'}", "with_training_state=true"])
        == 0
    )
    again, before = (open_source(path).load()["semantic"] for path in (tmp_path / "again", out))
    name = "language_model.model.embed_tokens.weight"
    assert 0 < (again[name] - before[name]).abs().max() < 0.01

"""Preference losses inside trl's DPO trainer: a tiny random model and tokenizer, made here."""

import copy
import sys

import pytest
import torch

from allrounder.errors import InputError
from allrounder.losses.preference import PreferenceLoss
from allrounder.losses.preference_logic import Structure, compile_loss
from allrounder.losses.trl_adapter import preference_trainer

WORDS = [f"w{i}" for i in range(20)]
PAIRS = {
    "prompt": [f"w{i % 5} w{i % 7} " if i % 2 else f"w{i % 5} " for i in range(12)],
    "chosen": [f"w{10 + i % 3} w{11 + i % 2}" + " w12" * (i % 3) for i in range(12)],
    "rejected": [f"w{15 + i % 3} w{16 + i % 2}" + " w17" * (i % 2) for i in range(12)],
}


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("trl")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=23, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=1,
            )
        )  # fmt: skip


def trainer_of(kind, tokenizer, folder, **options):
    from datasets import Dataset
    from trl import DPOConfig

    config = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2, report_to=[],
        save_strategy="no", logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    model = tiny()
    data = Dataset.from_dict(PAIRS)
    return kind(
        model, ref_model=copy.deepcopy(model), args=config, train_dataset=data, eval_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip


def curve(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_dpo_of_this_room_trains_as_trls_own_step_for_step(tokenizer, tmp_path):
    from trl import DPOTrainer

    theirs = trainer_of(DPOTrainer, tokenizer, tmp_path)
    theirs.train()
    ours = trainer_of(preference_trainer(PreferenceLoss("dpo", beta=0.1)), tokenizer, tmp_path)
    ours.train()
    assert curve(ours) == pytest.approx(curve(theirs), abs=1e-5)
    assert curve(ours)[-1] < curve(ours)[0]
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], abs=1e-5)


def test_a_derived_loss_trains_inside_trl(tokenizer, tmp_path):
    loss = compile_loss(Structure("(L & Rw) >> (W & Rl)", given="(W & Rl) | (L & Rw)"))
    trainer = trainer_of(preference_trainer(loss, per_token=True), tokenizer, tmp_path, precompute_ref_log_probs=True)
    reference = copy.deepcopy(trainer.model)
    trainer.train()
    assert curve(trainer)[-1] < curve(trainer)[0] - 0.01
    last = [row for row in trainer.state.log_history if "rewards/accuracies" in row][-1]
    assert last["rewards/accuracies"] == 1
    assert any(not torch.equal(a, b) for a, b in zip(trainer.model.parameters(), reference.parameters()))


@pytest.mark.parametrize(("name", "trl_name"), [("ipo", "ipo"), ("dpo_hinge", "hinge"), ("dpo_robust", "robust")])
def test_values_are_those_of_trls_trainer(name, trl_name, tokenizer, tmp_path):
    from trl import DPOTrainer

    smoothing = {"label_smoothing": 0.2} if name == "dpo_robust" else {}
    theirs = trainer_of(DPOTrainer, tokenizer, tmp_path, loss_type=[trl_name], beta=0.3, **smoothing)
    loss = PreferenceLoss(name, beta=0.3, **smoothing)
    ours = trainer_of(preference_trainer(loss, per_token=name == "ipo"), tokenizer, tmp_path, beta=0.3)
    batch = next(iter(theirs.get_train_dataloader()))
    for trainer in (theirs, ours):  # away from the reference, where the losses differ
        with torch.no_grad():
            for value in trainer.model.parameters():
                value.add_(0.3 * torch.cos(torch.arange(value.numel())).reshape(value.shape))
    expected = theirs.compute_loss(theirs.model, batch)
    found = ours.compute_loss(ours.model, batch)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters()):
        torch.testing.assert_close(mine.grad, other.grad)


def test_without_need_of_a_reference_its_forward_pass_is_skipped(tokenizer, tmp_path):
    calls = []
    trainer = trainer_of(preference_trainer(PreferenceLoss("simpo"), per_token=True), tokenizer, tmp_path)
    trainer.ref_model.register_forward_hook(lambda *_: calls.append(1))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch)
    assert not calls
    assert not trainer.precompute_ref_logps


def test_options_that_trl_would_apply_to_its_own_loss_are_refused(tokenizer, tmp_path):
    kind = preference_trainer(PreferenceLoss("dpo"))
    with pytest.raises(InputError, match="loss_type changes trl's own loss"):
        trainer_of(kind, tokenizer, tmp_path, loss_type=["ipo"])
    with pytest.raises(InputError, match="ld_alpha changes"):
        trainer_of(kind, tokenizer, tmp_path, ld_alpha=0.5)


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(InputError, match=r"needs trl 1.16 or later: pip install trl"):
        preference_trainer(PreferenceLoss("dpo"))

"""The peer in a comparison of training steps: transformers' Trainer with DeepSpeed, on the batches of ours.

The same ds_config, AdamW (fused, as both have it), weight decay, clipping and schedule; attention as transformers
chooses. On several ranks it gets a loss of its own (`compute_loss_func`), by the tokens of all ranks as ours has it:
else each rank's mean would count the same whatever it masks. It does the same arithmetic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training_case import BATCHES, LEARNING_RATE, SEED, Case
from training_turns import Gate


def peer(case: Case, folder: Path, port: int) -> None:
    """What one rank does."""
    import deepspeed
    import torch
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, Trainer, TrainerCallback, TrainingArguments

    gate, machine = Gate(port, case), case.trainer()
    if "deepspeed" in machine:
        # compiled at its first start, for inference alone; killed meanwhile it would leave a lock that hangs the next
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")
    told = torch.load(folder.parent / BATCHES, weights_only=True)

    class Steps(TrainerCallback):
        """Counts steps; losses are told after a step's end."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.step()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                gate.losses[gate.steps] = logs["loss"]

    def over_all_ranks(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        mean = F.cross_entropy(outputs.logits.flatten(0, -2), labels.flatten(), ignore_index=-100)  # as its models do
        return mean.float() * (labels != -100).sum() * case.ranks / told["counts"][gate.steps]

    # Before the model: at ZeRO-3 it is then read into partitions.
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=case.rows // case.ranks,
        max_steps=case.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=case.precision == "bf16",
        average_tokens_across_devices=False,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
        **machine,
    )
    auto = AutoModelForCausalLM if case.lm == "causal" else AutoModelForMaskedLM
    model = auto.from_pretrained(Path(case.folder) / "base", trust_remote_code=False)
    ids = told["input_ids"]
    rows = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": labels}
        for row, labels in zip(ids, told["labels"], strict=True)
    ]
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        callbacks=[Steps()],
        compute_loss_func=over_all_ranks if case.ranks > 1 and case.lm == "masked" else None,
    ).train()

"""One small adapter of every kind that peft can build on a tiny BERT, and of the settings that change what it saves.

Each is made, given an effect and saved by plain peft alone: what plain peft computes with it is the oracle.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

QUERY_VALUE = ["query", "value"]
WORDS = "embeddings.word_embeddings"
LABELS = 3
TOKENS = [7, 9, 20]
"""The rows of the word embeddings that kinds with trained tokens train."""


def _on(kind: str, **settings: Any) -> Callable[[], PeftConfig]:
    """A config of peft's that goes on query and value."""
    return lambda: getattr(peft, f"{kind}Config")(
        **{"task_type": "SEQ_CLS", "target_modules": list(QUERY_VALUE), **settings}
    )


def _prompt(kind: str, **settings: Any) -> Callable[[], PeftConfig]:
    """A config of peft's that puts prompts before the text."""
    return lambda: getattr(peft, f"{kind}Config")(**{"task_type": "SEQ_CLS", "num_virtual_tokens": 4, **settings})


BUILDABLE: dict[str, Callable[[], PeftConfig]] = {
    "LORA": _on("Lora", r=3),
    "LORA, rsLoRA": _on("Lora", r=3, use_rslora=True),
    "LORA, DoRA": _on("Lora", r=3, use_dora=True),
    "LORA, on embeddings": _on("Lora", r=3, target_modules=["word_embeddings", "query"]),
    "LORA, on embeddings, DoRA": _on("Lora", r=3, target_modules=["word_embeddings", "query"], use_dora=True),
    "LORA, bias all": _on("Lora", r=3, bias="all"),
    "LORA, bias lora_only": _on("Lora", r=3, bias="lora_only"),
    "LORA, lora_bias": _on("Lora", r=3, lora_bias=True),
    "LORA, patterns": _on(
        "Lora", r=3, rank_pattern={"layer.1.attention.self.query": 2}, alpha_pattern={"layer.0.attention.self.query": 7}
    ),
    "LORA, one layer": _on("Lora", r=3, layers_to_transform=[1], layers_pattern="layer"),
    "LORA, token indices": _on("Lora", r=3, trainable_token_indices=TOKENS),
    "LORA, token indices by name": _on("Lora", r=3, trainable_token_indices={"word_embeddings": TOKENS}),
    "LORA, target_parameters": _on("Lora", r=3, target_modules=[], target_parameters=["query.weight"]),
    "LORA, embeddings saved whole": _on("Lora", r=3, modules_to_save=["word_embeddings"]),
    "LORA, on embeddings, saved with them": _on("Lora", r=3, target_modules=["word_embeddings", "query"]),
    "LORA, layer norms saved whole": _on("Lora", r=3, modules_to_save=["LayerNorm"]),
    "LORA, QALoRA": _on("Lora", r=3, use_qalora=True, qalora_group_size=8),
    "LORA, BdLoRA": _on(
        "Lora", r=4, use_bdlora={"target_modules_bd_a": ["query"], "target_modules_bd_b": ["value"], "nblocks": 2}
    ),
    "LORA, KaSA": _on("Lora", r=3, kasa_config={"beta": 0.1, "gamma": 0.1}),
    "LORA, MonteCLoRA": _on("Lora", r=3, monteclora_config={}),
    "LORA, VeLoRA": _on("Lora", r=3, velora_config={}),
    "LORA, orthogonal": _on("Lora", r=4, init_lora_weights="orthogonal"),
    "LORA, PiSSA": _on("Lora", r=3, init_lora_weights="pissa"),
    "LORA, all-linear": _on("Lora", r=3, target_modules="all-linear"),
    "ADALORA": _on("AdaLora", init_r=4, target_r=2, total_step=10),
    "ADALORA, pruned": _on("AdaLora", init_r=4, target_r=2, total_step=3),
    "BEFT": _on("Beft"),
    "BOFT": _on("BOFT", boft_block_size=4),
    "BOFT, bias": _on("BOFT", boft_block_size=4, boft_n_butterfly_factor=2, bias="boft_only"),
    "C3A": _on("C3A", block_size=8),
    "DEFT": _on("Deft", r=3),
    "DEFT, para": _on("Deft", r=3, para=True),
    "DEFT, qr": _on("Deft", r=3, decomposition_method="qr"),
    "DELORA": _on("Delora", r=3),
    "FOURIERFT": _on("FourierFT", n_frequency=20),
    "FROD": _on("Frod", progressbar=False),
    "FROD, unsaved": _on("Frod", save_projection=False, progressbar=False),
    "GLORA": _on("Glora", r=3),
    "GLORA, vector": _on("Glora", r=3, config_A_B="vector", config_C="vector", config_D_E="vector"),
    "GRALORA": _on("Gralora", r=4, gralora_k=2),
    "GRALORA, hybrid": _on("Gralora", r=4, gralora_k=2, hybrid_r=2),
    "HIRA": _on("Hira", r=3),
    "HRA": _on("HRA", r=4),
    "HRA, Gram-Schmidt": _on("HRA", r=4, apply_GS=True),
    "IA3": _on("IA3", target_modules=["query", "value", "output.dense"], feedforward_modules=["output.dense"]),
    "LILY": _on("Lily", r=3),
    "LN_TUNING": _on("LNTuning", target_modules=["LayerNorm"]),
    "LOHA": _on("LoHa", r=3),
    "LOKR": _on("LoKr", r=3),
    "LOKR, decomposed": _on("LoKr", r=2, decompose_both=True, decompose_factor=8),
    "MISS": _on("Miss", r=4),
    "MISS, bat": _on("Miss", r=4, init_weights="bat"),
    "MISS, mini": _on("Miss", r=4, init_weights="mini", mini_r=4),
    "OFT": _on("OFT", oft_block_size=8),
    "OFT, shared": _on("OFT", oft_block_size=8, block_share=True, use_cayley_neumann=False),
    "OSF": _on("OSF", effective_rank=8),
    "PEANUT": _on("Peanut", r=3),
    "PEANUT, deep": _on("Peanut", r=3, depth=2),
    "POLY": _on("Poly", r=2, n_tasks=1, n_skills=2),
    "PSOFT": _on("Psoft", r=4),
    "PVERA": _on("Pvera", r=8),
    "PVERA, unsaved": _on("Pvera", r=8, save_projection=False),
    "RANDLORA": _on("RandLora", r=4),
    "RANDLORA, unsaved": _on("RandLora", r=4, save_projection=False),
    "ROAD": _on("Road", group_size=8),
    "ROAD, 4": _on("Road", variant="road_4", group_size=8),
    "SHADOW": _on("Shadow", r=3, shadow_dropout=0.0),
    "SHIRA": _on("Shira", r=2),
    "SHIRA, seeded": _on("Shira", r=2, random_seed=5),
    "SUPERTUNING": _on("Supertuning", sparsity=0.9),
    "SUPERTUNING, unsaved": _on("Supertuning", sparsity=0.9, save_precomputed_indices=False),
    "SUPERTUNING, with LoRA": _on("Supertuning", sparsity=0.9, r=3, lora_alpha=3),
    "TINYLORA": _on("TinyLora", u=8),
    "TINYLORA, unsaved": _on("TinyLora", u=8, save_projection=False),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(
        task_type="SEQ_CLS", token_indices=TOKENS, target_modules=["word_embeddings"]
    ),
    "UNILORA": _on("UniLora", r=3, theta_d_length=64),
    "UNILORA, saved": _on("UniLora", r=3, theta_d_length=64, save_indices=True),
    "VBLORA": _on("VBLoRA", r=3, num_vectors=16, vector_length=8),
    "VBLORA, top k": _on("VBLoRA", r=3, num_vectors=16, vector_length=8, save_only_topk_weights=True),
    "VERA": _on("Vera", r=8),
    "VERA, unsaved": _on("Vera", r=8, save_projection=False),
    "WAVEFT": _on("WaveFT", n_frequency=40),
    "PROMPT_TUNING": _prompt("PromptTuning"),
    "P_TUNING": _prompt("PromptEncoder", encoder_hidden_size=16),
    "P_TUNING, LSTM": _prompt("PromptEncoder", encoder_hidden_size=16, encoder_reparameterization_type="LSTM"),
    "PREFIX_TUNING": _prompt("PrefixTuning"),
    "PREFIX_TUNING, projected": _prompt("PrefixTuning", prefix_projection=True, encoder_hidden_size=16),
    "MULTITASK_PROMPT_TUNING": _prompt("MultitaskPromptTuning", num_tasks=2),
    "CARTRIDGE": _prompt("Cartridge"),
}
"""Kind of peft's, or kind, setting -> the config."""

ELSEWHERE: dict[str, dict[str, Any]] = {
    "ADAMSS": {"target_modules": QUERY_VALUE, "r": 4},  # wants scikit-learn to be built
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "CPT": {"num_virtual_tokens": 4, "cpt_token_ids": [7, 8, 9, 10]},
    "XLORA": {"hidden_size": 32, "adapters": {"0": "elsewhere"}},
}
"""Kinds that peft does not build on a BERT for classification, at least not here -> what their configs hold."""


_AUTO = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": AutoModel,
}


def plain(base: Path, task: str = "SEQ_CLS") -> PreTrainedModel:
    """A base with a fresh head by plain transformers, the same one every time."""
    head = {} if task == "FEATURE_EXTRACTION" else {"num_labels": LABELS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _AUTO[task].from_pretrained(base, **head).eval()


def reopened(base: Path, adapter: Path, task: str = "SEQ_CLS") -> PeftModel:
    """A saved adapter on a base, by plain peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(plain(base, task), adapter).eval()


def make(kind: str, base: Path, folder: Path, task: str = "SEQ_CLS", shift: float = 0.1) -> None:
    """Build one of `BUILDABLE` on a base, shift everything that it trains, and save it, all by plain peft.

    Args:
        task: peft's name of the kind of task.
        shift: standard deviation of the noise that is added.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        config = BUILDABLE[kind]()
        config.task_type = task
        model = get_peft_model(plain(base, task), config)
        if kind == "ADALORA, pruned":
            _prune(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += shift * torch.randn_like(parameter)
        model.save_pretrained(folder, save_embedding_layers=kind.endswith("saved with them") or "auto")


def make_by_hand(kind: str, folder: Path) -> None:
    """One of `ELSEWHERE` as a directory that says so, with a tensor in it."""
    folder.mkdir(parents=True)
    config = {"peft_type": kind, "task_type": "SEQ_CLS", **ELSEWHERE[kind]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.x": torch.ones(1)}, folder / "adapter_model.safetensors")


def on_upgrade(adapter: Path, old: Path, new: Path, folder: Path) -> Path:
    """The adapter as it ought to be on an upgrade: new + (tuned - old) for values of the base's own tensors."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    before, after = (load_file(base / "model.safetensors") for base in (old, new))
    shutil.copytree(adapter, folder)
    for name, tuned in tensors.items():
        own = name.removeprefix("base_model.model.bert.")
        for part in (".base_layer", ".ln_tuning_layers"):
            own = own.replace(part, "")
        if own in before and not own.startswith("pooler."):  # that is the task's, like the classifier
            tensors[name] = after[own] + (tuned - before[own])
        elif own.endswith("trainable_tokens_delta"):
            rows = f"{WORDS}.weight"
            tensors[name] = after[rows][TOKENS] + (tuned - before[rows][TOKENS])
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def _prune(model: PeftModel) -> None:
    """Train AdaLoRA to its end: it keeps the ranks that matter most."""
    words = torch.arange(5, 17).view(1, 12)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, 4):
        model(input_ids=words, labels=torch.tensor([1])).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()

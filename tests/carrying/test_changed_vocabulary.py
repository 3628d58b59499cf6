"""Weights go from a model with Mistral's first tokenizer to one with its third: same pieces, nearly all in other rows.

The models are tiny, the tokenizers real (from the package `mistral-common`): 32,000 pieces become 32,768, all old ones
are kept, and three keep their number. Right is plain peft, or plain transformers, on the same upgrade with its rows
where they were, the weights moved by hand: for texts of old pieces every logit of an old piece must be the same number.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import taken_in, trained
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recyclable.carrying import starts
from recyclable.carrying.changes import FoundChanges
from recyclable.recipes.apply import apply
from recyclable.recipes.lineage import declare
from recyclable.weights.manifest import ADAPTER
from recyclable.weights.vocabulary import in_place

OLD, NEW = "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"
TEXTS = ("Recycled weights keep what they know when their base moves on.", "La glycémie à jeun: 5,4 mmol/l; 東京.")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = [272, 1024, 12345, 31999]
KINDS = {
    "words": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "factors": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": ROWS},
    "words-tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "factors-tied": {"target_modules": ["q_proj", "embed_tokens"]},
    "rows-tied": {"target_modules": ["q_proj"], "trainable_token_indices": ROWS},
    "delta": {},
    "delta-tied": {},
}


def tokenizer_file(name: str) -> Path:
    """One of the package's files; importing the package is not needed for it."""
    found = find_spec("mistral_common")
    if found is None or found.origin is None:
        pytest.skip("mistral-common is not installed: `pip install .[test]`")
    return Path(found.origin).parent / "data" / name


def plain(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder).eval()


def moved(model: LlamaForCausalLM, seed: int, scale: float) -> LlamaForCausalLM:
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=noise)
    return model


class World:
    """A model, its upgrade with the rows where they were, and the same upgrade with the new tokenizer."""

    def __init__(self, folder: Path, tied: bool) -> None:
        self.folder = folder
        self.old, self.upgrade, self.child = (folder / name for name in ("old", "upgrade", "child"))
        for base, file in ((self.old, OLD), (self.child, NEW)):
            base.mkdir(parents=True)
            shutil.copyfile(tokenizer_file(file), base / "tokenizer.model")
            (base / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, tie_word_embeddings=tied, **sizes))
        moved(model, 1, 0.3).save_pretrained(self.old)
        moved(model, 2, 0.1).save_pretrained(self.upgrade)
        before, after = (AutoTokenizer.from_pretrained(base).get_vocab() for base in (self.old, self.child))
        self.row = torch.tensor([after[piece] for piece in sorted(before, key=before.__getitem__)])
        tensors = load_file(self.upgrade / "model.safetensors")
        for name in {EMBEDDING, HEAD} & tensors.keys():
            rows = 0.3 * torch.randn(len(after), 16, generator=torch.Generator().manual_seed(3))
            rows[self.row] = tensors[name]
            tensors[name] = rows
        save_file(tensors, self.child / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((self.upgrade / "config.json").read_text())
        (self.child / "config.json").write_text(json.dumps({**config, "vocab_size": len(after)}))
        declare(str(self.child), str(self.old))

    def tuned(self, kind: str) -> Path:
        """What was tuned on the old model elsewhere: peft's directory, or a whole model's."""
        folder = self.folder / f"tuned-{kind}"
        if not folder.exists():
            if kind.startswith("delta"):
                moved(plain(self.old), 4, 0.1).save_pretrained(folder)
                shutil.copyfile(self.old / "tokenizer.model", folder / "tokenizer.model")
                shutil.copyfile(self.old / "tokenizer_config.json", folder / "tokenizer_config.json")
            else:
                torch.manual_seed(0)
                config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=12, **KINDS[kind])
                trained(get_peft_model(plain(self.old), config), 0.1).save_pretrained(folder)
        return folder

    def wanted(self, kind: str) -> list[torch.Tensor]:
        """The logits of old pieces, all by hand and with the rows where they were."""
        old, new = (load_file(base / "model.safetensors") for base in (self.old, self.upgrade))
        folder = self.folder / f"by-hand-{kind}"
        shutil.rmtree(folder, ignore_errors=True)
        if kind.startswith("delta"):
            tuned = load_file(self.tuned(kind) / "model.safetensors")
            model = plain(self.upgrade)
            model.load_state_dict({n: new[n] + (tuned[n] - old[n]) for n in tuned}, strict="tied" not in kind)
            return [said(model, ids) for ids in self.ids(self.old)]
        shutil.copytree(self.tuned(kind), folder)
        tensors = load_file(folder / ADAPTER)
        for name, tensor in tensors.items():
            own = name.removeprefix("base_model.model.").replace("base_layer.", "")
            own = own.replace("token_adapter.trainable_tokens_delta", "weight")
            if own in new:
                rows = ROWS if "trainable" in name else slice(None)
                tensors[name] = new[own][rows] + (tensor - old[own][rows])
        save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
        model = PeftModel.from_pretrained(plain(self.upgrade), folder)
        return [said(model, ids) for ids in self.ids(self.old)]

    def found(self, kind: str, out: Path) -> list[torch.Tensor]:
        """The same of the weights carried onto the child, its pieces in the old order."""
        weights = taken_in(self.tuned(kind), self.old, None, out / "weights")
        apply([weights], self.child, out / "applied", FoundChanges())
        if kind.startswith("delta"):
            model: torch.nn.Module = plain(out / "applied")
        else:
            model = PeftModel.from_pretrained(plain(self.child), out / "applied")
        return [said(model, ids)[..., self.row] for ids in self.ids(self.child)]

    def ids(self, base: Path) -> list[torch.Tensor]:
        tokenizer = AutoTokenizer.from_pretrained(base)
        return [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]


def said(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, World]:
    return {tied: World(tmp_path_factory.mktemp("mistral") / str(tied), tied) for tied in (False, True)}


def test_all_pieces_are_kept_and_three_keep_their_number(worlds: dict[bool, World]) -> None:
    world = worlds[False]
    assert (world.row == torch.arange(32_000)).sum() == 3
    for old, new in zip(world.ids(world.old), world.ids(world.child), strict=True):
        assert torch.equal(world.row[old], new), "the texts are of old pieces"


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_old_pieces_are_the_same_numbers(worlds: dict[bool, World], kind: str, tmp_path: Path) -> None:
    world = worlds["tied" in kind]
    for found, wanted in zip(world.found(kind, tmp_path), world.wanted(kind), strict=True):
        assert torch.equal(found, wanted), (found - wanted).abs().max()


@pytest.mark.parametrize("kind", ["words", "factors", "delta", "delta-tied"])
def test_carried_by_row_number_they_would_not_be(
    worlds: dict[bool, World], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = worlds["tied" in kind]
    monkeypatch.setattr(starts, "align", in_place)
    for found, wanted in zip(world.found(kind, tmp_path), world.wanted(kind), strict=True):
        assert np.median((found - wanted).abs().numpy()) > 0.01

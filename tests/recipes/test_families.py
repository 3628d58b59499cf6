"""Every family of encoders that transformers has a classifier for, end to end, beside plain transformers and peft.

None ends in a traceback: what was tuned elsewhere comes out of the store bit for bit on its own base and as new + tuned
- old on an upgrade, or is refused in one line.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoders import (
    REFUSED,
    SIZES,
    UNTIED,
    encoder,
    encoder_config,
    encoder_tokenizer,
    head_names,
    linear_names,
    moved,
    save,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PretrainedConfig, PreTrainedModel
from verbs import Verbs
from worlds import LABELS, make_task

from recyclable.weights.remembered import VARIABLE as CACHE
from recyclable.weights.store import VARIABLE as STORE

WEIGHTS = "model.safetensors"
TEXTS = ["w1 w20 w33", "w11 w0 w7 w60 w61", "w5 w6"]
NAMED = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
EXACT = [*((family, True) for family in SIZES if family not in REFUSED), *((family, False) for family in UNTIED)]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("families") / "task", train=6, dev=6, test=6)


@pytest.fixture
def verbs(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Verbs:
    monkeypatch.setenv(STORE, str(tmp_path / "store"))
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return Verbs(tmp_path, capsys)


def done(verbs: Verbs, *argv: object) -> None:
    status, said = verbs.run(*argv)
    assert status == 0, said


def classifier(folder: Path) -> PreTrainedModel:
    """As plain transformers opens it."""
    torch.manual_seed(7)  # of a head that the files lack
    return AutoModelForSequenceClassification.from_pretrained(folder, **NAMED).eval()


def logits(model: PreTrainedModel, config: PretrainedConfig) -> torch.Tensor:
    inputs = encoder_tokenizer(config)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def on_upgrade(tuned: Path, old: Path, new: Path, folder: Path) -> Path:
    """new + tuned - old of the backbone's tensors, the pooler's aside; of the head the tuned ones."""
    model = classifier(tuned)
    prefix, heads = f"{model.base_model_prefix}.", tuple(f"{name}." for name in head_names(model))

    def tensors(base: Path) -> dict[str, torch.Tensor]:
        """Of the backbone, whether it was saved alone or with a head."""
        return {name.removeprefix(prefix): tensor for name, tensor in load_file(base / WEIGHTS).items()}

    wanted, of_old, of_new = load_file(tuned / WEIGHTS), tensors(old), tensors(new)
    for name, tensor in wanted.items():
        inside = name.removeprefix(prefix)
        # ModernBERT's masked-LM head and its classifier's have parts of the same name
        if inside in of_old and not inside.startswith(heads) and tensor.is_floating_point():
            wanted[name] = of_new[inside] + tensor - of_old[inside]
    folder.mkdir()
    save_file(wanted, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_bytes((tuned / "config.json").read_bytes())
    return folder


def made(verbs: Verbs, config: PretrainedConfig) -> tuple[Path, Path, Path]:
    """A base, its declared upgrade and a tuned classifier, as plain transformers saves them."""
    base = save(encoder(config, 1), verbs.tmp / "base")
    up = save(moved(encoder(config, 1), 2), verbs.tmp / "up")
    tuned = save(moved(classifier(base), 3), verbs.tmp / "tuned")
    done(verbs, "lineage", "declare", up, "--parent", base)
    for each in (base, up):
        done(verbs, "lineage", "show", each)
    return base, up, tuned


@pytest.mark.parametrize(("family", "tied"), EXACT, ids=lambda value: {True: "tied", False: "untied"}.get(value, value))
def test_tuned_weights_and_a_lora_on_their_base_and_on_an_upgrade(
    verbs: Verbs, task: Path, family: str, tied: bool
) -> None:
    config = encoder_config(family, **({} if tied else {"tie_word_embeddings": False}))
    base, up, tuned = made(verbs, config)
    done(verbs, "store", "add", "--tuned", tuned, "--base", base, "--name", "full")
    done(verbs, "store", "export", "full", "--merged", "--base", base, "--out", verbs.tmp / "own")
    own, found = classifier(tuned), classifier(verbs.tmp / "own")
    assert all(torch.equal(found.get_parameter(name), parameter) for name, parameter in own.named_parameters())
    assert logits(own, config).std() > 1e-3, "the model says the same of every text"
    assert torch.equal(logits(found, config), logits(own, config))
    done(verbs, "store", "export", "full", "--merged", "--base", up, "--out", verbs.tmp / "new")
    wanted, found = classifier(on_upgrade(tuned, base, up, verbs.tmp / "wanted")), classifier(verbs.tmp / "new")
    for name, parameter in wanted.named_parameters():
        assert torch.allclose(found.get_parameter(name), parameter, atol=1e-6), name
    assert torch.allclose(logits(found, config), logits(wanted, config), atol=1e-4)
    assert (
        AutoTokenizer.from_pretrained(verbs.tmp / "new")(TEXTS).input_ids == encoder_tokenizer(config)(TEXTS).input_ids
    )
    done(verbs, "evaluate", "--weights", "full", "--base", up, "--task", task)
    if linear_names(own):
        check_lora(verbs, config, base, up)


def check_lora(verbs: Verbs, config: PretrainedConfig, base: Path, up: Path) -> None:
    model = classifier(base)
    heads = {"task_type": "SEQ_CLS", "modules_to_save": head_names(model)}
    torch.manual_seed(4)
    moved(get_peft_model(model, LoraConfig(r=2, target_modules=linear_names(model), **heads)), 4, 0.2).save_pretrained(
        verbs.tmp / "lora"
    )
    labels = ("--labels", ",".join(LABELS))
    done(verbs, "store", "add", "--tuned", verbs.tmp / "lora", "--base", base, "--name", "lora", *labels)
    for folder in (base, up):
        out = verbs.tmp / f"lora-{folder.name}"
        done(verbs, "store", "export", "lora", "--merged", "--base", folder, "--out", out)
        wanted = logits(PeftModel.from_pretrained(classifier(folder), verbs.tmp / "lora").eval(), config)
        assert torch.allclose(logits(classifier(out), config), wanted, atol=2e-5 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_is_not_understood_is_refused_in_one_line(verbs: Verbs, family: str) -> None:
    base, _, tuned = made(verbs, encoder_config(family))
    assert REFUSED[family] in verbs.refused("store", "add", "--tuned", tuned, "--base", base, "--name", "full")


@pytest.mark.parametrize("architecture", ["FunnelModel", "FunnelBaseModel", "FunnelForMaskedLM", None])
def test_a_family_with_two_backbones_is_shown_whichever_saved_it(verbs: Verbs, architecture: str | None) -> None:
    import transformers

    model = getattr(transformers, architecture or "FunnelModel")(encoder_config("funnel"))
    model.save_pretrained(verbs.tmp / "base")
    if architecture is None:
        del model.config.architectures
        model.config.save_pretrained(verbs.tmp / "base")
    done(verbs, "lineage", "show", verbs.tmp / "base")

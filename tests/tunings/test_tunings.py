"""Every kind of tuning on decoders and an encoder-decoder: what is trained, drawn, saved, and opened by plain peft."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import END, PAD, SEQ2SEQ, decoder, decoder_config, decoder_tokenizer
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from recyclable.carrying.places import saved_tensors
from recyclable.errors import InputError
from recyclable.models.build import start_all, structure
from recyclable.tunings import TUNINGS
from recyclable.weights.base import Base
from recyclable.weights.manifest import ADAPTER
from recyclable.weights.sources import fill, is_unread

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora_r": 2},
    "lora, everything": {
        **{"use_rslora": True, "use_dora": True, "target_modules": "all-linear", "lora_alpha": 3},
        **{"rank_pattern": {r".*\.0\..*": 3}, "alpha_pattern": {r".*\.1\..*": 7}},
    },
    "bottleneck": {"bottleneck_size": 4},
    "ia3": {},
    "prefix": {"num_virtual_tokens": 3},
    "prefix, projected": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 5},
    "prompt": {"num_virtual_tokens": 3},
}
FAMILIES = ["gpt2", "llama", "qwen3", "gemma3_text", "t5"]
AUTO: dict[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}
LENGTHS = [9, 6, 4]
IDS, ANSWERS = (torch.randint(5, 200, (3, n), generator=torch.Generator().manual_seed(n)) for n in (9, 5))


@dataclass(frozen=True)
class Made:
    """A base with its head, saved."""

    family: str
    task_type: str
    folder: Path

    @property
    def plain(self) -> PreTrainedModel:
        """As plain transformers opens it."""
        return AUTO[self.task_type].from_pretrained(self.folder).eval()

    def unread(self) -> PreTrainedModel:
        """As this package makes it before any value is read."""
        base = Base(self.folder)
        model = structure(base.config, AUTO[self.task_type])
        start_all(model, base, 0)
        return model

    def attached(self, tuning: str, seed: int = 7, **settings: Any) -> nn.Module:
        """For this kind of tuning, with values."""
        kind = TUNINGS.get(tuning.partition(",")[0])
        return fill(kind(**(ADAPTERS.get(tuning, {}) | settings)).attach(self.unread(), self.task_type, seed)).eval()

    def texts(self) -> Iterator[dict[str, torch.Tensor]]:
        """Each text alone, without padding."""
        for row, length in enumerate(LENGTHS):
            ids = IDS[row : row + 1, :length].clone()
            if self.family in SEQ2SEQ:
                ids[0, -1] = END
            two = {"decoder_input_ids": ANSWERS[row : row + 1]} if self.task_type == "SEQ_2_SEQ_LM" else {}
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), **two}

    def batch(self) -> dict[str, torch.Tensor]:
        """All in one, padded on the right."""
        texts = [text["input_ids"][0].tolist() for text in self.texts()]
        tokenizer = decoder_tokenizer(self.family, side="right", pad_token="<pad>")
        two = {"decoder_input_ids": ANSWERS} if self.task_type == "SEQ_2_SEQ_LM" else {}
        return {**tokenizer.pad({"input_ids": texts}, return_tensors="pt"), **two}

    def alone(self, model: nn.Module) -> list[torch.Tensor]:
        """Logits of each text by itself."""
        with torch.no_grad():
            return [model(**text).logits[0] for text in self.texts()]


def make(folder: Path, family: str, task_type: str) -> Made:
    config = decoder_config(family, pad_token_id=PAD, num_labels=3)
    decoder(config, 1, AUTO[task_type]).save_pretrained(folder)
    decoder_tokenizer(family).save_pretrained(folder)
    return Made(family, task_type, folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Made]:
    root = tmp_path_factory.mktemp("bases")
    found = {}
    for family in FAMILIES:
        for classes in (True, False):
            text = "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "CAUSAL_LM"
            found[family, classes] = make(root / f"{family}-{classes}", family, "SEQ_CLS" if classes else text)
    return found


def step(model: nn.Module, batch: dict[str, torch.Tensor], steps: int = 2) -> None:
    """Some plain steps on what is trained."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model(**batch).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("classes", [True, False], ids=["classes", "text"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tuning", ADAPTERS)
def test_plain_peft_opens_what_was_trained_with_the_same_logits(
    bases: dict[tuple[str, bool], Made], family: str, tuning: str, classes: bool, tmp_path: Path
) -> None:
    made = bases[family, classes]
    if family in SEQ2SEQ and classes and tuning.startswith(("prompt", "prefix")):
        with pytest.raises(InputError, match="cannot have before a text"):
            made.attached(tuning)
        return
    model = made.attached(tuning)
    before = made.alone(model)
    step(model, made.batch())
    after = made.alone(model)
    assert max((one - other).abs().max() for one, other in zip(before, after, strict=True)) > 1e-3, "it learns"
    values = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = saved_tensors(model, values)
    save_file({name: tensor.detach().contiguous() for name, tensor in saved.items()}, tmp_path / ADAPTER)
    model.peft_config["default"].save_pretrained(str(tmp_path))
    opened = PeftModel.from_pretrained(made.plain, tmp_path).eval()
    for found, wanted in zip(made.alone(opened), after, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    if classes:
        with torch.no_grad():  # as this package reads them, prompts before them or not
            torch.testing.assert_close(model(**made.batch()).logits, torch.stack(after), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [True, False], ids=["classes", "text"])
@pytest.mark.parametrize("tuning", ADAPTERS)
def test_whole_modules_are_saved_only_of_the_tasks_head_and_norms(
    bases: dict[tuple[str, bool], Made], tuning: str, classes: bool
) -> None:
    model = bases["llama", classes].attached(tuning)
    whole = {name for name in saved_tensors(model) if not name.startswith("prompt") and "_layer" not in name}
    whole = {n for n in whole if not any(part.startswith(("lora", "ia3", "bottleneck")) for part in n.split("."))}
    norms = {name for name in whole if "norm" in name}
    assert all("score" in name for name in whole - norms) and bool(whole - norms) == classes
    assert bool(norms) == tuning.startswith("bottleneck")


@pytest.mark.parametrize("tuning", ADAPTERS)
def test_fresh_values_depend_on_the_seed_alone(bases: dict[tuple[str, bool], Made], tuning: str) -> None:
    def values(seed: int, disturb: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(disturb)
        model = bases["gpt2", False].attached(tuning, seed)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    one, same, other = values(7, 0), values(7, 1), values(8, 0)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one) != (tuning == "ia3")


@pytest.mark.parametrize("tuning", [*(name for name in ADAPTERS if name != "lora, everything"), "bias", "full"])
def test_a_base_stays_unread_until_it_is_asked_for(bases: dict[tuple[str, bool], Made], tuning: str) -> None:
    kind, made = TUNINGS.get(tuning.partition(",")[0]), bases["gpt2", True]
    assert is_unread(kind(**ADAPTERS.get(tuning, {})).attach(made.unread(), made.task_type, 7))


# ---- biases alone


@pytest.mark.parametrize("classes", [True, False], ids=["classes", "text"])
def test_of_biases_alone_nothing_else_moves_but_the_tasks_head(
    bases: dict[tuple[str, bool], Made], classes: bool
) -> None:
    made = bases["gpt2", classes]
    model, before = made.attached("bias"), made.plain.state_dict()
    step(model, made.batch())
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in moved if not name.startswith("score.")} == {n for n in before if n.endswith(".bias")}
    assert ("score.weight" in moved) is classes


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "t5"])
def test_a_base_without_biases_has_none_to_train(bases: dict[tuple[str, bool], Made], family: str) -> None:
    with pytest.raises(InputError, match=f"tuning: is bias, but a {family} has no biases"):
        bases[family, True].attached("bias")


# ---- which modules


LINEAR = ["gpt2", "opt", "gpt_neox", "llama", "phi3", "t5", "bart"]


@pytest.mark.parametrize("text", [False, True], ids=["classes", "text"])
@pytest.mark.parametrize("family", LINEAR)
def test_every_linear_module_is_what_plain_peft_takes_for_it(family: str, text: bool) -> None:
    kind = "SEQ_CLS" if not text else "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "CAUSAL_LM"
    config = decoder_config(family, pad_token_id=PAD, num_labels=3)

    def adapted(model: nn.Module) -> set[str]:
        names = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        return {name for name in names if "classification_head" not in name}  # which is trained whole here

    ours = TUNINGS.get("lora")(target_modules="all-linear").attach(decoder(config, 1, AUTO[kind]), kind, 7)
    plain = LoraConfig(task_type=TaskType(kind), target_modules="all-linear")
    theirs = get_peft_model(decoder(config, 1, AUTO[kind]), plain)
    assert adapted(ours) == adapted(theirs) and adapted(ours)
    backbone = ours.get_base_model().base_model
    inside = {id(m) for layer in backbone.modules() if isinstance(layer, BaseTunerLayer) for m in layer.modules()}
    left = [n for n, m in backbone.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and id(m) not in inside]
    assert all("lm_head" in name for name in left), "fused projections are modules like others"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_are_no_modules_are_not_passed_over_in_silence(family: str) -> None:
    model = decoder(decoder_config(family))
    lora = TUNINGS.get("lora")
    experts = r"leaves out 4 tensors that are no modules, such as model\.layers\.0\.mlp\.experts\.gate_up_proj"
    with pytest.raises(InputError, match=rf"target_modules: is all-linear, which {experts}.*name the modules"):
        lora(target_modules="all-linear").attach(model, "CAUSAL_LM", 7)
    with pytest.raises(InputError, match=r"has 'down_proj', which means .*experts\.down_proj as well, a tensor"):
        lora(target_modules=["q_proj", "down_proj"]).attach(model, "CAUSAL_LM", 7)
    named = lora(target_modules=["q_proj", "v_proj"]).attach(model, "CAUSAL_LM", 7)
    assert sum(isinstance(module, LoraLayer) for module in named.modules()) == 4


SEVEN = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def on(model: nn.Module) -> list[str]:
    """The modules that have an adapter, in order of their names."""
    found = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return sorted(name.removeprefix("base_model.model.model.layers.") for name in found)


DENSE: dict[str, Any] = {"mlp_only_layers": [0]}
"""A mixture of experts whose first layer has none."""


@pytest.mark.parametrize("tuning", ["lora", "ia3", "bottleneck"])
@pytest.mark.parametrize(
    ("family", "changed", "targets", "found", "tensor"),
    [
        ("qwen2_moe", {}, SEVEN, "has 'gate_proj'", "0.mlp.experts.gate_up_proj"),
        ("qwen2_moe", {}, r".*_proj", "is '.*_proj'", "0.mlp.experts.gate_up_proj"),
        ("qwen2_moe", {}, r".*(q_proj|experts\.\d+\.down_proj)", "is '.*(q_proj", "0.mlp.experts.down_proj"),
        ("qwen3_moe", DENSE, SEVEN, "has 'gate_proj'", "1.mlp.experts.gate_up_proj"),
        ("qwen3_moe", DENSE, r".*\.(q|up)_proj", "is '.*", "1.mlp.experts.gate_up_proj"),
        ("mixtral", {}, ["q_proj", "w2"], "has 'w2'", "0.mlp.experts.down_proj"),
        ("mixtral", {}, r".*(q_proj|w3)", "is '.*(q_proj|w3)'", "0.mlp.experts.gate_up_proj"),
        ("mixtral", {}, ["q_proj", "experts"], "has 'experts'", "0.mlp.experts.gate_up_proj"),
    ],
)
def test_names_that_experts_have_too_are_refused_whatever_else_they_match(
    tuning: str, family: str, changed: dict[str, Any], targets: list[str] | str, found: str, tensor: str
) -> None:
    model = decoder(decoder_config(family, **changed))
    with pytest.raises(InputError) as caught:
        TUNINGS.get(tuning)(target_modules=targets).attach(model, "CAUSAL_LM", 7)
    said = str(caught.value)
    assert said.startswith(f"target_modules: {found}") and "\n" not in said
    assert f", which means model.layers.{tensor} as well, a tensor and not a module" in said
    assert "expected names of modules alone, such as k_proj, o_proj, q_proj, " in said


@pytest.mark.parametrize("tuning", ["lora", "ia3", "bottleneck"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_names_of_modules_alone_go_on_them_beside_experts(tuning: str, family: str) -> None:
    attention = [f"{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "kv"]
    for targets in (["k_proj", "v_proj"], r".*\.self_attn\.[kv]_proj"):
        model = decoder(decoder_config(family, **(DENSE if family == "qwen3_moe" else {})))
        assert on(TUNINGS.get(tuning)(target_modules=targets).attach(model, "CAUSAL_LM", 7)) == attention
    if family == "qwen2_moe":
        made = TUNINGS.get(tuning)(target_modules=r".*\.shared_expert\.\w+_proj").attach(
            decoder(decoder_config(family)), "CAUSAL_LM", 7
        )
        assert on(made) == [f"{n}.mlp.shared_expert.{x}_proj" for n in (0, 1) for x in ("down", "gate", "up")]


def test_what_is_left_out_is_peft_s_choice_where_it_means_modules_alone() -> None:
    assert on(TUNINGS.get("lora")().attach(decoder(decoder_config("mixtral")), "CAUSAL_LM", 7)) == [
        f"{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"
    ]
    said = r"is left out, and PEFT's choice for a mixtral has 'w2', which means .*experts\.down_proj as well"
    with pytest.raises(InputError, match=said):
        TUNINGS.get("ia3")().attach(decoder(decoder_config("mixtral")), "CAUSAL_LM", 7)
    for tuning in ("lora", "ia3"):
        with pytest.raises(
            InputError, match=r"is left out, and PEFT has no choice for a qwen3_moe: expected .* k_proj, "
        ):
            TUNINGS.get(tuning)().attach(decoder(decoder_config("qwen3_moe")), "CAUSAL_LM", 7)
    for family in ("mixtral", "qwen2_moe", "qwen3_moe"):
        with pytest.raises(InputError, match=r"target_modules: .*sublayers end in a Linear module is not to be seen"):
            TUNINGS.get("bottleneck")().attach(decoder(decoder_config(family)), "CAUSAL_LM", 7)


@pytest.mark.parametrize(
    ("family", "changed", "targets", "said"),
    [
        ("mixtral", {}, r".*\.1\..*q_proj", "means not model.layers.0.self_attn.q_proj, on which PEFT puts an adapter"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, SEVEN, "means model.layers.0.mlp.down_proj, which PEFT leaves out"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "all-linear", "means model.layers.0.mlp.down_proj, which PEFT"),
    ],
)
def test_where_peft_renames_experts_lora_goes_on_what_is_named_or_nowhere(
    family: str, changed: dict[str, Any], targets: list[str] | str, said: str
) -> None:
    with pytest.raises(InputError, match=f"target_modules: {re.escape(said)}.*expected a list of modules' whole names"):
        TUNINGS.get("lora")(target_modules=targets).attach(decoder(decoder_config(family, **changed)), "CAUSAL_LM", 7)
    whole = ["model.layers.1.self_attn.q_proj"]
    made = TUNINGS.get("lora")(target_modules=whole).attach(decoder(decoder_config(family, **changed)), "CAUSAL_LM", 7)
    assert on(made) == ["1.self_attn.q_proj"]


@pytest.mark.parametrize("tuning", ["lora", "ia3", "bottleneck"])
@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "k_prj"], "has 'k_prj', but the name of no module of a LlamaForCausalLM ends so"),
        (r".*\.[", "is no regular expression"),
        (r"(.*a)+b", "may take forever to match"),
        (r"nothing\.like\.it", "which is the whole name of no module of a LlamaForCausalLM"),
    ],
)
def test_modules_that_are_not_there_are_refused(tuning: str, targets: list[str] | str, said: str) -> None:
    with pytest.raises(InputError, match="target_modules: ") as caught:
        TUNINGS.get(tuning)(target_modules=targets).attach(decoder(decoder_config("llama")), "CAUSAL_LM", 7)
    assert said in str(caught.value)


def test_a_regular_expression_names_modules_as_in_peft() -> None:
    model = TUNINGS.get("lora")(target_modules=r".*\.1\..*\.(q|v)_proj").attach(
        decoder(decoder_config("llama")), "CAUSAL_LM", 7
    )
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    inside = "base_model.model.model.layers.1.self_attn"
    assert adapted == {f"{inside}.q_proj", f"{inside}.v_proj"}


def test_settings_that_nothing_would_read_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder_hidden_size is given, but nothing reads it without prefix_proj"):
        TUNINGS.get("prefix")(encoder_hidden_size=4)
    with pytest.raises(ValueError, match="feedforward_modules are given without target_modules"):
        TUNINGS.get("ia3")(feedforward_modules=["down_proj"])

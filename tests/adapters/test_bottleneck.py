"""The bottleneck adapter against a plain PyTorch oracle, and through everything PEFT does with an adapter."""

from __future__ import annotations

import copy
import importlib
import math
import pickle

import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from recyclable.adapters import bottleneck
from recyclable.adapters.bottleneck import BottleneckConfig, BottleneckLayer
from recyclable.errors import InputError
from recyclable.models.adapters import attach_fresh

LAYERS, WIDTH = 2, 16
SHAPE = {
    "vocab_size": 50,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
BERT_LIKE = ["attention.output.dense", "output.dense"]
ENDS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2"), BERT_LIKE),
    "distilbert": ["attention.out_lin", "ffn.lin2"],
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "opt": ["self_attn.out_proj", "fc2"],
}
CLASSES = {
    "bert": (BertConfig, BertForSequenceClassification),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
}
KINDS = pytest.mark.parametrize("kind", CLASSES)
IDS = torch.arange(3, 27).reshape(3, 8)
MASK = torch.ones_like(IDS)
MASK[0, 5:] = 0


def plain_model(kind: str = "bert", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same random model on every call."""
    torch.manual_seed(0)
    config_class, model_class = CLASSES[kind]
    return model_class(config_class(**SHAPE, num_labels=3, initializer_range=0.3)).to(dtype).eval()


def with_adapter(kind: str = "bert", dtype: torch.dtype = torch.float32, **fields) -> PeftModel:
    return get_peft_model(plain_model(kind, dtype), BottleneckConfig(**fields)).eval()


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 1) -> None:
    """Random values, far from the identity, for everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=MASK).logits


def oracle_logits(kind: str, dtype: torch.dtype, adapter: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the plain model with the adapter written as forward hooks on matrices, with an explicit erf."""
    model = plain_model(kind, dtype)

    def hook(place: str):
        down, down_bias, up, up_bias = (
            adapter[f"base_model.model.{place}.bottleneck_{part}"]
            for part in ("down.weight", "down.bias", "up.weight", "up.bias")
        )

        def add_adapter(module, args, y):
            z = torch.einsum("...h,bh->...b", y, down) + down_bias
            z = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
            return y + torch.einsum("...b,hb->...h", z, up) + up_bias

        return add_adapter

    for number, layer in enumerate(getattr(model, kind).encoder.layer):
        place = f"{kind}.encoder.layer.{number}"
        layer.attention.output.dense.register_forward_hook(hook(f"{place}.attention.output.dense"))
        layer.output.dense.register_forward_hook(hook(f"{place}.output.dense"))
    return logits(model)


@KINDS
def test_fresh_adapter_is_the_identity_bit_for_bit(kind):
    assert torch.equal(logits(with_adapter(kind)), logits(plain_model(kind)))


def test_without_init_weights_a_fresh_adapter_is_not_the_identity():
    assert not torch.equal(logits(with_adapter(init_weights=False)), logits(plain_model()))


@KINDS
def test_perturbed_adapter_equals_forward_hooks_on_the_plain_model(kind):
    model = with_adapter(kind, torch.float64, bottleneck_size=5)
    perturb(model)
    found = logits(model)
    expected = oracle_logits(kind, torch.float64, get_peft_model_state_dict(model))
    assert (found - logits(plain_model(kind, torch.float64))).abs().max() > 0.1, "the adapter does nothing"
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@KINDS
@pytest.mark.parametrize("size", [24, 7])
def test_trainable_parameters_follow_the_formula(kind, size):
    model = with_adapter(kind, bottleneck_size=size)
    per_sublayer = 2 * WIDTH * size + size + WIDTH
    assert model.get_nb_trainable_parameters()[0] == 2 * LAYERS * per_sublayer
    assert all("bottleneck_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_gradients_reach_every_adapter_weight_and_only_those():
    model = with_adapter()
    perturb(model)
    model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1, 2])).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == ("bottleneck_" in name), name


@pytest.mark.parametrize("model_type", ENDS)
def test_each_model_type_gets_one_adapter_per_sublayer(model_type):
    shape = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 32} if model_type == "distilbert" else {}
    torch.manual_seed(0)
    base = AutoModel.from_config(AutoConfig.for_model(model_type, **{**SHAPE, **shape})).eval()
    before = base(input_ids=IDS).last_hidden_state
    model = get_peft_model(base, BottleneckConfig())
    assert model.peft_config["default"].target_modules == ENDS[model_type]
    wrapped = [module for module in model.modules() if isinstance(module, BottleneckLayer)]
    assert len(wrapped) == 2 * LAYERS
    assert not any(isinstance(layer.base_layer, BottleneckLayer) for layer in wrapped)
    assert torch.equal(model(input_ids=IDS).last_hidden_state, before)
    perturb(model)
    assert not torch.allclose(model(input_ids=IDS).last_hidden_state, before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@KINDS
def test_saved_adapter_and_modules_to_save_load_to_the_same_logits(kind, low_cpu_mem_usage, tmp_path):
    extra = ["LayerNorm", "classifier"] + (["pooler"] if kind == "bert" else [])
    model = with_adapter(kind, bottleneck_size=6, activation="relu", modules_to_save=extra)
    perturb(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()

    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, BottleneckConfig)
    assert (config.bottleneck_size, config.activation, config.modules_to_save) == (6, "relu", extra)
    assert config.target_modules == ENDS[kind]

    loaded = PeftModel.from_pretrained(plain_model(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_state_dict_round_trip_restores_the_adapter():
    model, other = with_adapter(), with_adapter()
    perturb(model)
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(logits(other), logits(model))


@KINDS
def test_disable_adapter_restores_the_base_and_enables_again(kind):
    model = with_adapter(kind, modules_to_save=["LayerNorm", "classifier"])
    perturb(model)
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain_model(kind)))
    assert torch.equal(logits(model), adapted)


def test_unload_gives_the_plain_model_back():
    model = with_adapter()
    perturb(model)
    base = model.unload()
    assert torch.equal(logits(base), logits(plain_model()))
    assert base.state_dict().keys() == plain_model().state_dict().keys()


@KINDS
def test_unload_removes_the_adapter_and_keeps_tuned_modules_as_peft_does(kind):
    model = with_adapter(kind, modules_to_save=["LayerNorm", "classifier"])
    perturb(model)
    base = copy.deepcopy(model).unload()
    for layer in model.modules():
        if isinstance(layer, BottleneckLayer):
            layer.reset_bottleneck_parameters("default")
    assert torch.equal(logits(base), logits(model))
    assert not torch.equal(logits(base), logits(plain_model(kind)))


def test_set_adapter_switches_between_two_adapters():
    model = with_adapter()
    perturb(model)
    first = logits(model)
    model.add_adapter("second", BottleneckConfig(bottleneck_size=3, activation="tanh"))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(plain_model()))
    assert all(".second." in name for name, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)


def test_on_a_bf16_base_the_adapter_computes_in_fp32_and_rounds_once():
    model = with_adapter(dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(plain_model(dtype=torch.bfloat16)))
    perturb(model)
    layer = model.base_model.model.bert.encoder.layer[0].output.dense
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    assert {down.weight.dtype, up.weight.dtype} == {torch.float32}
    x = torch.randn(4, 32).to(torch.bfloat16)
    y = layer.base_layer(x).double()
    z = y @ down.weight.double().T + down.bias.double()
    expected = y + z * 0.5 * (1 + torch.erf(z / math.sqrt(2))) @ up.weight.double().T + up.bias.double()
    found = layer(x)
    assert found.dtype == torch.bfloat16
    # Half a unit in the last of bf16's 8 bits is 2**-9 of the value; the rest is room for fp32.
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)
    assert logits(model).dtype == torch.bfloat16


def test_on_the_meta_device_the_adapter_is_meta_until_weights_are_loaded():
    twin = with_adapter()
    perturb(twin)
    with torch.device("meta"):
        model = get_peft_model(plain_model(), BottleneckConfig()).eval()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.state_dict().keys() == twin.state_dict().keys()
    model.to_empty(device="cpu")
    model.load_state_dict(twin.state_dict())
    for buffer, value in zip(model.buffers(), twin.buffers(), strict=True):
        buffer.copy_(value)  # position ids are not part of a state dict
    assert torch.equal(logits(model), logits(twin))


def test_reset_makes_materialised_weights_the_identity():
    layer = BottleneckLayer(nn.Linear(4, 6), "default", BottleneckConfig())
    perturb(layer)
    x = torch.randn(5, 4)
    assert not torch.allclose(layer(x), layer.base_layer(x))
    layer.reset_bottleneck_parameters("default")
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.bottleneck_down["default"].weight.std() > 0.01


def test_explicit_target_modules_are_sublayers_of_any_model():
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.randn(5, 4)
    before = plain(x)
    model = get_peft_model(plain, BottleneckConfig(target_modules=["2"]))
    assert [name for name, m in model.named_modules() if isinstance(m, BottleneckLayer)] == ["base_model.model.2"]
    assert torch.equal(model(x), before)


def test_without_target_modules_a_model_whose_sublayers_are_not_understood_is_a_clear_error():
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("mixtral", vocab_size=50, intermediate_size=8, num_local_experts=2, **size)
    with pytest.raises(ValueError, match=r"target_modules: not given.*'mixtral'"):
        get_peft_model(AutoModel.from_config(config), BottleneckConfig())


def test_gpt2s_transposed_linears_end_its_sublayers():
    config = AutoConfig.for_model("gpt2", vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    plain, ids = AutoModel.from_config(config).eval(), torch.arange(6)[None]
    before = plain(ids).last_hidden_state
    model = get_peft_model(plain, BottleneckConfig(bottleneck_size=4)).eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}
    assert [name.partition("h.0.")[2] for name in layers] == ["attn.c_proj", "mlp.c_proj"]
    assert {tuple(layer.bottleneck_up["default"].weight.shape) for layer in layers.values()} == {(16, 4)}
    assert torch.equal(model(ids).last_hidden_state, before)


def test_a_target_that_is_no_linear_is_a_clear_error():
    with pytest.raises(TypeError, match=r"target_modules: found a LayerNorm, expected torch\.nn\.Linear"):
        with_adapter(target_modules=["LayerNorm"])


@pytest.mark.parametrize("fields", [{"bottleneck_size": 0}, {"bottleneck_size": 2.5}, {"activation": "geloo"}])
def test_impossible_config_is_a_clear_error(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=rf"{name}: found {value!r}, expected"):
        BottleneckConfig(**fields)


@pytest.mark.parametrize("verb", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_and_leaves_the_model_as_it_was(verb):
    model = with_adapter()
    perturb(model)
    before = logits(model)
    with pytest.raises(ValueError, match="nonlinear and cannot be merged"):
        getattr(model, verb)()
    with pytest.raises(ValueError, match="nonlinear and cannot be merged"):
        model.base_model.model.bert.encoder.layer[0].output.dense.merge()
    assert torch.equal(logits(model), before)


def test_the_new_member_behaves_like_any_other_of_the_enum():
    member = BottleneckConfig().peft_type
    assert member is PeftType.BOTTLENECK is PeftType("BOTTLENECK") is PeftType["BOTTLENECK"]
    assert list(PeftType).count(member) == 1 and member in PeftType and isinstance(member, PeftType)
    assert copy.deepcopy(member) is member and pickle.loads(pickle.dumps(member)) is member
    assert (member.name, member.value, str(member)) == ("BOTTLENECK", "BOTTLENECK", "PeftType.BOTTLENECK")


def test_registering_twice_is_harmless():
    members = list(PeftType)
    bottleneck.register()
    bottleneck.register()
    assert list(PeftType) == members
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.BOTTLENECK] is BottleneckConfig


def test_reloading_the_module_is_harmless():
    before, members = dict(vars(bottleneck)), list(PeftType)
    try:
        importlib.reload(bottleneck)
        assert list(PeftType) == members
        model = get_peft_model(plain_model(), bottleneck.BottleneckConfig())
        assert isinstance(model.base_model, bottleneck.BottleneckModel)
        assert torch.equal(logits(model), logits(plain_model()))
    finally:  # other tests hold the classes of the first import
        vars(bottleneck).update(before)
        bottleneck.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.BOTTLENECK] is BottleneckConfig


def test_a_method_of_the_same_name_from_elsewhere_is_not_overwritten(monkeypatch):
    foreign = type("BottleneckModel", (), {"__module__": "peft.tuners.bottleneck"})
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.BOTTLENECK, foreign)
    with pytest.raises(KeyError, match="already PEFT method called 'bottleneck'"):
        bottleneck.register()
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.BOTTLENECK] is foreign


def test_a_target_that_is_no_linear_is_one_line_of_bad_input() -> None:
    model = plain_model()
    with pytest.raises(InputError, match=r"^target_modules: found \['word_embeddings'\]: found a Embedding, expected"):
        attach_fresh(model, BottleneckConfig(target_modules=["word_embeddings"]), "bottleneck", seed=0)

"""Every tensor finds its layer group by the structure, in whatever spelling a family has and whoever wrote the name."""

from __future__ import annotations

import pytest
from families import FAMILIES, LAYERS, config
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForSequenceClassification

from recyclable.architectures.structure import Structure, on_meta
from recyclable.architectures.sublayers import sublayer_ends

# family -> how names of layers begin (the number behind it), embeddings, and what belongs to neither.
WANTED = {
    "bert": ("encoder.layer.", ["embeddings."], ["pooler."]),
    "roberta": ("encoder.layer.", ["embeddings."], ["pooler."]),
    "distilbert": ("transformer.layer.", ["embeddings."], []),
    "electra": ("encoder.layer.", ["embeddings."], ["embeddings_project."]),
    "deberta-v2": ("encoder.layer.", ["embeddings.", "encoder.rel_embeddings."], []),
    "albert": ("encoder.albert_layer_groups.", ["embeddings."], ["encoder.embedding_hidden_mapping_in.", "pooler."]),
    "modernbert": ("layers.", ["embeddings."], ["final_norm."]),
    "gpt2": ("h.", ["wte.", "wpe."], ["ln_f.", "lm_head."]),
    "opt": (
        "decoder.layers.",
        ["decoder.embed_tokens.", "decoder.embed_positions."],
        ["decoder.project_in.", "decoder.project_out.", "decoder.final_layer_norm.", "lm_head."],
    ),
    "gpt_neox": ("layers.", ["embed_in."], ["final_layer_norm.", "lm_head."]),
    **dict.fromkeys(
        ("llama", "qwen3", "gemma2", "cohere", "granite"), ("layers.", ["embed_tokens."], ["norm.", "lm_head."])
    ),
}


def test_every_tiny_family_is_looked_at() -> None:
    assert {*WANTED, "t5"} == set(FAMILIES)


@pytest.mark.parametrize("family", WANTED)
def test_groups_of_a_family(family: str) -> None:
    made = Structure(config(family))
    names = sorted(made.names | made.head)
    layer, embeddings, others = WANTED[family]
    groups = made.layers.split(names)
    layers = [f"layer {i}" for i in range(1 if family == "albert" else LAYERS)]
    assert list(groups) == ["embeddings", *layers, *(["other"] if others else [])]
    for i, group in enumerate(layers):
        assert groups[group] == [name for name in names if name.startswith(f"{layer}{i}.")] != []
    for group, beginnings in (("embeddings", embeddings), ("other", others)):
        assert {b for b in beginnings if any(n.startswith(b) for n in groups[group])} == set(beginnings)
        assert all(name.startswith(tuple(beginnings)) for name in groups.get(group, []))


def test_encoder_and_decoder_are_not_mixed_up() -> None:
    made = Structure(config("t5"))
    groups = made.layers.split(sorted(made.names))
    stacks = [f"{stack} layer {i}" for stack in ("encoder", "decoder") for i in range(LAYERS)]
    assert list(groups) == ["embeddings", *stacks, "other"]
    assert groups["embeddings"] == ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "shared.weight"]
    for group in stacks:
        stack, _, number = group.split()
        assert all(name.startswith(f"{stack}.block.{number}.") for name in groups[group])
    assert len(groups["encoder layer 1"]) < len(groups["decoder layer 1"])


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2", "gpt2", "llama"])
def test_an_adapter_s_names_and_those_of_a_model_with_a_head_fall_into_the_groups_of_what_they_belong_to(
    family: str,
) -> None:
    made = Structure(config(family))
    model = on_meta(made.config, AutoModelForSequenceClassification)
    for name in model.state_dict():
        inside = name.removeprefix(f"{made.prefix}.")
        assert made.layers.of(name) == (made.layers.of(inside) if inside in made.names else "other"), name
    peft = get_peft_model(model, LoraConfig(target_modules=[end.name for end in sublayer_ends(model)]))
    groups = made.layers.split(name for name in get_peft_model_state_dict(peft) if "lora_B" in name)
    assert list(groups) == [f"layer {i}" for i in range(LAYERS)]
    for group, names in groups.items():
        assert all(f".{group.split()[1]}." in name for name in names) and len(names) == 2


def test_numbers_are_in_order_beyond_nine() -> None:
    made = Structure(config("llama", num_hidden_layers=12))
    assert list(made.layers.split(sorted(made.names)))[1:-1] == [f"layer {i}" for i in range(12)]

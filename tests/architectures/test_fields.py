"""Configs by which the same weights compute something else have other digests; others have not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import config, drawn
from transformers import AutoConfig, AutoModel, BertConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from recyclable.architectures.fields import computing_fields, differing_fields

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 5, 6, 7]])
# family, what it is made with, what is changed; weights of the one fit the other.
DIFFERENT = [
    ("bert", {}, {"hidden_act": "relu"}),
    ("bert", {}, {"layer_norm_eps": 0.1}),
    ("bert", {}, {"is_decoder": True}),
    ("roberta", {}, {"pad_token_id": 3}),
    ("distilbert", {}, {"n_heads": 4}),
    ("distilbert", {}, {"activation": "relu"}),
    ("electra", {}, {"num_attention_heads": 4}),
    ("albert", {}, {"num_hidden_layers": 3}),
    ("albert", {}, {"hidden_act": "relu"}),
    ("deberta-v2", {"share_att_key": True}, {"relative_attention": False}),
    ("deberta-v2", {"share_att_key": True}, {"pos_att_type": ["c2p"]}),
    ("deberta-v2", {"position_buckets": 4, "max_relative_positions": 4}, {"max_relative_positions": 3}),
    ("deberta-v2", {"share_att_key": True, "norm_rel_ebd": "layer_norm"}, {"norm_rel_ebd": "none"}),
    ("modernbert", {}, {"local_attention": 8}),
    ("modernbert", {}, {"layer_types": ["full_attention", "full_attention"]}),
    ("modernbert", {}, {"norm_eps": 0.1}),
    ("gpt2", {}, {"n_head": 4}),
    ("gpt2", {}, {"activation_function": "relu"}),
    ("gpt2", {}, {"layer_norm_epsilon": 0.1}),
    ("gpt2", {}, {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {}, {"scale_attn_weights": False}),
    ("t5", {}, {"feed_forward_proj": "gelu"}),
    ("t5", {}, {"layer_norm_epsilon": 0.1}),
    ("t5", {"relative_attention_max_distance": 128}, {"relative_attention_max_distance": 17}),
    ("opt", {}, {"activation_function": "gelu"}),
    ("opt", {}, {"num_attention_heads": 4}),
    ("opt", {}, {"do_layer_norm_before": False}),
    ("gpt_neox", {}, {"use_parallel_residual": False}),
    ("gpt_neox", {}, {"hidden_act": "relu"}),
    ("gpt_neox", {}, {"layer_norm_eps": 0.1}),
    ("gpt_neox", {"rotary_pct": 0.5}, {"rotary_pct": 1.0}),
    ("llama", {}, {"rope_theta": 50.0}),
    ("llama", {}, {"rms_norm_eps": 0.1}),
    ("qwen3", {}, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}),
    ("gemma2", {}, {"query_pre_attn_scalar": 16}),
    ("gemma2", {}, {"attn_logit_softcapping": 1.0}),
    ("gemma2", {}, {"sliding_window": 2}),
    ("granite", {}, {"residual_multiplier": 0.5}),
]
SAME = [
    *("architectures", "transformers_version", "torch_dtype", "id2label", "problem_type", "use_cache"),
    *("finetuning_task", "task_specific_params", "return_dict", "output_hidden_states", "gradient_checkpointing"),
    *("initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    *("tokenizer_class", "name_or_path", "output_attentions", "max_length", "top_k", "chunk_size_feed_forward"),
]
VALUES: dict[str, Any] = {
    "architectures": ["BertModel"],
    "transformers_version": "4.0.0",
    "torch_dtype": "float16",
    "id2label": {0: "a", 1: "b", 2: "c"},
    "problem_type": "regression",
    "task_specific_params": {"summarization": {"length_penalty": 2.0}},
    "finetuning_task": "mnli",
    "tokenizer_class": "BertTokenizer",
    "name_or_path": "elsewhere",
    "max_length": 7,
    "top_k": 7,
    "chunk_size_feed_forward": 2,
}


def output(model: PreTrainedModel) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).last_hidden_state


def with_weights_of(other: PreTrainedModel, made: PretrainedConfig) -> PreTrainedModel:
    model = AutoModel.from_config(made).eval()
    taken = {name: tensor for name, tensor in other.state_dict().items() if name in model.state_dict()}
    model.load_state_dict(taken)
    return model


@pytest.mark.parametrize(("family", "given", "changed"), DIFFERENT)
def test_what_computes_differently_has_another_digest(family: str, given: dict, changed: dict) -> None:
    one, other = config(family, **given), config(family, **{**given, **changed})
    model = drawn(one)
    assert not torch.allclose(output(model), output(with_weights_of(model, other)), atol=1e-3)
    assert computing_fields(one) != computing_fields(other)
    assert differing_fields(one, other)
    assert computing_fields(one) == computing_fields(config(family, **given))


@pytest.mark.parametrize("field", SAME)
def test_bookkeeping_changes_nothing(field: str) -> None:
    given = {"num_attention_heads": 2, "hidden_size": 16}
    value = VALUES.get(field, 0.5)
    if field in ("use_cache", "return_dict", "output_hidden_states", "gradient_checkpointing", "output_attentions"):
        value = not getattr(BertConfig(), field, False)
    made = BertConfig(**given, **{field: value})
    assert computing_fields(made) == computing_fields(BertConfig(**given))
    assert not differing_fields(made, BertConfig(**given))


def test_a_default_is_as_good_as_its_value() -> None:
    assert computing_fields(BertConfig(hidden_act="gelu")) == computing_fields(BertConfig()) == {"model_type": "bert"}


def test_a_field_that_a_new_version_adds_changes_nothing_until_it_is_set() -> None:
    class Newer(BertConfig):
        added: int = 3
        made_of_others: list | None = None

        def __post_init__(self, **kwargs):
            super().__post_init__(**kwargs)
            self.made_of_others = self.made_of_others or ["full"] * self.num_hidden_layers

    assert computing_fields(Newer(num_hidden_layers=5)) == computing_fields(BertConfig(num_hidden_layers=5))
    assert computing_fields(Newer(num_hidden_layers=5, added=4))["added"] == 4
    assert computing_fields(Newer(num_hidden_layers=2, made_of_others=["full", "half"]))["made_of_others"][1] == "half"


def test_what_follows_from_other_fields_is_left_out_and_what_does_not_is_kept() -> None:
    size = {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    assert "layer_types" not in computing_fields(Qwen3Config(**size))
    other = Qwen3Config(**size, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    assert computing_fields(other)["layer_types"] == other.layer_types


def test_a_config_inside_another_counts_by_the_same_rule() -> None:
    inside = {"vocab_size": 40, "hidden_size": 16}
    one = AutoConfig.for_model("gemma3", text_config=inside)
    stored = AutoConfig.for_model("gemma3", text_config={**inside, "dtype": "bfloat16", "use_cache": False})
    other = AutoConfig.for_model("gemma3", text_config={**inside, "final_logit_softcapping": 5.0})
    assert computing_fields(one) == computing_fields(stored)
    found = computing_fields(other)["text_config"]
    assert found["final_logit_softcapping"] == 5.0 and found != computing_fields(one)["text_config"]


def test_a_class_without_defaults_counts_all_its_fields() -> None:
    class Wants(BertConfig):
        def __init__(self, size: int, **more: Any) -> None:
            super().__init__(hidden_size=size, **more)

    found = computing_fields(Wants(768))
    assert found["hidden_size"] == 768 and found["hidden_act"] == "gelu" and "hidden_dropout_prob" not in found


def test_fields_that_a_class_does_not_know_part_configs_only_where_both_have_them() -> None:
    old, new = BertConfig(position_embedding_type="absolute"), BertConfig()
    other = BertConfig(position_embedding_type="relative_key")
    assert not differing_fields(old, new)
    assert differing_fields(old, other) == {"position_embedding_type": ("absolute", "relative_key")}
    assert differing_fields(BertConfig(hidden_act="relu"), new) == {"hidden_act": ("relu", "gelu")}

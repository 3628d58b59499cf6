"""A deep model's trace from four of its layers: moment by moment that of all of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from recyclable.planning.depth import deepen, layers_alike
from recyclable.planning.devices import by_name
from recyclable.planning.fitting import Fitter
from recyclable.planning.memory import memory, traced
from recyclable.planning.time import Fleet
from recyclable.recipes.planned import Planned, planned
from recyclable.recipes.pretrain_settings import read_pretrain_settings

LAYERS = 7
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 100}
MODELS = {
    "causal": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64, **SIZES},
    "masked": {
        "model_type": "roberta",
        "architectures": ["RobertaForMaskedLM"],
        "max_position_embeddings": 66,
        **SIZES,
    },
    "spans": {
        **{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 32, "d_ff": 64, "d_kv": 8},
        **{"num_heads": 4, "vocab_size": 100, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    },
}


def run(folder: Path, lm: str, layers: int, taught: bool) -> Planned:
    folder = folder / f"{lm}-{layers}"
    folder.mkdir(exist_ok=True)
    counts = dict.fromkeys(("num_layers", "num_decoder_layers") if lm == "spans" else ("num_hidden_layers",), layers)
    (folder / "config.json").write_text(json.dumps({**MODELS[lm], **counts}))
    keys = {"base": str(folder), "corpus": "none", "out": "none", "max_steps": 1, "learning_rate": 1e-4, "lm": lm}
    return planned(
        read_pretrain_settings({**keys, "max_length": 16, **({"teacher": str(folder)} if taught else {})}, lm)
    )


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize(("lm", "taught"), [("causal", False), ("spans", False), ("masked", False), ("masked", True)])
def test_four_layers_tell_of_all(tmp_path: Path, lm: str, taught: bool, again: bool):
    ds_config = {"zero_optimization": {"stage": 3}, **({"activation_checkpointing": {}} if again else {})}
    runs = {layers: run(tmp_path, lm, layers, taught) for layers in (3, 4, LAYERS)}
    three, four, whole = (traced(of.objective, of.batch(2), ds_config, on_cpu=True) for of in runs.values())
    found = deepen(four, four.flops - three.flops, LAYERS)
    if lm == "spans" and again:  # layers share a gradient of positions: too little would be told
        assert found is None
        return
    assert found is not None
    if taught:
        assert (found.held >= whole.held).all() and found.peak() <= 1.1 * whole.peak()
        return
    assert np.array_equal(found.held, whole.held) and np.array_equal(found.done, whole.done)
    assert (found.forward, found.order, found.uses, found.flops) == (
        whole.forward,
        whole.order,
        whole.uses,
        whole.flops,
    )
    last = runs[LAYERS]
    taken = [memory(last.objective, last.batch(2), ds_config, 2, on_cpu=True, training=t) for t in (found, whole)]
    assert taken[0] == taken[1]


def test_layers_are_alike_by_their_shapes():
    one, other = {"a.0.w": (2, 3), "a.1.w": (2, 3), "x": (9,)}, {"b.0.w": (4,), "b.1.w": (4,), "b.2.w": (4,)}
    assert layers_alike(one) == 2 and layers_alike(other) == 3
    assert layers_alike({**one, **other}) is None
    assert layers_alike({**other, "b.0.w": (5, 4)}) == layers_alike({**other, "b.0.more": (1,)}) == 3
    assert layers_alike({**other, "b.2.w": (5,)}) is None


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_a_fitter_that_looks_at_few_layers_finds_what_one_that_looks_at_all_does(tmp_path: Path, again: bool):
    ds_config = {"zero_optimization": {"stage": 3}, **({"activation_checkpointing": {}} if again else {})}
    whole, fleet = run(tmp_path, "causal", LAYERS, False), Fleet(by_name("l4"), 2)
    few = Fitter(whole.objective, whole.batch, 8, fleet)
    few.shallow, few.layers = lambda layers: run(tmp_path, "causal", layers, False).objective, LAYERS
    every = Fitter(whole.objective, whole.batch, 8, fleet)
    for rows in (2, 4):
        one, other = few.tried(ds_config, rows), every.tried(ds_config, rows)
        assert one.memory == other.memory and one.trace.flops == other.trace.flops

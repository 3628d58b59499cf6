"""Experts that lie apart in files or fused, as today's transformers has them, are the same weights to every verb."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import make_decoder
from experts import fused
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from processes import finish, start
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import SplitModulelist
from worlds import make_corpus, make_upgraded

from recyclable import carry, pretrain
from recyclable.cli import main
from recyclable.errors import InputError
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import fingerprint

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
APART = {"mixtral": "block_sparse_moe.experts.0.w1.weight"}
IDS = torch.arange(5, 25).view(2, 10)


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base, its upgrade and a tuned form of the base, apart as written and `fused-`."""
    root = tmp_path_factory.mktemp(request.param)
    make_decoder(root / "base", request.param)
    make_upgraded(root / "base", root / "new", scale=0.05)
    make_upgraded(root / "base", root / "tuned", scale=0.1, seed=5)
    (root / "tuned" / "lineage.json").unlink()
    names = load_file(root / "base" / "model.safetensors").keys()
    assert any(name.endswith(APART.get(request.param, "mlp.experts.0.gate_proj.weight")) for name in names)
    for name in ("base", "new", "tuned"):
        fused(root / name, root / f"fused-{name}")
    yield root


def run(capsys: pytest.CaptureFixture, *argv: object) -> dict[str, Any]:
    capsys.readouterr()
    status = main([*map(str, argv), "--json"])
    said = capsys.readouterr()
    assert status == 0, said.err
    return json.loads(said.out.splitlines()[-1])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def plain(folder: Path) -> torch.Tensor:
    """What plain transformers computes."""
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not (told["missing_keys"] or told["unexpected_keys"] or told["mismatched_keys"]), told
    return logits(model)


def test_a_base_is_the_same_in_both_layouts_whatever_its_files_are(world: Path, tmp_path: Path) -> None:
    apart, together = Base(world / "base"), Base(world / "fused-base")
    assert fingerprint(apart) == fingerprint(together) != fingerprint(Base(world / "new"))
    assert set(apart.names) == set(together.names)
    for name in together.names:
        assert torch.equal(apart[name], together[name]), name
        middle = together.stored(name).numel // 2
        assert torch.equal(apart.read(name, middle // 3, middle), together.read(name, middle // 3, middle))
    AutoModelForCausalLM.from_pretrained(world / "base").save_pretrained(tmp_path / "many", max_shard_size="20KB")
    for file in (world / "base").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert fingerprint(Base(tmp_path / "many")) == fingerprint(apart)
    AutoModelForCausalLM.from_pretrained(world / "base").model.save_pretrained(tmp_path / "backbone")
    backbone = Base(tmp_path / "backbone")
    assert {name: backbone[name].sum() for name in backbone.names if name != "lm_head.weight"} == {
        name: apart[name].sum() for name in apart.names if name != "lm_head.weight"
    }


def test_a_delta_from_one_layout_goes_onto_a_base_in_the_other(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    old, tuned, new = (load_file(world / name / "model.safetensors") for name in ("base", "tuned", "new"))
    shutil.copytree(world / "new", tmp_path / "wanted")
    wanted = {name: new[name] + (tuned[name] - old[name]) for name in new}
    save_file(wanted, tmp_path / "wanted" / "model.safetensors", metadata={"format": "pt"})
    want, store = plain(tmp_path / "wanted"), tmp_path / "store"
    for tuned_as, base_as, new_as in (("", "fused-", ""), ("fused-", "", "fused-")):
        name = f"from-{tuned_as}tuned"
        given = ("--tuned", world / f"{tuned_as}tuned", "--base", world / f"{base_as}base")
        run(capsys, "store", "add", "--store", store, *given, "--name", name)
        on = ("--base", world / f"{new_as}new")
        run(capsys, "apply", "--weights", store / name, *on, "--out", tmp_path / name)
        run(capsys, "store", "export", name, "--store", store, "--merged", *on, "--out", tmp_path / f"{name}-merged")
        for out in (tmp_path / name, tmp_path / f"{name}-merged"):
            assert torch.allclose(plain(out), want, atol=1e-5)
            assert load_file(out / "model.safetensors").keys() == wanted.keys(), "as save_pretrained lays it out"
        assert torch.allclose(logits(carry(store / name, world / f"{new_as}new")), want, atol=1e-5)
        own = tmp_path / f"{name}-own"
        run(capsys, "apply", "--weights", store / name, "--base", world / f"{new_as}base", "--out", own)
        found = load_file(own / "model.safetensors")
        assert all(torch.equal(found[n].view(torch.int32), tuned[n].view(torch.int32)) for n in tuned), "bit for bit"
    digests = [(store / f"from-{way}tuned" / "delta.safetensors").read_bytes() for way in ("", "fused-")]
    assert digests[0] == digests[1]


def test_an_upgrade_that_could_not_be_written_is_refused_before_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_decoder(tmp_path / "base", "mixtral")
    corpus, split = make_corpus(tmp_path / "corpus") / "train.txt", SplitModulelist.convert
    monkeypatch.setattr(
        SplitModulelist, "convert", lambda *args, **more: {n: t + t for n, t in split(*args, **more).items()}
    )
    run = {"max_steps": 1, "train_batch_size": 2, "learning_rate": 1e-3, "max_length": 16}
    with pytest.raises(InputError, match=r"Mixtral.* cannot be laid out .* \(aten\.add\.Tensor is no") as error:
        pretrain(base=str(tmp_path / "base"), corpus=str(corpus), out=str(tmp_path / "out"), **run)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_ranks_read_their_own_ranges_of_either_layout_and_train_alike(world: Path, tmp_path: Path) -> None:
    if world.name.startswith("qwen3_moe"):
        pytest.skip("laid out as qwen2_moe is")
    corpus = str(make_corpus(tmp_path / "corpus") / "train.txt")
    settings = {"corpus": corpus, "max_steps": 2, "train_batch_size": 2, "max_length": 16, "eval_every": 1}
    settings |= {"learning_rate": 1e-3, "save_every": 0, "max_heldout_sequences": 4}
    layouts = ("base", "fused-base")
    trained = [{**settings, "base": str(world / name), "out": str(tmp_path / f"up-{name}")} for name in layouts]
    runs = [{"base": str(world / name)} for name in layouts] + [{"pretrain": each} for each in trained]
    folder = tmp_path / "ranks"
    finish(start(folder, runs, nproc=2, script="expert_ranks.py"), folder)
    found = [json.loads((folder / f"{n}-{rank}.json").read_text()) for n in range(len(runs)) for rank in range(2)]
    assert found == [""] * len(found), next(filter(None, found))
    records = [json.loads((Path(each["out"]) / "lineage.json").read_text()) for each in trained]
    assert records[0]["fingerprint"] == records[1]["fingerprint"] and records[0]["heldout"] == records[1]["heldout"]
    outs = [plain(Path(each["out"])) for each in trained]
    assert torch.equal(*outs) and not torch.allclose(outs[0], plain(world / "base"), atol=1e-3)


def adapter(world: Path, base: str, folder: Path, **config: Any) -> torch.Tensor:
    """A LoRA of random values made by plain PEFT; returns its logits on that base."""
    torch.manual_seed(4)
    settings = LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, init_lora_weights=False, **config)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(world / base), settings)
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ],
    ids=["attention", "fused experts"],
)
def test_an_adapter_that_has_its_place_works_on_either_layout(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, config: dict[str, Any]
) -> None:
    want = adapter(world, "base", tmp_path / "lora", **config)
    for layout in ("", "fused-"):
        store, on = tmp_path / f"{layout}store", world / f"{layout}base"
        run(capsys, "store", "add", "--store", store, "--tuned", tmp_path / "lora", "--base", on, "--name", "lora")
        assert torch.allclose(logits(carry(store / "lora", on)), want, atol=1e-5)
        out = tmp_path / f"{layout}new"
        run(capsys, "apply", "--weights", store / "lora", "--base", world / f"{layout}new", "--out", out)
        made = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "new"), out)
        assert torch.allclose(logits(carry(store / "lora", world / f"{layout}new")), logits(made), atol=1e-5)
        merged = tmp_path / f"{layout}merged"
        run(capsys, "store", "export", "lora", "--store", store, "--merged", "--base", on, "--out", merged)
        assert torch.allclose(plain(merged), want, atol=1e-4)


def test_an_adapter_made_on_experts_that_were_modules_is_refused_by_their_names(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    parts, own = ("w1", "w2", "w3"), "block_sparse_moe"
    if "mixtral" not in world.name:
        parts, own = ("gate_proj", "down_proj", "up_proj"), "mlp"
    adapter(world, "base", tmp_path / "lora", target_modules=["q_proj"])
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    sizes = dict(zip(parts, ((24, 16), (16, 24), (24, 16)), strict=True))
    for layer in range(2):
        for expert in range(4):
            for part, (rows, columns) in sizes.items():
                name = f"base_model.model.model.layers.{layer}.{own}.experts.{expert}.{part}"
                tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = (
                    torch.randn(2, columns),
                    torch.randn(rows, 2),
                )
    for targets in (["q_proj", *parts], ["q_proj"]):
        save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors", metadata={"format": "pt"})
        (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
        for layout in ("", "fused-"):
            capsys.readouterr()
            given = ("--tuned", tmp_path / "lora", "--base", world / f"{layout}base")
            status = main([*map(str, ("store", "add", "--store", tmp_path / "store", *given, "--name", "lora"))])
            said = capsys.readouterr().err.strip().splitlines()
            assert (status, len(said)) == (2, 1), said
            first = f"model.layers.0.{own}.experts.0.{sorted(parts)[0]}: it is a part of model.layers.0.mlp.experts."
            assert f"was made on 24 modules that a {world.name.rstrip('0')} no longer has, such as {first}" in said[0]
            assert not (tmp_path / "store" / "lora").exists()

"""`recyclable apply` on a chain of upgrades: what comes out is base + difference in plain transformers, or nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from worlds import WORDS, make_adapter, make_base, make_outdated, make_task, make_tokenizer, make_upgraded

from recyclable.carrying.changes import FoundChanges
from recyclable.cli import main
from recyclable.errors import InputError
from recyclable.recipes.apply import PROVENANCE, apply
from recyclable.weights import algebra, lineage
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.manifest import ADAPTER, DELTA, HEAD

PREFIX = "bert."
KINDS = ("lora", "bottleneck")


class Chain:
    """M0 with adapted weights, M1 and M2 made from it in turn, and a stranger."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bases = [make_base(root / "m0")]
        self.bases += [make_upgraded(self.bases[0], root / "m1", seed=2)]
        self.bases += [make_upgraded(self.bases[1], root / "m2", seed=3)]
        self.stranger = make_base(root / "stranger", seed=9)
        self.task = make_task(root / "task")
        self.weights = make_outdated(self.bases[0], self.task, root / "w")
        self.other = make_outdated(self.bases[0], self.task, root / "w2", seed=11)
        self.adapters = {kind: make_adapter(self.bases[0], self.task, root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("apply"))


def merged(folder: Path) -> dict[str, torch.Tensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("upgrades", [0, 1, 2])
def test_a_delta_over_any_number_of_upgrades(chain: Chain, tmp_path: Path, upgrades: int) -> None:
    record = apply([chain.weights], chain.bases[upgrades], tmp_path / "out", FoundChanges())
    found, base = merged(tmp_path / "out"), Base(chain.bases[upgrades])
    delta, head = load_file(chain.weights / DELTA), load_file(chain.weights / HEAD)
    assert found.keys() == delta.keys() | head.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, base[name] + delta[name] if name in delta else head[name]), name
    assert record["weights"][0]["relation"] == ("recorded" if upgrades else "own")
    assert json.loads((tmp_path / "out" / PROVENANCE).read_text()) == json.loads(json.dumps(record, default=str))

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert list(model.config.id2label.values()) == ["left", "middle", "right"]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2", return_tensors="pt")
    assert model(**tokens).logits.shape == (1, 3)


def test_many_small_files_hold_the_same_model(chain: Chain, tmp_path: Path) -> None:
    apply([chain.weights], chain.bases[1], tmp_path / "one", FoundChanges())
    apply([chain.weights], chain.bases[1], tmp_path / "many", FoundChanges(), max_shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    one, many = (AutoModelForSequenceClassification.from_pretrained(tmp_path / n) for n in ("one", "many"))
    for (name, a), (_, b) in zip(one.state_dict().items(), many.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_strength_pruning_and_embeddings_left_alone(chain: Chain, tmp_path: Path) -> None:
    base, delta = Base(chain.bases[1]), load_file(chain.weights / DELTA)
    words = "embeddings.word_embeddings.weight"
    apply([chain.weights], chain.bases[1], tmp_path / "s", FoundChanges(scale=0.5, skip_embeddings=True))
    for name, tensor in merged(tmp_path / "s").items():
        if name in delta:
            assert torch.allclose(tensor, base[name] + (0 if name == words else 0.5 * delta[name]), atol=1e-7), name
    apply([chain.weights], chain.bases[1], tmp_path / "t", FoundChanges(ties=0.25))
    for name, tensor in merged(tmp_path / "t").items():
        if name in delta:
            kept = (
                delta[name].abs()
                >= delta[name].abs().flatten().sort(descending=True).values[-(-delta[name].numel() // 4) - 1]
            )
            assert torch.allclose(tensor, base[name] + delta[name] * kept, atol=1e-7), name
    apply([chain.weights], chain.bases[1], tmp_path / "d", FoundChanges(dare=0.5), seed=3)
    for name, tensor in merged(tmp_path / "d").items():
        if name in delta:
            thinned = algebra.dare(delta[name].view(-1), 0.5, 3, name).view_as(tensor)
            assert torch.allclose(tensor, base[name] + thinned, atol=1e-7), name


@pytest.mark.parametrize("upgrades", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_goes_over_and_full_values_in_it_move_with_the_base(
    chain: Chain, tmp_path: Path, kind: str, upgrades: int
) -> None:
    before, old, new = load_file(chain.adapters[kind] / ADAPTER), Base(chain.bases[0]), Base(chain.bases[upgrades])
    for scale in (1.0, 0.5):
        apply([chain.adapters[kind]], chain.bases[upgrades], tmp_path / str(scale), FoundChanges(scale=scale))
        weights = AdaptedWeights(tmp_path / str(scale))
        assert weights.manifest.base["fingerprint"] == fingerprint(new).as_dict()
        assert weights.manifest.recycled_from["relation"] == ("recorded" if upgrades else "own")
        found = dict(weights.tensors(ADAPTER))
        assert found.keys() == before.keys()
        for name, tensor in before.items():
            base_name = name.removeprefix("base_model.model.bert.")
            if base_name in old:  # a layer norm
                want = new[base_name] + scale * (tensor - old[base_name])
            else:
                want = tensor * (scale if "lora_B" in name or "bottleneck_up" in name else 1.0)
            torch.testing.assert_close(found[name], want, rtol=0, atol=1e-6, msg=name)
            assert torch.equal(found[name], tensor) or base_name in old or scale != 1.0
        assert upgrades or scale != 1.0 or all(torch.equal(found[name], before[name]) for name in before)
    assert any(name.removeprefix("base_model.model.bert.") in old for name in before) == (kind == "bottleneck")


def test_several_are_merged_and_the_head_is_the_firsts(chain: Chain, tmp_path: Path) -> None:
    apply([chain.weights, chain.other], chain.bases[2], tmp_path / "out", FoundChanges(scale=0.5))
    base, one, two = Base(chain.bases[2]), load_file(chain.weights / DELTA), load_file(chain.other / DELTA)
    for name, tensor in merged(tmp_path / "out").items():
        if name in one:
            assert torch.allclose(tensor, base[name] + 0.5 * (one[name] + two[name]), atol=1e-6), name
        else:
            assert torch.equal(tensor, load_file(chain.weights / HEAD)[name])


def test_a_stranger_is_refused_unless_allowed(chain: Chain, tmp_path: Path) -> None:
    wanted = fingerprint(Base(chain.bases[0])).weights[:12]
    with pytest.raises(InputError, match=wanted):
        apply([chain.weights], chain.stranger, tmp_path / "out", FoundChanges())
    assert not (tmp_path / "out").exists()
    record = apply([chain.weights], chain.stranger, tmp_path / "out", FoundChanges(), allow_unrelated=True)
    assert record["weights"][0]["relation"] == "unrelated"
    for kind in ("w", "lora"):  # of another shape: the base is named all the same
        narrow = make_base(tmp_path / f"narrow-{kind}", hidden=16)
        both = f"{wanted}.*{fingerprint(Base(narrow))}"
        with pytest.raises(InputError, match=both):
            apply([chain.root / kind], narrow, tmp_path / "no", FoundChanges())
        with pytest.raises(InputError, match=r"does not fit.*is \(32,.*; .*is \(32,"):
            apply([chain.root / kind], narrow, tmp_path / "no", FoundChanges(), allow_unrelated=True)


@pytest.mark.parametrize("which", ["base", "delta", "head"])
def test_a_flipped_bit_is_found_and_nothing_is_left(chain: Chain, tmp_path: Path, which: str) -> None:
    base, weights = tmp_path / "base", tmp_path / "weights"
    shutil.copytree(chain.bases[1], base)
    shutil.copytree(chain.weights, weights)
    path = {"base": base / "model.safetensors", "delta": weights / DELTA, "head": weights / HEAD}[which]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match=str(base if which == "base" else path)):
        apply([weights], base, tmp_path / "out", FoundChanges())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "weights"]


def grown(chain: Chain, folder: Path) -> Path:
    """M1 with ten new words in front of the old ones, the last five words gone."""
    words = [f"new{i}" for i in range(10)] + WORDS[:-5]
    make_upgraded(chain.bases[0], folder, seed=2)
    tensors = load_file(folder / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    old, rows = tensors[name], 5 + len(words)
    new = torch.randn(rows, old.shape[1], generator=torch.Generator().manual_seed(1))
    new[:5], new[15:] = old[:5], old[5:-5]
    tensors[name] = new
    if "cls.predictions.bias" in tensors:
        tensors["cls.predictions.bias"] = torch.zeros(rows)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    make_tokenizer(words).save_pretrained(folder)
    (folder / lineage.FILE).unlink()
    lineage.declare(Base(folder), Base(chain.bases[0]), "m0")
    return folder


def test_rows_follow_their_tokens_into_a_grown_vocabulary(chain: Chain, tmp_path: Path, capsys) -> None:
    folder = grown(chain, tmp_path / "grown")
    record = apply([chain.weights], folder, tmp_path / "out", FoundChanges(), old_base=chain.bases[0])
    name = "embeddings.word_embeddings.weight"
    base, delta, found = Base(folder)[name], load_file(chain.weights / DELTA)[name], merged(tmp_path / "out")[name]
    assert torch.equal(found[5:15], base[5:15])
    assert torch.equal(found[:5], base[:5] + delta[:5])
    assert torch.equal(found[15:], base[15:] + delta[5:-5])
    assert record["vocabulary"]["added"] == [f"new{i}" for i in range(10)]
    assert record["vocabulary"]["dropped"] == WORDS[-5:]
    assert "dropped tokens: 5 (w190" in capsys.readouterr().out


def test_recycling_tells_of_tokens_too_and_a_teacher_reads_with_its_own_tokenizer(
    chain: Chain, tmp_path: Path, capsys
) -> None:
    settings = {
        "method": "apply",
        "base": grown(chain, tmp_path / "grown"),
        "old_base": chain.bases[0],
        "weights": chain.weights,
        "task": chain.task,
        "out": tmp_path / "out",
        "max_length": 24,
    }
    config = tmp_path / "run.yaml"
    config.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    assert main(["recycle", str(config)]) == 0
    assert "dropped tokens: 5 (w190" in capsys.readouterr().out
    assert AdaptedWeights(tmp_path / "out").manifest.recycled_from["vocabulary"]["dropped"] == WORDS[-5:]
    training = ["max_steps=1", "learning_rate=1e-3"]
    for teacher in ("cached", "online"):
        told = [f"out={tmp_path / teacher}", f"teacher={teacher}", "method=distill", *training]
        assert main(["recycle", str(config), *told]) == 0
    once, every_step = (load_file(tmp_path / teacher / "delta.safetensors") for teacher in ("cached", "online"))
    assert all(torch.allclose(once[name], every_step[name], atol=1e-6) for name in once)
    assert main(["recycle", str(config), "method=interpolate", *training, f"out={tmp_path / 'no'}"]) == 2
    assert f"{settings['base']}: has another vocabulary than {chain.bases[0]}" in capsys.readouterr().err


def test_command_line(chain: Chain, tmp_path: Path, capsys) -> None:
    argv = ["apply", "--weights", str(chain.weights), "--base", str(chain.bases[1]), "--out", str(tmp_path / "out")]
    assert main([*argv, "--scale", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]["scale"] == 0.5
    assert main(argv) == 2
    assert "not empty" in capsys.readouterr().err
    assert main([*argv[:-1], str(tmp_path / "no"), "--ties", "1.5"]) == 2
    assert "ties" in capsys.readouterr().err
    assert main([*argv[:-1], str(tmp_path / "no"), "--scale", "nan"]) == 2
    assert "scale: found 'nan', expected: a finite number" in capsys.readouterr().err
    (tmp_path / "file").write_text("here before")
    for place, said in (
        ("file", "exists"),
        ("file/no", "cannot be written (Not a directory)"),
        ("n" * 300, "too long"),
    ):
        assert main([*argv[:-1], str(tmp_path / place)]) == 2
        assert said in capsys.readouterr().err and (tmp_path / "file").read_text() == "here before"
    assert not (tmp_path / "no").exists()


def test_a_process_that_has_made_no_adapter_knows_ours_all_the_same(chain: Chain, tmp_path: Path) -> None:
    given = ["--weights", chain.adapters["bottleneck"], "--base", chain.bases[1], "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "recyclable.cli", "apply", *map(str, given)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr
    assert AdaptedWeights(tmp_path / "out").manifest.tuning["tuning"] == "bottleneck"


def test_on_its_own_base_every_bit_comes_back(chain: Chain, tmp_path: Path) -> None:
    """Also where the sum of base and difference alone would not give it."""
    from recyclable.weights.adapted import write_manifest
    from recyclable.weights.checkpoint_files import SafetensorsFile
    from recyclable.weights.delta import Codec, write_delta

    base, weights = Base(chain.bases[0]), tmp_path / "w"
    shutil.copytree(chain.weights, weights)
    draw = torch.Generator().manual_seed(5)
    tuned = {n: t + torch.randn(t.shape, generator=draw) for n, t in base.items()}
    tuned["encoder.layer.0.output.dense.weight"] *= 1e-6
    save_file(tuned, tmp_path / "tuned.safetensors")
    write_delta(weights / DELTA, SafetensorsFile(tmp_path / "tuned.safetensors"), base, Codec())
    write_manifest(weights, AdaptedWeights(chain.weights).manifest)
    apply([weights], chain.bases[0], tmp_path / "out", FoundChanges())
    found, delta = merged(tmp_path / "out"), AdaptedWeights(weights).delta
    assert all(torch.equal(found[name], tensor) for name, tensor in tuned.items())
    assert not all(torch.equal(base[name] + delta[name], tensor) for name, tensor in tuned.items())

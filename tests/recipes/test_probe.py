"""`recyclable probe`: verdict and evidence on small worlds, the page, restarts, ranks, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import finish, start
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from worlds import WORDS, make_adapter, make_base, make_outdated, make_task, make_tokenizer, make_upgraded

from recyclable.carrying.changes import FoundChanges
from recyclable.cli import main
from recyclable.config.run_file import make_config
from recyclable.errors import InputError
from recyclable.launching import supervisor
from recyclable.recipes import probe_task
from recyclable.recipes.apply import apply
from recyclable.recipes.probe import probe
from recyclable.recipes.probe_settings import ProbeSettings
from recyclable.tasks.parts.task import load_task
from recyclable.weights import lineage
from recyclable.weights.adapted import AdaptedWeights
from recyclable.weights.base import Base
from recyclable.weights.fingerprint import fingerprint
from recyclable.weights.lineage import declare
from recyclable.weights.manifest import DELTA


class World:
    """M0, its upgrades M1 and M2, a stranger, a task, and weights of M0 and M1 of several kinds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.m0 = make_base(root / "m0")
        self.m1 = make_upgraded(self.m0, root / "m1")
        self.m2 = make_upgraded(self.m1, root / "m2", scale=0.05, seed=5)
        self.stranger = make_base(root / "stranger", seed=9)
        self.task = make_task(root / "task")
        self.full = make_outdated(self.m0, self.task, root / "full")
        for kind in ("lora", "bottleneck"):
            make_adapter(self.m0, self.task, root / kind, kind)
            make_adapter(self.m1, self.task, root / f"{kind}-1", kind, seed=8)
        make_outdated(self.m1, self.task, root / "full-1", seed=4)

    def config(self, **settings: Any) -> ProbeSettings:
        tried = {"examples": 20, "points": 3} if "task" in settings else {}
        content = {"weights": str(self.full), "base": str(self.m1), **tried, **settings}
        content = {name: str(value) if isinstance(value, Path) else value for name, value in content.items()}
        return make_config(ProbeSettings, content, "")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="module")
def whole(world: World) -> dict[str, Any]:
    """A probe with everything."""
    return probe(world.config(task=world.task, out=world.root / "out"))[0]


def flat(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    names = [n for n in sorted(tensors) if n.startswith("bert.")]
    return np.concatenate([tensors[n].double().numpy().ravel() for n in names])


def test_weights_alone_give_distances_and_a_start_without_promises(world: World) -> None:
    result, verdict = probe(world.config())
    assert result.keys() == {"verdict", "evidence"} and result["evidence"].keys() == {"distance"}
    assert result["verdict"] == "init" and verdict.reason
    m0, m1 = (flat(load_file(base / "model.safetensors")) for base in (world.m0, world.m1))
    delta = load_file(world.full / DELTA)
    found, d = result["evidence"]["distance"]["whole"], flat({f"bert.{n}": t for n, t in delta.items()})
    assert found["l2"] == pytest.approx(np.linalg.norm(m1 - m0), rel=1e-6)
    assert found["ratio"] == pytest.approx(np.linalg.norm(m1 - m0) / np.linalg.norm(d), rel=1e-6)
    assert found["tuning_cosine"] == pytest.approx(
        (m1 - m0) @ d / np.linalg.norm(m1 - m0) / np.linalg.norm(d), abs=1e-6
    )
    layers = [layer["layer"] for layer in result["evidence"]["distance"]["layers"]]
    assert layers == ["embeddings", "layer 0", "layer 1"]


def test_their_own_base_needs_no_recycling(world: World) -> None:
    result, _ = probe(world.config(base=world.m0, task=world.task))
    assert result["evidence"]["distance"]["whole"]["l2"] == 0
    assert result["evidence"].keys() == {"distance", "compatibility"}
    assert result["evidence"]["compatibility"]["old"] == result["evidence"]["compatibility"]["new"]
    assert probe(world.config(base=world.m0))[0]["verdict"] == "apply"


def test_the_json_has_the_promised_shape(world: World, whole: dict[str, Any]) -> None:
    assert whole.keys() == {"verdict", "confidence", "expected_gain", "evidence", "report"}
    assert whole["verdict"] in ("apply", "init", "distill", "both", "scratch") and 0 <= whole["confidence"] <= 1
    evidence = whole["evidence"]
    assert evidence.keys() == {"distance", "compatibility", "connectivity", "similarity"}
    assert evidence["connectivity"].keys() == {"mu", "metric", "loss", "barrier"}
    assert evidence["connectivity"]["mu"] == [0, 0.5, 1]
    assert np.array(evidence["similarity"]["heads"]).shape == (2, 2) and len(evidence["similarity"]["cka"]) == 3
    assert json.loads((world.root / "out" / "probe.json").read_text()) == whole
    assert Path(whole["report"]).is_file()


def test_scores_are_those_of_a_merged_model_in_plain_transformers(
    world: World, whole: dict[str, Any], tmp_path: Path
) -> None:
    found = whole["evidence"]["compatibility"]
    split = probe_task.limit(load_task(world.task).splits["dev"], 20, 20)
    for when, base in (("old", world.m0), ("new", world.m1)):
        apply([world.full], base, tmp_path / when, FoundChanges())
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / when).eval()
        tokenizer = AutoTokenizer.from_pretrained(base)
        with torch.no_grad():
            logits = torch.cat([model(**tokenizer(t, return_tensors="pt")).logits for t in split.texts])
        labels = torch.tensor(split.labels)
        assert found[when]["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)
        assert found[when]["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    ends = whole["evidence"]["connectivity"]["loss"][0], whole["evidence"]["connectivity"]["loss"][-1]
    assert ends == (found["old"]["loss"], found["new"]["loss"])


def test_knowing_nothing_is_the_most_frequent_class_or_the_mean(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": "w", "label": x}) + "\n" for x in "aaab"))
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps({"text": "w", "label": x}) + "\n" for x in "abb"))
    task = load_task(tmp_path)
    found = probe_task.knowing_nothing(task, task.kind.examples(task.splits["dev"], make_tokenizer(), 8))
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["loss"] == pytest.approx(-(np.log(4 / 6) + 2 * np.log(2 / 6)) / 3, rel=1e-6)
    for name, values in (("train", (0.5, 1.5)), ("dev", (1.0, 3.5))):
        rows = (json.dumps({"text": "w", "label": x}) + "\n" for x in values)
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    task = load_task(tmp_path)
    found = probe_task.knowing_nothing(task, task.kind.examples(task.splits["dev"], make_tokenizer(), 8))
    assert (found["pearson"], found["loss"]) == (0, pytest.approx((0 + 2.5**2) / 2))


def test_weights_over_a_chain_of_bases(world: World, tmp_path: Path) -> None:
    task = load_task(world.task)
    bases = [Base(folder) for folder in (world.m0, world.m1, world.m2)]
    weights = AdaptedWeights(world.full)
    rows = probe_task.compatibility(weights, bases, task, task.splits["dev"], tmp_path)
    assert len(rows) == 3 and len({row["loss"] for row in rows}) == 3
    assert json.loads((tmp_path / "compatibility.json").read_text())["points"]["2"] == rows[2]
    apply([world.full], world.m2, tmp_path / "merged", FoundChanges())
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer, dev = AutoTokenizer.from_pretrained(world.m2), task.splits["dev"]
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(t, return_tensors="pt")).logits for t in dev.texts])
    assert rows[2]["loss"] == pytest.approx(F.cross_entropy(logits, torch.tensor(dev.labels)).item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora", "bottleneck"])
def test_a_path_to_weights_tuned_on_the_new_base(world: World, kind: str) -> None:
    config = world.config(weights=world.root / kind, task=world.task, to=world.root / f"{kind}-1")
    evidence = probe(config)[0]["evidence"]
    path, scores = evidence["connectivity"], evidence["compatibility"]
    assert path["loss"][0] == scores["old"]["loss"] and path["loss"][-1] != scores["new"]["loss"]
    assert ("adapter_alone" in path) == (kind != "full")
    if kind != "full":
        assert path["adapter_alone"]["loss"][0] == scores["new"]["loss"]
        assert path["adapter_alone"]["loss"][-1] == path["loss"][-1]
    assert ("tuning_l2" in evidence["distance"]["whole"]) == (kind != "bottleneck")


def with_other_words(world: World, folder: Path) -> Path:
    """M1 with five new words in front of the old ones, whose last five are gone."""
    make_upgraded(world.m0, folder)
    words = [f"new{i}" for i in range(5)] + WORDS[:-5]
    tensors = load_file(folder / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    tensors[name] = torch.cat([tensors[name][:5], torch.full((5, 32), 9.0), tensors[name][5:-5]])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(words).save_pretrained(folder)
    (folder / lineage.FILE).unlink()
    declare(Base(folder), Base(world.m0), str(world.m0))
    return folder


def test_embeddings_are_compared_token_by_token_where_vocabularies_differ(world: World, tmp_path: Path) -> None:
    evidence = probe(world.config(base=with_other_words(world, tmp_path / "other"), task=world.task))[0]["evidence"]
    tensors = [load_file(b / "model.safetensors") for b in (world.m0, tmp_path / "other")]
    old, new = (t["bert.embeddings.word_embeddings.weight"].double() for t in tensors)
    rest = sum(
        (tensors[1][n] - tensors[0][n]).double().square().sum()
        for n in tensors[0]
        if n.startswith("bert.embeddings") and "word" not in n
    )
    step = torch.cat([new[:5] - old[:5], new[10:] - old[5:-5]])
    found = evidence["distance"]["layers"][0]
    assert found["l2"] == pytest.approx(float((step.square().sum() + rest).sqrt()), rel=1e-6)
    assert "connectivity" not in evidence and "compatibility" in evidence


# ---- the page ----------------------------------------------------------------------------------------------------


class Loaded(HTMLParser):
    """What a page would load, and that its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.wanted += [
            v
            for n, v in attrs
            if n in ("src", "href", "xlink:href", "srcset") and v and not v.startswith(("#", "data:"))
        ]


def test_the_page_asks_for_nothing_and_says_the_verdict_first(whole: dict[str, Any]) -> None:
    text = Path(whole["report"]).read_text()
    page = Loaded()
    page.feed(text)
    assert not page.wanted and "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"https?:|url\((?!#)|@import", text)
    assert page.tags.count("svg") == 7
    assert text.index("<body>") < text.index('class="verdict"') < text.index("Weights: ") < text.index("<svg")
    ids = re.findall(r'\sid="([^"]+)"', text)
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    assert used <= set(ids)


def test_names_in_a_page_are_text(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "<script>x"
    shutil.copytree(world.full, folder)
    probe(world.config(weights=folder, out=tmp_path / "out"))
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;x" in text
    assert "Not measured" in text


def test_tensorboard_has_the_path(world: World, whole: dict[str, Any]) -> None:
    events = EventAccumulator(str(world.root / "out" / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("path/loss")]
    losses = whole["evidence"]["connectivity"]["loss"]
    assert found == [(step, pytest.approx(loss)) for step, loss in zip((0, 500, 1000), losses, strict=True)]
    assert len(events.Scalars("path/accuracy")) == 3 and len(events.Scalars("distance/ratio")) == 3


# ---- restarts and ranks ------------------------------------------------------------------------------------------


def test_a_killed_probe_goes_on_and_finds_the_same(
    world: World, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, asked = world.config(task=world.task, out=tmp_path / "out"), []
    from recyclable.analysis import connectivity

    original = connectivity.measure

    def killed(*arguments: Any) -> dict[str, float]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(connectivity, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        probe(config)
    assert not (tmp_path / "out" / "probe.json").exists()
    with pytest.raises(InputError, match="--resume"):
        probe(config)
    asked.append(None)  # no longer killed
    result, _ = probe(config, resume=True)
    assert len(asked) == 4  # one point was left
    assert {**result, "report": whole["report"]} == whole
    assert probe(config, resume=True)[0] == result
    with pytest.raises(InputError, match="was started with"):
        probe(world.config(task=world.task, out=tmp_path / "out", examples=10), resume=True)


def test_two_ranks_find_what_one_finds(world: World, whole: dict[str, Any], tmp_path: Path) -> None:
    out, adapter = tmp_path / "two", tmp_path / "adapter"
    configs = [world.config(task=world.task, out=out)]
    configs += [
        world.config(task=world.task, out=adapter, weights=world.root / "lora", to=world.root / "lora-1", points=4)
    ]
    runs = [{"config": json.loads(config.model_dump_json())} for config in configs]
    finish(start(tmp_path, runs, nproc=2, script="probe_ranks.py"), tmp_path)
    results = [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]
    similarity = [each["evidence"].pop("similarity") for each in (results[0], json.loads(json.dumps(whole)))]
    for name, values in similarity[0].items():
        assert np.allclose(values, similarity[1][name], atol=1e-6), name
    alone = {name: value for name, value in whole["evidence"].items() if name != "similarity"}
    assert results[0]["evidence"] == alone and results[0]["verdict"] == whole["verdict"]
    one = probe(configs[1].model_copy(update={"out": None}))[0]
    found = json.loads((adapter / "probe.json").read_text())
    assert found["evidence"]["connectivity"] == one["evidence"]["connectivity"]


# ---- the command line --------------------------------------------------------------------------------------------


def command(world: World, *more: object, **settings: object) -> list[str]:
    given = {"weights": world.full, "base": world.m1, **settings}
    return ["probe", *[f for n, v in given.items() for f in (f"--{n.replace('_', '-')}", str(v))], *map(str, more)]


def test_command_line(world: World, capsys: pytest.CaptureFixture) -> None:
    argv = command(world, "--json", task=world.task, points=2, examples=9)
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert lines[0].startswith(f"verdict: {found['verdict']}") and len(found["evidence"]["connectivity"]["mu"]) == 2
    assert any(line.startswith("| on the new base, unchanged") for line in lines)


def test_the_old_base_is_found_by_the_lineage_or_named(world: World, tmp_path: Path, capsys) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(world.full, moved)
    content = json.loads((moved / "manifest.json").read_text())
    content["base"]["name"] = str(tmp_path / "gone")
    (moved / "manifest.json").write_text(json.dumps(content))
    assert main(command(world, weights=moved)) == 0  # the lineage of M1 names it
    lost = tmp_path / "m1"
    shutil.copytree(world.m1, lost)
    record = json.loads((lost / lineage.FILE).read_text())
    record["ancestors"][0]["name"] = str(tmp_path / "gone, too")
    (lost / lineage.FILE).write_text(json.dumps(record))
    capsys.readouterr()
    assert main(command(world, weights=moved, base=lost)) == 2
    assert "name it with --old-base" in capsys.readouterr().err
    assert main(command(world, weights=moved, base=lost, old_base=world.m0)) == 0
    assert main(command(world, weights=moved, base=lost, old_base=world.stranger)) == 2
    assert fingerprint(Base(world.m0)).weights[:12] in capsys.readouterr().err


def test_a_base_that_is_not_related_is_tried_where_that_is_allowed(world: World, capsys) -> None:
    argv = command(world, base=world.stranger, task=world.task, points=2, examples=9)
    assert main(argv) == 2
    assert main([*argv, "--allow-unrelated", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"old", "new"} <= found["evidence"]["compatibility"].keys()


def test_ranks_are_told_what_the_command_line_says(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def launch(script: Path, argv: list[str], nproc: int, hostfile: str | None, **_: object) -> int:
        assert (script.name, nproc, hostfile) == ("probe.py", 2, None)
        told.append(argv)
        return 0

    monkeypatch.setattr(supervisor, "launch", launch)
    assert main(command(world, "--nproc", 2, "--json", "--allow-unrelated", task=world.task)) == 0
    assert main(command(world, "--nproc", 2)) == 0
    shared = ["--weights", str(world.full), "--base", str(world.m1)]
    assert told[0] == [*shared, "--task", str(world.task), "--nproc", "2", "--json", "--allow-unrelated"]
    assert told[1] == [*shared, "--nproc", "2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "./nowhere"}, "is missing, expected a model directory"),
        ({"base": "{root}/stranger"}, "does not descend from it"),
        ({"weights": "./nowhere"}, "is no directory of adapted weights"),
        ({"task": "{root}/no-dev"}, "has no dev split to try the weights on, found ['test', 'train']"),
        ({"task": "{root}/two-labels"}, "was tuned for labels ['left', 'middle', 'right']"),
        ({"task": "{root}/task", "points": "1"}, "points: found 1, expected: greater than or equal to 2"),
        ({"task": "{root}/task", "examples": "0"}, "examples: found 0, expected: greater than 0"),
        ({"to": "{root}/full-1"}, "to is given, but nothing reads it without a task"),
        ({"examples": "9"}, "examples is given, but nothing reads it without a task"),
        ({"points": "5"}, "points is given, but nothing reads it without a task"),
        ({"task": "{root}/task", "to": "{root}/full"}, "was tuned on"),
        ({"task": "{root}/task", "to": "{root}/lora-1"}, "its tuning is {{'tuning': 'lora'"),
        ({"out": "{root}/task"}, "is not empty and holds no run"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    world: World, settings: dict[str, str], message: str, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, splits in (("no-dev", ("train", "test")), ("two-labels", ("train", "dev"))):
        if not (folder := world.root / name).exists():
            make_task(folder)
            for file in folder.iterdir():
                if file.stem not in splits:
                    file.unlink()
                elif name == "two-labels":
                    rows = [row for row in file.read_text().splitlines(keepends=True) if "middle" not in row]
                    file.write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    settings = {name: value.format(root=world.root) for name, value in settings.items()}
    out = {} if "out" in settings else {"out": tmp_path / "out"}
    assert main(command(world, **out, **settings)) == 2
    error = capsys.readouterr().err
    assert message.replace("{{", "{") in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()

"""`recyclable generate`: answers are those of plain transformers and peft, on one process and on ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from decoders import decoder_tokenizer, make_decoder
from peft import PeftModel
from processes import NOTHING_WHOLE, ROOT, finish, start
from rows import write_rows
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from verbs import Verbs
from worlds import WORDS, make_base, make_outdated, make_task

import recyclable
from recyclable.cli import main
from recyclable.errors import InputError

NEW = 6
FULL = {"llama": ("base", "full"), "t5": ("t5", "t5_full")}
"""Family -> which base of the world, and its weights."""
TASKS = {"generation": ("task", "f1"), "choice": ("choice", "accuracy")}
"""Kind of task -> where it lies, and a score that is not 0."""
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
TEXTS = ["w1 w2 w3", "w7", "w8 w9 w10 w11 w12 w13", "w4 w5"]
CHATS = [[{"role": "user", "content": "w3 w4"}], [{"role": "w1", "content": "w5"}, {"role": "user", "content": "w6"}]]


class World:
    """A decoder with a chat template, its weights for a task as delta and LoRA, an encoder-decoder, its weights, an
    encoder; and a task of choice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokenizer = decoder_tokenizer("llama")
        tokenizer.chat_template = TEMPLATE
        self.base = make_decoder(folder / "llama", "llama", tokenizer=tokenizer)
        self.t5, self.bert = make_decoder(folder / "t5", "t5"), make_base(folder / "bert")
        self.task = folder / "task"
        self.task.mkdir()
        for name, size in (("train", 16), ("dev", 6), ("test", 7)):
            rows = [
                {"prompt": " ".join(WORDS[i : i + 1 + i % 4]), "response": f" {WORDS[50]} {WORDS[i % 3]}"}
                for i in range(size)
            ]
            (self.task / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lora = {"tuning": "lora", "lora_r": 3, "target_modules": "all-linear"}
        for name, base, tuning in (("full", self.base, {}), ("lora", self.base, lora), ("t5_full", self.t5, {})):
            recyclable.tune(
                **{"base": str(base), "task": str(self.task), "out": folder / name, **tuning},
                **{"max_steps": 6, "learning_rate": 0.1, "train_batch_size": 8, "max_length": 24, "save_every": 0},
            )
        self.choice = folder / "choice"
        for name, size in (("train", 2), ("test", 15)):
            write_rows(self.choice / f"{name}.jsonl", [chosen(i) for i in range(size)])
        self.texts = folder / "texts.txt"
        self.texts.write_text("\n".join(TEXTS) + "\n")

    def plain(self, model: Any, folder: Path, prompts: list[Any]) -> list[str]:
        """What plain transformers answer to one prompt after the other."""
        tokenizer, said = AutoTokenizer.from_pretrained(folder), []
        for prompt in prompts:
            if isinstance(prompt, str):
                ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            else:
                text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
                ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            begin = 1 if model.config.is_encoder_decoder else ids.shape[1]
            (row,) = model.generate(
                input_ids=ids, max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(ids)
            )
            said.append(tokenizer.decode(row[begin:], skip_special_tokens=True))
        return said


def chosen(i: int) -> dict[str, Any]:
    """A row of two to four options of one to three words, of which the last or the first is right."""
    options = [" " + " ".join(WORDS[50 + i + j : 51 + i + j + (i + j) % 3]) for j in range(2 + i % 3)]
    return {"prompt": " ".join(WORDS[i : i + 1 + i % 4]), "choices": options, "answer": i % 2 and len(options) - 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("generate"))


def generated(world: World, base: Path, prompts: Any, **keys: Any) -> list[str]:
    result = recyclable.generate(str(base), prompts, max_new_tokens=NEW, eval_batch_size=3, **keys)
    return [row["response"] for row in result["rows"]]


def test_a_bases_answers_are_those_of_plain_transformers(world: World) -> None:
    llama = AutoModelForCausalLM.from_pretrained(world.base).eval()
    expected = world.plain(llama, world.base, TEXTS)
    assert generated(world, world.base, world.texts) == expected == generated(world, world.base, TEXTS)
    assert generated(world, world.base, [*TEXTS, *CHATS]) == expected + world.plain(llama, world.base, CHATS)
    assert len(set(expected)) == len(TEXTS)
    t5 = AutoModelForSeq2SeqLM.from_pretrained(world.t5).eval()
    assert generated(world, world.t5, TEXTS) == world.plain(t5, world.t5, TEXTS)


def test_tuned_weights_answer_as_their_sum_with_the_base_and_as_peft_does(world: World, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(world.base).eval()
    bare = world.plain(base, world.base, TEXTS)
    recyclable.apply(world.folder / "full", str(world.base), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    full = generated(world, world.base, TEXTS, weights=world.folder / "full")
    assert full == world.plain(merged, world.base, TEXTS) != bare
    adapted = PeftModel.from_pretrained(base, world.folder / "lora").eval()
    lora = generated(world, world.base, TEXTS, weights=world.folder / "lora")
    assert lora == world.plain(adapted, world.base, TEXTS) != bare


def command(folder: Path, *argv: object) -> list[str]:
    """The lines on standard output of the command itself."""
    code = "import sys; from recyclable.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    argv = [sys.executable, "-c", code, *map(str, argv)]
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_a_base_proposes_is_checked_before_tokens_are_drawn(world: World, tmp_path: Path) -> None:
    base = make_decoder(tmp_path / "base", "llama")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "do_sample": True}))
    with pytest.raises(InputError, match=r"generation_config\.json: temperature: found 0\.0, expected: greater"):
        generated(world, base, TEXTS, do_sample=True)
    assert len(generated(world, base, TEXTS, do_sample=True, temperature=0.5)) == len(TEXTS)


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_write_what_one_process_answers(world: World, tmp_path: Path, stage: int) -> None:
    zero = {"zero_optimization": {"stage": stage, **(NOTHING_WHOLE if stage else {})}}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    weights, drawn = world.folder / "lora", {"do_sample": True, "temperature": 2.0, "top_k": 20, "seed": 3}
    asked = ["generate", "--base", world.base, "--weights", weights, "--prompts", world.texts, "--max_new_tokens", NEW]
    asked += ["--do-sample", "--temperature", 2.0, "--top-k", 20, "--seed", 3, "--nproc", 2]
    lines = command(tmp_path, *asked, "--deepspeed_config", "zero.json", "--out", "answers.jsonl", "--json")
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    alone = generated(world, world.base, TEXTS, weights=weights, **drawn)
    assert rows == [{"prompt": text, "response": said} for text, said in zip(TEXTS, alone, strict=True)]
    told = json.loads(lines[-1])
    assert told["rows"] == rows and told["decoding"] == {"max_new_tokens": NEW, "top_p": 1.0, **drawn}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "zero.json"]


@pytest.fixture(scope="module")
def evaluated(world: World) -> dict[tuple[str, str], dict[str, Any]]:
    """What two ranks say of weights of both families on both kinds of tasks."""
    asked = [(family, kind) for family in FULL for kind in TASKS]
    runs = [evaluation(world, *which) for which in asked]
    finish(start(world.folder / "ranks", runs, nproc=2, script="evaluation_ranks.py"), world.folder / "ranks")
    return dict(zip(asked, json.loads((world.folder / "ranks" / "rows.json").read_text()), strict=True))


def evaluation(world: World, family: str, kind: str) -> dict[str, Path]:
    base, task = (getattr(world, name) for name in (FULL[family][0], TASKS[kind][0]))
    return {"weights": world.folder / FULL[family][1], "base": base, "task": task}


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("family", FULL)
def test_scores_of_answers_in_text_are_the_same_on_ranks(world: World, evaluated: Any, family: str, kind: str) -> None:
    run, row = evaluation(world, family, kind), evaluated[family, kind]
    (alone,) = recyclable.evaluate(run["weights"], str(run["base"]), str(run["task"]))["runs"]
    scores = {name: value for name, value in alone.items() if name.startswith("test_")}
    assert scores[f"test_{TASKS[kind][1]}"] > 0
    assert {name: row[name] for name in scores} == pytest.approx(scores, rel=1e-5)


def test_rows_come_from_any_format_and_what_a_base_proposes_is_drawn_with(world: World, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    (tmp_path / "texts.csv").write_text("id,prompt\n" + "".join(f"{i},{text}\n" for i, text in enumerate(TEXTS)))
    pq.write_table(pa.table({"messages": CHATS}), tmp_path / "chats.parquet")
    expected = generated(world, world.base, CHATS)
    assert generated(world, world.base, tmp_path / "chats.jsonl") == expected
    assert generated(world, world.base, tmp_path / "chats.parquet") == expected
    assert generated(world, world.base, tmp_path / "texts.csv") == generated(world, world.base, TEXTS)
    (tmp_path / "base").mkdir()
    for file in world.base.iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    proposed = {"do_sample": True, "temperature": 0.5, "top_k": 7}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(proposed))
    told = recyclable.generate(str(tmp_path / "base"), TEXTS, do_sample=True, top_k=0, max_new_tokens=2)["decoding"]
    assert (told["temperature"], told["top_k"], told["top_p"], told["seed"]) == (0.5, 0, 1.0, 20)
    assert generated(world, tmp_path / "base", TEXTS) == generated(world, world.base, TEXTS)  # greedy is greedy


def test_answers_on_a_terminal_are_json_that_sends_it_no_escape_sequences(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "été 猫", "response": '\x1b[2J \x9b1m \u202e \U000e0041 \ud800 "quoted" \\'}]
    monkeypatch.setattr("recyclable.recipes.generate.generate", lambda *_: {"rows": rows})
    assert main(["generate", "--base", str(world.base), "--prompts", str(world.texts)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == rows[0] and line.isprintable() and "été 猫" in line


def test_what_cannot_be_generated_is_refused_in_one_line(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verbs = Verbs(tmp_path, capsys)
    long, empty, blank, both, last = (tmp_path / f"{name}.jsonl" for name in ("long", "empty", "blank", "both", "last"))
    long.write_text(json.dumps({"prompt": "w1"}) + "\n" + json.dumps({"prompt": "w1 " * 63}) + "\n")
    empty.write_text("")
    blank.write_text(json.dumps({"prompt": ""}) + "\n")
    both.write_text(json.dumps({"text": "w1"}) + "\n")
    last.write_text(json.dumps({"messages": [*CHATS[0], {"role": "assistant", "content": "w1"}]}) + "\n")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHATS[0]}) + "\n")
    (tmp_path / "there.jsonl").write_text("kept")
    task = make_task(tmp_path / "labels", train=9, dev=9, test=9)
    classifier = make_outdated(world.bert, task, tmp_path / "classifier")

    def refused(*more: object, base: Path = world.base, prompts: Path = world.texts) -> str:
        return verbs.refused("generate", "--base", base, "--prompts", prompts, *more)

    for said, why in (
        (refused("--temperature", 0.5), "temperature is given, but nothing reads it without do_sample"),
        (refused("--seed", 1), "seed is given, but nothing reads it without do_sample"),
        (refused("--old-base", world.base), "old_base is given, but nothing reads it without weights"),
        (refused("--do-sample", "--top-p", 1.5), "top_p: found 1.5"),
        (refused("--max-new-tokens", 0), "max_new_tokens: found 0"),
        (refused("--out", tmp_path / "there.jsonl"), "there.jsonl: is there already"),
        (refused("--out", tmp_path / "no" / "x.jsonl"), "lies in no directory that there is"),
        (refused("--out", "/proc/x.jsonl"), "out: /proc cannot be used"),
        (refused("--max-new-tokens", 2, prompts=long), "long.jsonl, row 2: has 63 tokens, with max_new_tokens 2"),
        (
            refused(prompts=world.texts),
            "texts.txt, row 1: has 3 tokens, with max_new_tokens 128 it needs 131 positions",
        ),
        (refused(prompts=empty), "empty.jsonl: holds no prompts"),
        (refused(prompts=blank), "blank.jsonl, row 1: is an empty prompt"),
        (refused(prompts=both), "row 1: has neither of the columns `prompt` and `messages`"),
        (refused(prompts=last), "row 1: ends with a message of the assistant's"),
        (refused(prompts=tmp_path / "none.txt"), "none.txt: no such file"),
        (refused(base=world.bert), "is an encoder (bert), which generates no text"),
        (refused(base=world.t5, prompts=tmp_path / "chat.jsonl"), "its tokenizer has no chat template"),
        (refused("--weights", classifier), "classifier"),
    ):
        assert why in said, said

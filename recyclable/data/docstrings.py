"""A small world of real text that every installation carries: what the installed libraries say about themselves.

Docstrings are read from the source files with `ast`; no library is imported. The libraries make two domains: scientific
computing (`general`) and deep learning (`upgrade`). The task, inside the second domain, asks which library a sentence
documents. The base is a randomly initialised BERT with a WordPiece vocabulary of both domains.
"""

from __future__ import annotations

import ast
import gc
import json
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from recyclable.errors import InputError

GENERAL = ("numpy", "pandas", "matplotlib", "networkx", "sympy", "mpmath", "PIL")
UPGRADE = ("torch", "transformers", "datasets", "accelerate", "peft", "deepspeed", "huggingface_hub", "tensorboard")
HELD_OUT = 0.05  # of each domain's sentences: enough to see the loss fall, little enough not to miss in training
LEAST_DOCUMENTED = 0.04  # of a file: below, parsing it costs more time than its few sentences are worth
FEWEST_CLASSES = 4
FEWEST_TRAIN = 200  # a library with fewer training sentences than this is no class of the task

_SENTENCE_END = re.compile(r"(?<=[a-z0-9`)\"'][.!?])\s+(?=[A-Z`])")
_NOT_PROSE = re.compile(r">>>|::|```|---|===|\*optional\*|^ {4}|^\s*[-*] |^\s*\w+ ?\(.*\) ?:", re.MULTILINE)
_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns?|Yields|Raises|Notes?|Examples?|Warning|Tip) ?:\s*")
_CODE_OR_NOT_LETTER = re.compile(r"`[^`]*`|[^a-z ]+")

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class DocstringWorld:
    """Where the world lies, and what its task asks.

    Attributes:
        general: folder of the first domain: `train.jsonl` and `heldout.jsonl`, one `{"text"}` a line.
        upgrade: the same for the second domain.
        task: folder of `train.jsonl`, `dev.jsonl` and `test.jsonl`, one `{"text", "label"}` a line.
        base: a Hugging Face directory with random weights, to be pre-trained on `general`.
        labels: the task's classes, which are names of libraries, in sorted order.
    """

    general: Path
    upgrade: Path
    task: Path
    base: Path
    labels: tuple[str, ...]


def write_docstring_world(
    folder: Path,
    *,
    seed: int = 0,
    sentences: int = 3000,
    train: int = 1000,
    dev: int = 60,
    test: int = 130,
    vocab_size: int = 6000,
    layers: int = 2,
    width: int = 128,
    positions: int = 128,
) -> DocstringWorld:
    """Write corpora, task and base under `folder`: the same bytes for the same seed and installed versions.

    No sentence of the task's dev or test set occurs in a corpus, and none occurs twice in the corpora or in the task.

    Args:
        sentences: at most so many are taken from one library, from its best documented files first.
        train, dev, test: at most so many sentences per class; dev and test are filled first.
        vocab_size: pieces the tokenizer may have.
        layers, width, positions: shape of the base, which has a head per 32 of its width.

    Raises:
        InputError: too few of the libraries are installed with their sources.
    """
    seen: set[str] = set()
    general, upgrade = ({lib: _sentences(lib, sentences, seen) for lib in libs} for libs in (GENERAL, UPGRADE))
    task = _split_task(upgrade, random.Random(seed), train, dev, test)
    labels = tuple(sorted({row["label"] for row in task["train"]}))
    if len(labels) < FEWEST_CLASSES or not any(general.values()):
        found = ", ".join(lib for lib, texts in (general | upgrade).items() if texts) or "nothing"
        wanted = ", ".join(GENERAL + UPGRADE)
        raise InputError(folder, f"found docstrings of {found}; expected {wanted}; pip install them")

    kept_out = {row["text"] for part in ("dev", "test") for row in task[part]}
    world = DocstringWorld(folder / "general", folder / "upgrade", folder / "task", folder / "base", labels)
    corpora = {}
    for place, libraries in ((world.general, general), (world.upgrade, upgrade)):
        corpora[place] = [text for texts in libraries.values() for text in texts if text not in kept_out]
        random.Random(seed).shuffle(corpora[place])
        cut = int(len(corpora[place]) * HELD_OUT)
        _write_lines(place / "heldout.jsonl", ({"text": text} for text in corpora[place][:cut]))
        _write_lines(place / "train.jsonl", ({"text": text} for text in corpora[place][cut:]))
    for part, rows in task.items():
        _write_lines(world.task / f"{part}.jsonl", rows)

    tokenizer = _train_tokenizer((text for texts in corpora.values() for text in texts), vocab_size, positions)
    tokenizer.save_pretrained(world.base)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        intermediate_size=4 * width,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,  # BERT's 0.02 is meant for a width of 768; this is about 0.02 * sqrt(768 / width)
        hidden_dropout_prob=0.0,  # training for a minute leaves no time to overfit
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertForMaskedLM(config).save_pretrained(world.base)
    return world


def _sentences(library: str, most: int, seen: set[str]) -> list[str]:
    """Prose sentences of a library's docstrings that are not in `seen` yet, which learns them.

    Sentences that differ in code, numbers or punctuation only are one sentence: libraries repeat themselves.
    """
    spec = find_spec(library)
    texts: list[str] = []
    for root in (spec.submodule_search_locations or []) if spec else []:
        for docstring in _docstrings(Path(root)):
            for sentence in _prose(docstring):
                key = " ".join(_CODE_OR_NOT_LETTER.sub(" ", sentence.lower()).split())
                if key.count(" ") >= 3 and key not in seen:
                    seen.add(key)
                    texts.append(sentence)
            if len(texts) >= most:
                return texts[:most]
    return texts


def _docstrings(root: Path) -> Iterator[str]:
    """Docstrings under a folder, from the file with the largest share of documentation on (parsing all takes long)."""
    sources = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not {"tests", "_vendor"} & set(inside.parts):
            source = path.read_text(encoding="utf-8", errors="ignore")
            documented = sum(map(len, source.split('"""')[1::2]))
            if documented > LEAST_DOCUMENTED * len(source):
                sources.append((-documented / len(source), inside.as_posix(), source))
    for _, _, source in sorted(sources):
        nodes: list[_Documented] = [tree] if (tree := _parse(source)) else []
        while nodes:
            node = nodes.pop()
            if docstring := ast.get_docstring(node):
                yield docstring
            nodes += [n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]


def _parse(source: str) -> ast.Module | None:
    """The syntax tree, None for templates and files of another Python; no cyclic garbage is made, so none is sought."""
    collecting = gc.isenabled()
    gc.disable()  # halves the time: every few hundred nodes would start a search for cycles
    try:
        with warnings.catch_warnings(action="ignore"):  # other people's invalid escapes
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    finally:
        if collecting:
            gc.enable()


def _prose(docstring: str) -> Iterator[str]:
    """Whole sentences of 6 to 40 words, mostly letters, without code, lists and tables of arguments."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        if _NOT_PROSE.search(paragraph):
            continue
        for sentence in _SENTENCE_END.split(_SECTION.sub("", " ".join(paragraph.split()))):
            letters = sum(c.isalpha() or c == " " for c in sentence)
            mostly_words = 6 <= len(sentence.split()) <= 40 and letters > 0.85 * len(sentence)
            if mostly_words and sentence[0].isupper() and sentence[-1] in ".!?":
                yield sentence


def _split_task(
    libraries: Mapping[str, list[str]], rng: random.Random, train: int, dev: int, test: int
) -> dict[str, list[dict[str, str]]]:
    """Draw the three sets, each class by itself, and shuffle them."""
    parts: dict[str, list[dict[str, str]]] = {"train": [], "dev": [], "test": []}
    for library, texts in libraries.items():
        if len(texts) < test + dev + FEWEST_TRAIN:
            continue
        rows = [{"text": text, "label": library} for text in rng.sample(texts, len(texts))]
        parts["test"] += rows[:test]
        parts["dev"] += rows[test : test + dev]
        parts["train"] += rows[test + dev : test + dev + train]
    for rows in parts.values():
        rng.shuffle(rows)
    return parts


def _train_tokenizer(texts: Iterable[str], vocab_size: int, positions: int) -> BertTokenizerFast:
    """Train lower-cased WordPiece; pieces are numbered in sorted order, since training numbers them as hashes fall."""
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = special + sorted(set(trained.get_vocab()) - set(special))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    exact = BertWordPieceTokenizer(vocab, lowercase=True)
    return BertTokenizerFast(tokenizer_object=exact._tokenizer, model_max_length=positions)


def _write_lines(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

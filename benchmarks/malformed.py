"""Malformed safetensors, manifests and adapter configs of every kind, made from whole ones by a seeded random choice.

A spoiler takes a random generator and a whole file's bytes and returns bytes that no reader may accept.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Spoiler = Callable[[random.Random, bytes], bytes]
MARK = "RECYCLABLE_UNPICKLED"
"""The environment variable that a pickle sets when somebody opens it."""
_HEAD = "classifier.weight"
_NAN = float("nan")
_JUNK = (None, True, -1, 3.5, 10**30, "", "8", "../../x", "/etc/passwd", [], ["a", 1], {}, {"a": {"b": []}}, _NAN)


@dataclass(frozen=True)
class Way:
    """One way to spoil a file."""

    what: str
    spoil: Callable[[random.Random, Path], None]
    """Spoils the file at a path, which was whole, as the random generator decides."""


def ways(file: str) -> list[Way]:
    """Every way for a file of this name."""
    kind = {".safetensors": SAFETENSORS, ".json": JSON}[Path(file).suffix]
    spoilers = {**kind, **OF_FILE.get(file, {})}
    return [Way(n, _rewriting(spoiler)) for n, spoiler in spoilers.items()] + [Way(n, p) for n, p in PLACES.items()]


def _rewriting(way: Spoiler) -> Callable[[random.Random, Path], None]:
    return lambda draw, path: path.write_bytes(way(draw, path.read_bytes())) and None


# ---- what stands in the file's place


def _place(make: Callable[[Path], Any]) -> Callable[[random.Random, Path], None]:
    def spoil(draw: random.Random, path: Path) -> None:
        path.unlink()
        make(path)

    return spoil


def _link_out(path: Path) -> None:
    outside = path.parent.parent / f"outside-{path.name}"
    outside.write_bytes(b"somebody else's")
    path.symlink_to(outside)


PLACES = {
    "a directory": _place(Path.mkdir),
    "a pipe": _place(os.mkfifo),
    "a link out": _place(_link_out),
    "a link to itself": _place(lambda path: path.symlink_to(path)),
    "a link to a device": _place(lambda path: path.symlink_to("/dev/zero")),
    "nothing": _place(lambda path: None),
}


# ---- safetensors


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _file(header: bytes | dict[str, Any], body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _any_of(draw: random.Random, header: dict[str, Any]) -> str:
    """A tensor's name; one of the encoder's where there is one, since a base may do without the others."""
    names = sorted(header.keys() - {"__metadata__"})
    return draw.choice([name for name in names if "encoder" in name] or names)


def _entry(change: Callable[[random.Random, dict[str, Any]], Any]) -> Spoiler:
    """Change one tensor's entry in the header."""

    def spoil(draw: random.Random, data: bytes) -> bytes:
        header, body = _parts(data)
        change(draw, header[_any_of(draw, header)])
        return _file(header, body)

    return spoil


def _set(field: str, *values: Any) -> Spoiler:
    return _entry(lambda draw, entry: entry.update({field: draw.choice(values)}))


def _shifted(by: int) -> Spoiler:
    def change(draw: random.Random, entry: dict[str, Any]) -> None:
        entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]

    return _entry(change)


def _renamed(draw: random.Random, data: bytes) -> bytes:
    header, body = _parts(data)
    name = _any_of(draw, header)
    new = draw.choice(["../../x", "/etc/passwd", "", "\x1b[31m", "a" * 10**6, "a::left", "\n\n"])
    return _file({new if n == name else n: entry for n, entry in header.items()}, body)


def _twice(draw: random.Random, data: bytes) -> bytes:
    header, body = _parts(data)
    name = _any_of(draw, header)
    text = json.dumps(header)
    return _file(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}".encode(), body)


class Opened:
    """What a careless reader would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"import os; os.environ[{MARK!r}] = '1'",)


def _torch_archive(draw: random.Random, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Opened()))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


SAFETENSORS: dict[str, Spoiler] = {
    "truncated": lambda draw, data: data[: draw.randrange(len(data))],
    "one byte short": lambda draw, data: data[:-1],
    "bytes behind the last tensor": lambda draw, data: data + bytes(draw.randint(1, 64)),
    "empty": lambda draw, data: b"",
    "header length": lambda draw, data: (
        struct.pack("<Q", draw.choice([2**64 - 1, 2**63, 2**40, len(data), len(data) - 7, 1, 0])) + data[8:]
    ),
    "no tensors": lambda draw, data: _file({"__metadata__": {"format": "pt"}}, b""),
    "header of noise": lambda draw, data: _file(draw.randbytes(draw.randint(1, 4000)), data[-64:]),
    "header no UTF-8": lambda draw, data: data[:20] + b"\xff\xfe" + data[22:],
    "header no object": lambda draw, data: _file(draw.choice([b"[]", b"3", b'"a"', b"null", b"NaN"]), b""),
    "header deep": lambda draw, data: _file(draw.choice([b"[", b'{"a":']) * draw.choice([2_000, 200_000]), b""),
    "tensor twice": _twice,
    "tensor renamed": _renamed,
    "another shape": _entry(lambda draw, entry: entry["shape"].append(1)),
    "overlap": _shifted(-4),
    "hole": _shifted(4),
    "offset": _set("data_offsets", [0, 2**63], [-4, 0], [8, 4], [0.0, 4.0], ["0", "4"], [], None, [0, 2**64]),
    "dtype": _set("dtype", "F33", "F64", "I8", "BOOL", "O", "", None, 32, ["F32"], "F4", "f32"),
    "shape": _set("shape", [2**62, 2**62], [-1], ["3"], [3.0], None, 3, [0, 2**63], [1] * 10**5, [_NAN], [2**70]),
    "entry": _entry(lambda draw, entry: entry.pop(draw.choice(sorted(entry)))),
    "metadata": lambda draw, data: _file(
        {**_parts(data)[0], "__metadata__": draw.choice([3, [], {"a": 1}, {"a": {}}])}, _parts(data)[1]
    ),
    "pickle": lambda draw, data: pickle.dumps(Opened()),
    "torch archive": _torch_archive,
}


# ---- JSON of all kinds


def _field(change: Callable[[random.Random, dict[str, Any]], Any]) -> Spoiler:
    def spoil(draw: random.Random, data: bytes) -> bytes:
        content = json.loads(data)
        change(draw, content)
        return json.dumps(content).encode()

    return spoil


def _put(path: str, *values: Any) -> Spoiler:
    """Set a field, reached by dots, to one of some values."""
    *sections, last = path.split(".")

    def change(draw: random.Random, content: dict[str, Any]) -> None:
        for section in sections:
            content = content[section]
        content[last] = draw.choice(values)

    return _field(change)


def _key_twice(draw: random.Random, data: bytes) -> bytes:
    content = json.loads(data)
    key = draw.choice(sorted(content))
    return data.rstrip()[:-1] + f", {json.dumps(key)}: {json.dumps(content[key])}}}".encode()


JSON: dict[str, Spoiler] = {
    "truncated": lambda draw, data: data[: draw.randrange(len(data.rstrip()))],
    "no UTF-8": lambda draw, data: data.replace(b'"', b'"\xff', 1),
    "half a surrogate pair": lambda draw, data: data.replace(b'"', b'"\\ud800', 1),
    "no object": lambda draw, data: draw.choice([b"[]", b"3", b"null", b'"a"', b"NaN", b"[" * 5]),
    "deep": lambda draw, data: draw.choice([b"[", b'{"a":']) * draw.choice([10_000, 1_000_000]),
    "key twice": _key_twice,
    "bytes behind": lambda draw, data: data + draw.choice([b"}", b"{}", b"\x00"]),
    "pickle": lambda draw, data: pickle.dumps(Opened()),
    "noise": lambda draw, data: draw.randbytes(draw.randint(1, 2000)),
    "long number": lambda draw, data: b'{"format": ' + b"9" * 10_000 + b"}",
}

_FINGERPRINTS = ("weights", "tokenizer", "config")
OF_FILE: dict[str, dict[str, Spoiler]] = {
    "manifest.json": {
        **{
            f"{field} of another type": _put(field, *values)
            for field, values in {
                "kind": _JUNK,
                "tuning": _JUNK,
                "task": _JUNK,
                "base": _JUNK,
                "method": tuple(junk for junk in _JUNK if not isinstance(junk, str)),
                "metrics": tuple(junk for junk in _JUNK if not isinstance(junk, dict)),
                "history": tuple(junk for junk in _JUNK if junk != []),
                "settings": _JUNK,
                "files": _JUNK,
                "format": _JUNK,
                "architecture": tuple(junk for junk in _JUNK if junk is not None),
                "recycled_from": tuple(junk for junk in _JUNK if junk is not None and not isinstance(junk, dict)),
                "storage": tuple(junk for junk in _JUNK if junk is not None and not isinstance(junk, dict)),
            }.items()
        },
        "unknown field": _put("color", "green"),
        "field missing": _field(lambda draw, content: content.pop(draw.choice(["kind", "task", "base", "files"]))),
        "files elsewhere": _put("files", {"../../x": "0"}, {"/etc/passwd": "0"}, {"delta.safetensors/../../x": "0"}),
        "files too few": _field(lambda draw, content: content["files"].popitem()),
        "digest": _put("files", {"delta.safetensors": "0" * 64, "head.safetensors": "../../x"}),
        "digest no text": _put("files", {"delta.safetensors": 0, "head.safetensors": None}),
        "fingerprint": _field(
            lambda draw, content: content["base"]["fingerprint"].update(
                {draw.choice(_FINGERPRINTS): draw.choice([3, None, [], "../../x", "0" * 64])}
            )
        ),
        "labels": _put("task.labels", ["a"], "abc", [1, 2, 3], {"a": 0}, None, [["a"], ["b"], ["c"]], ["a"] * 50),
        "max_length": _put("settings.max_length", "24", -1, 0, 2.5, None, _NAN, 10**30),
        "seed": _put("settings.seed", "20", -1, None, 1.5),
        "architecture": _put("architecture", "os.system", "PreTrainedModel", "GPT2Model", "../../x", "__doc__"),
        "score": _put("metrics", {"dev": {"accuracy": "0.9"}}, {"metric": 3}, {"best_step": "many"}),
    },
    "model.safetensors.index.json": {
        "field missing": _field(lambda draw, content: content.pop("weight_map")),
        "weight_map": _put("weight_map", *_JUNK),
        "files elsewhere": _put("weight_map", *({"a": p} for p in ("../../x", "/etc/passwd", "..", ".", "", "a\0b"))),
        "files of another type": _put("weight_map", *({"a": junk} for junk in _JUNK)),
        "files that lack it": _field(
            lambda draw, content: content["weight_map"].update({"a": content["weight_map"]["bert.pooler.dense.bias"]})
        ),
    },
    "adapter_config.json": {
        "field missing": _field(lambda draw, content: content.pop("peft_type")),
        "peft_type": _put("peft_type", *_JUNK, "LORA2", "XLORA", "lora ", "PREFIX_TUNING"),
        "task_type": _put("task_type", "DANCE", 3, [], "SEQ_2_SEQ_LM"),
        "r": _put("r", "8", 0, -1, 10**9, 2.5, _NAN, float("inf"), None, [8], {}),
        "lora_alpha": _put("lora_alpha", "16", _NAN, float("-inf"), [], {}, 10**30),
        "lora_dropout": _put("lora_dropout", 7, -0.5, "0.1", [], _NAN),
        "target_modules": _put("target_modules", ["nothing"], 5, [5], "nowhere", {"a": 1}, "[", [["query"]], "../../x"),
        "target_modules that hang": _put("target_modules", "(a+)+$", "(.*a|.*)*b", ".*.*.*.*.*.*x", "(x{1,9}){1,9}y"),
        "modules_to_save": _put("modules_to_save", 7, [7], "classifier/../../x", {}),
        "rank_pattern": _put("rank_pattern", {"query": 10**9}, {"query": "4"}, {"(a+)+": 2}, [3], "x", {"query": 0}),
        "alpha_pattern": _put("alpha_pattern", {"query": _NAN}, {"query": "4"}, {"(a+)+": 2}, [3]),
        "bias": _put("bias", "both", 3, []),
        "use_dora": _put("use_dora", True, "yes"),
        "layers": _put("layers_to_transform", 5, [10**12], "all"),
        "files elsewhere": _put("arrow_config", {"a": "../../x"}),
        "modules elsewhere": _put("megatron_config", {"a": 1}),
        "a changed base": _put("init_lora_weights", "pissa", "olora", "loftq", "pissa_niter_4", "corda"),
        "other adapters": _field(lambda draw, content: content.update(peft_type="XLORA", adapters={"a": "../../x"})),
        "a prompt's pickle": _field(
            lambda draw, content: content.update(
                peft_type="MULTITASK_PROMPT_TUNING", prompt_tuning_init_state_dict_path="../../x.bin"
            )
        ),
    },
}

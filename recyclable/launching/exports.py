"""Which variables go along to the other hosts of a run: deepspeed's launcher takes hardly any across by itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from recyclable.errors import InputError

_FILE = ".deepspeed_env"
_PREFIXES = (
    *("RECYCLABLE_", "GLOO_", "NCCL_", "UCX_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH_"),
    *("TRITON_", "OMP_", "MKL_", "KMP_", "PYTORCH_", "DS_ACCELERATOR", "DEEPSPEED_TIMEOUT", "XDG_CACHE_HOME"),
)
# They would be read by everybody on the other host in the list of its processes.
_SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD)(_|$)")


def exports(environment: Mapping[str, str]) -> dict[str, str]:
    """What ranks on other hosts are given of an environment, and of the user's `.deepspeed_env` over it.

    deepspeed's own rule says where that lies: in the home directory and, over it, in the working directory, under
    another name where `DS_ENV_FILE` says so. Raises InputError for a line that sets nothing.
    """
    found = {name: value for name, value in environment.items() if name.startswith(_PREFIXES)}
    found = {name: value for name, value in found.items() if not _SECRET.search(name)}
    name = environment.get("DS_ENV_FILE", _FILE)
    for folder in dict.fromkeys((Path.home(), Path.cwd())):
        found |= _read(folder / name)
    return found


def for_shells(variables: Mapping[str, str]) -> str:
    """The file of variables as deepspeed's launcher is to read it for pdsh.

    It puts double quotes around values that are more than a word, and what is special between them to the shell of
    the other host, or to pdsh, needs a sign of that.
    """
    lines = []
    for name, value in sorted(variables.items()):
        if re.search(r"[^\w@%+=:,./-]", value):
            value = re.sub(r'(["\\$`])', r"\\\1", value)
        lines.append(f"{name}={value.replace('%', '%%')}\n")
    return "".join(lines)


def _read(path: Path) -> dict[str, str]:
    """The variables of a file with one NAME=value per line."""
    found = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read ({error}), expected lines such as NAME=value") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, separator, value = line.partition("=")
        if not separator or not re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
            raise InputError(f"{path}, line {number}", f"found {line!r}, expected NAME=value")
        found[name.strip()] = value.strip()
    return found

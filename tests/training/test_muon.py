"""deepspeed's Muon is there without torch's compiler, which is only loaded when one of its functions is called."""

from __future__ import annotations

import subprocess
import sys

from processes import ROOT

SCRIPT = """
import sys
import torch
real = torch.compile
from recyclable.training.muon import import_muon
import_muon()
import_muon()
from deepspeed.runtime.zero.muon import muon_optimizer, original_muon
assert "torch._inductor.compile_fx" not in sys.modules
assert torch.compile is real
torch.compile = lambda function: lambda *given: ("compiled", function(*given).shape)
print(original_muon.zeropower_via_newtonschulz5(torch.randn(3, 2), 1))
"""


def test_muon_is_imported_without_the_compiler_and_compiled_when_it_is_called() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.splitlines()[-1] == "('compiled', torch.Size([3, 2]))"

"""Ways to recycle outdated weights: one file per method, found by name (`method` in recycle.yaml).

Recycling is where the weights start x what they learn from; a method's class puts the two together out of
`methods.parts` and is at the same time the run config of `recyclable recycle`: its fields are all that it reads.
"""

from __future__ import annotations

from recyclable.methods.parts.method import Method
from recyclable.registry import Registry

METHODS: Registry[Method] = Registry("recyclable.methods", "method", lambda: Method)

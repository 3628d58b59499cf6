"""Checkpoints that are whole or ignored: tensors by name and range in safetensors, whatever ranks and stage wrote them.

`step-N/` holds a file of each rank (`rank_file.py`) and the record that marks it as whole (`record.py`). `saving.py`
writes it in the background, `choosing.py` finds the newest whole one.
"""

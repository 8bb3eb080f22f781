"""Deltas: the weights of an expert as their difference from a base, or in a few bits each.

A delta is a folder: `delta.json` (`manifest.py`), `delta.safetensors` with the coded tensors, and the expert's other
files (configs, tokenizer, chat template) as they are. `writing.py` makes one, `restoring.py` makes the expert's
safetensors files of it again, byte for byte those whose SHA-256 the delta states. Tensors are coded and decoded in
chunks of bounded size, with NumPy alone.

    exact     XOR with the base's bits, split into planes of bytes, zstd (`planes.py`): lossless
    compeft   the largest differences as signs with one scale per tensor (`signs.py`, `selection.py`): arXiv 2311.13171
"""

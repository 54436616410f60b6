"""Targets computed once for a corpus and read from disk ever after: no step runs a teacher.

``layout.py``: what a frame of the file holds. ``numbers.py``: float16, bfloat16, int8.
``key.py``: what the targets depend on. ``index.py``: the folder's files. ``writer.py``,
``build.py``: making it. ``reader.py``: the batches' share of it. ``use.py``: a run that has one.
"""

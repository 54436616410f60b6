"""Checks of a package for SUPERB's hidden set: what the organisers check, and what they may meet.

:mod:`.files` reads the package; :mod:`.process` starts :mod:`.child` in a process of its own, where
``expert.py`` is imported and run. :mod:`.isolation`, :mod:`.official`, :mod:`.behaviour` and
:mod:`.size` run there; they need torch and nothing else.
"""

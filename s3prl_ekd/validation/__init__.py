"""Checks of a package for SUPERB's hidden set: what the organisers check, and what they may meet.

:mod:`.files` reads the package. :mod:`.process` starts :mod:`.child` in a process of its own, where
``expert.py`` is imported and run; the two exchange :mod:`.messages`, the outputs of the package.
The checks (:mod:`.official`, :mod:`.behaviour`, :mod:`.size`) are functions of a
:class:`.model.Package`, which asks that process; they run outside of it. :mod:`.isolation` is what
the process may not do, :mod:`.descendants` ends what it has started.
"""

"""SUPERB's hidden-set package: write it, and check it as the organisers do.

:mod:`.package` writes it. :mod:`.static_checks` reads it. :mod:`.sandbox` starts :mod:`.child` in a
process of its own, where ``expert.py`` is imported and run; the two exchange :mod:`.messages`, the
outputs of the package. :mod:`.runtime_checks` are functions of a ``Package``, which asks that
process; they run outside of it. :mod:`.isolation` is what the process may not do,
:mod:`.descendants` ends what it has started.
"""

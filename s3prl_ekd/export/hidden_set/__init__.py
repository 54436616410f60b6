"""Write and validate packages for SUPERB's hidden set.

- :mod:`.package` writes a package.
- :mod:`.static_checks` checks its files without running them.
- :mod:`.sandbox` runs :mod:`.child` in a separate process, which imports and runs ``expert.py`` and
  returns its outputs as :mod:`.messages`.
- :mod:`.runtime_checks` checks these outputs, outside of that process.
- :mod:`.isolation` blocks network and packages in it, :mod:`.descendants` kills its children.
"""

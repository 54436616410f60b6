"""A frozen upstream's hidden states, computed once for each waveform and kept on disk.

``run_downstream.py --cache-features DIR``. Each utterance is computed alone, so that its hidden
states depend on nothing else: in a padded batch s3prl's group norm goes over the padding too, and a
short utterance changes with its neighbours.

:mod:`.arguments` is what the user types, :mod:`.store` the files, :mod:`.upstream` what stands for
s3prl's upstream, :mod:`.run` its Runner with that in it.
"""

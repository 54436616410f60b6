"""What :mod:`s3prl_ekd.runner` is made of: a file for each thing that can happen to a long run."""

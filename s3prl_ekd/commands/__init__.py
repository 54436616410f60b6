"""The subcommands of ``s3prl-ekd``, one module each: ``configure(parser)`` and ``main(args)``."""

"""The import that ``init`` writes into a working folder; see :mod:`.pretrain.expert`."""

from .pretrain.expert import UpstreamPretrainExpert

__all__ = ["UpstreamPretrainExpert"]

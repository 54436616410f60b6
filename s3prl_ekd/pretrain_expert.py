"""The module that ``s3prl-ekd init`` makes working folders import; see :mod:`.pretrain.expert`."""

from .pretrain.expert import UpstreamPretrainExpert

__all__ = ["UpstreamPretrainExpert"]

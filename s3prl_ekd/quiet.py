"""Leave out what s3prl's code makes other packages say, so that what matters can be read."""

from __future__ import annotations

import logging
import warnings


def quiet_s3prl() -> None:
    """Silence deprecations that s3prl cannot mend in a run, and its dumps of model configs."""
    # torch.cuda.amp and torch.nn.utils.weight_norm, said anew at every step or layer
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.")
    # WavLM's attention passes a bool mask beside a float one
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
    # s3prl's own optimizers
    warnings.filterwarnings("ignore", message="This overload of add_ is deprecated")
    logging.getLogger("s3prl").setLevel(logging.WARNING)

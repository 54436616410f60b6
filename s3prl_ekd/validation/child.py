"""The process that a package is run in: ``python child.py PLAN.json``, started by :mod:`.process`.

The plan says ``root`` (the folder that holds our package), ``folder`` (the one to check), ``names``
(the checks), ``lengths`` and ``report``, a file that gets a JSON line when a check starts and one
when it ends. No name of ours is importable once the first check begins.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> int:
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.path[0] = plan["root"]  # where this script's own folder stood
    import torch

    from s3prl_ekd.validation import behaviour, isolation, official, size
    from s3prl_ekd.validation.model import Package, told
    from s3prl_ekd.validation.outcome import Failed, Skipped, Warned

    del sys.path[0]
    functions = {
        "weights": official.weights,
        "import": official.import_,
        "build": official.build,
        "keywords": official.keywords,
        "forward": official.forward,
        "lists": official.lists,
        "rates": official.rates,
        "frames": official.frames,
        "values": behaviour.values,
        "device": behaviour.device,
        "gpu": behaviour.gpu,
        "inputs": behaviour.inputs,
        "repeat": behaviour.repeat,
        "modes": behaviour.modes,
        "order": behaviour.order,
        "batching": behaviour.batching,
        "0.05 s": behaviour.short,
        "1 s": behaviour.middle,
        "35 s": behaviour.long,
        "network": behaviour.network,
        "parameters": size.parameters,
        "macs": size.macs,
    }
    package = Package(Path(plan["folder"]), plan["lengths"])
    package.watch.block()
    isolation.force_data_only(torch)
    torch.manual_seed(0)
    with open(plan["report"], "a", encoding="utf-8") as report:

        def write(**line) -> None:
            report.write(json.dumps(line) + "\n")
            report.flush()

        for name in plan["names"]:
            write(start=name)
            status = "fail"
            try:
                status, reason = "pass", functions[name](package)
            except Failed as error:
                status, reason = "fail", str(error)
            except Warned as error:
                status, reason = "warn", str(error)
            except Skipped as error:
                status, reason = "skip", str(error)
            except BaseException as error:  # SystemExit of an expert.py, too
                status, reason = "fail", told(error, package.folder)
            write(name=name, status=status, reason=" ".join(reason.split()))
        write(done=True, cost=package.cost, torch=torch.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main())

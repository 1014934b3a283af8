"""`python -m tests.kernels.npu.worker CHECK`, where torch_npu is: what one check finds, a line of JSON each."""

import argparse
import json
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO

CHECKS = ("ops", "model", "shapes", "faults", "examined")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("check", choices=CHECKS)
    said = parser.parse_args()
    # torch_npu prints what it misses on a machine without CANN.
    with redirect_stdout(StringIO()):
        found = list(import_module(f"tests.kernels.npu.{said.check}").check())
    for line in found:
        print(json.dumps(line))


if __name__ == "__main__":
    main()

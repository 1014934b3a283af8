"""`python -m tests.kernels.triton.worker CHECK [KERNEL ...]`, in the environment of one of the compilers: what one
checker finds for every example, a line of JSON each."""

import argparse
import json
import sys
from importlib import import_module

from expertmesh.errors import KernelFailure
from tests.kernels.triton.examples import EXAMPLES
from tests.kernels.triton.toolchain import CHECKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("check", choices=sorted(CHECKS))
    parser.add_argument("kernels", nargs="*", help="(default: all)")
    said = parser.parse_args()
    examples = [e for e in EXAMPLES if not said.kernels or e.kernel in said.kernels]
    try:
        for line in import_module(f"tests.kernels.triton.{said.check}").check(examples):
            print(json.dumps(line), flush=True)
    except KernelFailure as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

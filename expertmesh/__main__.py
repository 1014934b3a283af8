"""`python -m expertmesh` is the command line."""

import sys

from expertmesh.cli import main

sys.exit(main())

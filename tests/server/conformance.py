"""Whether the server keeps to its own document: a random checkpoint behind a real server, called by schemathesis.

    python -m venv there && there/bin/pip install schemathesis
    python -m tests.server.conformance there/bin/schemathesis [more of its options]

Ends with schemathesis' own code: 0 where no answer was undocumented, misshapen or a fault of the server.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from expertmesh import LLM
from tests.server.conftest import make_folder, serving

# What fits the document may still be refused, since a prompt can be too long: nothing is said of that.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance,unsupported_method"
)
OPTIONS = ("--checks", CHECKS, "--phases", "coverage,fuzzing", "--max-examples", "10", "--seed", "1")


def main(program: str, *options: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        make_folder(model)
        with LLM(model, max_batch_requests=8, page_size=4, max_context=48) as llm, serving(llm) as url:
            command = [Path(program).absolute(), "run", f"{url}/openapi.json", *OPTIONS, *options]
            return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

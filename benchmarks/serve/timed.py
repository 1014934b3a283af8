"""`python benchmarks/serve/timed.py`: a server that computes nothing and answers at known times, to try clients on."""

import argparse
import asyncio
import json
from typing import Any

from aiohttp import web

NAME = "timed"


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def application(first: float, gap: float) -> web.Application:
    """first: milliseconds to the first text; gap: to each further one."""

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": NAME, "object": "model"}]})

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        loop, answer = (
            asyncio.get_running_loop(),
            web.StreamResponse(headers={"Content-Type": "text/event-stream"}),
        )
        head = {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": NAME}
        start = loop.time()
        await answer.prepare(request)
        for number in range(body["max_tokens"]):
            await asyncio.sleep(start + (first + number * gap) / 1000 - loop.time())
            choice = {"index": 0, "text": " a", "logprobs": None, "finish_reason": None}
            await answer.write(event(head | {"choices": [choice]}))
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        usage["total_tokens"] = sum(usage.values())
        await answer.write(event(head | {"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        return answer

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", complete)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument(
        "--first", type=float, default=200.0, metavar="MS", help="to the first text (default: 200)"
    )
    parser.add_argument("--gap", type=float, default=50.0, metavar="MS", help="between texts (default: 50)")
    args = parser.parse_args()
    web.run_app(application(args.first, args.gap), host="127.0.0.1", port=args.port, print=None)


if __name__ == "__main__":
    main()

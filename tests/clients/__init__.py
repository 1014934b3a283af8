"""Official clients' own tests, and a load, against a server of ours. They run as programs, not with the other tests:
`python -m tests.clients.run openai anthropic langchain schemathesis`, `python -m tests.clients.soak`."""

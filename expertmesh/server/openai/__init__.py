"""OpenAI's API: completions, chat completions, responses, models; tokens in vLLM's form."""

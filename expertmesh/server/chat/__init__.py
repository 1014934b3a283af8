"""Conversations, whichever API they come by: from messages and tools to a prompt, from generated text to blocks."""

"""Training of the demo model: texts, tokenizer, model, optimiser, export and model card."""

"""Predicts memory, throughput and latency of a deployment from facts alone: no weights, no accelerator."""

"""Ranks that talk: transports (threads, processes), the TP group's collectives, the exchange of rows with experts."""

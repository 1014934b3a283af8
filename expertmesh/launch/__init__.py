"""Rank processes on one machine: how they are started, and how one talks with them."""

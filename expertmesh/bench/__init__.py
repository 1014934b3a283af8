"""Measurements that users can repeat: what `expertmesh bench` runs."""

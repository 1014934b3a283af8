"""Machines on one machine: network namespaces joined by links of a given rate and delay, and programs in them."""

"""The model in the order of the paper. It sees its own rows and names collectives; ranks live behind `Step`."""

"""Where experts are and who sends what to whom: plain data and pure functions, no device, no process group."""

"""The engine: checkpoint, cache, scheduler, sampler, runner (one rank), and the step loop that ties them together."""

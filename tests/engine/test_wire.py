"""What ranks in other processes are told equals what the scheduler knows."""

import msgpack
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.engine.cache import PageCache
from expertmesh.engine.sampler import fold_seed
from expertmesh.engine.scheduler import Scheduler
from expertmesh.engine.wire import (
    COUNTS,
    FLOATS,
    BatchReader,
    BatchWriter,
    read_masks,
    read_result,
    write_masks,
    write_result,
)
from expertmesh.request import Batch, Limits, Request, Sampled, SamplingParams, StepResult
from tests.support.fake import FakeModel, request_of


def read(params: SamplingParams) -> list[object]:
    """The parameters that runners and samplers read."""
    return [getattr(params, name) for name in (*FLOATS, *COUNTS)]


def told(batch: Batch) -> list[object]:
    """All that a runner reads of a batch."""
    return [
        (
            p.start,
            p.count,
            r.id,
            r.tokens[: p.start + p.count + 1],
            r.pages,
            r.prompt_length,
            read(r.params),
            r.params.logit_bias,
            r.limits,
            r.seed,
        )
        for p in batch.slices
        for r in [p.request]
    ]


@settings(max_examples=60)
@given(st.data())
def test_reader_sees_every_batch_as_it_was_scheduled(data: st.DataObject) -> None:
    """Small caches, so that requests are preempted; aborts at any time; ids used again."""
    page = data.draw(st.integers(1, 4))
    cache = PageCache(data.draw(st.integers(6, 16)), page)
    scheduler = Scheduler(cache, 12, 4, data.draw(st.integers(1, 9)), min(24, cache.pages * page))
    writer, reader, model = BatchWriter(), BatchReader(), FakeModel(page)
    requests: list[Request] = []
    for number in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["add", "step", "step", "step", "abort"]))
        if action == "add":
            prompt = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=15))
            if len(prompt) < scheduler.max_context:
                request = request_of(number, prompt, data.draw(st.integers(1, 12)))
                scheduler.add(request)
                requests.append(request)
        elif action == "abort" and requests:
            scheduler.abort(data.draw(st.sampled_from(requests)))
        else:
            batch = scheduler.schedule()
            message = msgpack.unpackb(msgpack.packb(writer.write(batch)), strict_map_key=False)
            assert told(reader.read(message)) == told(batch)
            scheduler.update(batch, model.run(batch))
    for request in requests:
        scheduler.abort(request)
    reader.read(writer.write(scheduler.schedule()))
    assert not reader._requests and not writer._known


def test_parameters_arrive_whole() -> None:
    params = SamplingParams(
        max_tokens=3, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, seed=5, stop=("a", "b"), stop_token_ids=(1, 2),
        logprobs=2, prompt_logprobs=1, presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.2,
        ignore_eos=True, logit_bias={7: -100, 9: 0.5}, min_tokens=2,
    )  # fmt: skip
    limits = Limits((1, 5), ((2, (3, 4)), (9, (3,))), ((5,), (6, 7)))
    request = Request("x", [1, 2, 3], 3, params, -(1 << 63), limits=limits, pages=[0])
    scheduler = Scheduler(PageCache(4, 4), 8, 8, 8, 16)
    scheduler.add(request)
    batch = scheduler.schedule()
    message = msgpack.unpackb(msgpack.packb(BatchWriter().write(batch)), strict_map_key=False)
    (part,) = BatchReader().read(message).slices
    assert read(part.request.params) == read(params) and part.request.seed == -(1 << 63)
    assert part.request.params.logit_bias == {7: -100.0, 9: 0.5} and part.request.limits == limits


def test_parameters_of_any_size_are_sent() -> None:
    """Whatever SamplingParams accepts: a message that cannot be packed would leave the two sides apart."""
    large = 10**25
    params = SamplingParams(
        max_tokens=large, temperature=large, top_k=large, repetition_penalty=large, seed=large, stop=("\ud800",),
        stop_token_ids=(large,),
    )  # fmt: skip
    scheduler = Scheduler(PageCache(4, 4), 8, 8, 8, 16)
    scheduler.add(Request("x", [1, 2, 3], 3, params, fold_seed(large)))
    message = msgpack.unpackb(msgpack.packb(BatchWriter().write(scheduler.schedule())))
    (part,) = BatchReader().read(message).slices
    assert part.request.params.temperature == 1e25 and part.request.params.top_k > 1 << 20


def test_masks_arrive_whole() -> None:
    masks = {"a": np.array([1, -1, 1 << 30], dtype=np.int32), "b": np.zeros(3, dtype=np.int32)}
    found = read_masks(msgpack.unpackb(msgpack.packb(write_masks(Batch((), masks)))))
    assert found.keys() == masks.keys()
    assert all(np.array_equal(found[key], mask) for key, mask in masks.items())


def test_results_arrive_whole() -> None:
    result = StepResult(
        {"a": Sampled(3), "b": Sampled(4, {4: -0.5, 9: -1.5})}, {"c": [None, {5: -2.0}], "d": []}
    )
    data = msgpack.packb(write_result(result))
    assert read_result(msgpack.unpackb(data, strict_map_key=False)) == result

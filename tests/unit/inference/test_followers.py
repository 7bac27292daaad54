"""What rank 0 tells the others, and what each rank reads of the weights; no processes, no frameworks."""

from __future__ import annotations

import queue
import threading
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.followers import WORDS, Leader, decode, encode, follow, shard_reader
from telechat_twins.core.inference.requests import Event, Request, Usage
from telechat_twins.core.inference.runner import Step
from telechat_twins.core.inference.sampling import TokenChoice, sampling_config
from telechat_twins.core.inference.worker import (
    GenerationJob,
    inference_layout,
    read_events,
    read_job,
    write_events,
    write_job,
)
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.model.quantize import Int8Matrix, quantize
from telechat_twins.core.parallel.layout import parse_layout
from telechat_twins.core.parallel.sharding import chunk_table
from tests.support.engine_support import PlainRunner, finish, tokens_of


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 600), sequences=st.integers(1, 40), pages=st.integers(1, 60), wanted=st.integers(1, 40))
def test_a_step_comes_out_as_it_went_in(tokens, sequences, pages, wanted):
    random = np.random.default_rng(tokens)
    shapes = {
        "starts": sequences + 1,
        "lengths": sequences,
        "tables": (sequences, pages),
        "wanted": wanted,
        "adapters": sequences,
    }
    arrays = {
        field.name: random.integers(0, 2**31 - 1, shapes.get(field.name, tokens), np.int32) for field in fields(Step)
    }
    first, rest = encode(Step(**arrays))
    assert first.shape == (WORDS,) and first.dtype == rest.dtype == np.int32
    again = decode(first, rest)
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(again, name), array)


def test_a_step_of_decoding_is_one_message():
    runner = PlainRunner(num_pages=600)
    engine = Engine(runner)
    for seed in range(8):
        engine.submit(Request(prompt_ids=(seed, 2, 3), max_new_tokens=200))
    steps = []
    real = runner.run
    runner.run = lambda step: (steps.append(step), real(step))[1]
    while engine.busy:
        engine.step()
    assert all(not encode(step)[1].size for step in steps)


class Ranks:
    """Several runners whose ``share`` meets, one thread a rank."""

    def __init__(self, count):
        self.queues = [queue.Queue() for _ in range(count)]

    def runner(self, rank):
        runner = PlainRunner()

        def share(words):
            if rank:
                return self.queues[rank].get(timeout=20)
            for other in self.queues[1:]:
                other.put(words.copy())
            return words

        runner.share = share
        return runner


def test_followers_make_the_leaders_steps_until_they_are_let_go():
    ranks = Ranks(3)
    runners = [ranks.runner(rank) for rank in range(3)]
    threads = [threading.Thread(target=follow, args=(runner,)) for runner in runners[1:]]
    for thread in threads:
        thread.start()
    leader = Leader(runners[0])
    # Pieces of prompts longer than one message, and decoding.
    engine = Engine(leader, limits=EngineLimits(step_tokens=400))
    asked = [
        Request(prompt_ids=tuple(range(1, 60)) * 9, max_new_tokens=5),
        Request(prompt_ids=(4, 5), max_new_tokens=9),
    ]
    numbers = [engine.submit(request) for request in asked]
    found = finish(engine)
    leader.idle()
    leader.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    plain = Engine(PlainRunner(), limits=EngineLimits(step_tokens=400))
    again = [plain.submit(request) for request in asked]
    expected = finish(plain)
    assert [tokens_of(found[n]) for n in numbers] == [tokens_of(expected[n]) for n in again]
    for runner in runners[1:]:
        assert runner.sizes == runners[0].sizes and runner.prefixes == runners[0].prefixes


@pytest.mark.parametrize("quantized", ["none", "int8"])
@pytest.mark.parametrize("text", ["tp2", "tp4", "pp2", "tp2.pp2"])
def test_the_ranks_parts_make_up_the_weights(text, quantized):
    """In 8 bits too: the same whole numbers and factors as of the whole matrix."""
    config = load_model_config({"preset": "telechat2-tiny", "vocab_size": 2049, "tied_embeddings": False})
    layout = parse_layout(text)
    whole = {name: init_tensor(name, config, 1) for name in parameter_table(config)}
    covered = {name: np.zeros(tensor.shape, bool) for name, tensor in whole.items()}
    for rank in range(layout.world):
        table = chunk_table(config, layout, layout.coord(rank))
        get = shard_reader(config, table, lambda name, box: whole[name][box], quantized)
        for name, shard in table.items():
            part = get(name)
            assert part.shape == shard.shape if not isinstance(part, Int8Matrix) else part.values.shape == shard.shape
            expected = whole[name]
            if isinstance(part, Int8Matrix):
                values, factors = quantize(whole[name])
                expected = values * factors[:, None]
                part = part.values * part.factors[:, None]
            filled = tuple(slice(0, box.stop - box.start) for box in shard.index)
            np.testing.assert_array_equal(part[filled], expected[shard.index])
            outside = part.copy()
            outside[filled] = 0
            assert not outside.any()
            covered[name][shard.index] = True
    assert all(c.all() for c in covered.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dp2", "found dp 2 in 'dp2'"),
        ("ring2.ulysses2", "found ulysses 2 in"),
        ("pp2.vpp2", "found virtual 2 in"),
    ],
)
def test_layouts_that_share_what_generation_lacks_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        inference_layout(text)
    assert not inference_layout("tp2.pp2").sequence_parallel
    assert inference_layout("cp4.tp2").ring == 4


def test_a_job_and_its_events_survive_the_files(tmp_path):
    request = Request(
        prompt_ids=(1, 2),
        max_new_tokens=5,
        sampling=sampling_config(temperature=0.5, seed=2**63),
        samples=2,
        stop_ids=frozenset({3, 9}),
        stop_texts=("\u4f60", "x"),
        logit_bias={5: -1.5},
        logprobs=2,
        margins=True,
        text="answer",
    )
    job = GenerationJob(
        backend="pt",
        checkpoint="model",
        config=load_model_config("telechat2-tiny"),
        layout="tp2",
        precision="bf16",
        quantize="int8",
        rescale="step",
        pages=9,
        request=request,
        tokenizer=None,
        control="chat",
        adapter="folder",
    )
    write_job(tmp_path / "job.json", job)
    assert read_job(tmp_path / "job.json") == job
    events = [
        Event(0, 0, TokenChoice(3, 0.5, -0.1, ((3, -0.1), (4, -2.0))), "t"),
        Event(0, 1, TokenChoice(5), "", "stop", "x", None, Usage(2, 1, 0)),
        Event(0, 0, None, "", "error", None, "broken", Usage(2, 1, 0)),
    ]
    write_events(tmp_path / "events.json", events, 0.25)
    assert read_events(tmp_path / "events.json") == (events, 0.25)
    assert replace(job, layout="pp2") != job

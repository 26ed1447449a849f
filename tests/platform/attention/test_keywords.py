"""Keyword arguments: each is a field of a record, and unknown ones are refused by name."""

import inspect
from dataclasses import fields

import pytest
import torch

from fulgurite.attention import (
    AttentionJob,
    Streamed,
    attend_files,
    attend_files_backward,
    keywords,
    plan,
    stream_attention,
)
from fulgurite.attention.call_options import Scoring, StreamOptions
from fulgurite.attention.masks import Masking
from fulgurite.errors import ConfigError

RECORDS = {field.name for kind in (Masking, Scoring, StreamOptions) for field in fields(kind)}
TENSOR = torch.zeros(1, 1, 4, 2)


@pytest.mark.parametrize("name", [n for n in keywords.__all__ if n.endswith("Keywords")])
def test_each_keyword_is_a_field_of_a_record(name):
    names = set(getattr(keywords, name).__annotations__)
    assert names
    assert names - RECORDS <= {"return_lse", "least_tasks"}


@pytest.mark.parametrize(
    "call",
    [
        lambda **options: stream_attention(TENSOR, TENSOR, TENSOR, **options),
        lambda **options: plan(TENSOR, TENSOR, **options),
        lambda **options: Streamed()(TENSOR, TENSOR, TENSOR, **options),
        lambda **options: attend_files([TENSOR] * 3, [TENSOR] * 2, **options),
        lambda **options: attend_files_backward(TENSOR, *[[TENSOR] * 3] * 3, **options),
        lambda **options: AttentionJob.create("folder", *[TENSOR] * 3, **options),
    ],
)
def test_an_unknown_keyword_is_refused_with_the_nearest_one(call):
    with pytest.raises(ConfigError, match=r"no argument windo\. Did you mean window\?"):
        call(windo=3)


def test_help_shows_the_keywords_with_their_defaults():
    parameters = inspect.signature(stream_attention).parameters
    assert parameters["memory_budget"].default is None
    assert parameters["schedule"].default == "auto"
    assert parameters["return_lse"].default is False
    assert "options" not in parameters
    assert "sinks" not in inspect.signature(plan).parameters

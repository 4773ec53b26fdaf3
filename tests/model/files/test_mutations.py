"""Hundreds of damaged models: each is refused in a sentence, or it works."""

import json
import os
import subprocess
import sys
from collections import Counter

import mutations
import pytest
from mutations import FILES, SECONDS, make_models

from sdcomp.files import ROOT


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[list]:
    """The end of each damaged model, in a process with little more memory than good models take."""
    folder = tmp_path_factory.mktemp("mutations")
    make_models(folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, mutations.__file__, str(folder)],
        capture_output=True, text=True, env=environment, timeout=1800,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert done.returncode == 0, f"after {found[-1:]}: {done.stderr[-3000:]}"
    return found


@pytest.mark.parametrize("model", FILES)
def test_a_damaged_model_is_refused_in_a_sentence_or_works(results, model):
    mine = [result[1:] for result in results if result[0] == model]
    bad = [
        result
        for result in mine
        if result[2] not in ("refused", "not finite", "generated") or result[4] > SECONDS
    ]
    assert not bad
    for file, what, end, message, _ in mine:
        if end != "generated":
            assert message.isprintable() and 20 < len(message) < 700, (file, what, message)
        if end == "refused":
            names = [name.rpartition("/")[2] for name in FILES[model]]
            assert any(name in message for name in names), (file, what, message)


def test_there_are_many_damages_with_every_kind_of_end(results):
    assert len(results) >= 500
    ends = Counter(result[3] for result in results)
    # Some changed bits and settings do no harm.
    assert ends["refused"] > 300 and ends["generated"] > 30 and ends["not finite"] > 0
    # The message names the kind of thing in place of a file.
    for model, file, what, end, message, _ in results:
        if what in ("a pipe", "a socket", "a device"):
            assert end == "refused" and "a pipe, a socket or a device, not a file" in message, (model, file)

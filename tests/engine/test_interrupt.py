"""A step that is interrupted, say by the stop button of a notebook, leaves a usable engine."""

from pathlib import Path

import pytest

from course_lib import LLM, SamplingParams
from tests.checkpoints import random_model, save


def test_after_an_interrupt_the_same_prompt_gets_the_same_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save(random_model("llama"), tmp_path)
    llm = LLM(directory, block_size=4)
    prompt = {"prompt_token_ids": list(range(20))}
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)

    def interrupted(_batch: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.llm_engine.executor, "execute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompt, params, use_tqdm=False)
    assert llm.llm_engine.block_pool.usage == 0

    (output,) = llm.generate(prompt, params, use_tqdm=False)
    (expected,) = LLM(directory).generate(prompt, params, use_tqdm=False)
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids

"""Runs in the environment of `bfcl-eval`, started by `bench.quality.bfcl`, and knows nothing of the rest of this tree.

One argument, JSON: model, categories, limit, max_tokens, num_threads, native, and `scores`, the file to write.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bfcl_eval import _llm_response_generation as generation
from bfcl_eval.constants import eval_config
from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING, ModelConfig
from bfcl_eval.eval_checker import eval_runner
from bfcl_eval.model_handler.api_inference.openai_completion import OpenAICompletionsHandler
from bfcl_eval.utils import load_dataset_entry

NAME = "forebay"
REFUSED = "Error during inference"  # how the suite notes a question without an answer


class Handler(OpenAICompletionsHandler):  # type: ignore[misc]
    """The suite's own for OpenAI's interface; where that is follows from the environment."""

    max_tokens: int

    def generate_with_backoff(self, **request: Any) -> Any:
        """One question. The suite bounds no answer, and a small model may repeat itself until its context is full."""
        return super().generate_with_backoff(**request, max_tokens=self.max_tokens)


def main(wanted: dict[str, Any]) -> None:
    """Ask, judge, and write the scores."""
    Handler.max_tokens = wanted["max_tokens"]
    MODEL_CONFIG_MAPPING[NAME] = ModelConfig(
        model_name=wanted["model"],
        display_name=NAME,
        url="",
        org="",
        license="",
        model_handler=Handler,
        is_fc_model=wanted["native"],
        underscore_to_dot=wanted["native"],
    )
    limit = wanted["limit"] or None
    ids = {
        category: [entry["id"] for entry in load_dataset_entry(category)[:limit]] for category in wanted["categories"]
    }
    eval_config.TEST_IDS_TO_GENERATE_PATH.write_text(json.dumps(ids))
    generation.main(
        SimpleNamespace(
            model=[NAME],
            test_category=list(ids),
            temperature=0.0,
            include_input_log=False,
            exclude_state_log=False,
            num_threads=wanted["num_threads"],
            result_dir=eval_config.RESULT_PATH,
            allow_overwrite=True,
            run_ids=True,
        )
    )
    eval_runner.main([NAME], list(ids), None, None, True)
    Path(wanted["scores"]).write_text(json.dumps({category: _score(category) for category in ids}))


def _score(category: str) -> dict[str, Any]:
    """The first line of the file that the suite writes for a category. It takes a question that was refused for one
    that was answered wrong: those are counted apart, with what the first refusal said."""
    score = _lines(eval_config.SCORE_PATH, category, "score")[0]
    said = [str(entry["result"]) for entry in _lines(eval_config.RESULT_PATH, category, "result")]
    refused = [text for text in said if text.startswith(REFUSED)]
    counts = {"num_cases": score["total_count"], "num_right": score["correct_count"], "accuracy": score["accuracy"]}
    return {**counts, "num_refused": len(refused), "refusal": refused[0] if refused else ""}


def _lines(directory: Path, category: str, kind: str) -> list[dict[str, Any]]:
    file = next((directory / NAME).rglob(f"*_{category}_{kind}.json"))
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""Runs in the environment of `bfcl-eval`, started by `bench.quality.bfcl`, and knows nothing of the rest of this tree.

One argument, JSON: model, categories, limit, num_threads, native, and `scores`, the file to write.
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


class Handler(OpenAICompletionsHandler):  # type: ignore[misc]
    """The suite's own for OpenAI's interface; where that is follows from the environment."""

    def generate_with_backoff(self, **request: Any) -> Any:
        """One question. `store` is about an account with OpenAI."""
        request.pop("store", None)
        return super().generate_with_backoff(**request)


def main(wanted: dict[str, Any]) -> None:
    """Ask, judge, and write the scores."""
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
    """The first line of the file that the suite writes for a category."""
    file = next((eval_config.SCORE_PATH / NAME).rglob(f"*_{category}_score.json"))
    head = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    return {"num_cases": head["total_count"], "num_right": head["correct_count"], "accuracy": head["accuracy"]}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

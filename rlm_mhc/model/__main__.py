"""transformers' own command line, with the models of this library: `python -m rlm_mhc.model serve DIR` answers requests
as OpenAI's API does, at `http://localhost:8000/v1`.

The command line by itself looks for a checkpoint's class in the module `transformers` alone.
"""

from importlib import import_module
from typing import Any

import transformers
from transformers.cli.transformers import main

from rlm_mhc.model import RLMModel
from rlm_mhc.model.generation import LengthError


def answer_length_errors() -> None:
    """Let the server answer a request that is too long by status 400 and the reason, not by 500."""
    try:
        server: Any = import_module("transformers.cli.serving.server")
    except ImportError:  # before transformers 5.8, or without its extra `serving`
        return
    build = server.build_server

    def build_server(*args: Any, **options: Any) -> Any:
        from fastapi.responses import JSONResponse

        app = build(*args, **options)

        async def answer(request: Any, error: LengthError) -> JSONResponse:
            reason = {"message": str(error), "type": "invalid_request_error", "code": "context_length_exceeded"}
            return JSONResponse({"error": reason}, status_code=400)

        app.add_exception_handler(LengthError, answer)
        return app

    server.build_server = build_server


if __name__ == "__main__":
    transformers.RLMModel = RLMModel
    answer_length_errors()
    main()

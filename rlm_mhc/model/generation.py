"""Generation by transformers within the model's longest sequence."""

import inspect
from collections.abc import Sequence
from typing import Any


class LengthError(ValueError):
    """A prompt and the tokens that a request asks for are more than `max_seq_len`."""


class BoundedGeneration:
    """Compare prompt and new tokens with `max_seq_len` before the first token, in front of `GenerationMixin`.

    One rule for `generate` with any cache or none, for `generate_batch` and for the server.
    """

    config: Any
    generation_config: Any

    def _prepare_generated_length(
        self,
        generation_config: Any,
        has_default_max_length: bool,
        has_default_min_length: bool,
        model_input_name: str,
        input_ids_length: int,
        inputs_tensor: Any,
    ) -> Any:
        prepared = super()._prepare_generated_length(  # type: ignore[misc]
            generation_config,
            has_default_max_length,
            has_default_min_length,
            model_input_name,
            input_ids_length,
            inputs_tensor,
        )
        # `max_length` counts tokens, and those of a prompt that is given as embeddings only where ids are given too.
        embedded = inputs_tensor.shape[1] if model_input_name == "inputs_embeds" else input_ids_length
        total = prepared.max_length + embedded - input_ids_length
        self._require_room(total, "max_length" if prepared.max_new_tokens is None else "max_new_tokens")
        return prepared

    def init_continuous_batching(self, *args: Any, **options: Any) -> Any:
        """As in transformers; the manager's `add_request` raises `LengthError`.

        A request without `max_new_tokens` may fill the model's window.
        """
        manager = super().init_continuous_batching(*args, **options)  # type: ignore[misc]
        add, signature = manager.add_request, inspect.signature(manager.add_request)

        def add_request(*args: Any, **options: Any) -> Any:
            given = signature.bind(*args, **options)
            length, limit = len(given.arguments["input_ids"]), self.config.max_position_embeddings
            count = given.arguments.get("max_new_tokens") or manager.generation_config.max_new_tokens
            self._require_room(length + (count or 1), "max_new_tokens")
            given.arguments["max_new_tokens"] = count or limit - length
            return add(*given.args, **given.kwargs)

        manager.add_request = add_request
        return manager

    def generate_batch(
        self, inputs: Sequence[Sequence[int]], generation_config: Any = None, *args: Any, **options: Any
    ) -> Any:
        """As in transformers; without `max_new_tokens` a request may fill the model's window.

        Raises:
            LengthError: where a prompt and the new tokens are more than `max_seq_len`.
        """
        settings = self.generation_config if generation_config is None else generation_config
        count = options.get("max_new_tokens") or settings.max_new_tokens or 1
        self._require_room(max(map(len, inputs), default=0) + count, "max_new_tokens")
        return super().generate_batch(inputs, generation_config, *args, **options)  # type: ignore[misc]

    def _require_room(self, total: int, option: str) -> None:
        limit = self.config.max_position_embeddings
        if total > limit:
            raise LengthError(
                f"prompt and new tokens are up to {total}, more than max_seq_len={limit} of the model; "
                f"shorten the prompt or lower {option} (max_tokens in a request to the server)"
            )

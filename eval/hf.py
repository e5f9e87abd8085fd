"""Baseline: transformers' `generate` with the weights loaded here.

Greedy decoding of the frozen base in PyTorch, which eval.speed times in turn with our own loops.
Knows nothing of clocks or tables. Needs torch; the rest of the project does not.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from orthrus_jax.checkpoint import config_to_hf, tensor_specs
from orthrus_jax.config import ModelConfig
from orthrus_jax.errors import UserError
from orthrus_jax.model import Params


def check_torch() -> None:
    """Raise UserError if torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("--modes hf needs torch: pip install torch, or leave hf out")


class HF:
    """transformers' model of the family, with the frozen weights of `params` in their dtype.

    It runs on a GPU if jax does and torch finds one, else on the CPU.

    Raises:
      UserError: without torch.
    """

    def __init__(self, config: ModelConfig, params: Params) -> None:
        check_torch()
        import torch
        import transformers

        self.torch = torch
        on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.config = config
        leaves = traverse_util.flatten_dict(params)
        state = {
            name: self._tensor(leaves[spec.path])
            for name, spec in tensor_specs(config, diffusion=False).items()
        }
        # Loaded as transformers loads files, but from these tensors.
        raw = config_to_hf(config, orthrus=False)
        theirs: Any = getattr(transformers, raw["architectures"][0]).from_pretrained(
            None,
            config=transformers.AutoConfig.for_model(**raw),
            state_dict=state,
            dtype=getattr(torch, config.dtype),
        )
        self.model = theirs.to(self.device).eval()
        self.model.generation_config.eos_token_id = list(config.eos_token_ids) or None
        self.model.generation_config.pad_token_id = self._pad

    @property
    def _pad(self) -> int:
        return (*self.config.eos_token_ids, 0)[0]

    @property
    def hardware(self) -> str:
        """Versions and device, for the report."""
        import transformers

        threads = f", {self.torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return (
            f"transformers {transformers.__version__}, torch {self.torch.__version__}, "
            f"{self.device.type}{threads}"
        )

    def _tensor(self, leaf: jax.Array) -> Any:
        host = np.ascontiguousarray(np.asarray(leaf))
        if host.dtype == jnp.bfloat16:  # a dtype that torch does not take from numpy
            bits = self.torch.tensor(host.view(np.int16))
            return bits.view(self.torch.bfloat16).to(self.device)
        return self.torch.tensor(host).to(self.device)

    def complete(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int = 1
    ) -> list[list[int]]:
        """Answer each prompt greedily, in whole batches padded on the left.

        Returns:
          The ids of each answer, its end token included where one ended it.
        """
        torch, answers = self.torch, []
        for first in range(0, len(prompts), batch_size):
            some = prompts[first : first + batch_size]
            width = max(map(len, some))
            ids = torch.full((len(some), width), self._pad)
            mask = torch.zeros_like(ids)
            for i, prompt in enumerate(some):
                ids[i, width - len(prompt) :] = torch.tensor(list(prompt))
                mask[i, width - len(prompt) :] = 1
            rows = self.model.generate(
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
            answers += [self._cut(row) for row in rows[:, width:].tolist()]
        return answers

    def _cut(self, row: list[int]) -> list[int]:
        ends = self.config.eos_token_ids
        return row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]

    def steps(self, batch: int, context: int, count: int) -> Any:
        """Prepare one-row forwards after `context` tokens.

        Returns:
          A function that takes `count` greedy steps and waits for the device; its context
          is read before the function is returned.
        """
        torch = self.torch
        with torch.inference_mode():
            ids = torch.ones((batch, context), dtype=torch.long, device=self.device)
            cache = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values

        def run() -> None:
            last = torch.ones((batch, 1), dtype=torch.long, device=self.device)
            with torch.inference_mode():
                for _ in range(count):
                    logits = self.model(last, past_key_values=cache, use_cache=True).logits
                    last = logits[:, -1:].argmax(-1)
            self.wait()

        self.wait()
        return run

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

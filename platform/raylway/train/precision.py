"""Number formats of the forward and backward pass: one object for all three, so the loop has no branch on them."""

from __future__ import annotations

from typing import Literal

import torch

from raylway.errors import UserError

_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast and gradient scaling (Micikevicius et al. 2018); for fp32 and bf16 the scaler does nothing.

    Args:
        kind: What the plan says.
        device: Where the model is.
        automatic: The job left the choice to us, so a GPU without bfloat16 gets fp32.

    Raises:
        UserError: The job asks for bf16 and the GPU doesn't have it.
    """

    def __init__(self, kind: Literal["fp32", "bf16", "fp16"], device: torch.device, automatic: bool = False) -> None:
        if kind == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            if not automatic:
                raise UserError(
                    "this GPU has no bfloat16",
                    where="train.precision",
                    expected="fp16 or fp32",
                    found=f"bf16 on {torch.cuda.get_device_name(device)}",
                )
            kind = "fp32"
        self.kind = kind
        self.may_skip = kind == "fp16"
        """Overflows are expected now and then: the step is skipped and the scale halved."""
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.may_skip)
        self._device = device.type

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._device, dtype=_AUTOCAST[self.kind], enabled=self.kind != "fp32")

"""The arithmetic training uses: bfloat16 where the processor computes in it, else float32."""

import torch


def fast_dtype() -> torch.dtype:
    """bfloat16 on processors with products for it; elsewhere emulation would make it slower."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def fast_products() -> torch.autocast:
    """Autocast to `fast_dtype`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() is torch.bfloat16)

"""FlashAttention-4 on Hopper and Blackwell, through the FLASH backend of FlexAttention.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, N slots.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.box import Box
from vidattn.kernels.constant import constant_result
from vidattn.kernels.engines import block_sparse_triton, flex
from vidattn.kernels.timing import interleaved_ms

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
# blocks that its kernels have tiles for, by major compute capability
BLOCKS = {9: (64, 128), 10: (128, 256)}
# what is timed to learn whether it is worth choosing
TIMED_BLOCKS, TIMED_HEADS, TIMED_SHARE = 64, 16, 0.25
# neither biases nor other keys: nobody has run these kernels with them
TAKES = ("scale", "key_mask", "need_lse")
log = logging.getLogger("vidattn")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The result of ``flex.attention``, by kernels of FlashAttention-4.

    Args:
        q: (B, H, S, D), D 64 or 128.
        k, v: (B, K, S, D), H a multiple of K.
        lists: which key blocks each query block reads; a block has 64 or 128 slots on Hopper, 128
            or 256 on Blackwell.
        scale: factor of the scores.
        key_mask: (B, S) bool, False for keys that nobody may read.
        need_lse: whether to return the log-sum-exp.

    Returns:
        (B, H, S, D) in the dtype of ``q``; (B, H, S) float32 log-sum-exp, or None.
    """
    return flex.attention(
        q,
        k,
        v,
        lists,
        scale=scale,
        key_mask=key_mask,
        need_lse=need_lse,
        kernel_options={"BACKEND": "FLASH"},
    )


def obstacle(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, **options: object) -> str | None:
    """What keeps these kernels from a call of ``attention``, and what to do; None if nothing."""
    if q.dtype not in DTYPES:
        wrong = f"takes float16 and bfloat16, got {q.dtype}"
    elif q.shape[-1] not in HEAD_DIMS:
        wrong = f"takes head dims 64 and 128, got {q.shape[-1]}"
    else:
        wrong = missing(q.device) or _unfit_block(q.device, lists.block)
    if wrong is None:
        return None
    return f'FlashAttention-4 {wrong}: use backend="triton" or backend="torch"'


@lru_cache
@constant_result
def missing(device: torch.device | str) -> str | None:
    """What these kernels lack on a device; None where nothing is."""
    is_nvidia = torch.cuda.is_available() and torch.version.hip is None
    if torch.device(device).type != "cuda" or not is_nvidia:
        return f"needs an NVIDIA GPU, the tensors are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in BLOCKS:
        return f"needs compute capability 9 or 10, this GPU has {major}.{minor}"
    if not _is_installed():
        return "needs the package flash-attn-4, which is not installed"
    return None


@lru_cache
def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


@constant_result
def _unfit_block(device: torch.device, block: int) -> str | None:
    blocks = BLOCKS[torch.cuda.get_device_capability(device)[0]]
    if block in blocks:
        return None
    return f"takes blocks of {blocks[0]} and {blocks[1]} on this GPU, got {block}"


def is_faster(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    key_mask: Tensor | None = None,
    **options: object,
) -> bool:
    """Whether a call without obstacle has measured faster than Triton, with the same bits always.

    The first call for a device, dtype, head dim, block and kind of plan measures, which takes the
    seconds of a compilation; later ones remember.
    """
    pulled = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    simple = key_mask is None and lists.masks is None
    if pulled or not simple or torch.compiler.is_compiling():
        return False
    return _measures_faster(q.device, q.dtype, q.shape[-1], lists.block, lists.box is not None)


@lru_cache
def _measures_faster(
    device: torch.device, dtype: torch.dtype, head_dim: int, block: int, has_box: bool
) -> bool:
    """Times both engines on random inputs and block lists, once in a process."""
    shape = (1, TIMED_HEADS, TIMED_BLOCKS * block, head_dim)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    given = (q, k, v, _random_lists(block, has_box).to(device))
    scale = head_dim**-0.5
    calls = {
        "flash": lambda: attention(*given, scale=scale, need_lse=False),
        "triton": lambda: block_sparse_triton.attention(*given, scale=scale),
    }
    what = f"FlashAttention-4 in {dtype}, head dim {head_dim}, blocks of {block}"
    try:
        outputs = [call()[0] for call in calls.values()]
        torch.testing.assert_close(*outputs, rtol=0.02, atol=0.02)
    # a compiler, a kernel or a result that fails is not chosen, whatever the failure is
    except Exception as error:
        log.warning("%s, is left out: %s", what, str(error).partition("\n")[0])
        return False
    times = interleaved_ms(calls, device=device)
    log.info("%s, takes %.2f times as long as Triton", what, times["flash"] / times["triton"])
    return times["flash"] < times["triton"]


def _random_lists(block: int, has_box: bool) -> BlockLists:
    """A quarter of all blocks; where there is a box, half of them are partial."""
    listed = torch.rand(TIMED_BLOCKS, TIMED_BLOCKS) < TIMED_SHARE
    counts = listed.sum(-1)
    box, num_full, num_slots = None, counts, TIMED_BLOCKS * block
    place = torch.arange(num_slots)
    if has_box:
        reach = num_slots // 2
        first, last = (place - reach).clamp_min(0), (place + reach).clamp_max(num_slots - 1)
        box, num_full = Box.pack([(num_slots, place, first, last)]), counts // 2
    row_start = F.pad(counts.cumsum(0), (1, 0))
    return BlockLists(
        order=place.int(),
        block=block,
        batch=1,
        heads=1,
        row_start=row_start,
        num_full=num_full.int(),
        key_block=listed.nonzero()[:, 1].int(),
        box=box,
    )

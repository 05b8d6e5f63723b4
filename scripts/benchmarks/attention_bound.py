"""The least time that attention can take on this processor."""

from concurrent.futures import ThreadPoolExecutor

import torch

from vidattn.kernels.engines.block_sparse_cpu import exp_rate, peak_flops


def measured_rates(dtype: torch.dtype) -> tuple[float, float]:
    """Products and sums, and exponentials, in a second of all threads of the cpp engine."""
    count = torch.get_num_threads()
    with ThreadPoolExecutor(count) as pool:
        peaks = list(pool.map(peak_flops, [dtype] * count))
        exps = list(pool.map(exp_rate, [dtype] * count))
    return sum(peaks), sum(exps)


def shares_of_bound(row: dict, heads: int, peak: float, exps: float) -> dict[str, float | None]:
    """The least time for the pairs of a row over the time taken, forward, and with backward."""
    pairs = heads * row["density"] * row["tokens"] ** 2

    def share(products: int, powers: int, taken_ms: float | None) -> float | None:
        least_s = pairs * (products * row["head_dim"] / peak + powers / exps)
        return 1e3 * least_s / taken_ms if taken_ms else None

    return {
        "cpp_share_of_bound": share(4, 1, row["cpp_ms"]),
        "train_cpp_share_of_bound": share(14, 2, row["train_cpp_ms"]),
    }
